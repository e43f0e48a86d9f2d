"""Linear head and loss in one: equal to head + arl_loss whatever the chunks, and never more than a chunk of
logits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn
from torch.utils._python_dispatch import TorchDispatchMode

import arl_fast
from arl_fast import ARLLoss, ConcatHead, SharedHead, SumHead, arl_loss, linear_arl_loss
from arl_fast._autograd import products
from arl_fast.implementations import dispatch

CLASSES = 6
CHUNKS = [None, 1, 4, 9]  # as many as fit the budget; row by row; a short last chunk; exactly the batch
HEADS = {
    "concat-full": lambda dims: ConcatHead(dims, CLASSES),
    "concat-split": lambda dims: ConcatHead(dims, CLASSES, bias="split"),
    "concat-none": lambda dims: ConcatHead(dims, CLASSES, bias=False),
    "sum": lambda dims: SumHead(dims, CLASSES),
    "sum-none": lambda dims: SumHead(dims, CLASSES, bias=False),
    "shared": lambda dims: SharedHead([dims[0]] * len(dims), CLASSES),
    "shared-none": lambda dims: SharedHead([dims[0]] * len(dims), CLASSES, bias=False),
}


def make(kind="concat-full", modalities=2, batch=9, dtype=torch.float64, shape=()):
    """A head whose branches disagree, features that need gradients, and class indices."""
    dims = [5, 3, 4, 2][:modalities]
    head = HEADS[kind](dims)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape))
    head = head.to(dtype)
    features = [
        torch.randn(batch, *shape, dim, dtype=torch.float64).to(dtype).requires_grad_() for dim in head.dims
    ]
    return head, features, torch.randint(0, CLASSES, (batch, *shape))


def gradients(loss, head, features, upstream=None):
    leaves = [*features, *head.parameters()]
    return torch.autograd.grad(
        loss, leaves, torch.ones_like(loss) if upstream is None else upstream, allow_unused=True
    )


def composed(head, features, target, upstream=None, zero_absent=True, **options):
    """The oracle: the head's logits, then arl_loss. Dense features [B, T, D] give logits [B, C, T].

    A head, and its loss, put zeros in the place of absent features; linear_arl_loss takes them as given.
    """
    out = head(features, options.get("mask") if zero_absent else None)
    loss, stats = arl_loss(out.fused, out.unimodal, target, out.link, **options)
    return loss, stats, gradients(loss, head, features, upstream)


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    error, size = (got - want).norm(), want.norm()
    return float(error / size) if size > 0 else float(error)


def check(head, features, target, chunk, upstream=None, tolerance=1e-10, **options):
    loss, stats = head.loss(features, target, chunk=chunk, **options)
    want_loss, want_stats, want = composed(head, features, target, upstream, **options)
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    for name, value in want_stats._asdict().items():
        torch.testing.assert_close(
            getattr(stats, name), value, rtol=tolerance, atol=tolerance, equal_nan=True
        )
        assert not getattr(stats, name).requires_grad
    got = gradients(loss, head, features, upstream)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        assert not g.isnan().any()
        assert relative(g, w) < tolerance
    return stats, got


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", HEADS)
def test_equals_head_and_loss(implementation, poisoned, kind, modalities, chunk):
    stats, got = check(*make(kind, modalities), chunk)
    assert all(g.norm() > 1e-3 for g in got)
    assert modalities == 1 or float(stats.gains.std()) > 1e-4  # or swapped gains would not show


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rule", ["share", "paper", "constant", "none"])
@pytest.mark.parametrize("gain", ["residual", "mean_one", "plain"])
def test_rules(implementation, rule, gain, chunk):
    check(
        *make(),
        chunk,
        rule=rule,
        gain=gain,
        dependence="logit_l1",
        temperature=3.0,
        gamma=2.5,
        entropy_floor=0.1,
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ogm(implementation, chunk):
    stats, _ = check(*make(), chunk, rule="ogm", temperature=0.3, gamma=0.5)
    assert float(stats.gains.min()) < 1


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(weight=True), dict(label_smoothing=0.2), dict(weight=True, label_smoothing=0.2)],
    ids=str,
)
def test_cross_entropy_options(implementation, reduction, soft, options, chunk):
    head, features, target = make()
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(CLASSES, dtype=torch.float64) + 0.1
    if soft:
        target = torch.softmax(torch.randn(9, CLASSES, dtype=torch.float64), 1)
    else:
        target[[2, 5]] = 3
        options["ignore_index"] = 3
    upstream = (
        torch.randn(9, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7, dtype=torch.float64)
    )
    mask = torch.rand(9, 2) > 0.3
    check(head, features, target, chunk, upstream, reduction=reduction, mask=mask, **options)


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_dense(implementation, reduction, soft, chunk):
    """Features [B, d1, d2, D]; target and returned logits as arl_loss has them, classes second."""
    head, features, target = make("sum", batch=3, shape=(2, 4))
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    if soft:
        target = torch.softmax(torch.randn(3, CLASSES, 2, 4, dtype=torch.float64), 1)
    upstream = torch.randn(3, 2, 4, dtype=torch.float64) if reduction == "none" else None
    check(head, features, target, chunk, upstream, reduction=reduction, mask=mask)
    weights, bias = head.weights_and_bias()
    *_, logits = linear_arl_loss(
        features, weights, bias, target, fusion="sum", chunk=chunk, return_logits=True
    )
    torch.testing.assert_close(logits.fused, head(features).fused.detach())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_absent_modality_and_ignored_targets(implementation, poisoned, chunk):
    head, features, target = make(modalities=3)
    mask = torch.ones(9, 3, dtype=torch.bool)
    mask[:, 1] = False
    stats, got = check(head, features, target, chunk, mask=mask)
    assert stats.gains[1] == 1
    assert got[1].norm() == 0  # zeros stand for it in the fused prediction
    ignored = torch.full_like(target, -100)
    loss, _ = head.loss(features, ignored, chunk=chunk)
    assert loss.isnan()  # as torch
    for g in gradients(loss, head, features):
        assert g.eq(0).all() or g.isnan().all()
    ignored[-1] = 2  # only the last chunk has a row
    check(head, features, ignored, chunk)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_batch(implementation, reduction):
    head, features, target = make(batch=0)
    loss, stats = head.loss(features, target, reduction=reduction)
    for g in gradients(loss, head, features):
        assert g.eq(0).all()
    assert stats.count.eq(0).all()


@pytest.mark.parametrize("chunk", [None, 64, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck(kind, reduction, chunk):
    """Numerical derivatives of the loss; a gain is not part of the loss, so with one the gradients divided by
    it.
    """
    head, features, target = make(kind, batch=5)
    weights, bias = head.weights_and_bias()
    leaves = [*features, *head.parameters()]
    mode = "split" if kind == "concat-split" else "full"

    def loss(*_, rule="none"):
        return linear_arl_loss(
            features,
            weights,
            bias,
            target,
            fusion=head.fusion,
            bias_mode=mode,
            chunk=chunk,
            rule=rule,
            reduction=reduction,
            gamma=1.7,
        )

    assert torch.autograd.gradcheck(lambda *x: loss(*x)[0], leaves)
    scaled, stats = loss(rule="share")
    plain, _ = loss()
    upstream = torch.randn_like(scaled)
    scaled, plain = (torch.autograd.grad(x, leaves, upstream) for x in (scaled, plain))
    for m, (g, p) in enumerate(zip(scaled, plain, strict=True)):
        torch.testing.assert_close(g, p * stats.gains[m] if m < 2 else p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 64, 8])
@pytest.mark.parametrize("kind", ["concat-full", "sum", "shared"])
def test_error_is_that_of_torch(kind, chunk, dtype):
    """Against the same inputs in float64: not more than twice what head + arl_loss loses at this dtype."""
    head, features, target = make(kind, batch=64, dtype=dtype)
    exact = HEADS[kind](head.dims).double()
    exact.load_state_dict({name: p.double() for name, p in head.state_dict().items()})
    upstream = torch.tensor(64.0)
    _, _, truth = composed(
        exact, [z.detach().double().requires_grad_() for z in features], target, upstream.double()
    )
    *_, torchs = composed(head, features, target, upstream)
    loss, _ = head.loss(features, target, chunk=chunk)
    for g, t, want in zip(gradients(loss, head, features, upstream), torchs, truth, strict=True):
        assert g.dtype == dtype
        assert relative(g, want) <= 2 * relative(t, want) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("kind", ["concat-full", "shared"])
def test_sums_over_many_chunks_do_not_round(kind):
    """bfloat16 in 256 chunks: added up in bfloat16, the late ones would hardly count."""
    head, features, target = make(kind, batch=512, dtype=torch.bfloat16)
    exact = HEADS[kind](head.dims).double()
    exact.load_state_dict({name: p.double() for name, p in head.state_dict().items()})
    _, _, truth = composed(exact, [z.detach().double().requires_grad_() for z in features], target)
    loss, _ = head.loss(features, target, chunk=2)
    for g, want in zip(gradients(loss, head, features), truth, strict=True):
        assert relative(g, want) < 8e-3


class Products(TorchDispatchMode):
    """The dtypes of the matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.name():
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("chunk", [None, 64, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, chunk):
    head, features, target = make("sum", batch=32, dtype=torch.float32)
    with Products() as products:
        with torch.autocast("cpu", dtype=dtype):
            loss, _ = head.loss(features, target, chunk=chunk)
        gradients(loss, head, features)
    assert products.dtypes == {dtype}
    with torch.autocast("cpu", dtype=dtype):
        loss, stats = head.loss(features, target, chunk=chunk)
        out = head(features)
        assert out.fused.dtype == dtype
        want, want_stats = arl_loss(out.fused, out.unimodal, target, out.link)
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, want, rtol=4 * eps, atol=0)
    torch.testing.assert_close(stats.entropy, want_stats.entropy, rtol=4 * eps, atol=0)
    exact, _, truth = composed(head, features, target)  # without autocast
    assert relative(loss, exact) > eps / 100  # the products did run at the lower precision
    for g, w, t in zip(gradients(loss, head, features), gradients(want, head, features), truth, strict=True):
        assert g.dtype == torch.float32
        assert relative(g, t) < 2 * relative(w, t) + eps / 4


