"""The Triton kernel of task="multilabel", interpreted (TRITON_INTERPRET=1 pytest -m contract).

Once more tests/test_multilabel.py, and what that does not reach: several tiles and programs, counting
together, strides, the op.
"""

from __future__ import annotations

import math
import os

import labels_truth
import pytest
import torch
from test_multilabel import *  # noqa: F403  its tests are collected here again, for Triton

from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule, make_options
from arl_fast._core.stats import unpack
from arl_fast.implementations import dispatch, ops, reference
from arl_fast.implementations.triton import plan as launch_plan

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
from arl_fast.implementations.triton import host

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", labels_truth.DTYPES)
def test_several_tiles_and_programs(poisoned, monkeypatch, dtype, reduction):
    """Whole tiles, a last one that is not, and programs that have none; weights go round with the labels."""
    for count in (1, 2, 5):
        monkeypatch.setattr(launch_plan, "programs", lambda *arguments, n=count: n)
        for shape in ((1024, 1), (130, 11), (3, 700)):
            logits, target = labels_truth.inputs(shape, dtype)
            compute = dtypes.compute_dtype(dtype)
            weights = [torch.rand(shape[1], dtype=compute) + 0.5 for _ in range(2)]
            labels_truth.compare(host, logits, Targets(target), reduction=reduction)
            targets = Targets(target, torch.rand(shape[0], 2) > 0.4, weights[0], None, weights[1])
            labels_truth.compare(host, logits, targets, reduction=reduction, dependence="logit_l1")


