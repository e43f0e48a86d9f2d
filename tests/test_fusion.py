"""Fusion weights against scipy's optimum, known truth, degenerate data; folding, masks, guard, errors."""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch.nn import functional as F

import arl_fast
from arl_fast import BranchLogits, FusionWeights

NAMES = ["audio", "visual"]
LINEAR = {
    "concat": lambda dims: arl_fast.ConcatHead(dims, 5),
    "split": lambda dims: arl_fast.ConcatHead(dims, 5, bias="split"),
    "no bias": lambda dims: arl_fast.ConcatHead(dims, 5, bias=False),
    "sum": lambda dims: arl_fast.SumHead(dims, 5),
    "sum, no bias": lambda dims: arl_fast.SumHead(dims, 5, bias=False),
    "shared": lambda dims: arl_fast.SharedHead(dims, 5),
}
POOLED = {
    "gated": lambda: arl_fast.GatedHead(dict.fromkeys(NAMES, 4), 5),
    "bilinear": lambda: arl_fast.BilinearHead(dict.fromkeys(NAMES, 4), 5),
    "zeroed": lambda: arl_fast.ZeroedHead(
        lambda x: torch.tanh(x["audio"] + x["visual"])[..., :4] @ torch.ones(4, 5)
    ),
    "own": lambda: None,
}
pytestmark = pytest.mark.filterwarnings("ignore:FusionWeights. .* Use that branch")


def simulate(rows, loudness, sharpness=None, seed=0, classes=6, width=8):
    """Branches whose weights are known: independent evidence about y, times a loudness: w_m = 1 / loudness_m.

    Evidence is the log-likelihood of Gaussian observations around class centres, ``sharpness`` apart.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=g)
    sharpness = sharpness or [0.6] * len(loudness)
    xs = []
    for loud, sharp in zip(loudness, sharpness, strict=True):
        centres = sharp * torch.randn(
            classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64
        )
        z = centres[y] + torch.randn(rows, width, generator=g, dtype=torch.float64)
        xs.append(loud * -0.5 * (z[:, None] - centres).square().sum(-1))
    head = arl_fast.ConcatHead([1] * len(xs), classes, bias=False).double()
    return head, BranchLogits(sum(xs), xs), y


def rows_of(out, index):
    return BranchLogits(out.fused[index], [x[index] for x in out.unimodal])


def accuracy(logits, y):
    return float((logits.argmax(1) == y).double().mean())


def trained(make, modalities=2, rows=120, seed=0):
    """A head with features, and targets that they partly tell."""
    torch.manual_seed(seed)
    dims = [4] * modalities
    head = make(dims).double()
    features = [torch.randn(rows, 4, dtype=torch.float64) * (1 + m) for m in range(modalities)]
    with torch.no_grad():
        out = head(features)
        noisy = out.fused + 2 * torch.randn_like(out.fused)
    return head, features, out, noisy.argmax(1)


# ---- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loudness", [[1.0, 4.0], [0.2, 1.0, 9.0]])
@pytest.mark.parametrize("n", [30, 400])
def test_branch_is_scipys_optimum(loudness, n):
    head, out, y = simulate(n, loudness)
    fitted = FusionWeights.fit(head, out, y, guard=None).weights
    for x, w in zip(out.unimodal, fitted, strict=True):
        objective = lambda t, x=x: float(F.cross_entropy(math.exp(t) * x, y)) + 0.01 * t * t  # noqa: E731
        best = minimize_scalar(objective, bounds=(-9, 9), method="bounded", options={"xatol": 1e-12})
        assert objective(math.log(w)) <= best.fun + 1e-12
        assert math.log(w) == pytest.approx(best.x, abs=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_joint_is_scipys_optimum(name):
    """Of the head's own formula, bias and all: parameters scaled by w are what scipy varies."""
    head, features, out, y = trained(LINEAR[name], modalities=3)
    fusion = FusionWeights.fit(head, out, y, method="joint", guard=None)

    def objective(w):
        weights = torch.tensor(w, requires_grad=True)
        loss = (
            F.cross_entropy(plain_formula(head, features, weights), y) + 0.001 * (weights - 1).square().sum()
        )
        loss.backward()
        return loss.item(), weights.grad.numpy()

    best = minimize(
        objective, np.ones(3), jac=True, bounds=[(0, None)] * 3, options={"ftol": 1e-15, "gtol": 1e-11}
    )
    np.testing.assert_allclose(fusion.weights, best.x, atol=1e-6)


