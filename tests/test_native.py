"""What only the native CPU implementation promises: instruction sets, threads, memory, and the eager step in
one call.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import arl_fast
from arl_fast import ARLLoss, BranchLogits, arl_loss, modulate
from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule, make_options
from arl_fast._core.spec import SUMS
from arl_fast._core.stats import unpack_sums
from arl_fast.implementations import dispatch, reference

native, REASON = dispatch.load("native", "cpu")
pytestmark = pytest.mark.skipif(native is None, reason=REASON)
ISAS = native._C.available_isas() if native else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def only_native(monkeypatch):
    monkeypatch.setattr(dispatch, "override", "native")
    isa = native._C.isa()
    yield
    native._C.set_isa(isa)


def inputs(batch=33, classes=37, modalities=2, dtype=torch.float32, target_dtype=torch.int64):
    logits = [(3 * torch.randn(batch, classes)).to(dtype) for _ in range(modalities + 1)]
    target = torch.randint(0, classes, (batch,)).to(target_dtype)
    if batch > 2:
        target[1] = -100
    return logits, target


def step(logits, target, upstream=None, **options):
    """Loss, packed statistics and gradients of logits and link by the public way."""
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    link = torch.zeros(
        len(logits) - 1,
        dtype=torch.float64 if logits[0].dtype == torch.float64 else torch.float32,
        requires_grad=True,
    )
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link, **options)
    loss.backward(upstream)
    return loss.detach(), torch.cat(list(stats)), [x.grad for x in leaves], link.grad


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "classes"),
    [
        (64, 6),
        (5, 1),
        (0, 4),
        (70, 16),
        (70, 37),
        (129, 48),
        (7, 49),
        (33, 100),
        (9, 113),
        (40, 128),
        (33, 309),
        (3, 2000),
    ],
)
def test_every_instruction_set(isa, dtype, batch, classes):
    native._C.set_isa(isa)
    logits, target = inputs(batch, classes, dtype=dtype, target_dtype=torch.int32)
    weight = torch.rand(classes, dtype=dtypes.compute_dtype(dtype))
    mask = torch.rand(batch, 2) > 0.3
    soft = torch.softmax(torch.randn(batch, classes), 1).to(dtype)
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-6}[dtype]
    for reduction in ("mean", "none"):
        for smoothing in (0.0, 0.1):
            for y in (target, soft):
                options = Options("share", "logit_l1", None, "residual", -100, smoothing, reduction)
                got = native.forward(logits, Targets(y, mask, weight), Schedule(2.0, 8.0), options, True)
                want = reference.forward(logits, Targets(y, mask, weight), Schedule(2.0, 8.0), options, True)
                torch.testing.assert_close(got[0], want[0], rtol=exact, atol=exact, equal_nan=True)
                torch.testing.assert_close(got[1], want[1], rtol=exact, atol=exact, equal_nan=True)
                alone = native.forward(logits, Targets(y, mask, weight), Schedule(2.0, 8.0), options, False)
                torch.testing.assert_close(alone[:2], want[:2], rtol=exact, atol=exact, equal_nan=True)
                for g, w in zip(got[2], want[2], strict=True):
                    torch.testing.assert_close(g, w, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [64, 512])
@pytest.mark.parametrize("classes", [6, 40, 101, 309, 5000])
def test_error_is_not_above_torch(isa, batch, classes):
    """Relative RMS error of the gradient against float64, next to torch's own cross-entropy."""
    native._C.set_isa(isa)
    logits, _ = inputs(batch, classes)
    logits = [x + 1000 for x in logits]
    target = logits[0].argmax(1)  # confident rows
    _, _, grads, _ = step(logits, target)
    for x, g in zip(logits, grads, strict=True):
        truth = x.double().requires_grad_()
        F.cross_entropy(truth, target).backward()
        own = x.clone().requires_grad_()
        F.cross_entropy(own, target).backward()
        error, torch_error = ((e.double() - truth.grad).norm() / truth.grad.norm() for e in (g, own.grad))
        assert error <= torch_error + 6e-8  # half a unit in the last place


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nan_agree_with_reference(isa):
    native._C.set_isa(isa)
    inf = float("inf")
    rows = [
        [0.0, -inf, 1.0],
        [-inf, -inf, 0.0],
        [inf, 0.0, 1.0],
        [float("nan"), 0.0, 1.0],
        [-inf] * 3,
        [1e4, -1e4, 0.0],
    ]
    for width in (3, 17, 60, 140):
        x = torch.tensor([row + [-inf] * (width - 3) for row in rows])
        for y in range(3):
            target = torch.full((6,), y)
            for reduction in ("sum", "none"):
                options = Options("share", "confidence", None, "residual", -100, 0.0, reduction)
                got = native.forward([x, x], Targets(target), Schedule(1.0, 8.0), options, True)
                want = reference.forward([x, x], Targets(target), Schedule(1.0, 8.0), options, True)
                torch.testing.assert_close(got[0], want[0], equal_nan=True)
                torch.testing.assert_close(unpack_sums(got[1]), unpack_sums(want[1]), equal_nan=True)
                torch.testing.assert_close(got[2][0], want[2][0], equal_nan=True)
                alone = native.forward([x, x], Targets(target), Schedule(1.0, 8.0), options, False)
                torch.testing.assert_close(unpack_sums(alone[1]), unpack_sums(want[1]), equal_nan=True)
                impossible = (x == -inf) & got[2][0].isfinite() & (torch.arange(width) != y)
                assert (got[2][0][impossible] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [3, 17, 60, 140])
