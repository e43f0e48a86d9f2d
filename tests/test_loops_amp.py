"""Autocast in float16 with a loss scaler, and in bfloat16; fused and unimodal logits of either type;
statistics in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import arl_fast
from arl_fast import ARLLoss

DTYPES = [torch.float16, torch.bfloat16]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)) for name in ("a", "v")}
        )
        self.head = arl_fast.ConcatHead({"a": 6, "v": 6}, 5)

    def forward(self, x):
        return self.head({name: encoder(x[name]) for name, encoder in self.encoders.items()})


def batch(rows=16):
    return {name: torch.randn(rows, 8) for name in ("a", "v")}, torch.randint(0, 5, (rows,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_loss_and_statistics(implementation, dtype):
    """The head's logits are of the autocast type, loss and statistics float32; gradients close to those of
    float32.
    """
    model, criterion = Model(), ARLLoss()
    x, target = batch()
    with torch.autocast("cpu", dtype):
        out = model(x)
        loss = criterion(out, target)
    assert out.fused.dtype == dtype
    assert out.link.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert all(s.dtype == torch.float32 for s in criterion.stats)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    gains = criterion.stats.gains
    model.zero_grad()
    full = ARLLoss()
    full(model(x), target).backward()
    torch.testing.assert_close(gains, full.stats.gains, rtol=2e-2, atol=2e-2)
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**16])
def test_loss_scale_does_not_touch_the_gains(implementation, scale):
    """The same statistics, and the same gradients after unscaling, whatever GradScaler multiplies the loss
    with.
    """
    model, criterion = Model(), ARLLoss()
    x, target = batch()
    results = []
    for s in (None, scale):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=s or 1.0, enabled=s is not None)
        model.zero_grad()
        loss = criterion(model(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append((criterion.stats.gains, [p.grad.clone() for p in model.parameters()]))
    (gains, grads), (scaled_gains, scaled_grads) = results
    assert torch.equal(gains, scaled_gains)
    for a, b in zip(grads, scaled_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_scale_saves_small_float16_gradients(implementation):
    """Gradients below float16's range: lost without a scale, as ever, and exact with one, since it is applied
    before rounding.
    """
    # rows of 4096: a mean gradient of about 1e-4 / 4096 is far below 6e-8, float16's smallest number
    logits = [torch.randn(4096, 5).half().requires_grad_() for _ in range(3)]
    target = torch.randint(0, 5, (4096,))
    double = [x.detach().double().requires_grad_() for x in logits]
    options = {"weight": torch.full((5,), 1e-3), "reduction": "sum"}
    loss, _ = arl_fast.arl_loss(logits[0], logits[1:], target, torch.zeros(2), **options)
    scale = 1e-3 / 4096
    truth, _ = arl_fast.reference.arl_loss(
        double[0], double[1:], target, torch.zeros(2, dtype=torch.float64), **options
    )
    expected = torch.autograd.grad(truth * scale, double)
    lost = torch.autograd.grad(loss * scale, logits, retain_graph=True)
    assert all(g.abs().sum() == 0 for g in lost)
    for a, b in zip(torch.autograd.grad(loss * scale * 2.0**16, logits), expected, strict=True):
        torch.testing.assert_close(a.double() / 2.0**16, b, rtol=2e-3, atol=1e-12)


def test_an_overflow_skips_the_step_and_training_goes_on():
    model, criterion = Model(), ARLLoss(warmup=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.detach().clone() for p in model.parameters()]
    moved = False
    for _ in range(60):
        x, target = batch()
        with torch.autocast("cpu", torch.float16):
            loss = criterion(model(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in model.parameters())
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if moved:
            break
    assert moved
    assert scaler.get_scale() < 2.0**60


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_under_autocast(implementation, dtype):
    torch._dynamo.reset()
    model, criterion = Model(), ARLLoss()
    x, target = batch()

    def step(x, target):
        with torch.autocast("cpu", dtype):
            return criterion(model(x), target)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = step(x, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-2, atol=1e-3)