@pytest.mark.parametrize("chunk", [None, 64])
def test_float16_needs_the_loss_scale_before_it_rounds(chunk):
    """Means over many rows have gradients below float16's smallest number; a loss scale must save them."""
    head, features, target = make("sum", batch=4096, dtype=torch.float16)
    scale = torch.tensor(2.0**14)
    loss, _ = head.loss([z.detach().mul(1e-3).requires_grad_() for z in features], target, chunk=chunk)
    exact = SumHead(head.dims, CLASSES).double()
    exact.load_state_dict({name: p.double() for name, p in head.state_dict().items()})
    small = [z.detach().mul(1e-3) for z in features]
    want, _ = exact.loss([z.double() for z in small], target, rule="none")
    weights = [layer.weight for layer in head.layers]
    truth = torch.autograd.grad(want, [layer.weight for layer in exact.layers], scale.double())
    for g, t in zip(torch.autograd.grad(loss, weights, scale), truth, strict=True):
        assert relative(g, t) < 5e-3


@pytest.mark.parametrize("chunk", [None, 64, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_survives(implementation, chunk, reduction):
    head, features, target = make()
    loss, _ = head.loss(features, target, chunk=chunk, reduction=reduction)
    leaves = [*features, *head.parameters()]
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.mul_(0)  # what a user or an optimizer may do
    again = torch.autograd.grad(loss, leaves, upstream)
    for a, b in zip(copies, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("chunk", [None, 64, 4])
def test_accumulation(implementation, chunk):
    """Two micro-batches into .grad, one forward before the other's backward."""
    head, features, target = make()
    want = [
        a + b
        for a, b in zip(*(composed(head, features, y)[2] for y in (target, target.flip(0))), strict=True)
    ]
    losses = [head.loss(features, y, chunk=chunk)[0] for y in (target, target.flip(0))]
    for loss in losses:
        loss.backward()
    for leaf, w in zip([*features, *head.parameters()], want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


@pytest.mark.parametrize("chunk", [None, 64, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["concat-full", "sum", "shared"])
def test_only_wanted_gradients(kind, reduction, chunk):
    """A frozen encoder, a frozen head, a frozen layer."""
    head, features, target = make(kind)
    _, _, want = composed(head, features, target)
    leaves = [*features, *head.parameters()]
    for frozen in itertools.chain([range(2), range(2, len(leaves))], ([i] for i in range(len(leaves)))):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i not in frozen)
        loss, _ = head.loss(features, target, chunk=chunk, reduction=reduction)
        wanted = [i for i in range(len(leaves)) if i not in frozen]
        got = torch.autograd.grad(
            loss, [leaves[i] for i in wanted], torch.full_like(loss, 1 / 9 if reduction == "none" else 1)
        )
        for i, g in zip(wanted, got, strict=True):
            torch.testing.assert_close(g, want[i])


def test_concat_weights_in_a_list_and_dicts():
    head, (a, b), target = make()
    want, stats = head.loss([a, b], target)
    pieces = [w.detach().clone().requires_grad_() for w in head.weight.split(head.dims, 1)]
    named = dict(zip("ab", pieces, strict=True))
    for weights in (pieces, dict(reversed(named.items()))):
        features = {"a": a, "b": b}
        loss, got, logits = linear_arl_loss(features, weights, head.bias, target, chunk=4, return_logits=True)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(got.gains, stats.gains)
        assert list(logits.unimodal) == ["a", "b"]
        grads = torch.autograd.grad(loss, pieces)
        torch.testing.assert_close(
            torch.cat(grads, 1), torch.autograd.grad(want, head.weight, retain_graph=True)[0]
        )


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", ["concat-full", "concat-split", "shared"])
def test_returned_logits(kind, chunk):
    head, features, target = make(kind)
    weights, bias = head.weights_and_bias()
    mode = "split" if kind == "concat-split" else "full"
    loss, _, logits = linear_arl_loss(
        features, weights, bias, target, fusion=head.fusion, bias_mode=mode, chunk=chunk, return_logits=True
    )
    want = head(features)
    for got, x in zip([logits.fused, *logits.unimodal], [want.fused, *want.unimodal], strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, x.detach())
    assert logits.link is None
    loss.backward()


class Largest(TorchDispatchMode):
    """The most float32 elements in the memory of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_never_more_than_a_chunk_of_logits(reduction, soft, monkeypatch):
    """Forward and backward, with 64 x 1000 logits and chunks of 8 rows."""
    monkeypatch.setattr(dispatch, "override", "reference")
    head = ConcatHead([3, 2], 1000)
    features = [torch.randn(64, dim, requires_grad=True) for dim in (3, 2)]
    target = torch.randint(0, 1000, (64,))
    if soft:
        target = torch.nn.functional.one_hot(target, 1000).float()
    with Largest() as largest:
        loss, _ = head.loss(features, target, chunk=8, reduction=reduction)
        loss.sum().backward()
    assert largest.elements <= (64 * 1000 if soft else 8 * 1000)  # soft targets are given whole


def test_chunk_follows_the_memory_budget():
    for classes, modalities, dtype in itertools.product(
        [6, 1000, 32000, 262144], [1, 2, 4], [torch.float32, torch.bfloat16, torch.float16]
    ):
        size = 6 if dtype == torch.float16 else 2 * dtype.itemsize
        for rows in (1, 64, 4096, 100_000):
            chunk = products.chunk_rows(rows, classes, modalities, dtype, "cpu")
            held = min(chunk, rows) * (modalities + 1) * classes * size
            assert held <= products.BUDGET["cpu"]
            number = -(-rows // chunk)
            assert chunk * number - rows < max(16 * number, chunk)  # chunks of about one size
    assert products.chunk_rows(10**9, 10**9, 4, torch.float32, "cpu") == 1


def test_evaluation_makes_no_gradients(implementation, monkeypatch):
    head, features, target = make()
    want, want_stats, _ = composed(head, features, target)
    asked = []
    module = dispatch.load(implementation, "cpu")[0]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: asked.append(args[-1]) or forward(*args))
    monkeypatch.setattr(
        products.GradientSums, "__init__", lambda *args: pytest.fail("gradient buffers in evaluation")
    )
    for chunk in (None, 4):
        with torch.no_grad():
            loss, stats = head.loss(features, target, chunk=chunk)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want.detach())
        torch.testing.assert_close(stats.gains, want_stats.gains)
    assert asked
    assert not any(asked)


def test_deterministic(implementation):
    head, features, target = make(batch=64, dtype=torch.float32)
    for chunk in (None, 7):
        runs = []
        for _ in range(2):
            loss, stats = head.loss(features, target, chunk=chunk)
            runs.append([loss.detach(), *stats, *gradients(loss, head, features)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("kind", "reduction", "chunk"),
    [("concat-full", "none", None), ("concat-full", "mean", 5), ("sum", "none", 5), ("shared", "mean", None)],
)
def test_compiled_without_a_graph_break(kind, reduction, chunk):
    torch.compiler.reset()
    head, features, target = make(kind)
    compiled = torch.compile(lambda z, y: head.loss(z, y, chunk=chunk, reduction=reduction), fullgraph=True)
    upstream = torch.randn(9, dtype=torch.float64) if reduction == "none" else None
    want, want_stats, want_grads = composed(head, features, target, upstream, reduction=reduction)
    loss, stats = compiled(features, target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats.gains, want_stats.gains)
    for g, w in zip(gradients(loss, head, features, upstream), want_grads, strict=True):
        torch.testing.assert_close(g, w)


def test_compiled_for_any_batch_size():
    torch.compiler.reset()
    compiled = torch.compile(lambda head, z, y: head.loss(z, y), fullgraph=True)
    head, features, target = make()
    for x in (*features, target):
        torch._dynamo.mark_dynamic(x, 0)
    compiled(head, features, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 17):
            z = [x.detach()[:1].repeat(batch, 1).requires_grad_() for x in features]
            y = target[:1].repeat(batch)
            want, _, want_grads = composed(head, z, y)
            loss, _ = compiled(head, z, y)
            torch.testing.assert_close(loss, want)
            for g, w in zip(gradients(loss, head, z), want_grads, strict=True):
                torch.testing.assert_close(g, w)


@pytest.mark.parametrize("chunk", [None, 64, 4])
def test_criterion(implementation, chunk):
    """head.loss with an ARLLoss: its options, class weights, warm-up counter and stats."""
    head, features, target = make()
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1
    options = dict(gamma=2.0, rule="constant", gain="plain", warmup=1, weight=weight, label_smoothing=0.1)
    fused, plain, module = ARLLoss(**options), ARLLoss(**options), ARLLoss(**options)
    assert set(module.state_dict()) == {"weight", "steps"}
    for step in range(2):
        want = plain(head(features), target)
        loss, stats = head.loss(features, target, fused, chunk=chunk)
        other = module.linear(features, head.weight, head.bias, target, chunk=chunk)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(other, want)
        assert torch.equal(stats.gains, fused.stats.gains)
        torch.testing.assert_close(module.stats.gains, plain.stats.gains)
        assert stats.gains[0] == (1.0 if step == 0 else 0.5)
        for got in (loss, other):
            for g, w in zip(
                gradients(got, head, features),
                gradients(plain_loss(plain, head, features, target, step), head, features),
                strict=True,
            ):
                torch.testing.assert_close(g, w)
    assert int(fused.steps) == int(module.steps) == 2


def plain_loss(criterion, head, features, target, step):
    """The criterion's loss in its state of ``step``, without counting."""
    again = ARLLoss(
        **{**criterion.options._asdict(), "gamma": criterion.gamma, "weight": criterion.weight, "warmup": 1}
    )
    again.steps.fill_(step)
    return again(head(features), target)


@pytest.mark.parametrize("chunk", [None, 64, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensor_schedule(implementation, chunk, reduction):
    head, features, target = make()
    warming = torch.tensor(False)
    gamma = torch.tensor(2.0)
    loss, _ = head.loss(features, target, gamma=gamma, warming=warming, chunk=chunk, reduction=reduction)
    want, _, want_grads = composed(head, features, target, gamma=2.0, reduction=reduction)
    gamma.fill_(9.0)  # the next step's; this one's backward has still to run
    torch.testing.assert_close(loss, want)
    for g, w in zip(gradients(loss, head, features), want_grads, strict=True):
        torch.testing.assert_close(g, w)


def test_callable_rule_sees_the_batch_once(implementation):
    head, features, target = make()
    seen = []

    def rule(stats):
        seen.append(stats)
        return torch.softmax(stats.entropy, 0)

    check(head, features, target, 4, rule=rule)
    assert len(seen) == 2  # once here, once in head + arl_loss
    torch.testing.assert_close(seen[0].entropy, seen[1].entropy)


@pytest.mark.parametrize("chunk", [None, 64, 4])
def test_target_out_of_range(implementation, chunk):
    head, features, target = make()
    target[-1] = CLASSES
    with pytest.raises(IndexError, match="got class 6"):
        head.loss(features, target, chunk=chunk, weight=torch.ones(CLASSES, dtype=torch.float64))


def test_modulated_features_are_not_scaled_twice():
    """A link that no loss uses is harmless: features may come out of modulate."""
    head, features, target = make()
    want = composed(head, features, target)[2]
    modulated, _ = arl_fast.modulate(features)
    loss, _ = head.loss(modulated, target)
    for g, w in zip(gradients(loss, head, features), want, strict=True):
        torch.testing.assert_close(g, w)


def _process(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head, features, target = make(batch=9)
    target[7] = -100
    mask = torch.rand(9, 2) > 0.3
    share = slice(0, 2) if rank == 0 else slice(2, 9)
    own = [z.detach()[share].requires_grad_() for z in features]
    found = []
    for reduction, chunk in itertools.product(["mean", "none"], [None, 3]):
        loss, stats = head.loss(
            own, target[share], mask=mask[share], chunk=chunk, sync_stats=True, reduction=reduction
        )
        found.append([loss.detach(), stats.gains, stats.loss, *gradients(loss, head, own)])
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@needs_gloo
def test_statistics_of_two_processes(tmp_path):
    """Unequal shares, one in chunks: averaged over the processes, the gradients of the joined batch."""
    spawn(_process, (str(tmp_path / "store"), str(tmp_path)), 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    head, features, target = make(batch=9)
    target[7] = -100
    mask = torch.rand(9, 2) > 0.3
    for case, (reduction, _) in enumerate(itertools.product(["mean", "none"], [None, 3])):
        want, stats, (dz0, dz1, *rest) = composed(head, features, target, mask=mask, reduction=reduction)
        mean = reduction == "mean"
        joined = want if mean else torch.cat([found[0][case][0], found[1][case][0]])
        torch.testing.assert_close(joined.detach(), want.detach())
        for rank, share in enumerate([slice(0, 2), slice(2, 9)]):
            loss, gains, losses, *grads = found[rank][case]
            torch.testing.assert_close(loss, want.detach() if mean else want.detach()[share])
            torch.testing.assert_close(gains, stats.gains)
            torch.testing.assert_close(losses, stats.loss)
            for g, w in zip(grads, (dz0, dz1), strict=False):
                torch.testing.assert_close(g / (2 if mean else 1), w[share])
        for a, b, w in zip(found[0][case][5:], found[1][case][5:], rest, strict=True):
            torch.testing.assert_close((a + b) / (2 if mean else 1), w)


def test_refuses_what_it_cannot_differentiate():
    head, features, target = make()
    loss, _ = head.loss(features, target)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda z: head.loss([z, features[1]], target)[0])(features[0])


# ---- the usual step on a CPU, one call and one node (csrc/eager/linear.cpp)

native, REASON = dispatch.load("native", "cpu")
NODE = "ARLLinearLossBackward"


@pytest.fixture
def only_native(monkeypatch):
    if native is None:
        pytest.skip(REASON)
    monkeypatch.setattr(dispatch, "override", "native")


@pytest.fixture
def served(only_native, count_served):
    """Whether each call was served by the one in C++."""
    return count_served("fast_linear_loss")


def truth(monkeypatch, *args, **options):
    """Head and loss in plain torch."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "override", "reference")
        return composed(*args, zero_absent=False, **options)


def call(head, features, target, **options):
    """linear_arl_loss with the head's parameters."""
    weights, bias = head.weights_and_bias()
    mode = "split" if head.bias_mode == "split" else "full"
    return linear_arl_loss(features, weights, bias, target, fusion=head.fusion, bias_mode=mode, **options)


ONE_CALL = {
    "defaults": dict(),
    "paper": dict(rule="paper", dependence="logit_l1", gain="mean_one"),
    "constant": dict(rule="constant", gain="plain", entropy_floor=0.2, gamma=0.5, temperature=2.0),
    "none": dict(rule="none", reduction="sum", label_smoothing=0.1),
    "warming": dict(warming=True, gamma=3.0),
    "tensors": dict(gamma=torch.tensor(2.0), temperature=torch.tensor(3), warming=torch.tensor(False)),
    "no-unimodal": dict(gamma=0),
    "masked": dict(
        mask=torch.tensor([[True, False], [False, True], [True, True]]).repeat(3, 1), ignore_index=3
    ),
    "weighted": dict(
        weight=torch.rand(CLASSES, dtype=torch.float64) + 0.1,
        label_smoothing=0.2,
        dependence="logit_l1",
        ignore_index=2,
    ),
}


@pytest.mark.parametrize("case", ONE_CALL)
@pytest.mark.parametrize("kind", HEADS)
def test_one_call_equals_head_and_loss(served, poisoned, monkeypatch, kind, case):
    """In float64: against head + arl_loss in plain torch, head + arl_loss natively, and the general path."""
    options = ONE_CALL[case]
    head, features, target = make(kind)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    loss, stats = call(head, features, target, **options)
    assert loss.grad_fn.name() == NODE
    got = [loss, *stats, *gradients(loss, head, features, upstream)]
    want_loss, want_stats, want = truth(monkeypatch, head, features, target, upstream, **options)
    native_loss, native_stats, native_want = composed(
        head, features, target, upstream, zero_absent=False, **options
    )
    assert served == [True]
    monkeypatch.setattr(dispatch, "native_steps", lambda: None)
    general_loss, general_stats = call(head, features, target, **options)
    assert general_loss.grad_fn.name() != NODE
    for others in (
        [want_loss, *want_stats, *want],
        [native_loss, *native_stats, *native_want],
        [general_loss, *general_stats, *gradients(general_loss, head, features, upstream)],
    ):
        for g, w in zip(got, others, strict=True):
            assert g.dtype == w.dtype
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("modalities", [1, 3, 4])
@pytest.mark.parametrize("kind", HEADS)
def test_one_call_for_any_number_of_modalities(served, poisoned, monkeypatch, kind, modalities):
    head, features, target = make(kind, modalities)
    loss, _ = call(head, features, target)
    _, _, want = truth(monkeypatch, head, features, target)
    assert served == [True]
    for g, w in zip(gradients(loss, head, features), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


# batch, classes, feature sizes
WIDE = {
    "few": (9, 6, [5, 3]),
    "many": (130, 301, [40, 72]),
    "wide": (24, 3000, [520, 410]),
}


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", ["concat", "sum", "shared"])
def test_one_call_at_any_size_and_stride(served, poisoned, fusion, dtype, shape, layout):
    """Against float64: the error of the products is that of the dtype, whatever the memory of features and
    weights.
    """
    batch, classes, dims = WIDE[shape]
    if fusion == "shared":
        dims = [dims[0]] * 2

    def leaf(*size, scale=1.0):
        x = (scale * torch.randn(size, dtype=torch.float64)).to(dtype)
        if layout == "strided":
            x = (
                torch.stack([x, x], 1)[:, 0]
                if len(size) == 1
                else x.t().contiguous().t()
                if size[0] == batch
                else torch.cat([x, x], 1)[:, : size[1]]
            )
        return x.requires_grad_()

    z = [leaf(batch, dim) for dim in dims]
    columns = {"concat": [sum(dims)], "sum": dims, "shared": dims[:1]}[fusion]
    w = [leaf(classes, dim, scale=0.1) for dim in columns]
    b = [leaf(classes) for _ in (dims if fusion == "sum" else dims[:1])]
    target = torch.randint(0, classes, (batch,))

    def grads(z, w, b):
        loss, stats = linear_arl_loss(
            z, w if fusion == "sum" else w[0], b if fusion == "sum" else b[0], target, fusion=fusion
        )
        return [loss.detach(), stats.gains, *torch.autograd.grad(loss, [*z, *w, *b])]

    got = grads(z, w, b)
    want = grads(*([x.detach().double().contiguous().requires_grad_() for x in part] for part in (z, w, b)))
    assert served == [True, True]
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for g, x in zip(got, want, strict=True):
        assert relative(g, x) < tolerance


USUAL = {
    "dict of features": lambda h, z, y: linear_arl_loss(dict(zip("ab", z, strict=True)), h.weight, h.bias, y),
    "tuple of features": lambda h, z, y: linear_arl_loss(tuple(z), h.weight, h.bias, y),
    "list of weights": lambda h, z, y: linear_arl_loss(
        z, [w.detach() for w in h.weight.split(h.dims, 1)], h.bias, y
    ),
    "a chunk of all rows": lambda h, z, y: linear_arl_loss(z, h.weight, h.bias, y, chunk=9),
    "int32 targets": lambda h, z, y: linear_arl_loss(z, h.weight, None, y.int()),
    "module": lambda h, z, y: (ARLLoss(warmup=2).linear(z, h.weight, h.bias, y),),
    "head": lambda h, z, y: h.loss(z, y, ARLLoss(gamma=2.0)),
}
UNUSUAL = {
    "callable rule": lambda h, z, y: linear_arl_loss(
        z, h.weight, h.bias, y, rule=lambda stats: torch.softmax(stats.entropy, 0)
    ),
    "soft targets": lambda h, z, y: linear_arl_loss(
        z, h.weight, h.bias, torch.softmax(torch.randn(9, CLASSES, dtype=torch.float64), 1)
    ),
    "a loss per row": lambda h, z, y: linear_arl_loss(z, h.weight, h.bias, y, reduction="none"),
    "several chunks": lambda h, z, y: linear_arl_loss(z, h.weight, h.bias, y, chunk=8),
    "positions": lambda h, z, y: linear_arl_loss([x[:, None] for x in z], h.weight, h.bias, y[:, None]),
    "dict of weights": lambda h, z, y: linear_arl_loss(
        dict(zip("ab", z, strict=True)),
        dict(zip("ba", h.weight.split(h.dims, 1)[::-1], strict=True)),
        h.bias,
        y,
    ),
    "float16": lambda h, z, y: linear_arl_loss([x.half() for x in z], h.weight.half(), h.bias.half(), y),
    "plain cross-entropy": lambda h, z, y: linear_arl_loss(z, h.weight, h.bias, y, gamma=0.0, rule="none"),
    "float32 class weights": lambda h, z, y: linear_arl_loss(
        z, h.weight, h.bias, y, weight=torch.ones(CLASSES)
    ),
}


@pytest.mark.parametrize("case", [*USUAL, *UNUSUAL])
def test_which_steps_are_one_call(served, monkeypatch, case):
    """The same result with and without it; unusual steps go the general way."""
    torch.manual_seed(1)
    head, features, target = make()
    step = (USUAL | UNUSUAL)[case]
    torch.manual_seed(2)
    loss = step(head, features, target)[0]
    assert served == [case in USUAL]
    assert (loss.grad_fn.name() == NODE) == (case in USUAL)
    monkeypatch.setattr(dispatch, "native_steps", lambda: None)
    torch.manual_seed(2)
    other = step(head, features, target)[0]
    torch.testing.assert_close(loss, other)
    upstream = torch.rand_like(loss)
    for g, w in zip(
        gradients(loss, head, features, upstream), gradients(other, head, features, upstream), strict=True
    ):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


def test_more_than_the_budget_is_not_one_call(served, monkeypatch):
    head, features, target = make()
    row = 3 * CLASSES * 2 * 8
    for rows, one in ((9, True), (8, False)):
        monkeypatch.setitem(products.BUDGET, "cpu", rows * row)
        call(head, features, target)
        assert served.pop() == one
    monkeypatch.setitem(products.BUDGET, "cpu", 1)
    call(head, [z[:1] for z in features], target[:1])
    assert served == [True]  # less than a row cannot be held


def test_modes_are_not_bypassed(served):
    head, features, target = make("sum", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head.loss(features, target)
    with Largest():
        head.loss(features, target)
    assert served == [False, False]
    head.loss(features, target, sync_stats=False)
    assert served.pop()


def test_one_call_checks_what_was_saved(served):
    """As autograd does: features where the weights, weights where the features need a gradient, must not
    change meanwhile.
    """
    for frozen, changed, fails in (
        ((), "features", True),
        ((), "weight", True),
        ((), "bias", False),
        (("weight", "bias"), "features", False),
        (("features",), "weight", False),
    ):
        head, features, target = make()
        parts = {"features": features, "weight": [head.weight], "bias": [head.bias]}
        for name in frozen:
            for x in parts[name]:
                x.requires_grad_(False)
        loss, _ = call(head, features, target)
        with torch.no_grad():
            parts[changed][-1].add_(1)
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
    head, features, target = make("sum")  # of matrices that nothing reads either
    features[1].requires_grad_(False)
    head.layers[0].weight.requires_grad_(False)
    loss, _ = call(head, features, target)
    with torch.no_grad():
        features[0].add_(1)
        head.layers[1].weight.add_(1)
    loss.backward()
    assert all(served)


def test_one_call_and_saved_tensor_hooks(served):
    head, features, target = make()
    loss, _ = call(head, features, target)
    want = gradients(loss, head, features)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t * 1):
        loss, _ = call(head, features, target)
    before = [t.clone() for t in held]
    assert len(held) == 2 + 1 + 2  # features, weight, the gradients of all logits, the bias's gradient
    got = gradients(loss, head, features, torch.tensor(3.0, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    torch.testing.assert_close(got, tuple(3 * g for g in want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["concat-full", "shared"])
def test_an_upstream_gradient_of_zero(served, kind, dtype):
    """0 where all is finite, and NaN where it is not: a product times 0 must not hide it."""
    head, features, target = make(kind, dtype=dtype)
    loss, _ = call(head, features, target)
    assert all(g.eq(0).all() for g in gradients(loss, head, features, torch.zeros_like(loss)))
    with torch.no_grad():
        features[0][0, 0] = torch.nan
    loss, _ = call(head, features, target)
    assert all(g.isnan().any() for g in gradients(loss, head, features, torch.zeros_like(loss)))
    assert served == [True, True]


def test_one_call_of_an_empty_batch_and_of_ignored_targets(served):
    head, features, target = make(batch=0)
    loss, stats = call(head, features, target, reduction="sum")
    assert all(g.eq(0).all() for g in gradients(loss, head, features))
    assert stats.count.eq(0).all()
    head, features, target = make()
    loss, _ = call(head, features, torch.full_like(target, -100))
    assert loss.isnan()
    assert served == [True, True]


def test_one_call_in_evaluation_takes_no_memory_for_gradients(served):
    head = ConcatHead([5, 3], 5000)
    features = [torch.randn(64, dim) for dim in (5, 3)]
    target = torch.randint(0, 5000, (64,))
    loss, _ = call(head, features, target)
    loss.backward()
    # given back for the next step, while `loss` still holds the node
    assert native._C.kept_memory() >= 3 * 64 * 5000 * 4
    kept = native._C.kept_memory()
    with torch.no_grad():
        loss, _ = call(head, features, target)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert native._C.kept_memory() == kept
    assert arl_fast.release_memory() == kept
    assert native._C.kept_memory() == 0
    for p in head.parameters():
        p.requires_grad_(False)
    assert call(head, features, target)[0].grad_fn is None
    assert served == [True] * 3


def test_memory_of_one_call_is_that_of_the_logits(served):
    """Logits and gradients share a buffer, which a profiler sees; in backward the gradients of features and
    weights come on top.
    """
    from benchmarks.linear import profiled

    head = ConcatHead([512, 512], 3000)
    features = [torch.randn(512, 512, requires_grad=True) for _ in range(2)]
    target = torch.randint(0, 3000, (512,))
    logits, results = 3 * 512 * 3000 * 4, sum(4 * x.numel() for x in (*features, head.weight))
    peak, _ = profiled(lambda: call(head, features, target)[0], "cpu")
    assert logits <= peak < logits + (8 << 20)
    peak, _ = profiled(lambda: gradients(call(head, features, target)[0], head, features), "cpu")
    assert logits + results <= peak < logits + results + (16 << 20)
    assert all(served)


Z = [torch.randn(4, 5), torch.randn(4, 3)]
W = torch.randn(CLASSES, 8)
Y = torch.randint(0, CLASSES, (4,))
B = torch.randn(CLASSES)
ERRORS = {
    "features-tensor": (dict(features=Z[0]), TypeError, "features: got a Tensor of shape"),
    "features-none": (dict(features=[]), TypeError, "features: got list"),
    "features-vector": (
        dict(features=[Z[0], Z[1][0]]),
        ValueError,
        r"features\[1\]: got a Tensor of shape \[3\], expected \[4, D_m\]",
    ),
    "features-batch": (dict(features=[Z[0], Z[1][:2]]), ValueError, r"features\[1\].*expected \[4, D_m\]"),
    "features-type": (dict(features=[Z[0], 3]), TypeError, r"features\[1\]: got int"),
    "features-int": (dict(features=[Z[0].long(), Z[1]]), TypeError, r"features\[0\]: got dtype torch.int64"),
    "features-dtype": (
        dict(features=[Z[0], Z[1].double()]),
        TypeError,
        r"features\[1\]: got dtype torch.float64.*torch.autocast",
    ),
    "features-device": (
        dict(features=[Z[0], Z[1].to("meta")]),
        ValueError,
        r"features\[1\]: got device meta",
    ),
    "shared-sizes": (
        dict(fusion="shared", weights=W),
        ValueError,
        r"one feature size for all modalities, got \[5, 3\]",
    ),
    "weights-shape": (
        dict(weights=W[:, :7]),
        ValueError,
        r"weights: got a Tensor of shape \[6, 7\], expected \[C, 8\]",
    ),
    "weights-number": (
        dict(weights=[W[:, :5]]),
        ValueError,
        "weights: got 1 tensors, expected one for each of the 2 modalities",
    ),
    "weights-classes": (
        dict(weights=[W[:, :5], W[:5, 5:]]),
        ValueError,
        r"weights\[1\].*expected C = 6 rows",
    ),
    "weights-type": (dict(weights=3), TypeError, "weights: got int"),
    "weights-dtype": (dict(weights=W.bfloat16()), TypeError, "weights: got dtype torch.bfloat16"),
    "weights-keys": (
        dict(features=dict(zip("ab", Z, strict=True)), weights={"a": W, "c": W}),
        ValueError,
        r"weights: got a dict with the keys",
    ),
    "sum-weights": (
        dict(fusion="sum"),
        TypeError,
        r"weights: got a Tensor of shape \[6, 8\], expected a dict or a sequence",
    ),
    "bias-shape": (
        dict(bias=B[:5]),
        ValueError,
        r"bias: got a Tensor of shape \[5\], expected \[C\] = \[6\]",
    ),
    "sum-bias": (
        dict(fusion="sum", weights=[W[:, :5], W[:, 5:]], bias=B),
        TypeError,
        r"bias: got a Tensor of shape \[6\]",
    ),
    "bias-sequence": (dict(bias=[B, B]), TypeError, "bias: got list"),
    "target-shape": (dict(target=Y[:3]), ValueError, "target: got class indices of shape"),
    "fusion": (
        dict(fusion="gated"),
        ValueError,
        "fusion: got 'gated', expected one of 'concat', 'sum', 'shared'",
    ),
    "bias_mode": (dict(bias_mode="half"), ValueError, "bias_mode: got 'half'"),
    "chunk": (dict(chunk=0), ValueError, "chunk: got 0, expected a number of rows >= 1"),
    "chunk-bool": (dict(chunk=True), ValueError, "chunk: got True"),
    "mask": (dict(mask=torch.ones(4, 3, dtype=torch.bool)), ValueError, "mask: got shape"),
    "rule": (dict(rule="sharp"), ValueError, "rule: got 'sharp'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    changes, error, message = ERRORS[case]
    arguments = {**dict(features=Z, weights=W, bias=B, target=Y), **changes}
    with pytest.raises(error, match=message):
        linear_arl_loss(**arguments)


def test_errors_of_heads_and_modules():
    head, features, target = make()
    with pytest.raises(TypeError, match="criterion: got CrossEntropyLoss"):
        head.loss(features, target, torch.nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="options belong to the criterion"):
        head.loss(features, target, ARLLoss(), gamma=2.0)
    with pytest.raises(ValueError, match=r"features\[0\]: got shape \[9, 4\], expected \[B, 5\]"):
        head.loss([features[0][:, :4], features[1]], target)
    with pytest.raises(ValueError, match="fusion: got 'cat'"):
        ARLLoss().linear(features, head.weight, head.bias, target, fusion="cat")
    with pytest.raises(ValueError, match="chunk: got -1"):
        ARLLoss().linear(features, head.weight, head.bias, target, chunk=-1)