def test_which_is_the_first_largest(isa, classes):
    """Ties, in logits and in soft targets, and a NaN, which counts as the largest: accuracy as torch.argmax
    has it.
    """
    native._C.set_isa(isa)
    x = torch.randint(0, 3, (200, classes)).float()
    soft = torch.randint(0, 3, (200, classes)).float()
    for row in range(0, 200, 7):
        x[row, row % classes] = float("nan")
    for row in range(0, 200, 5):
        soft[row, row % classes] = float("nan")
    options = Options("share", "confidence", None, "residual", -100, 0.0, "none")
    for target in (
        torch.randint(0, classes, (200,)),
        x.argmax(1),
        soft,
        torch.where(soft.isnan(), soft, x.nan_to_num(5.0)),
    ):
        label = target if target.dim() == 1 else target.argmax(1)
        correct = float((x.argmax(1) == label).sum())
        for grad in (True, False):
            _, packed, _ = native.forward([x, x], Targets(target), Schedule(1.0, 8.0), options, grad)
            assert unpack_sums(packed)[SUMS.index("correct")].tolist() == [correct] * 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [3, 17, 60, 140])
@pytest.mark.parametrize("grad", [True, False])
def test_one_class_is_as_large_as_the_true_one(isa, classes, grad):
    """It counts if it comes first, wherever both lie in the vectors of their row."""
    native._C.set_isa(isa)
    true = torch.arange(40 * classes) % classes
    other = (true + 1 + torch.arange(40 * classes) // classes % (classes - 1)) % classes
    x = torch.rand(40 * classes, classes).scatter_(1, torch.stack([true, other], 1), 9.0)
    _, packed, _ = native.forward([x, x], Targets(true), Schedule(1.0, 8.0), make_options(), grad)
    assert unpack_sums(packed)[SUMS.index("correct")].tolist() == [float((true < other).sum())] * 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [6, 60, 140])
