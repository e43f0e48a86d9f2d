"""What test_distributed.py runs inside its processes: one function per check, called on every process of a
gloo group.
"""

from __future__ import annotations

import itertools
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arl_fast
from arl_fast._core.collectives import Group, resolve_group
from arl_fast.implementations import dispatch
from arl_fast.reference import arl_loss
from arl_fast.sharded import copy_to_shards, sharded_arl_loss

CLASSES = 5


def run(rank: int, world: int, store: str, out: str, names: list[str]) -> None:
    """Run the named checks on this process and write what went wrong, by name, to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    failures = {}
    for name in names:
        torch.manual_seed(0)  # all processes draw the same joined batch
        try:
            getattr(sys.modules[__name__], name)(rank, world)
        except BaseException:  # pytest.raises fails with one
            failures[name] = traceback.format_exc()
    torch.save(failures, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def raises(kind: type[Exception], text: str, call) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()


def close(a, b, dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def shares(world: int) -> list[slice]:
    """Unequal parts of the joined batch: 1, 3, 5, ... rows."""
    ends = [i * i for i in range(world + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def part(share: slice, options: dict) -> dict:
    return options | ({"mask": options["mask"][share]} if "mask" in options else {})


class Model(nn.Module):
    """Two encoders and a head; a dict in, BranchLogits out."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoders = nn.ModuleDict(
            {"a": nn.Sequential(nn.Linear(8, 6), nn.Tanh()), "v": nn.Sequential(nn.Linear(8, 4), nn.Tanh())}
        )
        self.head = arl_fast.ConcatHead({"a": 6, "v": 4}, CLASSES)
        self.to(dtype)

    def forward(self, x):
        return self.head({name: encoder(x[name]) for name, encoder in self.encoders.items()})


def batch(rows: int, dtype=torch.float32):
    x = {name: torch.randn(rows, 8, dtype=dtype) for name in ("a", "v")}
    return x, torch.randint(0, CLASSES, (rows,))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def joined(x, target, dtype, **options):
    """One process on the whole batch: gradients, loss, statistics."""
    model = Model(dtype)
    criterion = arl_fast.ARLLoss(**{name: value for name, value in options.items() if name != "mask"})
    loss = criterion(model(x), target, options.get("mask"))
    loss.backward()
    return gradients(model), loss.detach(), criterion.stats


def ddp(rank, world, share, x, target, dtype, compiled=False, **options):
    """This process's share of it, under DistributedDataParallel."""
    model = DistributedDataParallel(Model(dtype))
    criterion = arl_fast.ARLLoss(
        sync_stats=True, **{name: value for name, value in options.items() if name != "mask"}
    )
    mask = part(share, options).get("mask")
    loss = criterion(model({name: z[share] for name, z in x.items()}), target[share], mask)
    loss.backward()
    return gradients(model), loss.detach(), criterion.stats


def same(a, b, dtype) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        close(x, y, dtype)
    close(a[1], b[1], dtype)
    for x, y in zip(a[2], b[2], strict=True):
        close(x, y, dtype)


# ---- statistics of all processes


def check_ddp_equals_one_process_on_the_joined_batch(rank, world):
    rows = world * world
    for dtype in (torch.float32, torch.float64):
        x, target = batch(rows, dtype)
        mask = torch.rand(rows, 2) > 0.3
        mask[: shares(world)[0].stop, 1] = False  # the first process has no row of "v"
        weight = torch.rand(CLASSES, dtype=dtype) + 0.1
        for name in ("reference", "native"):
            if dispatch.load(name, "cpu")[0] is None:
                continue
            dispatch.override = name
            for options in (
                {},
                {"rule": "paper", "gamma": 4.0, "dependence": "logit_l1"},
                {"mask": mask, "gain": "mean_one"},
                {"weight": weight, "label_smoothing": 0.1, "gain": "plain"},
                {"gamma": torch.tensor(2.0), "warmup": 1},
            ):
                options = options | ({"weight": options["weight"].clone()} if "weight" in options else {})
                same(
                    ddp(rank, world, shares(world)[rank], x, target, dtype, **options),
                    joined(x, target, dtype, **options),
                    dtype,
                )
            dispatch.override = None
        soft = torch.softmax(torch.randn(rows, CLASSES, dtype=dtype), 1)
        same(ddp(rank, world, shares(world)[rank], x, soft, dtype), joined(x, soft, dtype), dtype)
        labels = torch.randint(0, 2, (rows, CLASSES)).to(dtype)
        labels[torch.rand(rows, CLASSES) < 0.3] = torch.nan  # unequal numbers of known ones
        for options in ({}, {"mask": mask, "pos_weight": weight}):
            options = options | {"task": "multilabel"}
            same(
                ddp(rank, world, shares(world)[rank], x, labels, dtype, **options),
                joined(x, labels, dtype, **options),
                dtype,
            )