def plain_formula(head, features, w):
    """b + sum_m w_m W_m z_m, from the parameters."""
    if isinstance(head, arl_fast.ConcatHead):
        parts = [z @ m.T for z, m in zip(features, head.weight.split(head.dims, 1), strict=True)]
        bias = 0 if head.bias is None else head.bias
    else:
        layers = head.layers if isinstance(head, arl_fast.SumHead) else [head.layer] * len(features)
        parts = [z @ layer.weight.T for z, layer in zip(features, layers, strict=True)]
        bias = sum(0 if layer.bias is None else layer.bias for layer in layers)
    return bias + sum(v * part for v, part in zip(w, parts, strict=True))


@pytest.mark.parametrize("name", POOLED)
def test_pool_is_scipys_optimum(name):
    torch.manual_seed(1)
    head = POOLED[name]()
    features = {m: torch.randn(150, 4) for m in NAMES}
    with torch.no_grad():
        xs = [2 * torch.randn(150, 5) for _ in range(3)] if head is None else None
        out = BranchLogits(xs[0], dict(zip(NAMES, xs[1:], strict=True))) if xs else head(features)
        y = (out.fused + 0.3 * out.unimodal["visual"] + torch.randn(150, 5)).argmax(1)
    out = BranchLogits(out.fused.double(), {m: x.double() for m, x in out.unimodal.items()})
    fusion = FusionWeights.fit(head, out, y, guard=None)
    stack = torch.stack([out.fused, *out.unimodal.values()])
    plain = torch.tensor([1.0, 0, 0], dtype=torch.float64)

    def objective(w):
        w = torch.tensor(w, requires_grad=True)
        loss = F.cross_entropy(torch.einsum("k,knc->nc", w, stack), y) + 0.001 * (w - plain).square().sum()
        loss.backward()
        return loss.item(), w.grad.numpy()

    best = minimize(
        objective, plain.numpy(), jac=True, bounds=[(0, None)] * 3, options={"ftol": 1e-15, "gtol": 1e-11}
    )
    assert objective(fusion.weights.numpy())[0] <= best.fun + 1e-10
    np.testing.assert_allclose(fusion.weights, best.x, atol=1e-5)
    torch.testing.assert_close(fusion(out), torch.einsum("k,knc->nc", fusion.weights, stack))
    assert fusion.report.present == {}


@pytest.mark.parametrize("method", ["branch", "joint"])
def test_known_weights_are_recovered(method):
    loudness = [0.5, 2.0, 8.0]
    head, out, y = simulate(20000, loudness)
    fusion = FusionWeights.fit(head, out, y, method=method)
    expected = 1 / torch.tensor(loudness, dtype=torch.float64)
    torch.testing.assert_close(fusion.weights, expected, rtol=0.06, atol=0)
    if method == "joint":  # "branch" has its ridge's bias
        assert ((fusion.weights - expected).abs() < 4 * torch.tensor(fusion.report.errors)).all()
    assert fusion.report.passes <= 20


def test_standard_errors():
    """Those of the report are the spread of the weights over samples of the same size."""
    fits = [FusionWeights.fit(*simulate(300, [1.0, 5.0], seed=s), guard=None).report for s in range(60)]
    spread = torch.tensor([f.fitted for f in fits]).log().std(0)
    told = torch.tensor([f.errors for f in fits]).mean(0)
    torch.testing.assert_close(told, spread, rtol=0.35, atol=0)


# ---- degenerate data -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["branch", "joint"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sign", [1, -1])
def test_separable_data_converges(method, scale, sign):
    """Every row right, or every row wrong, at any scale of the logits."""
    y = torch.arange(60) % 3
    x = (
        sign
        * scale
        * F.one_hot(y, 3).double()
        * (1 + torch.rand(60, 1, generator=torch.Generator().manual_seed(0)))
    )
    head = arl_fast.ConcatHead([1, 1], 3, bias=False)
    fusion = FusionWeights.fit(head, BranchLogits(2 * x, [x, x]), y, method=method, guard=None)
    assert torch.isfinite(fusion.weights).all()
    assert (fusion.weights >= 0).all()
    assert fusion.report.passes <= 20
    if method == "branch":
        grid = torch.linspace(-9, 9, 1801, dtype=torch.float64)
        loss = torch.stack([F.cross_entropy(t.exp() * x, y) + 0.01 * t * t for t in grid])
        assert abs(fusion.weights[0].log() - grid[loss.argmin()]) < 0.011
    elif sign < 0 and scale == 1:
        assert (fusion.weights == 0).all()


