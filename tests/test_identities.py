"""Identities that the method promises, and properties that hold for any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from arl_fast import ARLLoss, arl_loss
from arl_fast._core import dtypes, rules
from arl_fast._core.branches import Targets
from arl_fast._core.options import Schedule, make_options
from arl_fast._core.stats import unpack
from arl_fast.implementations import reference

finite = st.floats(-30, 30, width=32)


def stats_of(logits, target, **options):
    with torch.no_grad():
        return arl_loss(logits[0], logits[1:], target, **options)[1]


@st.composite
def batches(draw, fewest=1, most=5):
    m, b, c = draw(st.integers(fewest, most)), draw(st.integers(1, 6)), draw(st.integers(2, 7))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(b, c, generator=generator) for _ in range(m + 1)]
    target = torch.randint(0, c, (b,), generator=generator)
    ignored = torch.rand(b, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return logits, torch.where(ignored, -100, target)


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.sampled_from(["share", "constant", "none"]),
    st.sampled_from(["residual", "mean_one", "plain"]),
    st.floats(-50, 50),
)
def test_shares_and_coefficients_sum_to_one(batch, rule, gain, temperature):
    logits, target = batch
    stats = stats_of(logits, target, rule=rule, gain=gain, temperature=temperature)
    if stats.count[1] == 0:
        return
    for value in (stats.inverse_variance, stats.dependence_share, stats.coefficients):
        torch.testing.assert_close(value.sum(), torch.ones(()))
        assert (value >= 0).all()
    if rule == "none":
        assert (stats.gains == 1).all()
    elif gain == "mean_one":
        torch.testing.assert_close(stats.gains.mean(), torch.ones(()))
    else:
        torch.testing.assert_close(
            stats.gains.sum(), torch.tensor(1.0 + (len(stats.gains) if gain == "residual" else 0))
        )


@settings(max_examples=40, deadline=None)
@given(batches(2), st.randoms(use_true_random=False))
def test_order_of_modalities_is_irrelevant(batch, random):
    logits, target = batch
    order = list(range(len(logits) - 1))
    random.shuffle(order)
    plain = stats_of(logits, target)
    permuted = stats_of([logits[0], *(logits[m + 1] for m in order)], target)
    for name in ("coefficients", "gains", "inverse_variance", "dependence_share"):
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[order], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(batches(2, 2), st.floats(0, 20))
def test_two_modalities_are_a_sigmoid(batch, temperature):
    """a_0 = sigmoid(T (q_0 - d_0)), what the release's formula comes to."""
    logits, target = batch
    stats = stats_of(logits, target, temperature=temperature)
    if stats.count[1] > 0:
        want = torch.sigmoid(temperature * (stats.inverse_variance[0] - stats.dependence_share[0]))
        torch.testing.assert_close(stats.coefficients[0], want, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_adding_a_constant_to_a_row_changes_nothing(batch):
    logits, target = batch
    logits = [x.double() for x in logits]
    plain = stats_of(logits, target)
    shifted = stats_of([x + 50 for x in logits], target)
    for got, want in zip(shifted, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(["mean", "sum"]), st.floats(0, 5))
def test_loss_is_the_sum_of_torch_cross_entropies(batch, reduction, gamma):
    logits, target = batch
    if not (target != -100).any():
        return
    with torch.no_grad():
        loss, _ = arl_loss(logits[0], logits[1:], target, gamma=gamma, reduction=reduction)
    want = F.cross_entropy(logits[0], target, reduction=reduction)
    want = want + gamma * sum(F.cross_entropy(x, target, reduction=reduction) for x in logits[1:])
    torch.testing.assert_close(loss, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("modalities", range(1, 7))
def test_temperature_zero_equals_constant(modalities):
    logits, target = [torch.randn(6, 4) for _ in range(modalities + 1)], torch.randint(0, 4, (6,))
    zero, constant = stats_of(logits, target, temperature=0.0), stats_of(logits, target, rule="constant")
    assert torch.equal(zero.gains, constant.gains)


@pytest.mark.parametrize("modalities", range(2, 7))
def test_uniform_exactly_when_shares_agree(modalities):
    """Equal modalities: q = d = 1/M; and from made-up sums with q = d != 1/M."""
    x, target = torch.randn(6, 4), torch.randint(0, 4, (6,))
    stats = stats_of([x] * (modalities + 1), target)
    torch.testing.assert_close(stats.coefficients, torch.full((modalities,), 1 / modalities))
    q = torch.softmax(torch.randn(modalities), 0)
    a = rules.coefficients("share", 8.0, q, q, q, q, None)
    torch.testing.assert_close(a, torch.full((modalities,), 1 / modalities))
    other = rules.coefficients("share", 8.0, q, q, q, q.roll(1), None)
    assert not torch.allclose(other, a)


@pytest.mark.parametrize("rule", ["share", "paper", "constant", "none", "ogm"])
@pytest.mark.parametrize("gain", ["residual", "mean_one", "plain"])
@pytest.mark.parametrize("floor", [None, 0.2])
def test_nobody_absent_is_the_same_as_no_mask_of_the_absent(rule, gain, floor, monkeypatch):
    """The shorter form for batches in which every modality has a row."""
    torch.manual_seed(4)
    sums = torch.rand(6, 3) + 0.5
    sums[1:3] += 7
    options = make_options(rule=rule, gain="plain" if rule == "ogm" else gain, entropy_floor=floor)
    short = rules.finish(sums, Schedule(0.7, 3.0), options)
    monkeypatch.setattr(rules, "_absent", torch.logical_not)
    torch.testing.assert_close(short, rules.finish(sums, Schedule(0.7, 3.0), options), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [5, 40, 600])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_reference_are_torchs(classes, weighted, smoothing, reduction):
    torch.manual_seed(2)
    leaves = [torch.randn(8, classes, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    target = torch.randint(0, classes, (8,))
    weight = torch.rand(classes, dtype=torch.float64) + 0.1 if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    want = torch.autograd.grad(sum(F.cross_entropy(x, target, **options) for x in leaves), leaves)
    checked = make_options(label_smoothing=smoothing, reduction=reduction)
    rows = [x.detach() for x in leaves]
    _, _, got = reference.forward(rows, Targets(target, weight=weight), Schedule(1.0, 8.0), checked, True)
    torch.testing.assert_close(tuple(got), want, rtol=1e-12, atol=1e-14)


def test_the_papers_rule_depends_on_the_order():
    torch.manual_seed(3)
    logits, target = (
        [torch.randn(16, 4), 3 * torch.randn(16, 4), torch.randn(16, 4)],
        torch.randint(0, 4, (16,)),
    )
    plain = stats_of(logits, target, rule="paper")
    swapped = stats_of([logits[0], logits[2], logits[1]], target, rule="paper")
    assert not torch.allclose(plain.coefficients, swapped.coefficients.flip(0), atol=1e-2)


@pytest.mark.parametrize("kind", ["indices", "ignored rows of NaN", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_cross_entropy_bit_for_bit(weighted, smoothing, dtype, reduction, kind):
    """gamma = 0 and rule "none" is the baseline of every comparison: torch's own cross-entropy, value and
    gradient.
    """
    x, other = torch.randn(50, 9, dtype=dtype, requires_grad=True), torch.randn(50, 9, dtype=dtype)
    target = torch.randint(0, 9, (50,))
    target[::7] = -100
    options = dict(
        weight=torch.rand(9, dtype=dtype) if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    if kind == "probabilities":
        target = torch.softmax(torch.randn(50, 9, dtype=dtype), 1)
    given = x
    if kind == "ignored rows of NaN":
        given = torch.where((target == -100).unsqueeze(1), torch.nan, x).detach().requires_grad_()
    ours, torchs = (
        ARLLoss(gamma=0.0, rule="none", **options)((given, [other, other]), target),
        F.cross_entropy(x, target, **options),
    )
    assert torch.equal(ours, torchs)
    ones = torch.ones_like(ours)
    assert torch.equal(torch.autograd.grad(ours, given, ones)[0], torch.autograd.grad(torchs, x, ones)[0])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(label_smoothing=0.1), dict(dependence="logit_l1"), dict(reduction="none")], ids=str
)
@pytest.mark.parametrize("block", [1, 12, 40])
def test_blocks_of_the_reference_do_not_matter(monkeypatch, soft, options, block):
    """Rows are worked on in blocks of a size that fits the machine: no statistic and no gradient may depend
    on it.
    """
    logits, target = [3 * torch.randn(11, 4) for _ in range(3)], torch.randint(0, 4, (11,))
    target[3] = -100
    if soft:
        target = torch.softmax(torch.randn(11, 4), 1)
    mask, weight = torch.rand(11, 2) > 0.3, torch.rand(4)
    logits[2][~mask[:, 1]] = torch.nan
    arguments = (logits, Targets(target, mask, weight), Schedule(0.7, 8.0), make_options(**options), True)
    loss, packed, grads = reference.forward(*arguments)
    monkeypatch.setattr(reference, "_BLOCK", block)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    again = reference.forward(*arguments)
    for got, want in zip([*again[:2], *again[2]], [loss, packed, *grads], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert got.isfinite().all()
    empty = reference.forward(
        [x[:0] for x in logits], Targets(target[:0]), Schedule(1.0, 8.0), arguments[3], True
    )
    assert [g.shape for g in empty[2]] == [(0, 4)] * 3


@pytest.mark.parametrize("rule", ["share", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "weight", [None, torch.tensor([0.3, 2.0, 0.7, 1.1], dtype=torch.float64)], ids=["", "weighted"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_the_reference_cannot_raise_a_wrong_class_is_nan(
    monkeypatch, rule, smoothing, reduction, weight
):
    """As on a GPU, where looking would stall: that row's loss and gradients are NaN in the branches where it
    is valid.
    """
    logits, target = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)], torch.randint(0, 4, (6,))
    target[1], target[4] = 4, -100
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[1, 1] = False
    chosen = make_options(rule=rule, label_smoothing=smoothing, reduction=reduction)
    gamma = 0.0 if rule == "none" else 1.0
    monkeypatch.setattr(reference, "_on_host", lambda target: False)
    loss, packed, grads = reference.forward(
        logits, Targets(target, mask, weight), Schedule(gamma, 8.0), chosen, True
    )
    assert loss.isnan().tolist() == ([b == 1 for b in range(6)] if reduction == "none" else True)
    assert [g.isnan().all(1).tolist() for g in grads] == [[b == 1 for b in range(6)]] * 2 + [[False] * 6]
    stats = unpack(packed)
    assert stats.loss.isnan().tolist() == [True, True, False]
    assert stats.dependence.isnan().tolist() == [True, False]
    target[1] = -100
    _, _, want = reference.forward(logits, Targets(target, mask, weight), Schedule(gamma, 8.0), chosen, True)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g[[0, 2, 3, 4, 5]], w[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_scales_in_float32_and_rounds_once(dtype, keep):
    grads = [torch.randn(5, 3).to(dtypes.grad_dtype(dtype)) for _ in range(2)]
    before = [g.clone() for g in grads]
    for upstream in (torch.tensor(0.7), torch.rand(5)):
        for factor in (None, torch.tensor([1.3, 0.1])):
            got = reference.scale([g.clone() for g in grads], upstream, factor, dtype, keep)
            for b, (g, x) in enumerate(zip(got, before, strict=True)):
                up = upstream.unsqueeze(1) if upstream.dim() else upstream
                assert torch.equal(g, (x.float() * (up if factor is None else up * factor[b])).to(dtype))
    reference.scale(grads, torch.tensor(0.7), None, dtype, True)
    assert all(torch.equal(g, x) for g, x in zip(grads, before, strict=True))


def test_plain_paper_gain_is_the_ablation():
    logits, target = [torch.randn(6, 4) for _ in range(3)], torch.randint(0, 4, (6,))
    residual, plain = (stats_of(logits, target, gain=g).gains for g in ("residual", "plain"))
    torch.testing.assert_close(residual, 1 + plain)
