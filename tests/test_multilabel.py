"""task="multilabel": every label is a yes or no. Truth is written in float64 from the formulas, in plain
loops.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import arl_fast
from arl_fast import ARLLoss, ConcatHead, arl_loss
from arl_fast._core.options import Schedule, make_options
from arl_fast._core.rules import finish
from arl_fast._core.stats import unpack

DTYPES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(shape=(6, 4), modalities=2, dtype=torch.float64, scale=2.0):
    """Logits, and targets with a soft and an unknown label."""
    logits = [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(modalities + 1)]
    target = torch.randint(0, 2, shape).to(torch.float64)
    target.view(-1)[1] = 0.3
    target.view(-1)[2] = math.nan
    return logits, target


def truth(logits, target, gamma=1.0, weight=None, pos_weight=None, mask=None, reduction="mean", **options):
    """The loss as a float64 tensor with a graph, and the sums [6, M+1] of one pair of row and label after the
    other.
    """
    columns, losses = [], []
    for b, x in enumerate(logits):
        terms, sums = torch.zeros(x.shape, dtype=torch.float64), [0.0] * 6
        for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
            i, c = index[:2]
            t, v = float(target[tuple(index)]), x[tuple(index)]
            if math.isnan(t) or (b > 0 and mask is not None and not mask[i, b - 1]):
                continue
            w = 1.0 if weight is None else float(weight[c])
            pw = 1.0 if pos_weight is None else float(pos_weight[c])
            loss = w * (pw * t * F.softplus(-v) + (1 - t) * F.softplus(v))
            terms[tuple(index)] = loss
            value = float(v.detach())
            p, q = 1 / (1 + math.exp(-max(value, -700))), 1 / (1 + math.exp(max(min(value, 700), -700)))
            entropy = -sum(a * math.log(a) for a in (p, q) if a > 0)
            confidence = t * p + (1 - t) * q
            dependence = abs(value) if options.get("dependence") == "logit_l1" else confidence
            pair = [float(loss.detach()), 1.0, 1.0, float((value > 0) == (t > 0.5)), entropy, dependence]
            sums = [a + b for a, b in zip(sums, pair, strict=True)]
        losses.append(terms if reduction == "none" else terms.sum() / (sums[1] if reduction == "mean" else 1))
        columns.append(sums)
    gammas = gamma if isinstance(gamma, list) else [gamma] * (len(logits) - 1)
    loss = losses[0] + sum(g * term for g, term in zip(gammas, losses[1:], strict=True))
    return loss, torch.tensor(columns, dtype=torch.float64).t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["plain", "weights", "masked", "l1", "gammas", "dense", "binary"])
def test_against_truth(implementation, poisoned, dtype, reduction, case):
    shape = {"dense": (3, 4, 2), "binary": (6, 1)}.get(case, (6, 4))
    logits, target = make(shape, dtype=dtype)
    options = {
        "weights": {"weight": torch.rand(4) + 0.1, "pos_weight": torch.rand(4) + 0.5},
        "masked": {"mask": torch.rand(6, 2) > 0.4, "gain": "mean_one"},
        "l1": {"dependence": "logit_l1", "entropy_floor": 0.1},
        "gammas": {"gamma": [0.5, 2.0]},
    }.get(case, {})
    leaves = [x.requires_grad_() for x in logits]
    link = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, stats = arl_loss(
        leaves[0], leaves[1:], target, link, task="multilabel", reduction=reduction, **options
    )
    upstream = torch.rand_like(loss)
    grads = torch.autograd.grad(loss, leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in logits]
    want, sums = truth(wide, target, reduction=reduction, **options)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), want, rtol=exact, atol=exact)
    for got, expected in zip(grads, torch.autograd.grad(want, wide, upstream.double()), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= DTYPES[dtype] * expected.norm()
    chosen = make_options(
        task="multilabel",
        **{k: v for k, v in options.items() if k in ("gain", "dependence", "entropy_floor")},
    )
    _, packed = finish(sums, Schedule(1.0, 8.0), chosen)
    for name, got, expected in zip(stats._fields, stats, unpack(packed), strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=exact, atol=exact, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e4, -1e4, math.inf, -math.inf])
def test_extreme_logits(implementation, dtype, offset):
    """A certain answer costs |x| or nothing, has entropy 0, and its gradient is -1, 0 or 1."""
    target = torch.tensor([[0.0, 1.0]], dtype=dtype)
    x = torch.full((1, 2), offset, dtype=dtype, requires_grad=True)
    right = torch.tensor([[-30.0, 30.0]], dtype=dtype, requires_grad=True)
    loss, stats = arl_loss(right, [x], target, rule="none", task="multilabel", reduction="sum")
    assert stats.entropy.tolist() == [0.0]
    if math.isfinite(offset):
        torch.testing.assert_close(loss, torch.tensor(1e4, dtype=dtype))
    g, h = torch.autograd.grad(loss, [x, right])
    assert g.tolist() == ([[1.0, 0.0]] if offset > 0 else [[0.0, -1.0]])
    assert (h.abs() / math.exp(-30) - 1).abs().max() < 1e-5  # not rounded away


def test_gradcheck(implementation):
    logits, target = make((3, 2))
    leaves = [x.requires_grad_() for x in logits]
    assert torch.autograd.gradcheck(
        lambda *x: arl_loss(x[0], x[1:], target, rule="none", gamma=0.7, task="multilabel")[0], leaves
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [False, True])
def test_the_baseline_is_torchs_to_the_last_bit(implementation, reduction, weights):
    x = torch.randn(33, 7, requires_grad=True)
    target = torch.randint(0, 2, (33, 7)).float()
    own = dict(weight=torch.rand(7), pos_weight=torch.rand(7)) if weights else {}
    loss, _ = arl_loss(
        x, [x.detach()], target, gamma=0.0, rule="none", task="multilabel", reduction=reduction, **own
    )
    want = F.binary_cross_entropy_with_logits(x, target, reduction=reduction, **own)
    assert torch.equal(loss, want)
    ones = torch.ones_like(want)
    assert torch.equal(torch.autograd.grad(loss, x, ones)[0], torch.autograd.grad(want, x, ones)[0])


def test_unknown_labels_of_the_baseline(implementation):
    logits, target = make()
    x = logits[0].requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss, _ = arl_loss(
            x, logits[1:], target, gamma=0.0, rule="none", task="multilabel", reduction=reduction
        )
        want, _ = truth([x, *logits[1:]], target, gamma=0.0, reduction=reduction)
        torch.testing.assert_close(loss, want)
        ones = torch.ones_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x, ones)[0], torch.autograd.grad(want, x, ones)[0]
        )


def test_poisoned_rows_are_never_read(implementation):
    logits, target = make()
    mask = torch.tensor([[True, False]] * 6)
    for x in logits:
        x[0, 2] = math.nan  # its label is unknown
    logits[2].fill_(math.nan)
    leaves = [x.requires_grad_() for x in logits]
    loss, stats = arl_loss(leaves[0], leaves[1:], target, torch.zeros(2), mask=mask, task="multilabel")
    assert loss.isfinite()
    assert stats.gains[1] == 1
    grads = torch.autograd.grad(loss, leaves)
    assert all(g.isfinite().all() for g in grads)
    assert grads[2].abs().sum() == 0


def test_module_head_and_linear_loss_agree(implementation):
    """The criterion's buffers, the gains and the chunks."""
    head = ConcatHead({"image": 5, "table": 3}, 1).double()
    z = {
        k: torch.randn(9, n, dtype=torch.float64, requires_grad=True)
        for k, n in {"image": 5, "table": 3}.items()
    }
    target = torch.randint(0, 2, (9, 1)).double()
    target[4] = math.nan
    criterion = ARLLoss(task="multilabel", pos_weight=torch.tensor([2.0]), gamma=0.5)
    assert set(criterion.state_dict()) == {"pos_weight", "steps"}
    leaves = [*z.values(), *head.parameters()]
    for reduction in ("mean", "none"):
        criterion.options = make_options(task="multilabel", reduction=reduction)
        loss = criterion(head(z), target)
        upstream = torch.rand_like(loss)
        want, stats = torch.autograd.grad(loss, leaves, upstream), criterion.stats
        for chunk in (None, 4):
            one, one_stats = head.loss(z, target, criterion, chunk=chunk)
            torch.testing.assert_close(one, loss)
            torch.testing.assert_close(one_stats.gains, stats.gains)
            for got, expected in zip(torch.autograd.grad(one, leaves, upstream), want, strict=True):
                torch.testing.assert_close(got, expected)


