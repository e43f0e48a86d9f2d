"""Adaptive optimizers cancel a constant scale of the gradient; arl_fast.optim scales the update instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import arl_fast
from arl_fast import ARLLoss, BranchLogits
from arl_fast.optim import UpdateGains, detach_link

CLASSES = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)) for name in ("a", "v")}
        )
        self.head = arl_fast.ConcatHead({"a": 5, "v": 5}, CLASSES)

    def forward(self, x):
        return self.head({name: encoder(x[name]) for name, encoder in self.encoders.items()})

    def groups(self):
        return [{"params": list(part.parameters())} for part in (*self.encoders.values(), self.head)]


def batch():
    return {name: torch.randn(16, 8) for name in ("a", "v")}, torch.randint(0, CLASSES, (16,))


def train(make, rule, steps=40, scale_updates=False, prepare=lambda optimizer: None, **options):
    """Parameters of the first encoder after every step."""
    torch.manual_seed(0)
    model = Model().double()
    optimizer = make(model.groups())
    scheduler = prepare(optimizer)
    criterion = ARLLoss(rule=rule, **options)
    if scale_updates:
        UpdateGains(optimizer, {"a": 0, "v": 1}, criterion)
    trajectory = []
    for _ in range(steps):
        x, target = batch()
        out = model({name: z.double() for name, z in x.items()})
        optimizer.zero_grad()
        criterion(detach_link(out) if scale_updates else out, target).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in model.encoders["a"].parameters()]))
    return torch.stack(trajectory)


ADAPTIVE = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, eps=1e-12),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-12),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, eps=1e-12),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, eps=1e-12),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_optimizers_cancel_a_constant_scale(name):
    """The constant rule's gain is 1.5 in every step: no trace of it in the trajectory, in 40 steps."""
    plain, scaled = train(ADAPTIVE[name], "none"), train(ADAPTIVE[name], "constant")
    moved = (plain[-1] - plain[0]).abs().max()
    assert moved > 1e-3
    assert (plain - scaled).abs().max() < 1e-6 * moved


def test_sgd_does_not():
    plain, scaled = (
        train(lambda groups: torch.optim.SGD(groups, lr=0.1), rule) for rule in ("none", "constant")
    )
    moved = (plain[-1] - plain[0]).abs().max()
    assert (plain[-1] - scaled[-1]).abs().max() > 0.1 * moved


def test_update_gains_are_not_cancelled():
    """With gains on the update the constant rule is AdamW with 1.5 times the encoders' learning rate, as it
    is for SGD.
    """

    def faster(groups):
        return torch.optim.AdamW(
            [g | {"lr": 1e-2 * (1.5 if i < 2 else 1)} for i, g in enumerate(groups)], eps=1e-12
        )

    torch.testing.assert_close(
        train(ADAPTIVE["AdamW"], "constant", scale_updates=True), train(faster, "none"), rtol=1e-9, atol=1e-12
    )


def test_update_gains_with_sgd_are_gains_on_the_gradient():
    """Without momentum both are the same, step by step, for gains that change with the batch."""
    make = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    torch.testing.assert_close(
        train(make, "share", scale_updates=True), train(make, "share"), rtol=1e-9, atol=1e-12
    )