def check_a_process_without_a_valid_row(rank, world):
    dtype = torch.float64
    x, target = batch(world * world, dtype)
    for last in (False, True):
        target[shares(world)[-1 if last else 0]] = -100  # finally on two processes, with two processes on all
        expected = joined(x, target, dtype)
        got = ddp(rank, world, shares(world)[rank], x, target, dtype)
        same(got, expected, dtype)
        assert all(g.isfinite().all() for g in got[0])


def check_a_process_without_a_row(rank, world):
    dtype = torch.float64
    x, target = batch(6, dtype)
    share = slice(0, 0) if rank == 0 else slice((rank - 1) * 6 // (world - 1), rank * 6 // (world - 1))
    same(ddp(rank, world, share, x, target, dtype), joined(x, target, dtype), dtype)


def check_a_process_whose_rows_weigh_nothing(rank, world):
    dtype = torch.float64
    x, target = batch(world * world, dtype)
    target[:] = 1
    target[shares(world)[0]] = 0
    weight = torch.tensor([0.0, 1, 2, 3, 4], dtype=dtype)
    same(
        ddp(rank, world, shares(world)[rank], x, target, dtype, weight=weight),
        joined(x, target, dtype, weight=weight),
        dtype,
    )


def check_labels_of_all_processes(rank, world):
    """task="multilabel": means over the pairs of all processes, of which the first knows no label, then all
    labels.
    """
    for dtype in (torch.float32, torch.float64):
        x, _ = batch(world * world, dtype)
        target = torch.rand(world * world, CLASSES, dtype=dtype)
        pos_weight = torch.rand(CLASSES, dtype=dtype)
        for unknown in (True, False):
            known = target.clone()
            if unknown:
                known[torch.rand_like(target) < 0.2] = torch.nan
                known[shares(world)[0]] = torch.nan
            options = dict(task="multilabel", pos_weight=pos_weight.clone(), gain="mean_one")
            got = ddp(rank, world, shares(world)[rank], x, known, dtype, **options)
            same(got, joined(x, known, dtype, **options), dtype)
            assert all(g.isfinite().all() for g in got[0])


def check_sum_and_none_stay_local(rank, world):
    x, target = batch(world * world)
    share = shares(world)[rank]
    model = Model()
    own = {name: z[share] for name, z in x.items()}
    for reduction in ("sum", "none"):
        loss, stats = arl_fast.arl_loss(
            *call(model(own), target[share]), reduction=reduction, sync_stats=True
        )
        alone, local = arl_fast.arl_loss(*call(model(own), target[share]), reduction=reduction)
        _, everything = arl_fast.arl_loss(*call(model(x), target), reduction=reduction)
        close(loss, alone, torch.float32)
        for a, b in zip(stats, everything, strict=True):
            close(a, b, torch.float32)
        assert not torch.equal(local.entropy, stats.entropy)
        head = list(model.head.parameters())
        for a, b in zip(
            torch.autograd.grad(loss.sum(), head), torch.autograd.grad(alone.sum(), head), strict=True
        ):
            # the head's gradient is this share's own; the encoders' has the joined gain
            close(a, b, torch.float32)


def check_sum_with_a_normaliser_is_the_joined_batch(rank, world):
    """The recipe of HF's Trainer: sum over the share, divided by the number of rows of all, times the
    processes.
    """
    dtype = torch.float64
    x, target = batch(world * world, dtype)
    share = shares(world)[rank]
    model = DistributedDataParallel(Model(dtype))
    criterion = arl_fast.ARLLoss(reduction="sum", sync_stats=True)
    loss = criterion(model({name: z[share] for name, z in x.items()}), target[share]) / len(target) * world
    loss.backward()
    for a, b in zip(gradients(model), joined(x, target, dtype)[0], strict=True):
        close(a, b, dtype)


def check_local_by_default(rank, world):
    x, target = batch(world * world)
    share = shares(world)[rank]
    own = {name: z[share] for name, z in x.items()}
    model = Model()
    _, expected = arl_loss(*call(model(own), target[share]))
    criterion = arl_fast.ARLLoss()
    criterion(DistributedDataParallel(model)(own), target[share])
    for a, b in zip(criterion.stats, expected, strict=True):
        close(a, b, torch.float32)


def check_callable_rule_sees_the_joined_statistics_once(rank, world):
    x, target = batch(world * world)
    seen = []

    def rule(stats):
        seen.append(stats.count[0].item())
        return stats.entropy / stats.entropy.sum()

    got = ddp(rank, world, shares(world)[rank], x, target, torch.float32, rule=rule)
    assert seen == [world * world]
    same(got, joined(x, target, torch.float32, rule=rule), torch.float32)


def check_linear_loss(rank, world):
    """Head and loss in one, in chunks: the joined batch's gradients and statistics as well, with a share
    without a valid row too.
    """
    dtype = torch.float64
    x, target = batch(world * world, dtype)
    share = shares(world)[rank]

    class Whole(Model):
        def forward(self, x, target):
            features = {name: encoder(x[name]) for name, encoder in self.encoders.items()}
            return arl_fast.linear_arl_loss(
                features, self.head.weight, self.head.bias, target, sync_stats=True, chunk=2
            )

    for ignored in (None, shares(world)[0]):
        if ignored is not None:
            target[ignored] = -100
        model = DistributedDataParallel(Whole(dtype))
        loss, stats = model({name: z[share] for name, z in x.items()}, target[share])
        loss.backward()
        same((gradients(model), loss.detach(), stats), joined(x, target, dtype), dtype)


def check_compiled(rank, world):
    """The all-reduce is in the graph: fullgraph, both passes, no recompilation through the warm-up."""
    x, target = batch(world * world)
    share = shares(world)[rank]
    own, labels = {name: z[share] for name, z in x.items()}, target[share]
    model = Model()
    criterion, eager = (arl_fast.ARLLoss(sync_stats=True, warmup=1) for _ in range(2))
    compiled = torch.compile(criterion, fullgraph=True)
    for i in range(3):
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            loss = compiled(model(own), labels)
        loss.backward()
        got = gradients(model), loss.detach(), criterion.stats
        model.zero_grad()
        loss = eager(model(own), labels)
        loss.backward()
        same(got, (gradients(model), loss.detach(), eager.stats), torch.float32)


def check_compiled_ddp(rank, world):
    """torch.compile over the DDP module, the loss outside."""
    x, target = batch(world * world)
    share = shares(world)[rank]
    model = torch.compile(DistributedDataParallel(Model()), backend="aot_eager")
    criterion = arl_fast.ARLLoss(sync_stats=True)
    loss = criterion(model({name: z[share] for name, z in x.items()}), target[share])
    loss.backward()
    same((gradients(model), loss.detach(), criterion.stats), joined(x, target, torch.float32), torch.float32)


def check_fsdp2(rank, world):
    from torch.distributed.fsdp import fully_shard

    x, target = batch(world * world)
    share = shares(world)[rank]
    model = Model()
    for module in (*model.encoders.values(), model.head, model):
        fully_shard(module)
    criterion = arl_fast.ARLLoss(sync_stats=True)
    loss = criterion(model({name: z[share] for name, z in x.items()}), target[share])
    loss.backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]
    same((grads, loss.detach(), criterion.stats), joined(x, target, torch.float32), torch.float32)


