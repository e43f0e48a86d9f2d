"""Budgets of the Triton kernels, read from what they compile to (benchmarks/static_report.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
static = pytest.importorskip("static_report")
from arl_fast._core.branches import Targets  # noqa: E402
from arl_fast._core.options import Options, Schedule  # noqa: E402

OPTIONS, SCHEDULE = Options(), Schedule(1.0, 8.0)
LABELS_OPTIONS = Options(task="multilabel")

MORE = [  # what a plan does not tell
    static.Case(28, modalities=8, mask=True),
    static.Case(1000, "bf16", grad=False),
    static.Case(1000, reduction="none"),
    static.Case(32000, "bf16", grad=False),
    static.Case(32000, mask=True, smoothing=0.1, modalities=5),
    static.Case(151936, "bf16"),
]


# Bytes that do not fit, by target and case. On sm_80 ptxas spills at 8194 classes, not at 50258 in the same
# plan; the bound that mends it, 72, makes other plans spill, and more registers would leave room for two
# programs instead of three.
KNOWN_SPILLS = {("sm_80", static.Case(8194, "fp16")): 84}
if triton.__version__.startswith("3.6."):
    KNOWN_SPILLS |= {("sm_80", static.Case(8193)): 60, ("sm_80", static.Case(8196)): 8}
if triton.__version__.startswith("3.8."):
    KNOWN_SPILLS |= {("sm_80", static.Case(8193, "fp16")): 348}
    more_sums = [
        static.Case(classes, dtype, **static.EVERYTHING)
        for classes in (66, 130)
        for dtype in ("fp32", "bf16", "fp16")
    ]
    KNOWN_SPILLS |= {("sm_100", case): 28 for case in more_sums}


def wrong(case, name, found):
    """The budgets that a compiled forward kernel exceeds."""
    plan, size = case.plan, static.ITEMSIZE[case.dtype]
    nvidia = name.startswith("sm")
    held = plan.steps * plan.owners * plan.lanes // plan.threads  # logits of a thread and tile
    passes = 2 if plan.online and case.grad else 1  # a streamed row is read once more, for its gradient
    grad_size = 4 if case.dtype == "fp16" else size
    checks = {
        "no spills": found.spills <= KNOWN_SPILLS.get((name, case), 0),
        "registers": not nvidia or found.registers <= plan.registers,
        # the gradients of float16 logits are twice as wide, and are passed on to those who store them 16
        # bytes at a time
        "shared memory": found.shared <= (32 * plan.threads if case.dtype == "fp16" else 8192),
    }
    if case.classes * size % 16 == 0:
        loads = passes * held * (size + (max(4, size) if case.soft else 0))
        stores = held * grad_size if case.grad else 0
        for what, count, all_of_it in (
            ("16-byte loads", found.loads16, loads),
            ("16-byte stores", found.stores16, stores),
        ):
            if nvidia:
                checks[what] = count == all_of_it
            elif plan.online:  # AMD's compiler unrolls loops,
                checks[what] = count >= all_of_it
            else:  # and leaves out the steps that no class falls into
                steps = -(-case.classes // plan.lanes)
                checks[what] = all_of_it * steps // plan.steps <= count <= all_of_it
    if case.dtype != "fp64" and nvidia:
        # one exponential per logit and pass; two more in a row's other sums, and one at each change of
        # maximum
        checks["exponentials"] = passes * held <= found.exponentials <= passes * held + 4
        if held == 16 and case.label == "loss" and case.classes * size % 16 == 0:
            checks["instructions"] = found.instructions / held <= 32
    return [what for what, fine in checks.items() if not fine]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(static.TARGETS))
def test_every_plan_keeps_its_budget(name):
    """Each plan that can be picked, for each dtype, with the plain loss and with all sums."""
    cases = static.every_plan() + MORE
    assert len({case.plan for case in cases}) > 100
    found = static.reports([(case, name) for case in cases])
    broken = [
        (case, what, report)
        for case, report in zip(cases, found, strict=True)
        if (what := wrong(case, name, report))
    ]
    assert not broken, "\n".join(map(str, broken))


LABELS = [static.LabelsCase(dtype) for dtype in static.ITEMSIZE]
MORE_LABELS = [
    static.LabelsCase("bf16", modalities=8, grad=False),
    *[static.LabelsCase(dtype, mask=True, weights=True) for dtype in static.ITEMSIZE],
    *[static.LabelsCase(dtype, 5, mask=True, weights=True, reduction="none") for dtype in static.ITEMSIZE],
]


def check_labels(case, name):
    """No spills, few registers, accesses of 16 bytes in all tiles but the last, one exponential per pair."""
    found, plan = static.labels_report(case, name), case.plan
    # the losses of pairs with everything else, on sm_100 and with Triton 3.6 on sm_90: a few addresses, once
    # for each branch
    known_spills = 64 if name in ("sm_90", "sm_100") and case.reduction == "none" else 0
    assert found.spills <= known_spills, (case, found)
    assert found.shared <= 256
    size, compute = static.ITEMSIZE[case.dtype], 8 if case.dtype == "fp64" else 4
    if name.startswith("sm"):
        assert found.registers <= plan.registers
        if plan.lanes * size == 16 and case.reduction == "mean":
            assert found.loads16 >= plan.lanes * (size + compute), (case, found)
        if case.grad:
            grad_size = 4 if case.dtype == "fp16" else size
            assert plan.lanes * grad_size < 16 or found.stores16 >= plan.lanes * grad_size
        if case.dtype != "fp64":  # of a pair: one exponential
            assert found.exponentials == plan.lanes, (case, found)
            limit = 60 if case in LABELS else 95
            assert found.instructions <= limit * plan.lanes, (case, found)


@pytest.mark.parametrize("case", LABELS, ids=str)
@pytest.mark.parametrize("name", list(static.TARGETS))
def test_labels(case, name):
    check_labels(case, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(static.TARGETS))
def test_more_labels(name):
    for case in MORE_LABELS:
        check_labels(case, name)


@pytest.mark.parametrize("name", list(static.TARGETS))
def test_backward(name):
    reports = static.backward_reports(name)
    assert all(found.spills == 0 for found in reports.values())
    for kernel in ("scale", "scale per row", "modulate"):
        held = 2 * static.launch_plan.FLAT_BLOCK // static.launch_plan.FLAT_THREADS
        assert reports[kernel].loads16 >= held
        assert reports[kernel].stores16 >= held


@pytest.mark.parametrize("name", list(static.TARGETS))
def test_programs_that_wait_look_again(name):
    """The loop in which programs wait for others loads anew each time, or it might never end."""
    case, target = static.Case(1000), static.TARGETS[name]
    registers = case.plan.registers
    kernel, _ = static.compile_kernel(
        static.forward_kernel, static.forward_arguments(case), target, case.plan.threads, registers
    )
    if target.backend == "cuda":
        loops = static.innermost_loops(kernel.asm["ptx"], ".acquire.")
        assert len(loops) == 1
        assert len(loops[0]) < 12
        assert "atom.global.gpu.release" in kernel.asm["ptx"].split(".acquire.")[0]
        return
    lines = [line.strip() for line in kernel.asm["amdgcn"].splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".LBB")}
    (load,) = [i for i, line in enumerate(lines) if re.match(r"global_load_dword .*offset:8 sc1", line)]
    assert any(line.startswith("buffer_inv sc1") for line in lines[load : load + 5])
    jumps = [
        (i, labels[line.split()[1]]) for i, line in enumerate(lines) if re.match(r"s_c?branch\w* \.LBB", line)
    ]
    assert any(back <= load < i < load + 20 for i, back in jumps)


def test_prediction_is_at_least_the_floor():
    case = static.Case(1000, "bf16")
    found = static.Report(
        registers=64, spills=0, shared=0, loads16=32, stores16=32, exponentials=17, instructions=400
    )
    device = static.DEVICES["H200"]
    assert static.predict(case, found, device, 10**5) > 2 * 3e8 * 2 / device.dram


class Bound:
    """Stands for a kernel: stopped where Triton has bound the arguments, it keeps what would be compiled for
    them.

    What the launcher takes for a compiled variant insists on arguments for which Triton would have compiled
    just that.
    """

    def __init__(self, kernel, target="sm_90"):
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(static.TARGETS[target])
        )
        self.compiled, self.reused = [], 0

    def __getitem__(self, grid):
        assert len(grid) == 3

        def launch(*arguments, **options):
            variant = Variant(self, self.bind(*arguments, **options)[1], options)
            self.compiled.append(str((variant.specialization, options)))
            return variant

        return launch


class Variant:
    def __init__(self, bound, specialization, options):
        self.bound, self.specialization, self.options = bound, specialization, options

    def __getitem__(self, grid):
        def launch(*arguments):
            assert self.bound.bind(*arguments, **self.options)[1] == self.specialization
            self.bound.reused += 1

        return launch


@pytest.fixture
def bound(monkeypatch):
    """The Triton implementation's launchers by name, with their kernels bound and not run."""
    from arl_fast.implementations.triton import host as implementation
    from arl_fast.implementations.triton.launch import Launcher

    found = {}
    for name in ("run_forward", "run_labels", "run_scale", "run_modulate"):
        found[name] = Bound(getattr(implementation, name).kernel)
        monkeypatch.setattr(implementation, name, Launcher(found[name]))
    monkeypatch.setattr(implementation, "multiprocessors", lambda index: 132)
    return found


