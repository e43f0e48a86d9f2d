"""torch.ops.arl_fast.*: registered correctly (opcheck), and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch

from arl_fast import arl_loss, modulate
from arl_fast._core.options import Options
from arl_fast.implementations import dispatch

native, REASON = dispatch.load("native", "cpu")
pytestmark = pytest.mark.skipif(native is None, reason=REASON)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def forward_arguments(dtype, reduction="mean", grad=True, schedule=False, soft=False):
    logits = [torch.randn(7, 5, dtype=dtype) for _ in range(3)]
    target = torch.rand(7, 5, dtype=dtype) if soft else torch.randint(0, 5, (7,))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = native._numbers(Options("share", "confidence", None, "residual", -100, 0.0, reduction))
    schedule_tensor = torch.tensor([2.0, 8.0, 0.0], dtype=compute) if schedule else None
    mask = torch.rand(7, 2) > 0.2
    weight = torch.rand(5, dtype=compute)
    norm = torch.full((3,), 9.0, dtype=compute) if grad else None
    return (logits, target, mask, weight, norm, schedule_tensor, 1.0, 8.0, False, *numbers, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant",
    [{}, {"reduction": "none"}, {"grad": False}, {"schedule": True}, {"soft": True}],
    ids=lambda v: str(v) or "default",
)
def test_opcheck_forward(dtype, variant):
    torch.library.opcheck(
        torch.ops.arl_fast.forward.default, forward_arguments(dtype, **variant), test_utils=CHECKS
    )


@pytest.mark.parametrize(
    "upstream", [torch.tensor(1.0), torch.tensor(0.5), torch.rand(7)], ids=["one", "half", "rows"]
)
@pytest.mark.parametrize("factor", [None, torch.tensor([1.0, 2.0, 0.5])], ids=["plain", "factor"])
def test_opcheck_scale(upstream, factor):
    grads = [torch.randn(7, 5) for _ in range(3)]
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(
            torch.ops.arl_fast.scale.default, (grads, upstream, factor, dtype), test_utils=CHECKS
        )


def test_opcheck_modulate_backward():
    grads = [torch.randn(7, 5), torch.randn(7, 3, 2, dtype=torch.bfloat16)]
    torch.library.opcheck(
        torch.ops.arl_fast.modulate_backward.default, (grads, torch.rand(3), [0, 2]), test_utils=CHECKS
    )


def test_ops_never_alias_their_inputs():
    grads = [torch.randn(7, 5)]
    (scaled,) = torch.ops.arl_fast.scale(grads, torch.tensor(1.0), None, torch.float32)
    assert torch.equal(scaled, grads[0])
    assert scaled.data_ptr() != grads[0].data_ptr()


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