def test_missing_class_and_single_row():
    head, out, y = simulate(50, [1.0, 3.0], classes=6)
    fusion = FusionWeights.fit(head, rows_of(out, y != 2), y[y != 2])
    assert torch.isfinite(fusion.weights).all()
    fusion = FusionWeights.fit(head, rows_of(out, [0]), y[:1])
    assert torch.isfinite(fusion.weights).all()
    str(fusion.report)


@pytest.mark.parametrize("method", ["branch", "joint"])
def test_one_modality(method):
    """Nothing to weigh against: 1. Without the guard, its temperature."""
    head, out, y = simulate(200, [3.0])
    assert FusionWeights.fit(head, out, y, method=method).weights.tolist() == [1.0]
    fitted = FusionWeights.fit(head, out, y, method=method, guard=0).weights
    assert fitted.item() == pytest.approx(1 / 3, rel=0.2)


def test_absent_modality_and_ignored_rows():
    """Rows without a target, or a modality in a row, count for nothing, whatever stands there."""
    head, out, y = simulate(80, [1.0, 4.0])
    mask = torch.ones(80, 2, dtype=torch.bool)
    mask[60:70, 1] = False
    reference = FusionWeights.fit(head, out, y, mask=mask)
    spoilt = [x.clone() for x in out.unimodal]
    spoilt[1][60:70] = math.nan
    fused = out.fused.clone()
    fused[60:70] = math.nan
    again = FusionWeights.fit(head, BranchLogits(fused, spoilt), y, mask=mask)
    assert torch.equal(again.weights, reference.weights)
    assert again.report == reference.report
    assert reference.report.present[("0",)][0] == 80
    assert reference.report.present[("0", "1")][0] == 70

    y2 = y.clone()
    y2[70:] = -100
    spoilt = [torch.cat([x[:70], torch.full_like(x[70:], math.inf)]) for x in out.unimodal]
    ignored = FusionWeights.fit(head, BranchLogits(sum(spoilt), spoilt), y2, guard=0)
    torch.testing.assert_close(
        ignored.weights, FusionWeights.fit(head, rows_of(out, slice(70)), y[:70], guard=0).weights
    )
    assert ignored.report.rows == 70

    mask[:, 1] = False  # nowhere: its weight stays 1
    assert FusionWeights.fit(head, out, y, mask=mask, guard=0).weights[1] == 1


def test_class_weights_soft_targets_dense():
    head, out, y = simulate(120, [1.0, 4.0])
    weight = torch.rand(6, dtype=torch.float64) + 0.5
    fitted = FusionWeights.fit(head, out, y, weight=weight, guard=0).weights

    def objective(t):
        return float(F.cross_entropy(math.exp(t) * out.unimodal[1], y, weight=weight)) + 0.01 * t * t

    assert math.log(fitted[1]) == pytest.approx(
        minimize_scalar(objective, bounds=(-9, 9), method="bounded").x, abs=1e-4
    )

    plain = FusionWeights.fit(head, out, y)
    soft = FusionWeights.fit(head, out, F.one_hot(y, 6).double())
    torch.testing.assert_close(soft.weights, plain.weights)

    def dense(x):  # 40 samples of 3 positions: [40, C, 3]
        return x.unflatten(0, (40, 3)).movedim(-1, 1)

    deep = BranchLogits(dense(out.fused), [dense(x) for x in out.unimodal])
    fusion = FusionWeights.fit(head, deep, y.view(40, 3), guard=0)
    torch.testing.assert_close(fusion.weights, FusionWeights.fit(head, out, y, guard=0).weights)
    assert fusion.report.rows == 120
    assert fusion(deep).shape == (40, 6, 3)
    torch.testing.assert_close(fusion(deep), dense(fusion(out)))
    mask = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    fitted = FusionWeights.fit(head, deep, y.view(40, 3), mask=mask, guard=0).weights
    flat = FusionWeights.fit(head, out, y, mask=mask.repeat_interleave(3, 0), guard=0).weights
    torch.testing.assert_close(fitted, flat)