def test_trains_a_binary_model():
    """One logit for an image and a table, as in MONAI's tutorials, through any fusion."""
    torch.manual_seed(0)
    encoders = torch.nn.ModuleDict({"image": torch.nn.Linear(8, 4), "table": torch.nn.Linear(3, 4)})
    fusion = torch.nn.Linear(8, 1)
    head = arl_fast.ZeroedHead(lambda parts: fusion(torch.cat([parts["image"], parts["table"]], 1)))
    x = {"image": torch.randn(64, 8), "table": torch.randn(64, 3)}
    y = ((x["image"][:, :1] + x["table"][:, :1]) > 0).float()
    criterion = ARLLoss(task="multilabel")
    optimizer = torch.optim.SGD([*encoders.parameters(), *fusion.parameters()], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(head({name: encoder(x[name]) for name, encoder in encoders.items()}), y).backward()
        optimizer.step()
    assert criterion.stats.accuracy[0] > 0.9


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(implementation, reduction):
    logits, target = make(dtype=torch.float32)
    link = torch.zeros(2, requires_grad=True)

    def step(*x):
        pos_weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
        loss, stats = arl_loss(
            x[0], x[1:], target, link, task="multilabel", reduction=reduction, pos_weight=pos_weight
        )
        return loss, stats.gains

    leaves = [x.requires_grad_() for x in logits]
    upstream = torch.rand(6, 4) if reduction == "none" else torch.tensor(0.7)
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss, gains = function(*leaves)
        results.append([loss, gains, *torch.autograd.grad(loss, leaves, upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


X, Y = torch.randn(4, 3), torch.rand(4, 3)
ERRORS = {
    "one class": (
        dict(fused=X[:, :1], unimodal=[X[:, :1]], target=torch.zeros(4).long(), task="multiclass"),
        "task='multilabel'",
    ),
    "integers": (dict(target=Y.long()), r"target: got dtype torch.int64.*target.float\(\)"),
    "shape": (dict(target=Y[:, :2]), r"target: got labels of shape \[4, 2\], expected .*\[4, 3\]"),
    "range": (dict(target=Y + 1), r"target: got 1\.\d+, expected labels in \[0, 1\], or NaN"),
    "grad": (dict(target=Y.clone().requires_grad_()), "target: .* require grad"),
    "smoothing": (dict(label_smoothing=0.1), "label_smoothing: got 0.1 with task='multilabel'"),
    "task": (dict(task="multi"), "task: got 'multi', expected one of 'multiclass', 'multilabel'"),
    "pos_weight": (
        dict(task="multiclass", pos_weight=torch.ones(3), target=torch.zeros(4).long()),
        "pos_weight: got one with",
    ),
    "pos_weight shape": (
        dict(pos_weight=torch.ones(2)),
        r"pos_weight: got shape \[2\], expected \[C\] = \[3\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    given = dict(fused=X, unimodal=[X, X], target=Y, rule="none", task="multilabel") | changes
    with pytest.raises((TypeError, ValueError), match=message):
        arl_loss(**given)
