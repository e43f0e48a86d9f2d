"""The native CPU kernels for task="multilabel": instruction sets, threads, and the eager step in one call.

Truth is the reference in float64, which test_multilabel.py checks against the formulas, and torch's own loss.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import arl_fast
from arl_fast import arl_loss
from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule, make_options
from arl_fast._core.stats import unpack
from arl_fast.implementations import dispatch, reference

native, REASON = dispatch.load("native", "cpu")
pytestmark = pytest.mark.skipif(native is None, reason=REASON)
ISAS = native._C.available_isas() if native else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-6}


@pytest.fixture(autouse=True)
def only_native(monkeypatch):
    monkeypatch.setattr(dispatch, "override", "native")
    isa = native._C.isa()
    yield
    native._C.set_isa(isa)


def inputs(shape=(33, 37), dtype=torch.float32, unknown=True, soft=True):
    """Logits of three branches, and labels in float32 of which some are soft and some not known."""
    logits = [(3 * torch.randn(shape)).to(dtype) for _ in range(3)]
    target = torch.randint(0, 2, shape).float()
    if soft:
        target = torch.where(torch.rand(shape) < 0.2, torch.rand(shape), target)
    return logits, torch.where(torch.rand(shape) < 0.2, math.nan, target) if unknown else target


def wide(values):
    """The same in float64, tensors inside of tuples included."""
    if isinstance(values, torch.Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, (tuple, list)):
        own = [wide(v) for v in values]
        return type(values)(*own) if hasattr(values, "_fields") else type(values)(own)
    return values


def compare(logits, targets, options):
    """The kernels next to the reference in float64."""
    schedule = Schedule(2.0, 8.0)
    dtype = logits[0].dtype
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    got = native.forward(logits, targets, schedule, options, True)
    want = reference.forward(wide(logits), wide(targets), schedule, options, True)
    assert got[0].dtype == got[1].dtype == dtypes.compute_dtype(dtype)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=exact, atol=exact, equal_nan=True)
    for g, w in zip(got[2], want[2], strict=True):
        assert g.dtype == dtypes.grad_dtype(dtype)
        torch.testing.assert_close(g.double(), w, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (37, 1), (64, 6), (70, 28), (129, 48), (33, 309), (3, 5000)]
)
def test_every_instruction_set(poisoned, isa, dtype, shape):
    """All branches of the kernel: known labels only or not, weights or not, a mask or not, each reduction."""
    native._C.set_isa(isa)
    rows, labels = shape
    compute = dtypes.compute_dtype(dtype)
    weight, pos_weight = torch.rand(labels, dtype=compute) + 0.1, torch.rand(labels, dtype=compute) + 0.5
    mask = torch.rand(rows, 2) > 0.3
    for unknown in (False, True):
        logits, target = inputs(shape, dtype, unknown)
        for i, extras in enumerate([(), (mask,), (None, weight), (mask, weight)]):
            targets = Targets(target, *extras)._replace(pos_weight=pos_weight if i % 3 else None)
            for reduction in ("mean", "sum", "none"):
                dependence = "logit_l1" if reduction == "sum" else "confidence"
                options = make_options(task="multilabel", reduction=reduction, dependence=dependence)
                scaled = targets if reduction == "sum" else targets._replace(divisor=torch.rand(3) + 1)
                for chosen in (targets, scaled):
                    compare(logits, chosen, options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_losses_and_gradients_keep_their_digits(isa, dtype):
    """Pair by pair, from uncertain to nearly certain: relative to the value, not to the largest one."""
    native._C.set_isa(isa)
    lowest = 80 if dtype == torch.float32 else 600
    x = torch.cat([torch.linspace(-lowest, lowest, 4001, dtype=dtype), torch.randn(96, dtype=dtype) * 1e-3])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-30], dtype=dtype)]).view(-1, 1)
    options = make_options(task="multilabel", reduction="none")
    for label in (0.0, 1.0):
        target = torch.full_like(x, label)
        loss, _, (g, _) = native.forward([x, x], Targets(target), Schedule(0.0, 8.0), options, True)
        z = x.double() * (1 - 2 * label)  # the wrong answer has the probability sigmoid(z)
        p = torch.sigmoid(z)
        expected = z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))
        tolerance = dict(rtol=4e-7 if dtype == torch.float32 else 2e-15, atol=0)
        torch.testing.assert_close(loss.double(), expected, **tolerance)
        torch.testing.assert_close(g.double(), p * (1 - 2 * label), **tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(64, 1), (64, 28), (64, 309)])
def test_error_is_not_above_torchs(isa, shape):
    """Loss and gradient in float32, next to those of torch's own loss."""
    native._C.set_isa(isa)
    logits, target = inputs(shape, unknown=False, soft=False)
    for scale in (1, 10):
        x = logits[0] * scale
        truth, own, ours = (x.to(d).requires_grad_() for d in (torch.float64, torch.float32, torch.float32))
        losses = [F.binary_cross_entropy_with_logits(z, target.to(z.dtype)) for z in (truth, own)]
        loss, stats = arl_loss(ours, [x, x], target, rule="none", task="multilabel")
        for each in (*losses, loss):
            each.backward()
        losses = [each.detach() for each in losses] + [stats.loss[0]]
        errors = [(z.grad.double() - truth.grad).norm() / truth.grad.norm() for z in (own, ours)]
        assert errors[1] <= errors[0] + 6e-8  # half a unit in the last place
        errors = [abs(float(each) / float(losses[0]) - 1) for each in losses[1:]]
        assert errors[1] <= errors[0] + 5e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_answers(isa, dtype):
    """Logits of +-1e4 and infinite ones: entropy 0, gradients 0 and +-1; a wrong one costs 1e4."""
    native._C.set_isa(isa)
    options = make_options(task="multilabel", reduction="none", dependence="logit_l1")
    x = torch.tensor([[1e4, 1e4, -1e4, -1e4]] * 9).to(dtype)
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 9)
    loss, packed, grads = native.forward([x, x], Targets(target), Schedule(0.0, 8.0), options, True)
    size = float(x[0, 0])
    assert loss[0].tolist() == [0, size, size, 0]
    stats = unpack(packed)
    assert stats.entropy.tolist() == [0]
    assert stats.dependence.tolist() == [size]
    assert stats.accuracy.tolist() == [0.5, 0.5]
    for infinite in (x, x * math.inf):
        _, packed, grads = native.forward(
            [infinite, infinite], Targets(target), Schedule(1.0, 8.0), options, True
        )
        assert unpack(packed).entropy.tolist() == [0]
        assert grads[1][0].tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("isa", ISAS)