def test_probabilities_too_small_for_float32(isa, classes):
    """From exp(-87) on results may be 0, but are never something else."""
    native._C.set_isa(isa)
    x = torch.full((120, classes), -1000.0)
    x[:, 0], x[:, 1] = 0, -torch.arange(120)
    target = torch.zeros(120, dtype=torch.long)
    _, _, grads, _ = step([x, x, x], target, reduction="sum")
    p = torch.softmax(x.double(), 1)
    p[:, 0] = -p[:, 1:].sum(1)
    torch.testing.assert_close(grads[0].double(), p, rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("shape", [(64, 6), (300, 309), (40, 5000)])
def test_threads_do_not_change_a_bit(shape):
    logits, target = inputs(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, stats, grads, link = step(logits, target)
            results.append(torch.cat([loss.reshape(1), stats, link, *(g.reshape(-1) for g in grads)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 12288), (torch.bfloat16, 24576)])
def test_gradients_beyond_the_caches_are_the_same(isa, dtype, classes):
    """From 64 MB on they are stored past the caches; those of one branch alone are not."""
    native._C.set_isa(isa)
    logits, target = inputs(512, classes, dtype=dtype)
    together = step(logits, target)[2]
    link = torch.zeros(2, requires_grad=True)
    for b in range(3):
        leaves = [x.clone().requires_grad_(own == b) for own, x in enumerate(logits)]
        loss, _ = arl_loss(leaves[0], leaves[1:], target, link)
        assert torch.equal(torch.autograd.grad(loss, leaves[b])[0], together[b])


def test_large_logits_use_more_threads_than_one():
    """Seen in the CPU time of the process's threads: a parallel loop that is compiled without its runtime
    still computes. A second thread's share of the work does not depend on what else the machine does.
    """
    tasks = Path("/proc/self/task")
    if not next(tasks.glob("*/schedstat"), None):
        pytest.skip("needs /proc/self/task/*/schedstat")
    logits, target = inputs(2048, 1000)

    def cpu_time():
        return {task.parent.name: int(task.read_text().split()[0]) for task in tasks.glob("*/schedstat")}

    def spent(threads):
        torch.set_num_threads(threads)
        with torch.no_grad():
            arl_loss(logits[0], logits[1:], target)
            before = cpu_time()
            for _ in range(50):
                arl_loss(logits[0], logits[1:], target)
        return sorted((time - before.get(thread, 0) for thread, time in cpu_time().items()), reverse=True)

    before_threads = torch.get_num_threads()
    try:
        alone, second = spent(1)[0], spent(2)[1]
    finally:
        torch.set_num_threads(before_threads)
    assert second > alone / 4


def test_rows_of_any_stride():
    logits, target = inputs(20, 60)
    wide = [torch.randn(20, 200).index_copy(1, torch.arange(60), x) for x in logits]
    views = [wide[0][:, :60], logits[1].t().contiguous().t(), torch.stack([logits[2]] * 2, 1)[:, 0]]
    assert [x.is_contiguous() for x in views] == [False] * 3
    for got, want in zip(step_of_views(views, target), step_of_views(logits, target), strict=True):
        assert torch.equal(got, want)
    expanded = logits[0][:1].expand(20, 60)
    assert torch.equal(
        step_of_views([expanded] * 3, target)[0], step_of_views([expanded.contiguous()] * 3, target)[0]
    )
    strided_target = torch.stack([target, target], 1)[:, 0]
    assert torch.equal(step_of_views(logits, strided_target)[0], step_of_views(logits, target)[0])


def step_of_views(views, target):
    leaves = [x.detach().requires_grad_() for x in views]
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# ---- the step in one call
# ------------------------------------------------------------------------------------------


@pytest.fixture
def fast_calls(count_served):
    """Counts the calls that fast_loss has served."""
    return count_served("fast_loss")


OPTIONS = [
    dict(),
    dict(rule="paper", dependence="logit_l1", gain="mean_one"),
    dict(rule="constant", gain="plain", entropy_floor=0.2, gamma=0.5, temperature=2.0),
    dict(rule="none", reduction="sum", label_smoothing=0.1),
    dict(warming=True),
    dict(gamma=torch.tensor(2.0), temperature=torch.tensor(3), warming=torch.tensor(False)),
    dict(ignore_index=-100, gamma=0.0),
    dict(gamma=[0.5, 2.0]),
    dict(gamma=torch.tensor([0.5, 2.0]), warming=torch.tensor(True)),
    dict(gamma=(0.0, 0.0), rule="none"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True])
def test_fast_step_equals_the_general_one(options, dtype, extras, fast_calls, monkeypatch):
    logits, target = inputs(dtype=dtype)
    if extras:
        options = options | dict(
            mask=torch.rand(33, 2) > 0.5, weight=torch.rand(37, dtype=dtypes.compute_dtype(dtype))
        )
    upstream = torch.tensor(0.5, dtype=dtypes.compute_dtype(dtype))
    fast = step(logits, target, upstream, **options)
    assert fast_calls == [True]
    monkeypatch.setattr(dispatch, "native_steps", lambda: None)
    general = step(logits, target, upstream, **options)
    for got, want in zip(
        [*fast[:2], *fast[2], fast[3]], [*general[:2], *general[2], general[3]], strict=True
    ):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 21, 50), (2, 1000, 17), (1, 2, 3), (4, 37, 2, 2, 8)])