ALL = {
    "SGD": {"momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {},
    "ASGD": {},
    "Adafactor": {},
    "Muon": {},
}


@pytest.mark.parametrize("lr", [1e-2, "tensor"])
@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_that_takes_a_tensor_learning_rate(name, lr):
    """Two steps with gains equal two steps with learning rates that were multiplied by hand."""
    cls = getattr(torch.optim, name)
    value = torch.tensor(1e-2) if lr == "tensor" else lr
    start = [nn.Parameter(torch.randn(3, 3)) for _ in range(3)]
    steps = [[torch.randn(3, 3) for _ in range(3)] for _ in range(2)]

    class Source:
        modalities = ("a", "v")
        stats = None

    results = []
    for by_hand in (False, True):
        params = copy.deepcopy(start)
        optimizer = cls([{"params": [p]} for p in params], lr=value, **ALL[name])
        if not by_hand:
            UpdateGains(optimizer, {"v": 1, "a": 0}, Source)
        for i, grads in enumerate(steps):
            gains = torch.tensor([1.25, 1.75]) + i
            Source.stats = FakeStats(gains)
            for j, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = g.clone()
                if by_hand and j < 2:
                    optimizer.param_groups[j]["lr"] = value * float(gains[j])
            optimizer.step()
        assert by_hand or all(group["lr"] is value for group in optimizer.param_groups)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class FakeStats:
    def __init__(self, gains) -> None:
        self.gains = gains


@pytest.mark.parametrize("lr", [0.1, "tensor"])
def test_composes_with_learning_rate_schedulers(lr):
    """One that multiplies the rate it finds and one that computes it: both see rates without gains."""

    def schedule(optimizer):
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)
        return torch.optim.lr_scheduler.ChainedScheduler(
            [warm, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        )

    make = lambda groups: torch.optim.SGD(groups, lr=torch.tensor(0.1) if lr == "tensor" else lr)  # noqa: E731
    updates = train(make, "share", steps=8, scale_updates=True, prepare=schedule)
    gradients = train(make, "share", steps=8, prepare=schedule)
    torch.testing.assert_close(updates, gradients, rtol=1e-6, atol=1e-9)


def test_grad_scaler_and_missing_call():
    """GradScaler steps the optimizer, or skips the step; before the first loss the gains are 1."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.groups(), lr=0.1)
    criterion = ARLLoss()
    gains = UpdateGains(optimizer, {"a": 0, "v": 1}, criterion)
    assert gains.gains() == {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, target = batch()
    scaler.scale(criterion(detach_link(model(x)), target)).backward()
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.grad / 1024 for name, p in model.named_parameters()}
    scaler.step(optimizer)
    for name, p in model.named_parameters():
        gain = criterion.stats.gains[0 if ".a." in name else 1] if "encoders" in name else 1
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gain * grads[name])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_a_step_that_raises_leaves_no_gain_behind():
    model = Model()
    optimizer = torch.optim.SGD(model.groups(), lr=0.1)
    criterion = ARLLoss()
    gains = UpdateGains(optimizer, [0, 1], criterion)
    x, target = batch()
    criterion(detach_link(model(x)), target).backward()

    def closure():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    torch.testing.assert_close(optimizer.param_groups[0]["lr"], 0.1 * criterion.stats.gains[0])
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3
    gains.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_is_read_to_the_host(monkeypatch):
    """Learning rates are multiplied on the device: neither item() nor float() of a tensor in the hooks."""
    model = Model()
    optimizer = torch.optim.SGD(model.groups(), lr=0.1)
    criterion = ARLLoss()
    gains = UpdateGains(optimizer, {"a": 0, "v": 1}, criterion)
    x, target = batch()
    criterion(detach_link(model(x)), target).backward()

    def read(*_):
        raise AssertionError("read to the host")

    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    gains._before(optimizer)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    gains._after(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_detached_link_computes_gains_and_scales_nothing():
    """Statistics as with the link, gradients as with rule "none"."""
    torch.manual_seed(0)
    model = Model()
    x, target = batch()
    criterion, none = ARLLoss(), ARLLoss(rule="none")
    criterion(detach_link(model(x)), target).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    none(model(x), target).backward()
    for a, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    linked = ARLLoss()
    linked(model(x), target)
    torch.testing.assert_close(criterion.stats.gains, linked.stats.gains)
    assert (criterion.stats.gains > 1).all()


@pytest.mark.parametrize(
    "form",
    [lambda f, u: BranchLogits(f, u), lambda f, u: (f, list(u.values())), lambda f, u: {"fused": f, **u}],
)
def test_detach_link_takes_what_the_loss_takes(form):
    fused = torch.randn(3, 4, requires_grad=True)
    out = detach_link(form(fused, {"a": fused * 2, "v": fused * 3}))
    assert isinstance(out, BranchLogits)
    assert out.link.shape == (2,)
    assert not out.link.requires_grad
    assert out.link.mask is None
    ARLLoss()(out, torch.tensor([0, 1, 2])).backward()


def test_detach_link_keeps_the_mask_of_a_dict():
    criterion, mask = ARLLoss(rule="none"), torch.tensor([[True, False], [True, True], [True, True]])
    out = {"fused": torch.randn(3, 4), "a": torch.randn(3, 4), "v": torch.randn(3, 4), "mask": mask}
    wanted = criterion(out, torch.tensor([0, 1, 2]))
    assert torch.equal(criterion(detach_link(out), torch.tensor([0, 1, 2])), wanted)
    assert criterion.stats.count.tolist() == [3, 3, 2]


def test_errors():
    model = Model()
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-3)
    criterion = ARLLoss()
    with pytest.raises(TypeError, match="groups: got int, expected indices of parameter groups by modality"):
        UpdateGains(optimizer, 3, criterion)
    with pytest.raises(TypeError, match=r"groups\['a'\]: got str, expected the index of a parameter group"):
        UpdateGains(optimizer, {"a": ["x"]}, criterion)
    with pytest.raises(IndexError, match=r"groups\['a'\]: got 3, but the optimizer has 3 parameter groups"):
        UpdateGains(optimizer, {"a": 3}, criterion)
    with pytest.raises(ValueError, match=r"groups\['v'\]: got 0, which modality 'a' has as well"):
        UpdateGains(optimizer, {"a": 0, "v": (1, 0)}, criterion)
    x, target = batch()
    out = detach_link(model(x))
    wrong, by_order = (
        UpdateGains(optimizer, {"a": 0, "text": 1}, criterion),
        UpdateGains(optimizer, [0], criterion),
    )
    criterion(out, target)
    with pytest.raises(
        ValueError,
        match=r"groups: got the modalities \['a', 'text'\], but the criterion was given \['a', 'v'\]",
    ):
        wrong.gains()
    with pytest.raises(ValueError, match="groups: got 1 modalities, but the criterion has 2"):
        by_order.gains()
    criterion((out.fused, list(out.unimodal.values()), out.link), target)
    with pytest.raises(ValueError, match="was given logits without names, expected groups as a sequence"):
        wrong.gains()