def test_which_answers_are_correct(isa):
    """A logit of 0 says no, a label of 1/2 is a no."""
    native._C.set_isa(isa)
    options = make_options(task="multilabel")
    for x in (-1.0, -0.0, 0.0, 1e-30, 1.0):
        for t in (0.0, 0.5, 0.500001, 1.0, math.nan):
            logits, target = torch.full((21, 1), x), torch.full((21, 1), t)
            _, packed, _ = native.forward([logits] * 2, Targets(target), Schedule(1.0, 8.0), options, True)
            expected = 0.0 if math.isnan(t) else float((x > 0) == (t > 0.5))
            assert unpack(packed).accuracy.tolist() == [expected] * 2


@pytest.mark.parametrize("isa", ISAS)
def test_what_does_not_count_is_never_read(poisoned, isa):
    """NaN logits beside unknown labels and absent modalities; a NaN that counts shows."""
    native._C.set_isa(isa)
    for shape in ((33, 1), (33, 6), (5, 40)):
        logits, target = inputs(shape)
        mask = torch.rand(shape[0], 2) > 0.5
        clean = [x.clone() for x in logits]
        for b, x in enumerate(logits):
            x[target.isnan()] = math.nan
            if b:
                x[~mask[:, b - 1]] = math.nan
        for reduction in ("mean", "none"):
            options = make_options(task="multilabel", reduction=reduction)
            run = [
                native.forward(z, Targets(target, mask), Schedule(1.0, 8.0), options, True)
                for z in (logits, clean)
            ]
            for got, want in zip([*run[0][:2], *run[0][2]], [*run[1][:2], *run[1][2]], strict=True):
                assert got.isfinite().all()
                assert torch.equal(got, want)
    logits, target = inputs((33, 6), unknown=False)
    logits[1][3, 2] = math.nan
    loss, stats = arl_loss(logits[0], logits[1:], target, task="multilabel")
    assert loss.isnan()
    assert stats.gains.isnan().all()


def test_nothing_counts():
    """As torch's mean of nothing: NaN for the fused branch; an absent modality adds nothing."""
    x = torch.randn(4, 3)
    unknown = torch.full((4, 3), math.nan)
    loss, packed, grads = native.forward(
        [x, x], Targets(unknown), Schedule(1.0, 8.0), make_options(task="multilabel"), True
    )
    assert loss.isnan()
    assert all(g.eq(0).all() for g in grads)
    known, absent = torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.bool)
    loss, packed, grads = native.forward(
        [x, x], Targets(known, absent), Schedule(1.0, 8.0), make_options(task="multilabel"), True
    )
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(x, known))
    assert grads[1].eq(0).all()
    assert unpack(packed).count.tolist() == [12, 0]