def test_dense_logits_are_read_where_they_lie(isa, dtype, shape, fast_calls, monkeypatch):
    """[B, C, d1, ...] in one call, without a copy, against float64 rows [B d1 ..., C]."""
    native._C.set_isa(isa)
    logits, _ = inputs(int(torch.Size(shape).numel() / shape[1]), shape[1], dtype=dtype)
    logits = [x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous() for x in logits]
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    logits[1].flatten(2)[0, :, 1] = torch.nan  # an ignored row
    compute = dtypes.compute_dtype(dtype)
    for options in (
        {},
        dict(
            mask=torch.rand(shape[0], 2) > 0.3,
            weight=torch.rand(shape[1], dtype=compute),
            label_smoothing=0.1,
            dependence="logit_l1",
            reduction="sum",
        ),
    ):
        loss, stats, grads, link = step(logits, target, **options)
        assert fast_calls.pop()
        assert [g.is_contiguous() for g in grads] == [True] * 3
        wide = {name: x.double() if name == "weight" else x for name, x in options.items()}
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "override", "reference")
            want = step([x.double() for x in logits], target, **wide)
        fast_calls.clear()
        exact = 1e-12 if dtype == torch.float64 else 3e-5
        for got, truth in zip((loss, stats, link), (want[0], want[1], want[3]), strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=exact, atol=exact)
        tolerance = {torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 3e-6)
        for got, truth in zip(grads, want[2], strict=True):
            assert (got.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("extras", [False, True])
def test_the_joint_baseline_is_torch_and_the_statistics_are_the_kernels(reduction, extras, fast_calls):
    logits, target = inputs()
    options = dict(reduction=reduction)
    if extras:
        options |= dict(weight=torch.rand(37), label_smoothing=0.1)
        logits[0][1] = torch.nan  # an ignored row
    leaves = [x.clone().requires_grad_() for x in logits]
    link = torch.zeros(2, requires_grad=True)
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link, gamma=0.0, rule="none", **options)
    (0.3 * loss).backward()
    assert fast_calls == [True]
    plain = logits[0].nan_to_num().requires_grad_()
    want = F.cross_entropy(plain, target, **options)
    (0.3 * want).backward()
    assert torch.equal(loss, want)
    assert torch.equal(leaves[0].grad, plain.grad)
    assert [x.grad for x in (*leaves[1:], link)] == [None] * 3
    _, others = arl_loss(logits[0], logits[1:], target, gamma=0.5, rule="none", **options)
    assert all(torch.equal(got, want) for got, want in zip(stats, others, strict=True))


@pytest.mark.parametrize(
    "unusual",
    [
        lambda x, y: (
            [t.to(torch.float32).requires_grad_() for t in x],
            torch.full((33, 37), 1 / 37),
        ),
        lambda x, y: ([t.t().contiguous().t() for t in x], y),
        lambda x, y: ([t.view(3, 11, 37).transpose(1, 2) for t in x], y.view(3, 11)),
    ],
    ids=["soft target", "class stride", "channels last"],
)
def test_unusual_steps_take_the_general_way(unusual, fast_calls):
    logits, target = inputs()
    logits, target = unusual(logits, target)
    arl_loss(logits[0], logits[1:], target, rule="none")
    assert fast_calls == [False]


