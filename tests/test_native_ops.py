"""torch.ops.arl_fast.native_*: registered correctly (opcheck), and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch

from arl_fast import arl_loss, modulate
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule
from arl_fast.implementations import dispatch, ops

native, REASON = dispatch.load("native", "cpu")
pytestmark = pytest.mark.skipif(native is None, reason=REASON)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def forward_arguments(dtype, reduction="mean", grad=True, schedule=False, soft=False, task="multiclass"):
    logits = [torch.randn(7, 5, dtype=dtype) for _ in range(3)]
    labels = task == "multilabel"
    target = torch.rand(7, 5, dtype=dtype) if soft or labels else torch.randint(0, 5, (7,))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    options = Options("share", "confidence", 0.25, "residual", -100, 0.0, reduction, task)
    chosen = Schedule((1.0, 2.0), 8.0, 3)
    if schedule:
        chosen = Schedule(torch.rand(2, dtype=compute), torch.tensor(8.0, dtype=compute), 3, torch.tensor(5))
    mask = torch.rand(7, 2) > 0.2
    weight = torch.rand(5, dtype=compute)
    divisor = torch.full((3,), 9.0, dtype=compute) if grad else None
    return (
        logits,
        target,
        mask,
        weight,
        divisor,
        torch.rand(5, dtype=compute) if labels else None,
        *ops.encode_schedule(chosen),
        *ops.encode_options(options),
        grad,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"reduction": "none"},
        {"grad": False},
        {"schedule": True},
        {"soft": True},
        {"task": "multilabel"},
        {"task": "multilabel", "reduction": "none"},
    ],
    ids=lambda v: str(v) or "default",
)
def test_opcheck_forward(dtype, variant):
    torch.library.opcheck(
        torch.ops.arl_fast.native_forward.default, forward_arguments(dtype, **variant), test_utils=CHECKS
    )


@pytest.mark.parametrize(
    "upstream",
    [torch.tensor(1.0), torch.tensor(0.5), torch.rand(7), torch.rand(7, 5)],
    ids=["one", "half", "rows", "pairs"],
)
@pytest.mark.parametrize("factor", [None, torch.tensor([1.0, 2.0, 0.5])], ids=["plain", "factor"])
def test_opcheck_scale(upstream, factor):
    grads = [torch.randn(7, 5) for _ in range(3)]
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(
            torch.ops.arl_fast.native_scale.default, (grads, upstream, factor, dtype), test_utils=CHECKS
        )


def test_opcheck_modulate_backward():
    grads = [torch.randn(7, 5).t(), torch.randn(7, 3, 2, dtype=torch.bfloat16)]
    torch.library.opcheck(
        torch.ops.arl_fast.native_modulate_backward.default, (grads, [0, 2], torch.rand(3)), test_utils=CHECKS
    )


def test_ops_never_alias_their_inputs():
    grads = [torch.randn(7, 5)]
    (scaled,) = torch.ops.arl_fast.native_scale(grads, torch.tensor(1.0), None, torch.float32)
    assert torch.equal(scaled, grads[0])
    assert scaled.data_ptr() != grads[0].data_ptr()


@pytest.mark.parametrize(
    "changes", [{}, {"entropy_floor": 0.25}, {"label_smoothing": 0.5, "entropy_floor": 0}], ids=str
)
def test_options_arrive_in_the_op(changes):
    options = Options(rule="paper", gain="mean_one", ignore_index=2)._replace(**changes)
    logits, targets = [torch.randn(7, 5) for _ in range(3)], Targets(torch.randint(0, 5, (7,)))
    got = ops.forward("native", logits, targets, Schedule(2.0, 8.0), options, False)
    want = native.forward(logits, targets, Schedule(2.0, 8.0), options, False)
    assert torch.equal(got[1], want[1])


def test_options_that_the_kernels_do_not_know():
    arguments = list(forward_arguments(torch.float32))
    arguments[-3] = arguments[-3].replace("residual", "resident")
    with pytest.raises(ValueError, match="gain: got 'resident' in"):
        torch.ops.arl_fast.native_forward(*arguments)


def test_compiled_step_equals_eager(monkeypatch):
    """One graph, through the link, for two batch sizes."""
    monkeypatch.setattr(dispatch, "override", "native")
    heads = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]

    def step(za, zv, target):
        (a, v), link = modulate([za, zv])
        loss, stats = arl_loss(a @ heads[0] + v @ heads[1], [a @ heads[0], v @ heads[1]], target, link)
        return loss, stats.gains

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (8, 12):
        results = []
        for function in (step, compiled):
            torch.manual_seed(batch)
            z = [torch.randn(batch, 4, requires_grad=True) for _ in range(2)]
            loss, gains = function(*z, torch.randint(0, 6, (batch,)))
            results.append([loss, gains, *torch.autograd.grad(loss, [*z, *heads])])
        torch.testing.assert_close(*results)
