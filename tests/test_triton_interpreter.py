"""What the contract's suite does not reach in the Triton implementation: streamed rows, several tiles and
programs, counting together, the counters, ops and warming up. TRITON_INTERPRET=1 pytest -m contract runs it
with the contract."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import test_contract
import torch

from arl_fast import arl_loss
from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule
from arl_fast.implementations import dispatch, ops, reference
from arl_fast.implementations.triton import plan as launch_plan

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from arl_fast.implementations.triton import host as implementation

pytestmark = pytest.mark.contract
OPTIONS, SCHEDULE = Options(), Schedule(1.0, 8.0)
SMALL_STREAM = launch_plan.Plan(online=True, steps=2, owners=4, lanes=2, threads=128, registers=64)


@pytest.fixture(autouse=True)
def serve(monkeypatch):
    monkeypatch.setattr(dispatch, "override", "triton")
    implementation._forward_configuration.cache_clear()  # of another test's plans
    yield
    implementation._forward_configuration.cache_clear()


@pytest.fixture
def streamed(monkeypatch):
    """Every row is streamed, in chunks of 16 logits."""
    monkeypatch.setattr(launch_plan, "plan", lambda classes, itemsize, more_sums: SMALL_STREAM)


@contextmanager
def counted(monkeypatch, name):
    """Launches of a kernel."""
    launch, launches = getattr(implementation, name), []

    def counting(*arguments):
        launches.append(arguments)
        launch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(implementation, name, counting)
        yield launches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 16, 37])
def test_streamed(streamed, poisoned, classes, dtype):
    logits, target = test_contract.make(batch=6, classes=classes, dtype=dtype)
    target[1] = -100
    test_contract.check(logits, target)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_streamed_options(streamed, poisoned, soft, reduction):
    logits, target = test_contract.make(batch=5, classes=21)
    logits[0][:, 3] = 0 if soft else -torch.inf
    target[target == 3] = 4
    mask = torch.tensor([[True, True], [False, True], [True, False], [True, True], [False, False]])
    options = dict(dependence="logit_l1") if soft else dict()
    if soft:
        target = torch.softmax(torch.randn(5, 21), 1)
        options |= dict(label_smoothing=0.2)
    options["weight"] = torch.rand(21) + 0.1
    upstream = torch.randn(5) if reduction == "none" else torch.tensor(0.6)
    test_contract.check(logits, target, mask=mask, reduction=reduction, upstream=upstream, **options)


def test_streamed_soft_confidence_and_smoothing(streamed):
    logits, target = test_contract.make(batch=4, classes=19)
    test_contract.check(logits, torch.softmax(torch.randn(4, 19), 1))
    test_contract.check(logits, target, label_smoothing=0.3)


def test_streamed_absent_rows_may_hold_nan(streamed):
    logits, target = test_contract.make(batch=6, classes=20)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[2:4, 1] = False
    logits[2][2:4] = torch.nan
    _, grads, stats = test_contract.run(logits, target, mask=mask)
    assert grads[2][2:4].eq(0).all()
    assert all(torch.isfinite(v).all() for v in [*grads, *stats])


@pytest.mark.parametrize("kind", ["right", "wrong", "high"])
def test_streamed_extremes(streamed, kind):
    test_contract.test_trained_like_and_extreme("triton", kind, torch.float32)


def test_a_row_too_long_for_registers():
    test_contract.check(*test_contract.make(1, 2, launch_plan.LARGEST_ROW + 5))


def test_programs_take_several_tiles(monkeypatch, poisoned):
    """300 rows in tiles of 128, and of 4, by two programs per branch."""
    monkeypatch.setattr(launch_plan, "programs", lambda *arguments: 2)
    for batch, classes in ((300, 3), (21, 300)):
        logits, target = test_contract.make(batch=batch, classes=classes)
        target[::7] = -100
        test_contract.check(logits, target)


@pytest.fixture
def many_rows(monkeypatch):
    """Sixteen rows are many, to be counted in four pieces of whole blocks of eight."""
    monkeypatch.setattr(launch_plan, "COUNTING", launch_plan.Counting(shared_above=15, block=8, chunks=4))


@pytest.mark.parametrize("batch", [16, 31, 50, 65])
def test_many_rows_are_counted_together(many_rows, monkeypatch, poisoned, batch):
    """In the one launch there is, and what is ignored, absent or weighted counts as it should."""
    logits, target = test_contract.make(batch=batch)
    target[::3] = -100
    mask, weight = torch.rand(batch, 2) > 0.4, torch.rand(5) + 0.1
    with counted(monkeypatch, "run_forward") as forwards:
        test_contract.check(logits, target)
        test_contract.check(logits, target, mask=mask, weight=weight)
        test_contract.check(logits, torch.softmax(torch.randn(batch, 5), 1), mask=mask)
        test_contract.check(logits, torch.softmax(torch.randn(batch, 5), 1))
        assert len(forwards) == 4
        with torch.no_grad():
            arl_loss(logits[0], logits[1:], target)


def test_programs_share_the_counting(many_rows, monkeypatch):
    """As if others had already counted the first two pieces: their counts are used."""
    logits, target = test_contract.make(batch=32)
    targets = Targets(target)
    loss, packed, grads = reference.forward(logits, targets, SCHEDULE, OPTIONS, True)
    programs = launch_plan.programs(32, 3, launch_plan.plan(5, 4, False), 4)
    work = torch.full([launch_plan.workspace(3, programs)], torch.nan)
    counters = torch.tensor([0, 2, 2], dtype=torch.int32)
    counts = work[3 * 6 * programs :].view(3, 4)
    counts[:, :2] = torch.tensor([[5.0, 7.0], [6.0, 1.0], [0.0, 4.0]])  # not what is there
    divisor = counts[:, :2].sum(1) + 16
    monkeypatch.setattr(implementation.workspaces, "take", lambda *arguments: (work, counters))
    got = implementation.forward(logits, targets, SCHEDULE, OPTIONS, True)
    torch.testing.assert_close([got[0], got[1]], [loss, packed])
    torch.testing.assert_close(got[2], [g * 32 / n for g, n in zip(grads, divisor, strict=True)])
    assert counters.tolist() == [0, 0, 0]


def test_one_launch_forward_and_backward(monkeypatch):
    logits, target = test_contract.make(modalities=4, batch=64, classes=6)
    with counted(monkeypatch, "run_forward") as f, counted(monkeypatch, "run_scale") as s:
        test_contract.run(logits, target)
    assert (len(f), len(s)) == (1, 1)


def test_a_given_divisor_replaces_the_count_in_the_gradients_only():
    logits, target = test_contract.make()
    divisor = torch.tensor([11.0, 12.0, 13.0])
    arguments = (logits, Targets(target, divisor=divisor), Schedule(1.5, 8.0), OPTIONS, True)
    loss, packed, grads = implementation.forward(*arguments)
    want_loss, want_packed, want_grads = reference.forward(*arguments)
    torch.testing.assert_close([loss, packed, *grads], [want_loss, want_packed, *want_grads])


def test_nan_logits_and_a_class_out_of_range_poison_their_row_only(streamed):
    logits, target = test_contract.make(batch=4)
    logits[1][2, 1] = torch.nan
    _, grads, stats = test_contract.run(logits, target)
    assert stats.loss.isnan().tolist() == [False, True, False]
    assert grads[1].isnan().any(1).tolist() == [False, False, True, False]
    assert grads[0].isfinite().all()
    target[1] = 7
    logits = [x.nan_to_num() for x in logits]
    loss, _, grads = implementation._launch_forward(logits, Targets(target), SCHEDULE, OPTIONS, True)
    assert loss.isnan()
    for g in grads:
        assert g.isnan().all(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("batch", [7, 40])
def test_counters_are_zero_again(many_rows, monkeypatch, batch):
    """One workspace serves one launch after the other."""
    work = implementation.workspaces.take(torch.device("cpu"), torch.float32, 10000)
    work.work.fill_(torch.nan)
    monkeypatch.setattr(implementation.workspaces, "take", lambda *arguments: work)
    logits, target = test_contract.make(batch=batch)
    first = test_contract.run(logits, target)
    assert not work.counters.any()
    again = test_contract.run(logits, target)
    assert all(torch.equal(a, b) for a, b in zip([first[0], *first[1]], [again[0], *again[1]], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [False, True])
def test_scale(dtype, rows):
    grads = [torch.randn(33, 150, dtype=dtypes.grad_dtype(dtype)) for _ in range(3)]
    upstream = torch.randn(33) if rows else torch.tensor(0.3)
    for factor in (None, torch.tensor([0.5, 2.0, 3.0])):
        want = reference.scale(grads, upstream, factor, dtype, True)
        before = [g.clone() for g in grads]
        got = implementation.scale(grads, upstream, factor, dtype, True)
        torch.testing.assert_close(got, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        got = implementation.scale([g.clone() for g in grads], upstream, factor, dtype, False)
        torch.testing.assert_close(got, want)


def test_scale_by_one_hands_the_gradients_out():
    grads = [torch.randn(3, 5) for _ in range(2)]
    saved = [g.clone() for g in grads]
    got = implementation.scale(grads, torch.ones(()), None, torch.float32, False)
    assert all(a is b for a, b in zip(got, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, saved, strict=True))
    expanded = torch.ones(()).expand(3)
    torch.testing.assert_close(implementation.scale(grads, expanded, None, torch.float32, True), saved)


def test_modulate_backward_takes_sizes_dtypes_gaps_and_strides():
    link = torch.tensor([0.5, -0.25, 1.0, 2.0])
    grads = [
        torch.randn(3, 1400),
        None,
        torch.randn(5, 2, dtype=torch.bfloat16).t(),
        torch.ones(()).expand(4, 4),
    ]
    got = implementation.modulate_backward(grads, link)
    want = reference.modulate_backward(grads, link)
    assert got[1] is None
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_ops():
    logits, target = test_contract.make(dtype=torch.bfloat16)
    targets = Targets(target, torch.rand(7, 2) > 0.3, torch.rand(5), torch.ones(3))
    registered = torch.ops.arl_fast
    for schedule in (
        Schedule((1.5, 2.0), torch.tensor(4.0), 3, torch.tensor(2)),
        Schedule(torch.rand(2), 8.0),
    ):
        for reduction, grad in (("mean", True), ("none", False)):
            options = OPTIONS._replace(reduction=reduction, label_smoothing=0.1, entropy_floor=0.2)
            encoded = (*ops.encode_schedule(schedule), *ops.encode_options(options))
            arguments = (logits, *targets, *encoded, grad)
            torch.library.opcheck(registered.triton_forward.default, arguments)
    torch.library.opcheck(
        registered.triton_scale.default, (logits, torch.tensor(0.5), torch.ones(3), torch.bfloat16)
    )
    channels_last = [x.expand(2, 3, 7, 5).contiguous(memory_format=torch.channels_last) for x in logits]
    for grads in (logits, channels_last):
        torch.library.opcheck(registered.triton_modulate_backward.default, (grads, [2, 0, 1], torch.rand(3)))


def test_the_op_keeps_no_memory(monkeypatch):
    """CUDA graph trees of torch.compile refuse an op that holds memory of their pool after it has run."""

    def refuse(*arguments):
        raise AssertionError("the op asked for a workspace that outlives it")

    logits, target = test_contract.make()
    want = reference.forward(logits, Targets(target), SCHEDULE, OPTIONS, True)
    monkeypatch.setattr(implementation.workspaces, "take", refuse)
    encoded = (*ops.encode_schedule(SCHEDULE), *ops.encode_options(OPTIONS))
    got = torch.ops.arl_fast.triton_forward(logits, *Targets(target), *encoded, True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("floats", [(0.1, 0.2), (0.3, 0.0)])
def test_options_of_an_op_are_those_that_were_given(floats):
    given = Options(lambda stats: stats.entropy, "logit_l1", floats[0], "plain", 2**63 - 1, floats[1], "sum")
    assert ops.decode_options(*ops.encode_options(given)) == given._replace(rule="constant")
    assert ops.decode_options(*ops.encode_options(OPTIONS)) == OPTIONS


@pytest.mark.parametrize(("reduction", "backend"), [("mean", "inductor"), ("none", "aot_eager")])
def test_compiled_in_one_graph(reduction, backend):
    """The whole step, features to loss, through the registered ops, for two batch sizes."""
    import arl_fast

    head = arl_fast.SharedHead([3, 3], 4)
    criterion = arl_fast.ARLLoss(reduction=reduction)

    def step(z, target):
        return criterion(head(z), target).mean()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (6, 9):
        z = [torch.randn(batch, 3, requires_grad=True) for _ in range(2)]
        target = torch.randint(0, 4, (batch,))
        want, got = step(z, target), compiled(z, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


def test_warm_up_leaves_its_arguments_alone():
    logits, target = test_contract.make()
    before = [x.clone() for x in logits]
    implementation.warm_up(logits, target, OPTIONS, features=[torch.randn(3), torch.randn(4, 2)])
    assert all(torch.equal(a, b) for a, b in zip(logits, before, strict=True))