def test_modes_that_watch_operations_see_them(fast_calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    logits, target = inputs()
    with Watch():
        arl_loss(logits[0], logits[1:], target)
    assert fast_calls == [False]


def test_missing_link_and_bad_arguments_still_raise():
    logits, target = inputs()
    leaves = [x.requires_grad_() for x in logits]
    with pytest.raises(ValueError, match="link: got None"):
        arl_loss(leaves[0], leaves[1:], target)
    with pytest.raises(ValueError, match="gamma"):
        arl_loss(leaves[0], leaves[1:], target, gamma=-1.0, rule="none")
    with pytest.raises(ValueError, match="shape"):
        arl_loss(leaves[0], [leaves[1][:, :3], leaves[2]], target, rule="none")
    bad = target.clone()
    bad[2] = 37
    with pytest.raises(
        IndexError, match=r"target: got class 37, expected 0 <= target < 37 or ignore_index=-100"
    ):
        arl_loss(leaves[0], leaves[1:], bad, rule="none")
    features, link = modulate({"a": torch.randn(33, 3, requires_grad=True), "b": torch.randn(33, 3)})
    assert list(features) == ["a", "b"]
    with pytest.raises(ValueError, match="order given to modulate"):
        arl_loss(leaves[0], {"b": leaves[1], "a": leaves[2]}, target, link)


def test_autograd_steals_the_buffers():
    """The gradients that forward wrote are the ones in .grad: no copy, and none is left elsewhere."""
    logits, target = inputs(64, 6000)
    leaves = [x.requires_grad_() for x in logits]
    arl_fast.release_memory()
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    loss.backward()
    pointers = {x.grad.data_ptr() for x in leaves}
    assert len(pointers) == 3
    assert not pointers & {x.data_ptr() for x in leaves}
    # the next step of the same size lies in the same memory, once this one is freed
    for x in leaves:
        x.grad = None
    assert native._C.kept_memory() >= 3 * 64 * 6000 * 4
    arl_loss(leaves[0], leaves[1:], target, rule="none")[0].backward()
    assert {x.grad.data_ptr() for x in leaves} == pointers
    # also after an evaluation, which takes none itself
    for x in leaves:
        x.grad = None
    kept = native._C.kept_memory()
    with torch.no_grad():
        arl_loss(leaves[0], leaves[1:], target)
    assert native._C.kept_memory() == kept
    arl_loss(leaves[0], leaves[1:], target, rule="none")[0].backward()
    assert {x.grad.data_ptr() for x in leaves} == pointers
    # a somewhat smaller batch lies in it; a larger one, for which it is of no use, gives it back
    for x in leaves:
        x.grad = None
    for rows in (50, 100):
        other = [torch.randn(rows, 6000, requires_grad=True) for _ in range(3)]
        arl_loss(other[0], other[1:], torch.zeros(rows, dtype=torch.int64), rule="none")[0].backward()
        assert rows > 50 or {x.grad.data_ptr() for x in other} == pointers
        assert native._C.kept_memory() == 0


def test_kept_memory_is_bounded_and_given_back_on_request():
    def step(columns):
        leaves = [torch.zeros(64, columns, requires_grad=True) for _ in range(2)]
        loss, _ = arl_loss(leaves[0], leaves[1:], torch.zeros(64, dtype=torch.int64), rule="none")
        loss.backward()

    arl_fast.release_memory()
    for columns in (40000, 9000, 40000, 9000):  # two shapes in turn: each finds its own
        step(columns)
    kept = native._C.kept_memory()
    assert 2 * 64 * 49000 * 4 <= kept <= 2 * 64 * 49000 * 4 + 4 * (2 << 20)
    assert arl_fast.release_memory() == kept
    assert native._C.kept_memory() == 0
    assert arl_fast.release_memory() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_retained_graph_and_upstream(dtype):
    logits, target = inputs(dtype=dtype)
    leaves = [x.requires_grad_() for x in logits]
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    once = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for g in torch.autograd.grad(loss, leaves, retain_graph=True):
        g.zero_()  # a user may write into what autograd.grad gave
    twice = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0), retain_graph=True)
    last = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0))
    for a, b, c in zip(once, twice, last, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_of_some_branches_only():
    logits, target = inputs()
    full = step(logits, target)[2]
    for wanted in ([0], [1], [0, 2]):
        leaves = [x.detach().clone().requires_grad_(b in wanted) for b, x in enumerate(logits)]
        loss, _ = arl_loss(leaves[0], leaves[1:], target, torch.zeros(2))
        loss.backward()
        for b, x in enumerate(leaves):
            assert (x.grad is not None) == (b in wanted)
            assert b not in wanted or torch.equal(x.grad, full[b])
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    (only,) = torch.autograd.grad(loss, leaves[1:2])
    assert torch.equal(only, full[1])


def test_saved_tensor_hooks_and_checkpoint():
    logits, target = inputs()
    full = step(logits, target)[2]
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss, _ = arl_loss(leaves[0], leaves[1:], target, rule="none")
    assert len(held) == 3
    before = [t.clone() for t in held]
    loss.backward(torch.tensor(3.0))
    # what the hook holds stays as it was
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    torch.testing.assert_close([x.grad for x in leaves], [3 * g for g in full])
    from torch.utils.checkpoint import checkpoint

    leaves = [x.detach().clone().requires_grad_() for x in logits]
    loss = checkpoint(lambda *x: arl_loss(x[0], x[1:], target, rule="none")[0], *leaves, use_reentrant=False)
    loss.backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, full, strict=True))