def test_errors_take_samples_not_positions_for_independent():
    """A sample that is repeated at every position tells nothing new."""
    head, out, y = simulate(100, [1.0, 4.0])
    repeated = BranchLogits(
        out.fused[..., None].expand(-1, -1, 9), [x[..., None].expand(-1, -1, 9) for x in out.unimodal]
    )
    once, often = FusionWeights.fit(head, out, y), FusionWeights.fit(head, repeated, y[:, None].expand(-1, 9))
    torch.testing.assert_close(once.weights, often.weights)
    assert often.report.over_best.error == pytest.approx(once.report.over_best.error)
    assert often.report.errors == pytest.approx(once.report.errors)


# ---- several labels per row --------------------------------------------------------------------------


def labelled(n=150, loudness=(1.0, 4.0), labels=4, seed=0):
    """Labels [n, C]; as evidence the log-odds of Gaussian observations around -s and s, times a loudness."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n, labels), generator=g).double()
    s = torch.linspace(1.0, 0.4, labels, dtype=torch.float64)
    xs = [
        loud * 2 * s * ((2 * y - 1) * s + torch.randn(n, labels, generator=g, dtype=torch.float64))
        for loud in loudness
    ]
    head = arl_fast.ConcatHead([1] * len(xs), labels, bias=False).double()
    return head, BranchLogits(sum(xs), xs), y


def bce(x, y, **options):
    known = ~y.isnan()
    loss = F.binary_cross_entropy_with_logits(x, y.nan_to_num(), reduction="none", **options)
    return torch.where(known, loss, 0).sum() / known.sum()


@pytest.mark.parametrize("case", ["plain", "binary", "weights", "unknown", "soft", "masked"])
def test_labels_branch_is_scipys_optimum(case):
    head, out, y = labelled(labels=1 if case == "binary" else 4)
    options, mask = {}, None
    if case == "weights":
        options = dict(weight=torch.rand(4).double() + 0.1, pos_weight=torch.rand(4).double() + 0.5)
    if case == "unknown":
        y[torch.rand(y.shape) < 0.3] = math.nan
        for x in (out.fused, *out.unimodal):
            x[0] = math.nan
        y[0] = math.nan
    if case == "soft":
        y = 0.8 * y + 0.1
    if case == "masked":
        mask = torch.rand(150, 2) < 0.7
    fitted = FusionWeights.fit(head, out, y, guard=None, task="multilabel", mask=mask, **options).weights
    for m, (x, w) in enumerate(zip(out.unimodal, fitted, strict=True)):
        there = ~y.isnan().all(1) if mask is None else mask[:, m]
        objective = lambda t, x=x[there], y=y[there]: (  # noqa: E731
            float(bce(math.exp(t) * x, y, **options)) + 0.01 * t * t
        )
        best = minimize_scalar(objective, bounds=(-9, 9), method="bounded", options={"xatol": 1e-12})
        assert objective(math.log(w)) <= best.fun + 1e-12
        assert math.log(w) == pytest.approx(best.x, abs=1e-6)


@pytest.mark.parametrize("name", ["split", "sum", "own"])
@pytest.mark.parametrize("dense", [False, True])
def test_labels_jointly_is_scipys_optimum(name, dense):
    """Of the head's formula with its bias, and of a pool."""
    torch.manual_seed(3)
    shape = (60, 2, 4) if dense else (120, 4)
    features = [torch.randn(shape, dtype=torch.float64) * (1 + m) for m in range(2)]
    head = None if name == "own" else LINEAR[name]([4, 4]).double()
    with torch.no_grad():
        own = arl_fast.SumHead([4, 4], 5).double() if head is None else head
        out = own(features)
        y = (out.fused + 2 * torch.randn_like(out.fused) > 0).double()
    y[::7, 1] = math.nan
    fusion = FusionWeights.fit(head, out, y, method="joint", guard=None, task="multilabel")
    plain = torch.tensor([1.0, 0, 0] if head is None else [1.0, 1], dtype=torch.float64)

    def objective(w):
        w = torch.tensor(w, requires_grad=True)
        if head is None:
            x = sum(v * x for v, x in zip(w, (out.fused, *out.unimodal), strict=True))
        else:
            x = plain_formula(head, features, w)
            x = x.movedim(-1, 1) if dense else x
        loss = bce(x, y) + 0.001 * (w - plain).square().sum()
        loss.backward()
        return loss.item(), w.grad.numpy()

    bounds = [(0, None)] * len(plain)
    best = minimize(objective, plain.numpy(), jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-11})
    np.testing.assert_allclose(fusion.weights, best.x, atol=1e-5)


