"""The contract: what every implementation must compute, judged against float64 truth (tests/oracle.py).

Tolerances are relative to what torch's own cross-entropy loses at the same dtype.
"""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from torch.nn import functional as F

import arl_fast
from arl_fast import ARLLoss, arl_loss

pytestmark = pytest.mark.contract

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative error of statistics, loss and gradients that rounding of inputs and outputs at each dtype allows.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(modalities=2, batch=7, classes=5, dtype=torch.float32, scale=2.0, shape=()):
    """Logits (fused first) rounded to dtype, and class indices."""
    logits = [
        (scale * torch.randn(batch, classes, *shape, dtype=torch.float64)).to(dtype)
        for _ in range(modalities + 1)
    ]
    return logits, torch.randint(0, classes, (batch, *shape))


def run(logits, target, link=True, upstream=None, **options):
    """Loss, gradients of the logits and statistics of the implementation under test."""
    leaves = [x.detach().requires_grad_() for x in logits]
    zero = torch.zeros(
        len(logits) - 1, dtype=torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    )
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link=zero if link else None, **options)
    grads = torch.autograd.grad(loss, leaves, upstream if upstream is not None else torch.ones_like(loss))
    return loss.detach(), list(grads), stats


def relative(got, want):
    got, want = got.double(), want.double()
    error = (got - want).norm()
    return float(error / want.norm()) if want.norm() > 0 else float(error)