WEIGHTS = torch.linspace(0.5, 1.5, 37)
CRITERIA = {
    "plain": (dict(), 2),
    "weights": (dict(weight=WEIGHTS, gamma=(0.5, 2.0), temperature=3, rule="paper"), 2),
    "tensors": (dict(gamma=torch.tensor(2.0), temperature=torch.tensor(3.0)), 2),
    "labels": (dict(task="multilabel", weight=WEIGHTS, pos_weight=2 * WEIGHTS, gamma=0.5), 2),
    "warm-up": (dict(warmup=2, gamma=4.0), 3),
}


def criterion_calls(options, calls, named, masked):
    """All that some calls of a criterion leave behind."""
    torch.manual_seed(0)
    logits, target = inputs()
    if options.get("task") == "multilabel":
        target = (torch.arange(33 * 37).view(33, 37) % 3 == 0).float()
    criterion = ARLLoss(**options)
    criterion._unseen = False
    seen = []
    for call in range(calls + 1):
        criterion.train(call < calls)  # the last one is an evaluation, which does not count as a step
        leaves = [x.detach().clone().requires_grad_() for x in logits]
        link = torch.zeros(2, requires_grad=True)
        if masked:
            link.mask = torch.arange(66).view(33, 2) % 5 > 0
        unimodal = {"a": leaves[1], "b": leaves[2]} if named else leaves[1:]
        loss = criterion(BranchLogits(leaves[0], unimodal, link), target)
        loss.backward(torch.tensor(0.5))
        seen += [
            loss.detach(),
            *criterion.stats,
            link.grad,
            *(x.grad for x in leaves),
            criterion.steps.clone(),
        ]
    with torch.no_grad():
        seen.append(criterion(BranchLogits(leaves[0], unimodal, link), target))
    return seen, criterion.modalities


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_in_one_call_leaves_what_forward_does(name, named, masked, count_served, monkeypatch):
    options, calls = CRITERIA[name]
    served = count_served("fast_criterion")
    fast, modalities = criterion_calls(options, calls, named, masked)
    assert served == [True] * (calls + 2)
    assert modalities == (("a", "b") if named else None)
    monkeypatch.setattr(dispatch, "native_steps", lambda: None)
    general, names = criterion_calls(options, calls, named, masked)
    assert names == modalities
    for got, want in zip(fast, general, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_criterion_with_more_to_do_takes_the_general_way(count_served):
    logits, target = inputs()
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    output = BranchLogits(leaves[0], leaves[1:], torch.zeros(2, requires_grad=True))
    served = count_served("fast_criterion")
    criterion = ARLLoss()
    criterion._unseen = False
    want = criterion(output, target)
    assert served.pop()
    for changes in (dict(history=arl_fast.History()), dict(sync_stats=True), dict(_unseen=True)):
        criterion = ARLLoss()
        for attribute, value in (dict(_unseen=False) | changes).items():
            setattr(criterion, attribute, value)
        if changes.get("sync_stats"):
            with pytest.raises(RuntimeError, match="not initialised"):
                criterion(output, target)
        else:
            torch.testing.assert_close(criterion(output, target), want)
        assert not served.pop(), changes
    assert len(criterion.stats.entropy) == 2


def test_results_that_share_memory_do_not_meet(fast_calls):
    """The loss lies behind its statistics, and the gradients behind each other: each is its own to write."""
    logits, target = inputs()
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    loss, stats = arl_loss(leaves[0], leaves[1:], target, torch.zeros(2, requires_grad=True))
    assert loss._version == 0
    before = [x.clone() for x in stats]
    value = loss.item()
    loss /= 4
    assert loss._version > 0
    assert {x._version for x in stats} == {0}
    assert all(torch.equal(a, b) for a, b in zip(stats, before, strict=True))
    stats.loss.fill_(torch.nan)
    assert loss.item() == value / 4
    loss.backward()
    kept = [x.grad.clone() for x in leaves]
    for i, x in enumerate(leaves):
        x.grad.fill_(float(i))
        assert all(torch.equal(y.grad, g) for y, g in zip(leaves[i + 1 :], kept[i + 1 :], strict=True))
    assert [x.grad.unique().tolist() for x in leaves] == [[0.0], [1.0], [2.0]]
    torch.testing.assert_close(kept[0], step(logits, target)[2][0] / 4)


def test_modulate_node_equals_the_function(monkeypatch):
    results = []
    for fast in (True, False):
        torch.manual_seed(1)
        if not fast:
            monkeypatch.setattr(dispatch, "native_steps", lambda: None)
        z = [
            torch.randn(5, 4, requires_grad=True),
            torch.randn(5, 3, 2, dtype=torch.bfloat16, requires_grad=True),
        ]
        features, link = modulate([z[0] * 1, z[1] * 1])
        assert features[0].grad_fn.name().startswith("ARLModulate" if fast else "_Modulate")
        total = (
            (features[0] * torch.randn(5, 4)).sum()
            + features[1].float().square().sum()
            + (link * torch.tensor([0.5, -0.25])).sum()
        )
        total.backward()
        results.append([t.grad for t in z])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_modulate_shares_memory_and_version():
    base = torch.randn(4, 3, requires_grad=True)
    z = base.exp()  # exp saves its result for backward
    (feature,), _ = modulate([z])
    assert feature.data_ptr() == z.data_ptr()
    assert feature.requires_grad
    feature.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        feature.sum().backward()


def test_modulate_then_loss_scales_the_encoders():
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(3, 8)])
    head = arl_fast.ConcatHead({"a": 8, "b": 8}, num_classes=5)
    data, target = {"a": torch.randn(16, 4), "b": torch.randn(16, 3)}, torch.randint(0, 5, (16,))
    grads = []
    for rule in ("share", "none"):
        criterion = ARLLoss(rule=rule)
        encoders.zero_grad()
        criterion(
            head({name: f(x) for f, (name, x) in zip(encoders, data.items(), strict=True)}), target
        ).backward()
        grads.append([f.weight.grad.clone() for f in encoders])
        gains = criterion.stats.gains
        if rule == "share":
            share = gains
    for m in range(2):
        torch.testing.assert_close(grads[0][m], grads[1][m] * share[m])


