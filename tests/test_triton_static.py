"""Budgets of the Triton kernels, read from what they compile to for GPUs that are not here (benchmarks/static_report.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
static = pytest.importorskip("static_report")

CASES = [
    static.Case(6),
    static.Case(28, modalities=8, mask=True),
    static.Case(309, "bf16"),
    static.Case(1000),
    static.Case(1000, "bf16"),
    static.Case(1000, "fp16"),
    static.Case(1000, soft=True, mask=True, smoothing=0.1, dependence="logit_l1"),
    static.Case(1000, "bf16", grad=False),
    static.Case(8192, "bf16"),
    static.Case(32000),
    static.Case(32000, "bf16"),
    static.Case(32000, soft=True, mask=True, smoothing=0.1, dependence="logit_l1"),
    static.Case(32001, "bf16"),
    static.Case(5000, "fp64"),
]
ELSEWHERE = [static.Case(6), static.Case(1000, "bf16"), static.Case(8192), static.Case(32000, "bf16")]


def check(case, name):
    found = static.report(case, static.TARGETS[name])
    plan, size = case.plan, static.ITEMSIZE[case.dtype]
    assert found.spills == 0
    if name.startswith("sm"):
        assert found.registers <= plan.registers
    assert found.shared <= 8192
    held = plan.steps * plan.owners * plan.lanes // plan.threads  # logits of a thread and tile
    passes = 2 if plan.online and case.grad else 1  # a streamed row is read once more, for its gradient
    if case.classes * size % 16 == 0:
        targets = 4 * held * passes if case.soft else 0
        assert found.loads16 == passes * held * size + targets
        assert found.stores16 == (held * max(size, 4 if case.dtype == "fp16" else size) if case.grad else 0)
    if case.dtype != "fp64":
        # one exponential per logit and pass; a few for each row or change of maximum
        if name.startswith("sm") and held == 16:
            assert passes * held <= found.exponentials <= passes * held + 4
        if name.startswith("sm") and case.options == "loss" and case.classes * size % 16 == 0:
            assert found.instructions / held <= 32
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.classes}-{c.dtype}-{c.options}")
def test_budget(case):
    check(case, "sm_90")


@pytest.mark.parametrize("case", ELSEWHERE, ids=lambda c: f"{c.classes}-{c.dtype}")
@pytest.mark.parametrize("name", ["sm_80", "sm_100", "gfx942"])
def test_budget_elsewhere(name, case):
    check(case, name)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_backward(name):
    reports = static.backward_reports(static.TARGETS[name])
    assert all(found.spills == 0 for found in reports.values())
    for kernel in ("scale", "scale per row", "modulate"):
        held = 2 * static.triton_rule.FLAT_BLOCK // static.triton_rule.FLAT_THREADS
        assert reports[kernel].loads16 >= held
        assert reports[kernel].stores16 >= held


def test_prediction_is_at_least_the_floor():
    case = static.Case(1000, "bf16")
    found = static.Report(registers=64, spills=0, shared=0, loads16=32, stores16=32, exponentials=17, instructions=400)
    device = static.DEVICES["H200"]
    assert static.predict(case, found, device, 10**5) > 2 * 3e8 * 2 / device.dram


def test_another_batch_size_compiles_nothing(monkeypatch):
    """The host's own calls, stopped where Triton has bound the arguments: the key of its cache must not depend on B."""
    import torch
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from arl_fast.kernels import triton as implementation
    from arl_fast.options import Options

    backend = make_backend(static.TARGETS["sm_90"])
    keys = {}

    class Bound:
        def __init__(self, name):
            kernel = getattr(implementation, name)
            self.name, self.bind = name, create_function_from_signature(kernel.signature, kernel.params, backend)

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                _, specialization, options = self.bind(*arguments, **options)
                keys.setdefault(self.name, set()).add(str((specialization, options)))

            return launch

    for name in ("forward_kernel", "scale_kernel", "modulate_kernel"):
        monkeypatch.setattr(implementation, name, Bound(name))
    monkeypatch.setattr(implementation, "multiprocessors", lambda index: 132)
    options = Options("share", "confidence", None, "residual", -100, 0.0, "mean")
    for batch in (1, 2, 16, 63, 64, 4097):
        logits = [torch.randn(batch, 28) for _ in range(3)]
        for schedule in ((1.0, 8.0, True), (2, 16, False)):
            implementation._launch_forward(logits, torch.zeros(batch).long(), None, None, None, schedule, options, True)
        implementation.scale(logits, torch.ones(()), None, torch.float32, False)
        implementation.modulate_backward([torch.randn(batch, 100), torch.randn(batch, 51)], torch.zeros(2))
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)
    assert len(keys) == 3