def check(logits, target, tolerance=None, upstream=None, **options):
    dtype = logits[0].dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    loss, grads, stats = run(logits, target, upstream=upstream, **options)
    truth = oracle.arl(logits, target, upstream=1.0 if upstream is None else upstream.double(), **options)
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == statistics_dtype
    assert loss.shape == truth.loss.shape
    # statistics are computed in float32 whatever the logits' dtype
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    assert relative(loss, truth.loss) < exact
    for name, want in truth.stats.items():
        got = getattr(stats, name)
        assert got.dtype == statistics_dtype
        assert not got.requires_grad
        torch.testing.assert_close(
            got.double(),
            torch.tensor(want, dtype=torch.float64),
            rtol=exact,
            atol=exact,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for branch, (got, want) in enumerate(zip(grads, truth.grads, strict=True)):
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert relative(got, want) < tolerance, f"gradient of branch {branch}"
    return loss, grads, stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modalities", [1, 2, 3, 6])
def test_against_truth(implementation, poisoned, modalities, dtype):
    check(*make(modalities, dtype=dtype))


@pytest.mark.parametrize(
    ("batch", "classes"),
    [(1, 2), (3, 2), (64, 6), (9, 33), (4, 130), (3, 1031), (2, 4099)],
    ids=lambda v: str(v),
)
def test_shapes(implementation, poisoned, batch, classes):
    """Fewer classes than a vector, odd tails, more than one tile."""
    check(*make(2, batch, classes))


@pytest.mark.parametrize("rule", ["share", "paper", "constant", "none"])
@pytest.mark.parametrize("dependence", ["confidence", "logit_l1"])
@pytest.mark.parametrize("gain", ["residual", "mean_one", "plain"])
def test_rules(implementation, rule, dependence, gain):
    check(*make(), rule=rule, dependence=dependence, gain=gain, temperature=4.0, gamma=2.5)


@pytest.mark.parametrize("rule", ["share", "constant", "none"])
@pytest.mark.parametrize("modalities", [1, 3, 4, 5])
def test_rules_many_modalities(implementation, rule, modalities):
    logits, target = make(modalities)
    check([x * (1 + m) for m, x in enumerate(logits)], target, rule=rule, gain="mean_one", entropy_floor=0.15)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
def test_ogm(implementation, modalities, alpha):
    """The rule with gains of its own: some modality is ahead of the others' mean, some are not."""
    logits, target = make(modalities)
    for m, x in enumerate(logits[1:]):  # of more and more confidence in the true class
        x[torch.arange(len(target)), target] += m
    _, _, stats = check(logits, target, rule="ogm", temperature=alpha, gamma=0.5)
    assert torch.equal(stats.coefficients, stats.gains)
    assert stats.gains[0] == 1
    assert modalities == 1 or stats.gains[-1] < 1


def test_ogm_where_a_modality_is_absent_or_certain(implementation):
    logits, target = make(modalities=3, batch=8)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[:, 1] = False
    logits[2].fill_(torch.nan)
    logits[1] *= 0
    logits[1][torch.arange(8), target] = 1e4  # confidence 1
    logits[3] *= 0
    logits[3][torch.arange(8), (target + 1) % 5] = 1e4  # confidence 0
    _, _, stats = run(logits, target, mask=mask, rule="ogm", temperature=0.1)
    assert stats.gains.tolist() == [0, 1, 1]
    assert stats.coefficients.tolist() == [0, 0, 1]
    logits[1][0, 0] = torch.nan  # never a plausible gain beside it
    _, _, stats = run(logits, target, mask=mask, rule="ogm", temperature=0.1)
    assert stats.gains.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("floor", [None, 0.0, 0.1])
def test_entropy_floor(implementation, modalities, floor):
    """One modality nearly certain, one nearly uniform: the floor decides q."""
    logits, target = make(modalities)
    logits[1] *= 30
    logits[2] *= 0.05
    _, _, stats = check(logits, target, entropy_floor=floor)
    share = float(stats.entropy[0] / stats.entropy.sum())
    assert share < 0.1 < 0.6 / modalities, "the floor was not reached"


def test_nan_in_one_modality_shows_everywhere(implementation):
    """Logits that are NaN give a NaN loss, NaN shares and NaN gains, never a plausible number."""
    logits, target = make()
    logits[2][3, 1] = torch.nan
    loss, _, stats = run(logits, target)
    assert loss.isnan()
    for name in ("entropy", "dependence"):
        assert getattr(stats, name)[1].isnan()
        assert getattr(stats, name)[0].isfinite()
    for name in ("inverse_variance", "dependence_share", "coefficients", "gains"):
        assert getattr(stats, name).isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(weight=True), dict(label_smoothing=0.2), dict(weight=True, label_smoothing=0.2)],
    ids=str,
)
def test_cross_entropy_options(implementation, poisoned, reduction, soft, options):
    """Each branch follows torch.nn.functional.cross_entropy, with a mask and a non-trivial upstream gradient
    on top.
    """
    logits, target = make(batch=9)
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(5) + 0.1
    if soft:
        target = torch.softmax(torch.randn(9, 5), 1)
    else:
        target[2] = 3
        options["ignore_index"] = 3
    mask = torch.rand(9, 2) > 0.3
    upstream = torch.randn(9) if reduction == "none" else torch.tensor(0.7)
    plain = {k: v for k, v in options.items() if not (soft and k == "ignore_index")}
    _, _, stats = run(logits, target, reduction=reduction, **options)
    torch.testing.assert_close(stats.loss[0], F.cross_entropy(logits[0], target, **plain))
    check(logits, target, reduction=reduction, mask=mask, upstream=upstream, **options)


def test_ignored_rows_and_ignore_index(implementation, poisoned):
    logits, target = make(batch=12)
    target[::3] = -100
    check(logits, target)
    check(logits, target.to(torch.int32))


def test_absent_modality_is_as_if_it_did_not_exist(implementation):
    logits, target = make(modalities=3, batch=8)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[:, 1] = False
    logits[2].fill_(torch.nan)  # an absent modality may hold anything
    loss, grads, stats = run(logits, target, mask=mask)
    without, grads_without, stats_without = run([logits[0], logits[1], logits[3]], target)
    torch.testing.assert_close(loss, without)
    for got, want in zip([grads[0], grads[1], grads[3]], grads_without, strict=True):
        torch.testing.assert_close(got, want)
    assert grads[2].eq(0).all()
    kept = torch.tensor([0, 2])
    for name in ("entropy", "dependence", "inverse_variance", "dependence_share", "coefficients", "gains"):
        torch.testing.assert_close(getattr(stats, name)[kept], getattr(stats_without, name))
    assert stats.gains[1] == 1
    assert stats.coefficients[1] == 0
    assert stats.count.tolist() == [8, 8, 0, 8]
    assert all(torch.isfinite(value).all() for value in stats)