def test_another_batch_size_compiles_nothing(bound):
    import torch

    from arl_fast.implementations.triton import host as implementation

    for batch in (1, 2, 16, 63, 64, 4097, 20000):
        logits = [torch.randn(batch, 28) for _ in range(3)]
        for schedule in (Schedule(1.0, 8.0, 1), Schedule(2, 16), Schedule(16.0, 1.0, 2**40)):
            for targets, options in (
                (Targets(torch.zeros(batch).long()), OPTIONS),
                (Targets(torch.zeros(batch, 28)), LABELS_OPTIONS),
            ):
                implementation._launch_forward(logits, targets, schedule, options, True)
        implementation.scale(logits, torch.ones(()), None, torch.float32, False)
        implementation.modulate_backward([torch.randn(batch, 100), torch.randn(batch, 51)], torch.zeros(2))
    assert {name: len(kernel.compiled) for name, kernel in bound.items()} == dict.fromkeys(bound, 1)
    assert {name: kernel.reused for name, kernel in bound.items()} == dict(
        run_forward=20, run_labels=20, run_scale=6, run_modulate=6
    )


def test_another_number_of_labels_compiles_nothing(bound):
    """Unless rows or labels are told apart, by a mask, weights or a stride."""
    import torch

    from arl_fast.implementations.triton import host as implementation

    for labels in (1, 14, 80):
        logits = [torch.randn(6, labels) for _ in range(3)]
        for targets in (Targets(torch.zeros(6, labels)), Targets(torch.zeros(6, labels).double())):
            implementation._launch_forward(logits, targets, SCHEDULE, LABELS_OPTIONS, True)
    assert len(bound["run_labels"].compiled) == 2