def check_meshes_and_groups(rank, world):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    assert resolve_group(mesh) == Group(mesh.get_group().group_name, world, rank)
    assert resolve_group(True) == Group(dist.group.WORLD.group_name, world, rank)
    assert resolve_group(dist.group.WORLD) == resolve_group(True)
    raises(TypeError, "sync_stats: got str, expected True, a ProcessGroup", lambda: resolve_group("all"))
    raises(
        ValueError,
        "DeviceMesh of 2 dimensions",
        lambda: resolve_group(init_device_mesh("cpu", (world, 1), mesh_dim_names=("a", "b"))),
    )
    alone = [dist.new_group([r]) for r in range(world)][rank]
    assert resolve_group(alone) is None  # nothing to add up
    x, target = batch(world * world)
    share = shares(world)[rank]
    out = Model()({name: z[share] for name, z in x.items()})
    for a, b in zip(
        arl_fast.arl_loss(*call(out, target[share]), sync_stats=alone)[1],
        arl_fast.arl_loss(*call(out, target[share]))[1],
        strict=True,
    ):
        close(a, b, torch.float32)


def check_dtensor_logits_raise(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x, target = batch(4)
    fused, unimodal, link = Model()(x)
    whole = distribute_tensor(fused.detach(), mesh, [Replicate()])
    raises(TypeError, "fused: got a DTensor", lambda: arl_fast.arl_loss(whole, unimodal, target, link))
    raises(
        TypeError,
        "unimodal['a']: got a DTensor",
        lambda: arl_fast.arl_loss(fused, unimodal | {"a": whole}, target, link),
    )
    raises(TypeError, "features['a']: got a DTensor", lambda: arl_fast.modulate({"a": whole}))


# ---- classes over processes


def bounds(rank: int, world: int, classes: int, uneven: bool) -> slice:
    """This process's classes: even, or 1, 2, ... and the rest."""
    if not uneven:
        return slice(rank * classes // world, (rank + 1) * classes // world)
    first = rank * (rank + 1) // 2
    return slice(first, classes if rank == world - 1 else first + rank + 1)


def call(out, target) -> tuple:
    """Arguments of arl_loss."""
    return out.fused, out.unimodal, target, out.link


def compare_sharded(rank, world, logits, target, uneven=False, tolerance=None, **options) -> None:
    """Loss, statistics and gradients of the shard against the unsharded reference."""
    dtype = logits[0].dtype
    tolerance = tolerance or (1e-12 if dtype == torch.float64 else 1e-6)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    own = bounds(rank, world, logits[0].shape[1], uneven)

    leaves = [x.clone().requires_grad_() for x in logits]
    link = torch.zeros(
        len(logits) - 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link, **options)
    upstream = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, [link, *leaves], upstream)

    mine = [x[:, own].clone().requires_grad_() for x in logits]
    if "weight" in options:
        options = options | {"weight": options["weight"][own]}
    shard_target = target[:, own] if target.is_floating_point() else target
    got_loss, got_stats = sharded_arl_loss(
        mine[0], mine[1:], shard_target, link, offset=own.start if uneven else None, **options
    )
    got = torch.autograd.grad(got_loss, [link, *mine], upstream)
    torch.testing.assert_close(got_loss, loss, **close)
    for field in stats._fields:
        torch.testing.assert_close(
            getattr(got_stats, field),
            getattr(stats, field),
            **close,
            msg=lambda m, field=field: f"{field}: {m}",
        )
    torch.testing.assert_close(got[0], expected[0], **close)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b[:, own], **close)