@pytest.mark.parametrize("method", ["branch", "joint"])
def test_known_weights_of_labels_are_recovered(method):
    """And two logits 0 and x of classes are one label x: the same weights, errors and report."""
    head, out, y = labelled(8000, labels=1)
    fusion = FusionWeights.fit(head, out, y, method=method, task="multilabel")
    torch.testing.assert_close(fusion.weights, torch.tensor([1.0, 0.25]).double(), rtol=0.06, atol=0)
    two = BranchLogits(
        *(torch.cat([0 * x, x], 1) for x in (out.fused,)), [torch.cat([0 * x, x], 1) for x in out.unimodal]
    )
    classes = FusionWeights.fit(
        arl_fast.ConcatHead([1, 1], 2, bias=False), two, y[:, 0].long(), method=method
    )
    torch.testing.assert_close(classes.weights, fusion.weights)
    assert classes.report.before["fused"] == pytest.approx(fusion.report.before["fused"])
    assert classes.report.over_best == pytest.approx(fusion.report.over_best)


def test_the_report_of_labels():
    head, out, y = labelled()
    y[:3, 0] = math.nan
    report = FusionWeights.fit(head, out, y, task="multilabel").report
    assert report.rows == 150 * 4 - 3
    assert report.before["fused"].nll == pytest.approx(float(bce(out.fused, y)))
    known = ~y.isnan()
    right = ((out.unimodal[1] > 0) == (y > 0.5))[known].double().mean()
    assert report.before["1"].accuracy == pytest.approx(float(right))
    smooth = FusionWeights.fit(head, out, 0.8 * y + 0.1, task="multilabel").report
    assert smooth.before["1"].accuracy == report.before["1"].accuracy
    repeated = BranchLogits(out.fused.repeat(1, 3), [x.repeat(1, 3) for x in out.unimodal])
    wide = arl_fast.ConcatHead([1, 1], 12, bias=False)
    often = FusionWeights.fit(wide, repeated, y.repeat(1, 3), task="multilabel").report
    assert often.over_best == pytest.approx(report.over_best)  # labels of one row tell nothing new here
    assert often.errors == pytest.approx(report.errors)
    with pytest.raises(ValueError, match=r"target: got 2.*, expected labels in \[0, 1\]"):
        FusionWeights.fit(head, out, y + 1, task="multilabel")
    with pytest.raises(ValueError, match="target: got no row with a target, all are ignore_index or NaN"):
        FusionWeights.fit(head, out, y * math.nan, task="multilabel")
    with pytest.raises(ValueError, match="pos_weight: got one with task='multiclass'"):
        FusionWeights.fit(head, out, y.argmax(1), pos_weight=torch.ones(4))


# ---- the rows ------------------------------------------------------------------------------------


class Loader:
    def __init__(self, head, out, y, size, mask=None):
        self.head, self.out, self.y, self.size, self.mask, self.calls = head, out, y, size, mask, 0

    def __iter__(self):
        self.calls += 1
        for i in range(0, len(self.y), self.size):
            rows = slice(i, i + self.size)
            pair = rows_of(self.out, rows), self.y[rows]
            yield pair if self.mask is None else (*pair, self.mask[rows])


@pytest.mark.parametrize("method", ["branch", "joint"])
def test_iterable_is_the_tensor(method):
    head, out, y = simulate(101, [1.0, 4.0])
    mask = torch.rand(101, 2, generator=torch.Generator().manual_seed(0)) < 0.8
    whole = FusionWeights.fit(head, out, y, method=method, mask=mask)
    loader = Loader(head, out, y, 13, mask)
    batched = FusionWeights.fit(head, loader, method=method)
    assert loader.calls <= 21  # 20, and a look at the first batch
    torch.testing.assert_close(batched.weights, whole.weights, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.tensor(batched.report.over_best), torch.tensor(whole.report.over_best))
    generator = FusionWeights.fit(head, iter(loader), method=method)
    assert torch.equal(generator.weights, batched.weights)


def test_chunks_change_nothing(monkeypatch):
    head, out, y = simulate(101, [1.0, 4.0])
    whole = FusionWeights.fit(head, out, y)
    monkeypatch.setattr("arl_fast._fusion.rows._CHUNK", 50)
    torch.testing.assert_close(FusionWeights.fit(head, out, y).weights, whole.weights, rtol=1e-9, atol=0)