def test_absent_modality_beside_a_nan(implementation):
    """It takes no share and no coefficient; those of the others show the NaN."""
    logits, target = make(modalities=3, batch=6)
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[:, 1] = False
    logits[1][2, 0] = torch.nan
    _, grads, stats = run(logits, target, mask=mask)
    for name in ("inverse_variance", "dependence_share", "coefficients"):
        assert getattr(stats, name)[1] == 0, name
        assert getattr(stats, name)[0].isnan(), name
    assert stats.gains[1] == 1
    assert all(g.isfinite().all() for g in (grads[0], grads[2], grads[3]))


@pytest.mark.parametrize("gain", ["residual", "mean_one", "plain"])
@pytest.mark.parametrize("zeros", [False, True])
def test_absent_modality_against_truth(implementation, gain, zeros):
    """Floor, shares and gains go by the modalities that are present, also where all of their sums are 0."""
    logits, target = make(modalities=3, batch=8)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[:, 1] = False
    logits[1] *= 30
    if zeros:
        check([torch.zeros_like(x) for x in logits], target, mask=mask, gain=gain, dependence="logit_l1")
    else:
        _, _, stats = check(logits, target, mask=mask, gain=gain)
        assert float(stats.entropy[0] / stats.entropy.sum()) < 0.6 / 3, "the floor was not reached"