def check_sharded_equals_unsharded(rank, world):
    classes = 12 if world < 4 else 16
    for uneven in (False, True):
        for dtype in (torch.float64, torch.float32):
            logits = [3 * torch.randn(7, classes, dtype=dtype) for _ in range(4)]
            target = torch.randint(0, classes, (7,))
            target[2] = -100
            mask = torch.rand(7, 3) > 0.3
            weight = torch.rand(classes, dtype=dtype)
            weight[3] = 0
            for options in (
                {},
                {"gamma": torch.tensor(2.0), "warming": torch.tensor(False), "dependence": "logit_l1"},
                {"warming": True, "gamma": 3.0},
                {"mask": mask, "gain": "mean_one"},
                {"weight": weight},
                {"weight": weight, "label_smoothing": 0.1, "mask": mask},
                {"label_smoothing": 0.2, "reduction": "none"},
                {"weight": weight, "label_smoothing": 0.2, "reduction": "none", "mask": mask},
                {"reduction": "sum", "rule": "constant"},
                {"rule": "none", "gamma": 0.5},
                {"rule": lambda stats: stats.dependence / stats.dependence.sum()},
            ):
                compare_sharded(rank, world, logits, target, uneven, **options)
            compare_sharded(rank, world, logits[:3], target.int(), uneven, rule="paper")
            probabilities = torch.softmax(torch.randn(7, classes, dtype=dtype), 1)
            probabilities[0] = 1 / classes  # ties
            for options in (
                {},
                {"weight": weight, "label_smoothing": 0.1, "mask": mask},
                {"reduction": "none"},
            ):
                compare_sharded(rank, world, logits, probabilities, uneven, **options)
            dense = [torch.randn(2, classes, 3, 2, dtype=dtype) for _ in range(3)]
            compare_sharded(
                rank,
                world,
                dense,
                torch.randint(0, classes, (2, 3, 2)),
                uneven,
                reduction="none",
                mask=mask[:2, :2],
            )


