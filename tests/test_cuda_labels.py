"""The CUDA kernel of task="multilabel", run on the CPU by an emulation.

Once more tests/test_multilabel.py, and what that does not reach: blocks, the counting launch, addresses, the
order of the blocks.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from emulation import build

if build.unavailable():
    pytest.skip(build.unavailable(), allow_module_level=True)

import labels_truth
from emulation import guarded, module
from test_multilabel import *  # noqa: F403  its tests are collected here again, for these kernels

from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule, make_options
from arl_fast._core.stats import unpack
from arl_fast.implementations import dispatch

SHARED = 232448


@pytest.fixture(autouse=True)
def device():
    """One multiprocessor, so that persistent blocks loop over pairs."""
    module.library().set_device(1, SHARED)
    module.library().set_seed(1)
    yield
    module.library().set_device(3, SHARED)


@pytest.fixture
def implementation(monkeypatch):
    """The emulated kernels serve everything in this test."""
    monkeypatch.setitem(dispatch.MODULES, "cuda_emulation", "emulation.module")
    monkeypatch.setitem(dispatch._loaded, "cuda_emulation", module)
    monkeypatch.setattr(dispatch, "override", "cuda_emulation")
    return "cuda_emulation"


test_compiled = None  # the emulation is no op that a compiler knows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", labels_truth.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (31, 11), (3, 700), (700, 13)])
def test_every_kernel(poisoned, dtype, reduction, shape):
    """With weights and without; the last shape takes several rounds of the blocks and a counting launch."""
    logits, target = labels_truth.inputs(shape, dtype)
    compute = dtypes.compute_dtype(dtype)
    weight, pos_weight = (torch.rand(shape[1], dtype=compute) + 0.5 for _ in range(2))
    mask = torch.rand(shape[0], 2) > 0.4
    for targets in (
        Targets(target),
        Targets(target, mask, divisor=torch.rand(3, dtype=compute) + 1),
        Targets(target, weight=weight),
        Targets(target, mask, weight, pos_weight=pos_weight),
    ):
        labels_truth.compare(module, logits, targets, reduction=reduction)
    labels_truth.compare(
        module, logits, targets, reduction=reduction, grad=False, dependence="logit_l1", gain="mean_one"
    )


def test_counting_launch():
    """Many pairs are counted in a launch before, unless there is nothing to count."""
    lib = module.library()
    logits, target = labels_truth.inputs((8193, 1))
    mask = torch.rand(8193, 2) > 0.4
    for masked, launches in ((None, 2), (mask, 2)):
        for labels in (target, torch.stack([target] * 2, 1)[:, 0], guarded.at_bit(target, 31, False)):
            before = lib.launches()
            labels_truth.compare(module, logits, Targets(labels, masked))
            assert lib.launches() == before + launches
    before = lib.launches()
    labels_truth.compare(module, logits, Targets(target, mask, divisor=torch.tensor([1.0, 2.0, 3.0])))
    labels_truth.compare(module, logits, Targets(target), reduction="none")
    labels_truth.compare(module, logits, Targets(target), grad=False)
    labels_truth.compare(module, [x[:8192] for x in logits], Targets(target[:8192]))
    assert lib.launches() == before + 4


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
            loss, _, (g, _) = module.forward([x, x], Targets(target), Schedule(0.0, 8.0), options, True)
            z = x.double() * (1 - 2 * label)  # the wrong answer has the probability sigmoid(z)
            wanted = z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))
            error = (4 + 2 * z.abs()) * unit
            assert ((loss.double() - wanted).abs() <= error * wanted).all()
            wanted = torch.sigmoid(z) * (1 - 2 * label)
            assert ((g.double() - wanted).abs() <= error * wanted.abs()).all()


@pytest.mark.parametrize("dtype", labels_truth.DTYPES)
@pytest.mark.parametrize("labels", [1, 5, 37])
def test_no_access_out_of_range(dtype, labels, monkeypatch):
    """Every buffer ends at a forbidden page, then starts after one."""
    logits, target = labels_truth.inputs((7, labels), dtype)
    weight = torch.rand(labels, dtype=target.dtype)
    mask = torch.rand(7, 2) > 0.3
    for at_start, reduction in itertools.product((False, True), ("mean", "none")):
        monkeypatch.setattr(
            module,
            "allocate",
            lambda shape, dtype, a=at_start: guarded.empty(shape, dtype, a or dtype == torch.uint8),
        )
        given = [guarded.copy(x, at_start) for x in (target, mask, weight, weight)]
        targets = Targets(*given[:3], pos_weight=given[3])
        _, _, grads = labels_truth.compare(
            module, [guarded.copy(x, at_start) for x in logits], targets, reduction=reduction
        )
        upstream = guarded.copy(torch.rand(7, labels, dtype=target.dtype), at_start)
        for g, s in zip(grads, module.scale(grads, upstream, None, dtype, True), strict=True):
            torch.testing.assert_close(s, (g.to(target.dtype) * upstream).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("labels", [1, 6])
@pytest.mark.parametrize("dtype", labels_truth.DTYPES)
def test_rows_of_any_stride(poisoned, labels, dtype):
    """A gap of NaN, a stride between labels, addresses that no wide load likes, expanded rows."""
    logits, target = labels_truth.inputs((20, labels), dtype)
    wide = [torch.full((20, labels + 3), math.nan, dtype=dtype) for _ in logits]
    for w, x in zip(wide, logits, strict=True):
        w[:, :labels] = x
    gap = [w[:, :labels] for w in wide]
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(20, labels) for x in logits]
    turned = [x.t().contiguous().t() for x in logits]
    strided = torch.stack([target] * 2, 1)[:, 0]
    mask = (torch.rand(2, 40) > 0.3)[:, ::2].t()
    for reduction in ("mean", "none"):
        for x in (gap, shifted, turned, [gap[0], *logits[1:]], [logits[0][:1].expand(20, labels)] * 3):
            for y in (strided, target):
                labels_truth.compare(module, x, Targets(y), reduction=reduction)
                labels_truth.compare(module, x, Targets(y, mask), reduction=reduction)


def test_rows_far_apart():
    """Offsets beyond 2^31 elements."""
    logits, target = labels_truth.inputs((3, 40), branches=2)
    far = [guarded.far_apart(x, 2**31 + 4) for x in logits]
    near, got = (
        labels_truth.compare(module, logits, Targets(target)),
        labels_truth.compare(module, far, Targets(target)),
    )
    for a, b in zip([*got[:2], *got[2]], [*near[:2], *near[2]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_whatever_the_order_of_the_blocks(reduction):
    module.library().set_device(4, SHARED)
    logits, target = labels_truth.inputs((3000, 3))
    results = []
    for seed in range(3):
        module.library().set_seed(seed)
        options = Options(task="multilabel", reduction=reduction)
        loss, packed, grads = module.forward(logits, Targets(target), labels_truth.SCHEDULE, options, True)
        results.append([loss, packed, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_does_not_count_is_never_read(poisoned, reduction):
    """NaN beside unknown labels and absent modalities, one absent from the batch; a NaN that counts shows."""
    logits, target = labels_truth.inputs()
    mask = torch.rand(33, 2) > 0.5
    mask[:, 1] = False
    clean = labels_truth.compare(module, logits, Targets(target, mask), reduction=reduction)
    for b, x in enumerate(logits):
        x[target.isnan()] = math.nan
        if b:
            x[~mask[:, b - 1]] = math.nan
    options = make_options(task="multilabel", reduction=reduction)
    got = module.forward(logits, Targets(target, mask), labels_truth.SCHEDULE, options, True)
    for a, b in zip([*got[:2], *got[2]], [*clean[:2], *clean[2]], strict=True):
        assert torch.equal(a, b)
    logits[1].fill_(math.nan)
    loss, packed, grads = module.forward(logits, Targets(target), labels_truth.SCHEDULE, options, True)
    assert loss.isnan().any()
    assert unpack(packed).gains.isnan().all()
    assert grads[0].isfinite().all()


def test_nothing_counts_and_no_rows():
    x, unknown = torch.randn(4, 3), torch.full((4, 3), math.nan)
    loss, _, grads = labels_truth.compare(module, [x, x], Targets(unknown))
    assert loss.isnan()
    assert all(g.eq(0).all() for g in grads)
    for reduction in ("mean", "sum", "none"):
        _, packed, _ = labels_truth.compare(module, [x[:0]] * 3, Targets(unknown[:0]), reduction=reduction)
        assert unpack(packed).gains.tolist() == [1, 1]


@pytest.mark.parametrize("branches", [2, 16])
def test_branches_and_schedules(branches):
    logits, target = labels_truth.inputs((5, 6), branches=branches)
    gammas = torch.rand(branches - 1)
    for reduction in ("mean", "none"):
        for schedule in (
            labels_truth.SCHEDULE,
            Schedule(gammas, torch.tensor(3.0)),
            Schedule(gammas, 3.0, 5, torch.tensor(4)),
        ):
            labels_truth.compare(module, logits, Targets(target), schedule=schedule, reduction=reduction)