@pytest.mark.parametrize("shape", [(5000, 1), (600, 28), (40, 5000)])
def test_threads_do_not_change_a_bit(shape):
    logits, target = inputs(shape)
    mask = torch.rand(shape[0], 2) > 0.3
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for options in (Options(task="multilabel"), Options(task="multilabel", reduction="none")):
                loss, packed, grads = native.forward(
                    logits, Targets(target, mask), Schedule(1.0, 8.0), options, True
                )
                results.append(torch.cat([x.reshape(-1) for x in (loss, packed, *grads)]))
    finally:
        torch.set_num_threads(before)
    for first, *others in (results[::2], results[1::2]):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("classes", [1, 6, 60])
def test_rows_of_any_stride(poisoned, classes):
    """Rows with a gap, a class stride, expanded rows, an offset that no vector load likes, strided labels."""
    logits, target = inputs((20, classes))
    gap = [
        torch.full((20, 2 * classes + 3), math.nan).index_copy(1, torch.arange(classes), x) for x in logits
    ]
    views = [gap[0][:, :classes], logits[1].t().contiguous().t(), torch.stack([logits[2]] * 2, 1)[:, 0]]
    shifted = [torch.cat([torch.zeros(1), x.reshape(-1)])[1:].view(20, classes) for x in logits]
    expanded = [logits[0][:1].expand(20, classes)] * 3
    strided = torch.stack([target] * 2, 1)[:, 0]
    mask = torch.rand(20, 2) > 0.3
    pos_weight = torch.rand(classes)
    for reduction in ("mean", "none"):
        options = make_options(task="multilabel", reduction=reduction)
        for x, y in ((views, strided), (shifted, target), (expanded, target.t().contiguous().t())):
            compare(x, Targets(y, mask, pos_weight=pos_weight), options)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_of_any_dtype(dtype, target_dtype):
    logits, target = inputs(dtype=dtype)
    target = target.to(target_dtype)
    compare(logits, Targets(target.to(dtypes.compute_dtype(dtype))), make_options(task="multilabel"))
    _, stats = arl_loss(logits[0], logits[1:], target, task="multilabel")
    _, want = arl_loss(logits[0], logits[1:], target.to(dtypes.compute_dtype(dtype)), task="multilabel")
    assert all(torch.equal(a, b) for a, b in zip(stats, want, strict=True))


# ---- the step in one call --------------------------------------------------------------------------------


@pytest.fixture
def fast_calls(count_served):
    """Counts the calls that fast_loss has served."""
    return count_served("fast_loss")


def step(logits, target, upstream=None, **options):
    """Loss, statistics, gradients of logits, and the gains, of which the link's gradient has the digits
    behind 1.
    """
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in logits]
    link = torch.zeros(2, dtype=dtypes.compute_dtype(logits[0].dtype), requires_grad=True)
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link, task="multilabel", **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return [loss.detach(), *stats, *(x.grad for x in leaves), 1 + link.grad]