def check_sharded_extreme_logits(rank, world):
    classes = 16
    target = torch.randint(0, classes, (6,))
    dtype = torch.float64
    for offset in (-1e4, 1e4):
        compare_sharded(
            rank,
            world,
            [offset + 3 * torch.randn(6, classes, dtype=dtype) for _ in range(3)],
            target,
            tolerance=1e-9,
        )
    compare_sharded(rank, world, [200 * torch.randn(6, classes, dtype=dtype) for _ in range(3)], target)
    ties = [torch.randint(0, 2, (6, classes)).to(dtype) for _ in range(3)]
    compare_sharded(rank, world, ties, target, label_smoothing=0.1)
    masked = [torch.randn(6, classes, dtype=dtype) for _ in range(3)]
    for x in masked:  # a whole shard without a possible class, but never the target
        x[:, bounds(0, world, classes, False)] = -torch.inf
    for offset in (0, -1e4):
        compare_sharded(
            rank, world, [x + offset for x in masked], target % (classes // 2) + classes // 2, tolerance=1e-9
        )
    nothing = torch.full((6,), -100)
    compare_sharded(rank, world, ties, nothing)
    for x in ties:
        x[1] = torch.nan  # an ignored row may hold anything
    target[1] = -100
    compare_sharded(rank, world, ties, target)
    for dtype in (torch.float16, torch.bfloat16):
        compare_sharded(
            rank, world, [torch.randn(6, classes).to(dtype) for _ in range(3)], target, tolerance=1e-2
        )


def check_sharded_float32_extremes(rank, world):
    """Relative error of float32 gradients against float64, each row by itself, as arl_loss has it; and no row
    at all.
    """
    classes = 16
    target = torch.randint(0, classes, (6,))
    own = bounds(rank, world, classes, False)
    noise = [torch.randn(6, classes) for _ in range(3)]
    certain = [x.scatter_add(1, target[:, None], torch.full((6, 1), 14.0)) for x in noise]
    cases = {"offset": [x + 1e4 for x in noise], "certain": certain}
    for name, logits in cases.items():
        wide = [x.double().requires_grad_() for x in logits]
        loss, _ = arl_loss(wide[0], wide[1:], target, reduction="sum", rule="none")
        truth = torch.autograd.grad(loss, wide)
        mine = [x[:, own].clone().requires_grad_() for x in logits]
        loss, _ = sharded_arl_loss(mine[0], mine[1:], target, reduction="sum", rule="none")
        for got, want in zip(torch.autograd.grad(loss, mine), truth, strict=True):
            error = (got.double() - want[:, own]).norm(dim=1) / want.norm(dim=1)
            assert float(error.max()) < 2e-6, (name, error)
    empty = [x[:0, own].requires_grad_() for x in noise]
    loss, stats = sharded_arl_loss(empty[0], empty[1:], target[:0], rule="none")
    assert loss.isnan()
    assert stats.count.tolist() == [0, 0, 0]
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(loss, empty), empty, strict=True))