@pytest.mark.parametrize("shape", [(16, 1), (5, 13), (31, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_many_pairs_are_counted_together(poisoned, monkeypatch, shape, masked):
    """Every branch alike without a mask. The counters are left at zero."""
    monkeypatch.setattr(launch_plan, "COUNTING", launch_plan.Counting(shared_above=15, block=8, chunks=4))
    host._labels_configuration.cache_clear()
    work = host.new_workspace(torch.device("cpu"), torch.float32, 10_000)
    monkeypatch.setattr(host.workspaces, "take", lambda *arguments: work)
    logits, target = labels_truth.inputs(shape)
    targets = Targets(target, torch.rand(shape[0], 2) > 0.4 if masked else None)
    labels_truth.compare(host, logits, targets)
    assert not work.counters.any()
    labels_truth.compare(host, logits, targets._replace(divisor=torch.tensor([3.0, 5.0, 7.0])))
    labels_truth.compare(host, logits, targets, reduction="sum")
    host._labels_configuration.cache_clear()


def test_small_losses_and_gradients_keep_their_digits():
    """Pair by pair, from uncertain to nearly certain: relative to the value, not to the largest one.

    An exponential is as exact as its argument: relative to |x| in units of the last place.
    """
    for dtype, lowest, unit in ((torch.float32, 80, 6e-8), (torch.float64, 600, 1.2e-16)):
        x = torch.cat([torch.linspace(-lowest, lowest, 401, dtype=dtype), torch.tensor([-0.0, 1e-30])])
        x = x.to(dtype).view(-1, 1)
        for label in (0.0, 1.0):
            target = torch.full_like(x, label)
            options = Options(task="multilabel", reduction="none")
            loss, _, (g, _) = host.forward([x, x], Targets(target), Schedule(0.0, 8.0), options, True)
            z = x.double() * (1 - 2 * label)  # the wrong answer has the probability sigmoid(z)
            wanted = z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))
            error = (4 + 2 * z.abs()) * unit
            assert ((loss.double() - wanted).abs() <= error * wanted).all()
            wanted = torch.sigmoid(z) * (1 - 2 * label)
            assert ((g.double() - wanted).abs() <= error * wanted.abs()).all()


@pytest.mark.parametrize("labels", [1, 6])
def test_rows_of_any_stride(poisoned, labels):
    """A gap, a stride between labels, an address that no wide load likes, expanded rows, strided labels."""
    logits, target = labels_truth.inputs((20, labels))
    wide = [torch.full((20, labels + 3), math.nan) for _ in logits]
    for w, x in zip(wide, logits, strict=True):
        w[:, :labels] = x
    gap = [w[:, :labels] for w in wide]
    shifted = [torch.cat([torch.zeros(1), x.reshape(-1)])[1:].view(20, labels) for x in logits]
    turned = [x.t().contiguous().t() for x in logits]
    strided = torch.stack([target] * 2, 1)[:, 0]
    for reduction in ("mean", "none"):
        for x in (gap, shifted, turned, [gap[0], *logits[1:]], [logits[0][:1].expand(20, labels)] * 3):
            labels_truth.compare(host, x, Targets(strided), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_does_not_count_is_never_read(poisoned, reduction):
    """NaN beside unknown labels and absent modalities, one absent from the batch; a NaN that counts shows."""
    logits, target = labels_truth.inputs()
    mask = torch.rand(33, 2) > 0.5
    mask[:, 1] = False
    clean = labels_truth.compare(host, logits, Targets(target, mask), reduction=reduction)
    for b, x in enumerate(logits):
        x[target.isnan()] = math.nan
        if b:
            x[~mask[:, b - 1]] = math.nan
    options = make_options(task="multilabel", reduction=reduction)
    got = host.forward(logits, Targets(target, mask), labels_truth.SCHEDULE, options, True)
    for a, b in zip([*got[:2], *got[2]], [*clean[:2], *clean[2]], strict=True):
        assert torch.equal(a, b)
    logits[1].fill_(math.nan)
    loss, packed, grads = host.forward(logits, Targets(target), labels_truth.SCHEDULE, options, True)
    assert loss.isnan().any()
    assert unpack(packed).gains.isnan().all()
    assert grads[0].isfinite().all()


def test_nothing_counts_and_no_rows():
    x, unknown = torch.randn(4, 3), torch.full((4, 3), math.nan)
    loss, _, grads = labels_truth.compare(host, [x, x], Targets(unknown))
    assert loss.isnan()
    assert all(g.eq(0).all() for g in grads)
    for reduction in ("mean", "sum", "none"):
        loss, packed, _ = labels_truth.compare(host, [x[:0]] * 3, Targets(unknown[:0]), reduction=reduction)
        assert unpack(packed).gains.tolist() == [1, 1]


def test_which_answers_are_correct():
    """A logit of 0 says no, a label of 1/2 is a no."""
    for x in (-1.0, -0.0, 0.0, 1e-30, 1.0):
        for t in (0.0, 0.5, 0.500001, 1.0, math.nan):
            logits, target = torch.full((5, 1), x), torch.full((5, 1), t)
            options = make_options(task="multilabel")
            _, packed, _ = host.forward([logits] * 2, Targets(target), labels_truth.SCHEDULE, options, False)
            expected = 0.0 if math.isnan(t) else float((x > 0) == (t > 0.5))
            assert unpack(packed).accuracy.tolist() == [expected] * 2


def test_targets_of_any_dtype_and_schedules():
    logits, target = labels_truth.inputs()
    for dtype in labels_truth.DTYPES:
        labels_truth.compare(host, logits, Targets(target.to(dtype)), gain="mean_one")
    three, gammas = torch.tensor(3.0), torch.tensor([[0.5, 7.0], [2.0, 7.0]])[:, 0]
    for schedule in (
        Schedule((0.5, 2.0), 3.0),
        Schedule(gammas, three),
        Schedule(gammas, three, 5, torch.tensor(4)),
        Schedule(2.5, three, 5, torch.tensor(5)),
    ):
        labels_truth.compare(host, logits, Targets(target), schedule=schedule, reduction="none")
        labels_truth.compare(host, logits, Targets(target), schedule=schedule, grad=False)


def test_one_launch(monkeypatch):
    launches = []
    run = host.run_labels
    monkeypatch.setattr(host, "run_labels", lambda *arguments: launches.append(run(*arguments)))
    monkeypatch.setattr(dispatch, "override", "triton")
    logits, target = labels_truth.inputs((40, 3))
    for reduction in ("mean", "none"):
        arl_loss(logits[0], logits[1:], target, task="multilabel", reduction=reduction)  # noqa: F405
    assert len(launches) == 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op(monkeypatch, reduction):
    """The registered op, which holds no memory after it has run, and the gradients' scale per pair."""

    def refuse(*arguments):
        raise AssertionError("the op asked for a workspace that outlives it")

    monkeypatch.setattr(host.workspaces, "take", refuse)
    logits, target = labels_truth.inputs(dtype=torch.bfloat16)
    weight = torch.rand(7)
    targets = Targets(target, torch.rand(33, 2) > 0.3, weight, torch.ones(3), weight + 1)
    options = make_options(task="multilabel", reduction=reduction)
    encoded = (*ops.encode_schedule(labels_truth.SCHEDULE), *ops.encode_options(options))
    arguments = (logits, *targets, *encoded, True)
    torch.library.opcheck(torch.ops.arl_fast.triton_forward.default, arguments, test_utils="test_faketensor")
    upstream = torch.rand(33, 7) if reduction == "none" else torch.tensor(0.7)
    for keep in (False, True):
        grads = [torch.randn(33, 7) for _ in range(3)]
        want = reference.scale([g.clone() for g in grads], upstream, None, torch.float32, True)
        torch.testing.assert_close(host.scale(grads, upstream, None, torch.float32, keep), want)