OPTIONS = [
    dict(),
    dict(rule="paper", dependence="logit_l1", gain="mean_one"),
    dict(rule="none", reduction="sum", gamma=0.5),
    dict(warming=True, gamma=(0.5, 2.0)),
    dict(gamma=torch.tensor([0.5, 2.0]), temperature=torch.tensor(3), warming=torch.tensor(False)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 37), (9, 1), (6, 4, 3, 5), (0, 4), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_fast_step_equals_the_general_one(poisoned, options, dtype, shape, extras, fast_calls, monkeypatch):
    logits, target = inputs(shape, dtype)
    compute = dtypes.compute_dtype(dtype)
    if extras:
        weights = dict(
            weight=torch.rand(shape[1], dtype=compute), pos_weight=torch.rand(shape[1], dtype=compute)
        )
        options = options | weights | dict(mask=torch.rand(shape[0], 2) > 0.4)
    upstream = torch.tensor(0.5, dtype=compute)
    fast = step(logits, target, upstream, **options)
    assert fast_calls == [True]
    monkeypatch.setattr(dispatch, "native_steps", lambda: None)
    general = step(logits, target, upstream, **options)
    for got, want in zip(fast, general, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


UNUSUAL = {
    "no reduction": lambda x, y: (x, y, dict(reduction="none")),
    "channels last": lambda x, y: (
        [z.view(3, 11, 37, 1).to(memory_format=torch.channels_last) for z in x],
        y.view(3, 11, 37, 1),
        {},
    ),
    "class stride": lambda x, y: ([z.t().contiguous().t() for z in x], y, {}),
    "the baseline": lambda x, y: (x, y, dict(rule="none", gamma=0.0)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_steps_take_the_general_way(name, fast_calls, monkeypatch):
    logits, target, options = UNUSUAL[name](*inputs())
    results = step(logits, target, **options)
    assert fast_calls == [False]
    monkeypatch.setattr(dispatch, "override", "reference")
    for got, want in zip(results, step(logits, target, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_wrong_labels_raise_from_the_fast_step_too(fast_calls):
    logits, target = inputs(unknown=False)
    for wrong in (1.5, -0.25, math.inf, 1.0000001):
        bad = target.clone()
        bad[20, 3] = wrong
        with pytest.raises(ValueError, match=r"target: got .*, expected labels in \[0, 1\], or NaN") as error:
            arl_loss(logits[0], logits[1:], bad, task="multilabel")
        assert float(str(error.value).split()[2].rstrip(",")) == float(bad[20, 3])
        weight = torch.randn(37, 8, requires_grad=True)
        features = [torch.randn(33, 4), torch.randn(33, 4)]
        with pytest.raises(ValueError, match=r"target: got .*, expected labels in \[0, 1\], or NaN"):
            arl_fast.linear_arl_loss(features, weight, None, bad, task="multilabel")
    with pytest.raises(TypeError, match=r"target: got dtype torch\.int64"):
        arl_loss(logits[0], logits[1:], target.long(), task="multilabel")
    with pytest.raises(ValueError, match=r"target: .* require grad"):
        arl_loss(logits[0], logits[1:], target.requires_grad_(), task="multilabel")
    assert not any(fast_calls)
    with pytest.raises(ValueError, match="pos_weight: expected None without labels"):
        native._C.forward(
            logits, Targets(target, pos_weight=torch.ones(37)), Schedule(1.0, 8.0), Options(), True
        )
    with pytest.raises(TypeError, match="target: expected labels of floating point"):
        native._C.forward(
            logits, Targets(target.long()), Schedule(1.0, 8.0), Options(task="multilabel"), True
        )


def test_retained_graph_and_autocast():
    """float16 gradients are rounded after the loss scale; under autocast a head's logits are bfloat16."""
    logits, target = inputs(dtype=torch.float16)
    leaves = [x.requires_grad_() for x in logits]
    loss, _ = arl_loss(
        leaves[0], leaves[1:], target, rule="none", task="multilabel", weight=torch.full((37,), 1e-4)
    )
    first = torch.autograd.grad(loss, leaves, torch.tensor(2.0**16), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.tensor(2.0**16))
    assert all(torch.equal(a, b) and a.ne(0).any() for a, b in zip(first, again, strict=True))
    head = arl_fast.ConcatHead({"a": 5, "b": 3}, 4)
    z = {"a": torch.randn(9, 5, requires_grad=True), "b": torch.randn(9, 3, requires_grad=True)}
    target = torch.randint(0, 2, (9, 4)).float()
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = head(z)
            loss = arl_fast.ARLLoss(task="multilabel")(out, target)
        assert out.fused.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert loss.dtype == torch.float32
        results.append([loss, *torch.autograd.grad(loss, list(z.values()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 20])
def test_linear_head_in_one_call(count_served, monkeypatch, dtype, classes):
    """The loss overwrites the logits by their gradients."""
    served = count_served("fast_linear_loss")
    head = arl_fast.ConcatHead({"a": 5, "b": 3}, classes).to(dtype)
    z = {name: torch.randn(9, size, dtype=dtype, requires_grad=True) for name, size in (("a", 5), ("b", 3))}
    _, target = inputs((9, classes))
    options = dict(pos_weight=torch.rand(classes, dtype=dtypes.compute_dtype(dtype)), gamma=0.5)
    criterion = arl_fast.ARLLoss(task="multilabel", **options)
    mask = torch.rand(9, 2) > 0.3
    leaves = [*z.values(), *head.parameters()]
    loss, stats = head.loss(z, target, criterion, mask)
    grads = torch.autograd.grad(loss, leaves)
    assert served == [True]
    want, want_stats = criterion(head(z, mask), target, mask), criterion.stats
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=2e-6, atol=2e-6)
    for a, b in zip([loss, *stats], [want, *want_stats], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_who_serves_labels(monkeypatch):
    """The kernels, but for the loss that is torch's own to the last bit."""
    x, options = torch.randn(2, 2), make_options(task="multilabel")
    plain = make_options(task="multilabel", rule="none")
    assert dispatch.for_loss(x, options, Schedule(1.0, 8.0)) is native
    assert dispatch.for_loss(x, plain, Schedule(0.0, 8.0)) is reference
    monkeypatch.setattr(dispatch, "override", None)
    assert dispatch.for_loss(x, options, Schedule(1.0, 8.0)) is native
    monkeypatch.setattr(dispatch, "override", "reference")
    assert dispatch.for_loss(x, options, Schedule(1.0, 8.0)) is reference