def check_sharded_errors(rank, world):
    logits = [torch.randn(3, 4) for _ in range(3)]
    target = torch.tensor([0, 1, 4 * world])
    loss = lambda **options: sharded_arl_loss(logits[0], logits[1:], target, **options)  # noqa: E731
    raises(IndexError, f"got class {4 * world}, expected 0 <= target < {4 * world}", loss)
    target[2] = 2
    raises(ValueError, "expected shards that follow each other", lambda: loss(offset=rank * 3))
    raises(ValueError, "offset: got -1", lambda: loss(offset=-1))
    raises(TypeError, "group: got int", lambda: loss(group=3))
    logits[0].requires_grad_()
    raises(ValueError, "link: got None", loss)


def check_sharded_head_trains_as_the_unsharded(rank, world):
    """Column-parallel head: encoders alike on all processes get the gradients of the unsharded model, gains
    included.
    """
    dtype, classes = torch.float64, 4 * world
    own = bounds(rank, world, classes, False)
    x = {name: torch.randn(6, 8, dtype=dtype) for name in ("a", "v")}
    target = torch.randint(0, classes, (6,))
    head = {name: torch.randn(classes, width, dtype=dtype) for name, width in (("a", 6), ("v", 4))}

    def step(rows, loss, **options):
        encoders = Model(dtype).encoders
        features, link = arl_fast.modulate({name: encoder(x[name]) for name, encoder in encoders.items()})
        weights = {name: w[rows].clone().requires_grad_() for name, w in head.items()}
        enter = copy_to_shards if loss is sharded_arl_loss else (lambda z: z)
        unimodal = {name: enter(z) @ weights[name].T for name, z in features.items()}
        value, _ = loss(sum(unimodal.values()), unimodal, target, link, **options)
        value.backward()
        return gradients(encoders), [w.grad for w in weights.values()]

    expected, head_expected = step(slice(None), arl_loss)
    got, head_got = step(own, sharded_arl_loss)
    for a, b in zip(got, expected, strict=True):
        close(a, b, dtype)
    for a, b in zip(head_got, head_expected, strict=True):
        close(a, b[own], dtype)


def check_sharded_compiled(rank, world):
    own = bounds(rank, world, 8, False)
    logits = [torch.randn(6, 8)[:, own].clone().requires_grad_() for _ in range(3)]
    target = torch.randint(0, 8, (6,))
    link = torch.zeros(2, requires_grad=True)

    def step(target, *logits):
        loss, stats = sharded_arl_loss(logits[0], logits[1:], target, link, label_smoothing=0.1)
        return loss, stats.gains

    expected, gains = step(target, *logits)
    got, got_gains = torch.compile(step, fullgraph=True, backend="aot_eager")(target, *logits)
    close(got, expected, torch.float32)
    close(got_gains, gains, torch.float32)
    for a, b in zip(
        torch.autograd.grad(got, [link, *logits]), torch.autograd.grad(expected, [link, *logits]), strict=True
    ):
        close(a, b, torch.float32)


def check_sharded_classes_and_batch(rank, world):
    """Two by two: classes over one dimension of the mesh, the batch over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("batch", "classes"))
    dtype = torch.float64
    logits = [torch.randn(7, 8, dtype=dtype) for _ in range(3)]
    target = torch.randint(0, 8, (7,))
    leaves = [x.clone().requires_grad_() for x in logits]
    link = torch.zeros(2, dtype=dtype, requires_grad=True)
    loss, stats = arl_loss(leaves[0], leaves[1:], target, link)
    expected = torch.autograd.grad(loss, leaves)

    rows = slice(0, 2) if mesh.get_local_rank("batch") == 0 else slice(2, 7)
    own = bounds(mesh.get_local_rank("classes"), world // 2, 8, False)
    mine = [x[rows, own].clone().requires_grad_() for x in logits]
    got_loss, got_stats = sharded_arl_loss(
        mine[0], mine[1:], target[rows], link, group=mesh["classes"], sync_stats=mesh["batch"]
    )
    got = torch.autograd.grad(got_loss, mine)
    close(got_loss, loss, dtype)
    for a, b in zip(got_stats, stats, strict=True):
        close(a, b, dtype)
    for a, b in zip(got, expected, strict=True):
        close(a / 2, b[rows, own], dtype)  # averaged over the two shares of the batch