def test_partly_absent_rows_may_hold_nan(implementation):
    logits, target = make(batch=8)
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[2:5, 1] = False
    clean = [x.clone() for x in logits]
    logits[2][2:5] = torch.nan
    _, grads, stats = run(logits, target, mask=mask)
    _, want, stats_want = run(clean, target, mask=mask)
    for got, expected in zip([*grads, *stats], [*want, *stats_want], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(implementation, poisoned, reduction):
    """As torch: NaN for "mean", 0 otherwise, and gradients 0; gains stay 1."""
    logits, target = make()
    target.fill_(-100)
    loss, grads, stats = run(logits, target, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else loss.eq(0).all()
    assert all(g.eq(0).all() for g in grads)
    assert stats.gains.tolist() == [1, 1]
    for name in (
        "accuracy",
        "entropy",
        "dependence",
        "inverse_variance",
        "dependence_share",
        "coefficients",
        "count",
    ):
        assert getattr(stats, name).eq(0).all(), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(implementation, reduction):
    logits, target = make(batch=0)
    loss, grads, stats = run(logits, target, reduction=reduction)
    want = F.cross_entropy(logits[0], target, reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert [g.shape for g in grads] == [x.shape for x in logits]
    assert stats.gains.tolist() == [1, 1]


def test_target_out_of_range(implementation):
    logits, target = make()
    for bad in (5, -1):
        target[3] = bad
        with pytest.raises(IndexError, match=rf"target: got class {bad}.*expected 0 <= target < 5"):
            run(logits, target)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense(implementation, shape, reduction):
    logits, target = make(batch=4, shape=shape)
    target.view(-1)[1] = -100
    mask = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    check(logits, target, mask=mask, reduction=reduction)


def test_dense_channels_last_and_soft(implementation):
    logits, target = make(batch=3, shape=(2, 4))
    logits = [x.to(memory_format=torch.channels_last) for x in logits]
    check(logits, target)
    check(logits, torch.softmax(torch.randn(3, 5, 2, 4), 1))


def test_strides(implementation, poisoned):
    """Rows with a gap, a transposed class dimension, an offset that no vector load likes, expanded rows."""
    logits, target = make(batch=6, classes=9)
    wide = [torch.full((6, 14), torch.nan) for _ in logits]
    for w, x in zip(wide, logits, strict=True):
        w[:, 3:12] = x
    check([w[:, 3:12] for w in wide], target)
    check([x.t().contiguous().t() for x in logits], target)
    shifted = [torch.cat([torch.zeros(1), x.reshape(-1)])[1:].view(6, 9) for x in logits]
    check(shifted, target)
    check([logits[0], logits[1][:1].expand(6, 9), logits[2]], target)
    check(logits, torch.stack([target, target], 1)[:, 0])
    _, stats = arl_loss(logits[0], logits[1:], target, rule="none")
    _, strided = arl_loss(wide[0][:, 3:12], [w[:, 3:12] for w in wide[1:]], target, rule="none")
    for got, want in zip(strided, stats, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["right", "wrong", "tied", "high", "low"])
def test_trained_like_and_extreme(implementation, kind, dtype):
    """p_y -> 1, p_y -> 0, ties, and offsets of 1e4, against truth and against what torch itself loses."""
    batch, classes = 16, 7
    target = torch.randint(0, classes, (batch,))
    logits = [0.1 * torch.randn(batch, classes, dtype=torch.float64) for _ in range(3)]
    for b, x in enumerate(logits):
        if kind == "right":
            x[torch.arange(batch), target] += torch.linspace(2, 18, batch, dtype=torch.float64) - b
        elif kind == "wrong":
            x[torch.arange(batch), (target + 1) % classes] += (
                torch.linspace(2, 18, batch, dtype=torch.float64) - b
            )
        elif kind == "tied":
            x.zero_()
        else:
            x += 1e4 if kind == "high" else -1e4
    logits = [x.to(dtype) for x in logits]
    loss, grads, stats = run(logits, target, gamma=0.5)
    truth = oracle.arl(logits, target, gamma=0.5)
    assert all(torch.isfinite(value).all() for value in [loss, *stats])
    leaf = logits[0].detach().requires_grad_()
    torch_loss = F.cross_entropy(leaf, target)
    (torch_grad,) = torch.autograd.grad(torch_loss, leaf)
    slack = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    for got, want in zip(grads, truth.grads, strict=True):
        assert relative(got, want) <= 1.5 * relative(torch_grad, truth.grads[0]) + slack
    torch_error = abs(float(torch_loss.detach()) - truth.stats["loss"][0])
    assert abs(float(stats.loss[0]) - truth.stats["loss"][0]) <= 1.1 * torch_error + 2e-6 * (
        1 + truth.stats["loss"][0]
    )
    wanted = torch.tensor(truth.stats["gains"], dtype=torch.float64)
    torch.testing.assert_close(stats.gains.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", ["share", "paper"])
def test_certain_predictions_give_no_nan(implementation, dtype, rule):
    """Entropy exactly 0 in one, then in both modalities; a logit of -inf is a class that cannot be."""
    logits, target = make(dtype=dtype)
    for certain in ([1], [1, 2]):
        for b in certain:
            logits[b] = torch.zeros_like(logits[b])
            logits[b][:, 0] = 200
        loss, grads, stats = run(logits, target, rule=rule)
        assert all(torch.isfinite(v).all() for v in [loss, *grads, *stats])
        torch.testing.assert_close(stats.coefficients.sum(), torch.ones(()))
    torch.testing.assert_close(stats.inverse_variance, torch.full((2,), 0.5))
    logits, target = make(dtype=dtype)
    target.clamp_(max=3)
    for x in logits:
        x[:, 4] = -torch.inf
    check(logits, target, rule=rule)


def test_schedule_as_tensors(implementation):
    logits, target = make()
    _, _, want = run(logits, target, gamma=2.5, temperature=3.0)
    loss_want, grads_want, _ = run(logits, target, gamma=2.5, temperature=3.0)
    loss, grads, got = run(
        logits, target, gamma=torch.tensor(2.5), temperature=torch.tensor(3.0, dtype=torch.float64)
    )
    for a, b in zip([loss, *grads, *got], [loss_want, *grads_want, *want], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tensor", [False, True], ids=["numbers", "tensor"])
def test_gamma_per_modality(implementation, poisoned, tensor, reduction):
    """As numbers and as a tensor, also one whose entries are not adjacent; during the warm-up all are 1."""
    logits, target = make(modalities=3, batch=9)
    mask = torch.rand(9, 3) > 0.3
    values = (0.3, 0.0, 2.7)
    gamma = torch.tensor(values).repeat_interleave(2)[::2] if tensor else values
    upstream = torch.randn(9) if reduction == "none" else None
    for options in (dict(), dict(mask=mask, warming=True), dict(warming=torch.tensor(False))):
        loss, grads, _ = run(logits, target, gamma=gamma, reduction=reduction, upstream=upstream, **options)
        weights = 1.0 if upstream is None else upstream.double()
        options["warming"] = bool(options.get("warming", False))
        truth = oracle.arl(logits, target, gamma=values, reduction=reduction, upstream=weights, **options)
        assert relative(loss, truth.loss) < 1e-6
        assert all(relative(g, t) < 3e-6 for g, t in zip(grads, truth.grads, strict=True))


@pytest.mark.parametrize(
    "gamma", [(0.1, 1 / 3), torch.tensor([0.1, 1 / 3], dtype=torch.float64), 1 / 3], ids=str
)
def test_gamma_is_not_rounded_for_float64(implementation, gamma):
    check(*make(dtype=torch.float64), gamma=gamma, temperature=1 / 3)


@pytest.mark.parametrize("warming", [True, torch.tensor(True)], ids=["bool", "tensor"])
def test_warming(implementation, warming):
    logits, target = make()
    loss, grads, stats = run(logits, target, gamma=3.0, warming=warming)
    truth = oracle.arl(logits, target, gamma=3.0, warming=True)
    assert stats.gains.tolist() == [1, 1]
    assert relative(loss, truth.loss) < 1e-6
    assert all(relative(g, t) < 3e-6 for g, t in zip(grads, truth.grads, strict=True))
    torch.testing.assert_close(stats.coefficients, run(logits, target)[2].coefficients)


def test_custom_rule(implementation):
    logits, target = make(modalities=3)

    def tilt(stats):
        return torch.softmax(-stats.entropy, 0)

    _, _, stats = run(logits, target, rule=tilt, gain="mean_one")
    torch.testing.assert_close(stats.coefficients, torch.softmax(-stats.entropy, 0))
    torch.testing.assert_close(stats.gains, 3 * stats.coefficients)
    _, _, uniform = run(logits, target, rule=lambda s: s.coefficients)
    _, _, constant = run(logits, target, rule="constant")
    for got, want in zip(uniform, constant, strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(
        ValueError, match=r"rule: the callable returned a tensor of shape \[4\], expected .* \[3\]"
    ):
        run(logits, target, rule=lambda s: s.loss)


def test_evaluation_needs_no_link_and_keeps_no_graph(implementation):
    logits, target = make()
    with torch.no_grad():
        loss, _ = arl_loss(logits[0], logits[1:], target)
    truth = oracle.arl(logits, target)
    assert relative(loss, truth.loss) < 1e-6
    assert not loss.requires_grad
    leaves = [x.requires_grad_() for x in logits]
    with torch.no_grad():
        loss, _ = arl_loss(leaves[0], leaves[1:], target)
    assert loss.grad_fn is None


def test_logits_are_read_only(implementation):
    logits, target = make()
    before = [x.clone() for x in logits]
    run(logits, target, upstream=torch.tensor(3.0))
    assert all(torch.equal(x, y) for x, y in zip(logits, before, strict=True))


def test_backward_twice(implementation):
    """With retain_graph the second backward is as right as the first, whatever was done with the first one's
    result.
    """
    logits, target = make()
    leaves = [x.requires_grad_() for x in logits]
    for scale in (1.0, 0.5):
        loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
        truth = oracle.arl(logits, target)
        first = torch.autograd.grad(scale * loss, leaves, retain_graph=True)
        saved = [g.clone() for g in first]
        second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, saved, strict=True))
        for g in first:
            g.zero_()
        third = torch.autograd.grad(loss, leaves)
        for a, b, c, t in zip(saved, second, third, truth.grads, strict=True):
            assert relative(a, scale * t) < 3e-6
            assert relative(b, 2 * t) < 3e-6
            assert relative(c, t) < 3e-6


def test_no_double_backward(implementation):
    logits, target = make()
    leaves = [x.requires_grad_() for x in logits]
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss * loss, leaves, create_graph=True)


def test_gradient_for_some_branches_only(implementation):
    logits, target = make()
    truth = oracle.arl(logits, target)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [x.detach().requires_grad_(w) for x, w in zip(logits, wanted, strict=True)]
        loss, _ = arl_loss(leaves[0], leaves[1:], target, link=torch.zeros(2))
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, w, t in zip(leaves, wanted, truth.grads, strict=True):
            assert (leaf.grad is not None) == w
            assert not w or relative(leaf.grad, t) < 3e-6


@pytest.mark.parametrize("gain", ["residual", "mean_one", "plain"])
def test_gains_on_encoders_and_one_on_the_head(implementation, gain):
    """Equation 19 end to end: features times the stated gain, the head's own parameters as if there were
    none.
    """
    head = arl_fast.ConcatHead({"audio": 4, "visual": 3}, 5)
    target = torch.randint(0, 5, (6,))
    criterion = ARLLoss(gain=gain, gamma=1.5)
    z = {"audio": torch.randn(6, 4, requires_grad=True), "visual": torch.randn(6, 3, requires_grad=True)}
    (criterion(head(z), target) * 0.25).backward()
    scaled = {name: x.grad.clone() for name, x in z.items()}
    head_grads = [p.grad.clone() for p in head.parameters()]
    gains = dict(zip(z, criterion.stats.gains, strict=True))
    for x in [*z.values(), *head.parameters()]:
        x.grad = None
    (ARLLoss(rule="none", gamma=1.5)(head(z), target) * 0.25).backward()
    for name, x in z.items():
        torch.testing.assert_close(scaled[name], gains[name] * x.grad)
    for p, g in zip(head.parameters(), head_grads, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_modulate_dtypes(implementation):
    """The gain is applied in float32 and rounded once, for features of any shape and dtype."""
    for dtype in DTYPES:
        z = [
            torch.randn(3, 4, dtype=dtype, requires_grad=True),
            torch.randn(2, 2, 2, dtype=dtype, requires_grad=True),
        ]
        out, link = arl_fast.modulate(z)
        assert all(torch.equal(a, b) for a, b in zip(out, z, strict=True))
        assert link.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        upstream = [torch.randn_like(x) for x in z]
        gains = torch.tensor([1.37, 0.61], dtype=link.dtype)
        torch.autograd.backward([*out, link], [*upstream, gains - 1])
        for x, g, a in zip(z, upstream, gains, strict=True):
            torch.testing.assert_close(x.grad, (g.to(link.dtype) * a).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options", [dict(), dict(label_smoothing=0.1, reduction="sum"), dict(reduction="none")], ids=str
)
def test_gradcheck(implementation, options):
    logits, target = make(batch=3, classes=4, dtype=torch.float64)
    target[0] = -100
    weight = torch.rand(4, dtype=torch.float64)

    def loss(*x):
        return arl_loss(x[0], x[1:], target, rule="none", gamma=0.7, weight=weight, **options)[0]

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in logits])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_through_the_head(implementation, reduction):
    """Features to loss: autograd's gradient is the numerical one times the gain."""
    head = arl_fast.SharedHead([3, 3], 4).double()
    target = torch.randint(0, 4, (3,))
    z = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    criterion = ARLLoss(reduction=reduction)
    upstream = (
        torch.randn(3, dtype=torch.float64) if reduction == "none" else torch.tensor(1.3, dtype=torch.float64)
    )
    grads = torch.autograd.grad(criterion(head(z), target), z, upstream)
    gains = criterion.stats.gains

    def value(*features):
        with torch.no_grad():
            return float((criterion(head(list(features)), target) * upstream).sum())

    step = 1e-6
    for m, (x, g) in enumerate(zip(z, grads, strict=True)):
        numeric = torch.zeros_like(x)
        for i in range(x.numel()):
            plus, minus = (x.detach().clone() for _ in range(2))
            plus.view(-1)[i] += step
            minus.view(-1)[i] -= step
            others = [t.detach() for t in z]
            numeric.view(-1)[i] = (
                value(*others[:m], plus, *others[m + 1 :]) - value(*others[:m], minus, *others[m + 1 :])
            ) / (2 * step)
        torch.testing.assert_close(g, gains[m] * numeric, rtol=1e-6, atol=1e-8)


def test_deterministic(implementation):
    logits, target = make(batch=64, classes=40)
    first = run(logits, target)
    for _ in range(3):
        again = run(logits, target)
        assert torch.equal(first[0], again[0])
        assert all(
            torch.equal(a, b) for a, b in zip([*first[1], *first[2]], [*again[1], *again[2]], strict=True)
        )