def test_gamma_per_modality():
    logits, target = inputs()
    for reduction in ("mean", "sum", "none"):
        options = Options(reduction=reduction)
        for gamma in ((0.5, 2.0), torch.tensor([0.5, 2.0]), torch.tensor([[0.5, 2.0]] * 2).t()[:, 0]):
            got = native.forward(logits, Targets(target), Schedule(gamma, 8.0), options, True)
            want = reference.forward(logits, Targets(target), Schedule(gamma, 8.0), options, True)
            torch.testing.assert_close([*got[:2], *got[2]], [*want[:2], *want[2]])


def changed(name, value):
    facts = dict(native._C.spec)
    facts[name] = value
    return SimpleNamespace(spec=facts)


def test_an_extension_of_other_sources_is_noticed():
    assert native._stale(native._C) == ""
    assert "does not know RULES" in native._stale(SimpleNamespace())
    stale = native._stale(changed("RULES", ("share", "paper", "constant", "zero")))
    assert "RULES = ('share', 'paper', 'constant', 'zero')" in stale
    assert stale.endswith("build it again")
    for name in native._C.spec:
        assert name in native._stale(changed(name, None)), name


def test_what_the_extension_does_not_take():
    logits, target = inputs()
    schedule, options = Schedule(1.0, 8.0), Options()
    for arguments in (
        ((target,), schedule, options),
        (Targets(None), schedule, options),
        (Targets(target), Schedule("1", 8.0), options),
        (Targets(target), schedule, options._replace(rule=len)),
    ):
        with pytest.raises(TypeError, match="expected"):
            native._C.forward(logits, *arguments, True)
    with pytest.raises(ValueError, match="gamma: got 3 values, expected one, or one for each of the 2"):
        native._C.forward(logits, Targets(target), Schedule((1.0, 1.0, 1.0), 8.0), options, True)


def test_names_of_the_contract():
    assert native.unavailable("cpu") is None
    assert "avx" in native.describe("cpu") or "baseline" in native.describe("cpu")
    with pytest.raises(ValueError, match="ARL_FAST_ISA: got mmx"):
        native._C.set_isa("mmx")
    assert dispatch.native_steps() is native
    assert isinstance(BranchLogits(*(torch.zeros(1, 1),) * 2), tuple)