def shifted(x):
    """Equal, but begins eight bytes off a multiple of sixteen."""
    off = 8 // x.element_size()
    buffer = x.new_zeros(x.numel() + off)
    buffer[off:] = x.flatten()
    return buffer[off:].view(x.shape)


def test_the_launcher_never_takes_a_variant_for_other_arguments(bound):
    """Calls that differ in one thing each, twice: the second time a variant that fits is found (Variant)."""
    import torch

    from arl_fast.implementations.triton import host as implementation

    def forward(dtype=torch.float32, classes=28, change=lambda x: x, schedule=SCHEDULE, grad=True, **given):
        logits = [change(torch.zeros(6, classes, dtype=dtype)) for _ in range(3)]
        tensors = [
            given.pop(name, default)
            for name, default in (("target", torch.zeros(6).long()), ("mask", None), ("weight", None))
        ]
        targets = Targets(*tensors, given.pop("divisor", None), given.pop("pos_weight", None))
        implementation._launch_forward(logits, targets, schedule, OPTIONS._replace(**given), grad)

    def scale(dtype=torch.float32, wanted=None, upstream=None, factor=None, keep=True, change=lambda x: x):
        grads = [change(torch.zeros(6, 28, dtype=dtype)) for _ in range(3)]
        implementation.scale(
            grads, torch.ones(()) if upstream is None else upstream, factor, wanted or dtype, keep
        )

    def modulate(*grads, link=None):
        implementation.modulate_backward(grads, torch.zeros(len(grads)) if link is None else link)

    mask, weight, soft, z = (
        torch.ones(6, 2, dtype=torch.bool),
        torch.ones(28),
        torch.ones(6, 28),
        torch.zeros(6, 4),
    )
    one, step = torch.ones(()), torch.tensor(3)
    calls = [
        *[lambda t=t: forward(t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
        *[lambda c=c: forward(classes=c) for c in (27, 1000, 9000)],
        lambda: forward(change=shifted),
        lambda: forward(change=lambda x: torch.cat([x, x], 1)[:, :28]),
        lambda: forward(target=torch.zeros(6).int()),
        lambda: forward(target=shifted(torch.zeros(6).long())),
        lambda: forward(target=soft),
        lambda: forward(target=shifted(soft)),
        lambda: forward(mask=mask),
        lambda: forward(mask=shifted(mask)),
        lambda: forward(weight=weight),
        lambda: forward(weight=shifted(weight)),
        lambda: forward(divisor=torch.ones(3)),
        lambda: forward(divisor=shifted(torch.ones(3))),
        lambda: forward(schedule=Schedule(2, 4, 1)),
        lambda: forward(schedule=Schedule((1.0, 2.0), 8.0)),
        lambda: forward(torch.float64, schedule=Schedule((1.0, 2.0), 8.0)),
        *[
            lambda g=g: forward(schedule=Schedule(g, 8.0))
            for g in (one, shifted(one), torch.ones(2), torch.ones(4)[::2], torch.ones(1).expand(2))
        ],
        *[lambda t=t: forward(schedule=Schedule(1.0, t)) for t in (one, shifted(one))],
        *[lambda s=s: forward(schedule=Schedule(1.0, 8.0, 7, s)) for s in (step, shifted(step), step.int())],
        lambda: forward(schedule=Schedule(one, one, 7, step)),
        lambda: forward(torch.float64, schedule=Schedule(one.double(), one.double(), 7, step)),
        lambda: forward(grad=False),
        *[lambda r=r: forward(reduction=r) for r in ("sum", "none")],
        *[lambda r=r: forward(rule=r) for r in ("paper", "constant", "none", lambda stats: stats.entropy)],
        lambda: forward(rule="ogm", gain="plain"),
        *[lambda g=g: forward(gain=g) for g in ("mean_one", "plain")],
        lambda: forward(label_smoothing=0.1),
        lambda: forward(ignore_index=255),
        lambda: forward(dependence="logit_l1"),
        *[
            lambda t=t, g=g: forward(target=t, task="multilabel", **g)
            for t in (soft, shifted(soft), soft.double())
            for g in ({}, dict(mask=mask), dict(pos_weight=weight), dict(pos_weight=shifted(weight)))
        ],
        lambda: forward(target=soft, task="multilabel", reduction="none"),
        lambda: forward(target=soft, task="multilabel", grad=False, weight=weight),
        lambda: forward(change=lambda x: torch.cat([x, x], 1)[:, :28], target=soft, task="multilabel"),
        lambda: forward(change=shifted, target=soft, task="multilabel"),
        *[lambda f=f: forward(entropy_floor=f) for f in (0.0, 0.25)],
        *[lambda t=t: scale(t, upstream=torch.ones((), dtype=t)) for t in (torch.float64, torch.bfloat16)],
        lambda: scale(),
        lambda: scale(keep=False),
        lambda: scale(wanted=torch.float16),
        lambda: scale(upstream=torch.ones(6)),
        lambda: scale(upstream=shifted(torch.ones(6))),
        lambda: scale(factor=torch.ones(3)),
        lambda: scale(factor=shifted(torch.ones(3))),
        lambda: scale(change=shifted),
        lambda: modulate(z, z),
        lambda: modulate(z, None, z),
        lambda: modulate(z, z, z),
        lambda: modulate(shifted(z), z),
        lambda: modulate(z.bfloat16(), z),
        lambda: modulate(z.double(), z, link=torch.zeros(2).double()),
        lambda: modulate(z, z, link=shifted(torch.zeros(2))),
    ]
    for call in calls:
        call()
    compiled = {name: len(kernel.compiled) for name, kernel in bound.items()}
    # nothing twice
    assert all(len(set(kernel.compiled)) == len(kernel.compiled) for kernel in bound.values())
    for call in calls:
        call()
    assert compiled == {name: len(kernel.compiled) for name, kernel in bound.items()}


def test_another_class_count_compiles_no_other_scale_kernel(bound):
    import torch

    from arl_fast.implementations.triton import host as implementation

    for classes in (6, 28, 101):
        grads = [torch.zeros(5, classes) for _ in range(3)]
        implementation.scale(grads, torch.ones(()), None, torch.float32, False)
    assert len(bound["run_scale"].compiled) == 1
    for classes in (6, 28):  # of rows with upstream gradients of their own the class count is a divisor
        grads = [torch.zeros(5, classes) for _ in range(3)]
        implementation.scale(grads, torch.ones(5), None, torch.float32, False)
    assert len(bound["run_scale"].compiled) == 3


def test_schedule_tensors_are_passed_on_as_they_are(bound, monkeypatch):
    """A step whose gamma, T and warm-up are tensors runs nothing but the kernel: no copy, no stack."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from arl_fast.implementations.triton import host as implementation

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function)
            return function(*arguments, **(keywords or {}))

    workspace = implementation.new_workspace(torch.device("cpu"), torch.float32, 10_000)
    monkeypatch.setattr(implementation.workspaces, "take", lambda *arguments: workspace)
    logits, targets = [torch.zeros(6, 28) for _ in range(3)], Targets(torch.zeros(6).long())
    for gamma in (torch.rand(()), torch.rand(2), (0.5, 2.0)):
        schedule = Schedule(gamma, torch.ones(()), 5, torch.tensor(3))
        with Recorder():
            implementation._launch_forward(logits, targets, schedule, OPTIONS, True)
    assert set(seen) == {torch.ops.aten.empty.memory_format}


def test_on_rocm_a_large_tensor_gets_a_variant_of_its_own(monkeypatch):
    """AMD's compiler uses 32-bit offsets where the memory of a tensor is smaller than 2 GB."""
    import torch

    from arl_fast.implementations.triton import host as implementation
    from arl_fast.implementations.triton import launch

    found = {}
    for name in ("run_forward", "run_scale", "run_modulate"):
        found[name] = Bound(getattr(implementation, name).kernel, "gfx942")
        monkeypatch.setattr(implementation, name, launch.Launcher(found[name]))
    monkeypatch.setattr(implementation, "multiprocessors", lambda index: 304)
    monkeypatch.setattr(launch, "ROCM", True)
    memory = torch.empty(2**31, dtype=torch.uint8).view(torch.float32)  # never touched

    def run(x, weight):
        logits = [x] * 3
        targets = Targets(torch.zeros(6).long(), weight=weight)
        implementation._launch_forward(logits, targets, Schedule(1.0, 8.0), OPTIONS, True)
        implementation.scale(logits, torch.ones(()), None, torch.float32, False)
        implementation.modulate_backward(logits[:2], torch.zeros(2))

    small, large = torch.zeros(6 * 28), memory[: 6 * 28]
    for x in (small, large) * 2:
        for weight in (small, large):
            run(x.view(6, 28), weight[:28])
    assert {name: len(kernel.compiled) for name, kernel in found.items()} == dict(
        run_forward=4, run_scale=2, run_modulate=2
    )


def test_host_benchmark_runs():
    """In a process of its own: it puts a driver that does nothing in the place of Triton's."""
    command = [
        sys.executable,
        "-c",
        "from benchmarks import triton_host; triton_host.main(rounds=2, loops=2)",
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    for kernel in ("forward", "scale", "modulate"):
        assert f"{kernel}: launch, Triton's look-up" in run.stdout
        assert f"{kernel}: all of it" in run.stdout
