"""Identities that the method promises, and properties that hold for any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from arl_fast import ARLLoss, arl_loss, rules

finite = st.floats(-30, 30, width=32)


def stats_of(logits, target, **options):
    with torch.no_grad():
        return arl_loss(logits[0], logits[1:], target, **options)[1]


@st.composite
def batches(draw, fewest=1, most=5):
    m, b, c = draw(st.integers(fewest, most)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(b, c, generator=generator) for _ in range(m + 1)]
    target = torch.randint(0, c, (b,), generator=generator)
    ignored = torch.rand(b, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return logits, torch.where(ignored, -100, target)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["share", "constant", "none"]), st.sampled_from(["residual", "mean_one", "plain"]), st.floats(-50, 50))
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
        torch.testing.assert_close(stats.gains.sum(), torch.tensor(1.0 + (len(stats.gains) if gain == "residual" else 0)))


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
    present = torch.ones(modalities, dtype=torch.bool)
    a = rules.coefficients("share", 8.0, q, q, q, q, present)
    torch.testing.assert_close(a, torch.full((modalities,), 1 / modalities))
    other = rules.coefficients("share", 8.0, q, q, q, q.roll(1), present)
    assert not torch.allclose(other, a)


def test_the_papers_rule_depends_on_the_order():
    torch.manual_seed(3)
    logits, target = [torch.randn(16, 4), 3 * torch.randn(16, 4), torch.randn(16, 4)], torch.randint(0, 4, (16,))
    plain = stats_of(logits, target, rule="paper")
    swapped = stats_of([logits[0], logits[2], logits[1]], target, rule="paper")
    assert not torch.allclose(plain.coefficients, swapped.coefficients.flip(0), atol=1e-2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_cross_entropy_bit_for_bit(weighted, smoothing, dtype):
    """gamma = 0 and rule "none" is the baseline of every comparison: torch's own cross-entropy, value and gradient."""
    x, other = torch.randn(50, 9, dtype=dtype, requires_grad=True), torch.randn(50, 9, dtype=dtype)
    target = torch.randint(0, 9, (50,))
    target[::7] = -100
    weight = torch.rand(9, dtype=dtype) if weighted else None
    criterion = ARLLoss(gamma=0.0, rule="none", weight=weight, label_smoothing=smoothing)
    ours, torchs = criterion((x, [other, other]), target), F.cross_entropy(x, target, weight, label_smoothing=smoothing)
    if smoothing:
        torch.testing.assert_close(ours, torchs)
        return
    assert torch.equal(ours, torchs)
    assert torch.equal(torch.autograd.grad(ours, x)[0], torch.autograd.grad(torchs, x)[0])


def test_plain_paper_gain_is_the_ablation():
    logits, target = [torch.randn(6, 4) for _ in range(3)], torch.randint(0, 4, (6,))
    residual, plain = (stats_of(logits, target, gain=g).gains for g in ("residual", "plain"))
    torch.testing.assert_close(residual, 1 + plain)