def test_deterministic_and_read_only():
    head, out, y = simulate(60, [1.0, 4.0])
    before = [x.clone() for x in out.unimodal]
    first, second = (FusionWeights.fit(head, out, y, method="joint") for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert first.report == second.report
    assert all(torch.equal(x, b) for x, b in zip(out.unimodal, before, strict=True))


# ---- the weighted prediction ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR)
def test_plain_weights_give_the_fused_logits(name, dtype):
    head = LINEAR[name]([4, 4]).to(dtype)
    out = head([torch.randn(7, 4, dtype=dtype) for _ in range(2)])
    assert torch.equal(FusionWeights(head)(out), out.fused)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_folding(name, named):
    """The folded head's logits are the weighted ones, its loss has them, and nothing is applied twice."""
    head, features, out, y = trained(LINEAR[name], modalities=3)
    if named:
        named_head = LINEAR[name](dict.fromkeys("abc", 4)).double()
        named_head.load_state_dict(head.state_dict())
        head, features = named_head, dict(zip("abc", features, strict=True))
        out = head(features)
    fusion = FusionWeights.fit(head, out, y, guard=0)
    assert len(set(fusion.weights.tolist())) == 3
    weighted = fusion(out).detach()
    list_of = list(features.values()) if named else features
    torch.testing.assert_close(
        weighted, plain_formula(head, list_of, fusion.weights).detach(), rtol=0, atol=1e-12
    )
    folded = fusion.fold()
    again = folded(features)
    torch.testing.assert_close(again.fused.detach(), weighted, rtol=0, atol=1e-12)
    torch.testing.assert_close(folded.loss(features, y)[0], arl_fast.ARLLoss()(again, y))
    if name != "shared":
        assert folded is head
        assert torch.equal(fusion(again), again.fused)
        fusion.fold()
        torch.testing.assert_close(head(features).fused.detach(), weighted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_folding_refuses_a_layer_whose_weight_is_computed(name):
    """Writing to it would change nothing, and the weights would be lost."""
    head = LINEAR[name]([4, 4])
    for module in [m for m in head.modules() if isinstance(m, torch.nn.Linear)]:
        torch.nn.utils.parametrizations.weight_norm(module)
    fusion = FusionWeights(head)
    fusion.weights.copy_(torch.tensor([0.5, 2.0]))
    with pytest.raises(TypeError, match="head: got a ParametrizedLinear in the head, whose weight alone"):
        fusion.fold()
    assert fusion.weights.tolist() == [0.5, 2.0]


def test_the_mask_that_comes_with_the_output():
    """On a head's link, and as a dict's entry: in the fit, batch by batch too, and in the prediction."""
    head = arl_fast.ConcatHead({"a": 4, "v": 4}, 3)
    features, y = {m: torch.randn(60, 4) for m in "av"}, torch.randint(3, (60,))
    mask = torch.rand(60, 2) > torch.tensor([0.0, 0.5])
    out = head(features, mask)
    assert out.unimodal["v"].isnan().any()
    given = BranchLogits(out.fused, out.unimodal)
    wanted = FusionWeights.fit(head, given, y, mask=mask)
    entry = {"fused": out.fused, "mask": mask, **out.unimodal}
    for fitted in (
        FusionWeights.fit(head, out, y),
        FusionWeights.fit(head, [(out, y)]),
        FusionWeights.fit(head, entry, y),
    ):
        assert torch.equal(fitted.weights, wanted.weights)
    for output in (out, entry):
        assert torch.equal(wanted(output), wanted(given, mask))


@pytest.mark.parametrize("name", LINEAR)
def test_absent_modalities_in_the_prediction(name):
    """A row with a mask is b plus what it has, with its weights: as if the absent features were zero."""
    head, features, out, y = trained(LINEAR[name], modalities=3)
    fusion = FusionWeights.fit(head, out, y, guard=0)
    mask = torch.rand(120, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    zeroed = [torch.where(mask[:, m, None], z, 0.0) for m, z in enumerate(features)]
    garbage = [torch.where(mask[:, m, None], z, math.nan) for m, z in enumerate(features)]
    expected = plain_formula(head, zeroed, fusion.weights)
    torch.testing.assert_close(fusion(head(garbage), mask), expected)
    report = FusionWeights.fit(head, head(zeroed), y, mask=mask).report
    for names, (rows, before, after) in report.present.items():
        has = mask[:, [int(n) for n in names]].all(1)
        only = [z if str(m) in names else torch.zeros_like(z) for m, z in enumerate(features)]
        assert rows == int(has.sum())
        assert before == pytest.approx(accuracy(plain_formula(head, only, torch.ones(3))[has], y[has]))
        assert 0 <= after <= 1


def test_state_dict_and_copies():
    head, features, out, y = trained(LINEAR["concat"])
    fusion = FusionWeights.fit(head, out, y, guard=0)
    assert list(fusion.state_dict()) == ["weights"]
    loaded = FusionWeights(head).double()
    loaded.load_state_dict(fusion.state_dict())
    assert torch.equal(loaded(out), fusion(out))
    twin = copy.deepcopy(torch.nn.ModuleList([head, fusion]))
    twin[1].fold()  # folds into the copy's head
    torch.testing.assert_close(twin[0](features).fused, fusion(out))
    assert torch.equal(head(features).fused, out.fused)
    pool = FusionWeights(arl_fast.ZeroedHead(torch.nn.Identity()), ["a", "b"])
    assert pool.weights.tolist() == [1, 0, 0]
    assert "a=" in repr(FusionWeights(None, ["a", "b"]))


# ---- guard and report ----------------------------------------------------------------------------


def gains(loudness, sharpness, guard, runs=40, rows=50):
    """Mean accuracy gained on other rows, in points, and how often the weights stay 1."""
    gained, still = [], 0
    for seed in range(runs):
        head, out, y = simulate(rows + 3000, loudness, sharpness, seed=seed)
        fusion = FusionWeights.fit(head, rows_of(out, slice(rows)), y[:rows], guard=guard)
        test = rows_of(out, slice(rows, None))
        gained.append(100 * (accuracy(fusion(test), y[rows:]) - accuracy(test.fused, y[rows:])))
        still += fusion.weights.tolist() == [1.0] * len(loudness)
    return sum(gained) / runs, still / runs


def test_guard_spares_balanced_branches_and_keeps_the_gain():
    """50 rows. Equally good and loud branches; then a second that is weak and three or four times louder."""
    cost, still = gains([2.0, 2.0], [0.6, 0.6], 1.25)
    assert cost > -0.2  # over 120 runs: -0.08
    assert cost > gains([2.0, 2.0], [0.6, 0.6], None)[0] / 2  # over 120 runs: -0.30
    assert still > 0.3
    for loud in (4.5, 6.0):
        kept, full = (gains([1.5, loud], [0.6, 0.2], guard)[0] for guard in (1.25, None))
        assert full > 1
        assert kept > 0.9 * full


def test_report_is_cross_fitted_and_told_apart():
    head, out, y = simulate(400, [1.0, 6.0], [0.8, 0.15])
    report = FusionWeights.fit(head, out, y).report
    assert report.best == "0"
    assert report.ratio == pytest.approx(min(a := [accuracy(x, y) for x in out.unimodal]) / max(a))
    assert report.before["fused"].nll == pytest.approx(float(F.cross_entropy(out.fused, y)))
    assert report.before["1"].accuracy == pytest.approx(a[1])
    assert report.before["fused"].accuracy == pytest.approx(accuracy(out.fused, y))
    assert report.before["fused"].calibration == pytest.approx(calibration(out.fused, y), abs=1e-9)
    assert report.nll_gain.mean == pytest.approx(report.before["fused"].nll - report.after["fused"].nll)
    assert report.nll_gain.mean > 4 * report.nll_gain.error > 0
    gain = report.after["fused"].accuracy - report.before["fused"].accuracy
    assert report.accuracy_gain.mean == pytest.approx(gain)
    d = (out.fused.argmax(1) == y).double() - (out.unimodal[0].argmax(1) == y).double()
    assert report.plain_over_best == pytest.approx((float(d.mean()), float(d.std()) / 20))
    assert report.after["1"].calibration < report.before["1"].calibration / 3

    # weights that are right already: in sample every fit gains, cross-fitted it loses
    nothing = [
        FusionWeights.fit(*simulate(40, [1.0, 1.0], seed=s), method="joint", guard=0) for s in range(20)
    ]
    assert sum(f.report.nll_gain.mean for f in nothing) / 20 < 0


def calibration(logits, y):
    confidence, guess = logits.softmax(1).max(1)
    place = (confidence * 15).long().clamp(max=14)
    right = (guess == y).double()
    return float(sum((confidence[place == b] - right[place == b]).sum().abs() for b in range(15))) / len(y)


def test_says_where_one_branch_alone_is_better():
    """A loud modality that is always wrong, and kept at weight 1."""
    head, out, y = simulate(600, [1.0], [0.8])
    wrong = 8.0 * F.one_hot((y + 1 + torch.arange(600) % 2 * 4) % 6, 6).double()
    both = BranchLogits(out.fused + wrong, [out.unimodal[0], wrong])
    head = arl_fast.ConcatHead([1, 1], 6, bias=False)
    with pytest.warns(UserWarning, match="Fusion does not help: -.* points against 0 alone. Use that branch"):
        report = FusionWeights.fit(head, both, y, guard=1e9).report
    assert report.over_best.mean < -2 * report.over_best.error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        helped = FusionWeights.fit(*simulate(600, [1.0, 1.0])).report
    assert "Fusion helps: +" in str(helped)


# ---- what is refused -----------------------------------------------------------------------------


def bad(**changes):
    head, out, y = simulate(20, [1.0, 2.0])
    arguments = {"head": head, "out": out, "target": y} | changes
    return FusionWeights.fit(**arguments)


def test_error_messages():
    head, out, y = simulate(20, [1.0, 2.0])
    cases = [
        (dict(method="both"), ValueError, "method: got 'both', expected 'branch' or 'joint'"),
        (dict(guard=-1.0), ValueError, "guard: got -1.0, expected a number >= 0 or None"),
        (dict(head=torch.nn.Linear(2, 2)), TypeError, "head: got Linear, expected the head itself"),
        (dict(target=None), TypeError, "target: got None for BranchLogits"),
        (dict(out=[out], target=None), TypeError, "out: got BranchLogits as batch 0"),
        (dict(out=[], target=None), ValueError, "out: got an empty iterable"),
        (
            dict(out=[(out, y)], target=None, mask=torch.ones(20, 2).bool()),
            TypeError,
            "mask: got one beside an iterable",
        ),
        (dict(target=torch.full_like(y, -100)), ValueError, "target: got no row with a target"),
        (dict(target=y[:5]), ValueError, "target: got class indices of shape \\[5\\], expected \\[20\\]"),
        (dict(target=torch.full_like(y, 6)), (ValueError, IndexError, RuntimeError), "6"),
        (dict(mask=torch.ones(20, 3).bool()), ValueError, "mask: got shape \\[20, 3\\]"),
        (dict(weight=torch.ones(5)), ValueError, "weight: got shape \\[5\\]"),
        (
            dict(out=BranchLogits(out.fused, [out.unimodal[0], out.unimodal[1] * math.nan])),
            ValueError,
            "not finite",
        ),
        (
            dict(out=BranchLogits(out.fused, out.unimodal[:1])),
            ValueError,
            "unimodal: got 1, expected the modalities",
        ),
        (dict(out=rows_of(out, slice(0)), target=y[:0]), ValueError, "target: got no row with a target"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            bad(**changes)
    fusion = FusionWeights.fit(head, out, y)
    with pytest.raises(ValueError, match=r"mask: got torch.float32 \[20, 2\], expected bool"):
        fusion(out, torch.ones(20, 2))
    with pytest.raises(ValueError, match="unimodal: got \\['a', 'b'\\], expected the modalities"):
        fusion(BranchLogits(out.fused, dict(zip("ab", out.unimodal, strict=True))))
    with pytest.raises(ValueError, match="modalities: got none"):
        FusionWeights(None)
    with pytest.raises(ValueError, match="modalities: got \\['a'\\], expected those of the head"):
        FusionWeights(head, ["a"])
    with pytest.raises(
        TypeError, match="head: got GatedHead, expected ConcatHead, SumHead or SharedHead: a pool"
    ):
        FusionWeights(arl_fast.GatedHead([4, 4], 3)).fold()


def test_shuffled_rows_are_refused():
    head, out, y = simulate(60, [1.0, 4.0])

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(60)
            yield rows_of(out, order), y[order]

    with pytest.raises(ValueError, match="another order when iterated again"):
        FusionWeights.fit(head, Shuffled())


# ---- the page ----------------------------------------------------------------------------------------


PAGE = Path(__file__).parents[1] / "docs" / "fusion.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_block_of_the_page_runs(i):
    torch.manual_seed(0)
    exec(compile(BLOCKS[i], f"fusion.md, block {i}", "exec"), {"__name__": "page"})
