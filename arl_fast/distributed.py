"""Several processes: statistics of the whole batch, and a loss over classes that are sharded.

``sync_stats`` of ``arl_loss`` and ``ARLLoss`` adds up the sums of all processes, one small all-reduce per step.
``sharded_arl_loss`` is the loss for logits of which every process holds some of the classes, one all-gather per step.
Both are functional collectives, so that the same code runs eagerly, compiled with ``fullgraph=True`` and on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference, rules
from .branches import Unimodal, check_logits
from .functional import (
    _from_rows,
    _mask_rows,
    _to_rows,
    for_link,
    prepare,
    recorded,
    refuse_second_derivatives,
    refuse_transforms,
    require_link,
)
from .options import Options, make_options
from .stats import BranchStats, unpack, unpack_sums

_SPLIT = 1 << 20  # class numbers cross the wire as two floats, each exact in float32


class Group(NamedTuple):
    """A process group as collectives take it: plain values, constants for the compiler."""

    name: str
    size: int
    rank: int


def resolve_group(group: Any, argument: str = "sync_stats") -> Group | None:
    """The process group that True, a ProcessGroup or a one-dimensional DeviceMesh stands for; None for a single process.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: anything else, or a mesh of several dimensions.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{argument}: got {group!r}, but torch.distributed is not initialised: start the script with torchrun and call "
            "torch.distributed.init_process_group() first, or use sync_stats=False on a single process"
        )
    if group is True:
        group = dist.group.WORLD
    elif hasattr(group, "mesh_dim_names"):  # DeviceMesh, without importing it
        if group.ndim != 1:
            raise ValueError(f"{argument}: got a DeviceMesh of {group.ndim} dimensions, expected one: pass mesh['name of the dimension']")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{argument}: got {type(group).__name__}, expected True, a ProcessGroup or a DeviceMesh of one dimension")
    size = dist.get_world_size(group)
    return None if size == 1 else Group(group.group_name, size, dist.get_rank(group))


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.name))


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """[n] -> [processes, n]"""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size, group.name)).view(group.size, -1)


def synchronise(
    loss: Tensor, packed: Tensor, schedule: rules.Schedule, options: Options, group: Group, norm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and statistics of the joined batch from those of this process's share of it.

    Statistics, coefficients and gains are those of the joined batch, equal on all processes. With reduction "mean" so
    is the loss, and the returned factor turns this share's gradients into those whose *average* over the processes,
    which DDP and FSDP form, is the gradient of the joined batch, however unequal the shares. With "sum" and "none" loss
    and gradients stay this share's own: they are for a loop that normalises by itself.

    Args:
        loss, packed: what an implementation returned for this share.
        schedule, options: as the implementation got them.
        group: from ``resolve_group``.
        norm: [M+1] what the gradients were divided by, if a norm was given to the implementation.

    Returns:
        loss, packed [16M+9], and the factor [M+1] for ``scale``, or None for 1.
    """
    local = unpack_sums(packed)
    sums = _all_reduce(local, group)
    total, packed = rules.finish(sums, schedule, options)
    if options.reduction != "mean":
        return loss, packed, None
    _, global_norm, count = sums[:3]
    factor = (local[1] if norm is None else norm) * group.size / global_norm
    return total, packed, torch.where(count > 0, factor, 0)  # a branch without a valid row has no gradient, not 0/0


class _Classes(NamedTuple):
    """Class indices as one shard sees them. Quantities [N] over its own classes; u is the target times its class weights."""

    position: Tensor  # [N, 1] place of the target, 0 where it is not here
    here: Tensor  # [N] bool
    weight: Tensor  # [N] the target's class weight, 0 where it is not here

    def mass(self) -> Tensor:  # sum_c u_c
        return self.weight

    def tallest(self) -> Tensor:  # max_c t_c
        return self.here.to(self.weight.dtype)

    def is_at(self, position: Tensor) -> Tensor:
        return self.here & (position == self.position.squeeze(1))

    def aligned(self, shifted: Tensor) -> Tensor:  # sum_c u_c shifted_c
        return torch.where(self.weight != 0, shifted.gather(1, self.position).squeeze(1) * self.weight, 0)

    def expected(self, e: Tensor) -> Tensor:  # sum_c t_c e_c
        return torch.where(self.here, e.gather(1, self.position).squeeze(1), 0)

    def subtract(self, g: Tensor, share: float) -> Tensor:  # g - share u
        return g.scatter_add(1, self.position, -share * self.weight.unsqueeze(1))


class _Probabilities(NamedTuple):
    """Class probabilities t [N, C/processes] as one shard sees them; methods as _Classes."""

    t: Tensor
    u: Tensor

    def mass(self) -> Tensor:
        return self.u.sum(1)

    def tallest(self) -> Tensor:
        return self.t.amax(1)

    def is_at(self, position: Tensor) -> Tensor:
        return position == self.t.argmax(1)

    def aligned(self, shifted: Tensor) -> Tensor:
        return torch.where(self.u != 0, shifted * self.u, 0).sum(1)

    def expected(self, e: Tensor) -> Tensor:
        return (self.t * e).sum(1)

    def subtract(self, g: Tensor, share: float) -> Tensor:
        return g - share * self.u


class _ShardedRows(NamedTuple):
    """What one process knows of a branch, [N] each; logits less their largest here, ``top``, so that nothing overflows."""

    top: Tensor
    partition: Tensor  # Z = sum exp(x - top)
    energy: Tensor  # E = sum exp(x - top) (x - top)
    aligned: Tensor  # sum u (x - top)
    smooth: Tensor  # sum w (x - top), for label smoothing
    confidence: Tensor  # sum t exp(x - top)
    hit: Tensor  # whether the first largest logit here is where the target is largest
    l1: Tensor  # sum |x|, for dependence "logit_l1"


def _local_rows(x: Tensor, target: _Classes | _Probabilities, weights: Tensor, options: Options) -> Tensor:
    """[N, C/processes] -> _ShardedRows, stacked [8, N]."""
    top = x.amax(1)
    shifted = x - torch.where(top == -torch.inf, 0, top).unsqueeze(1)
    e = shifted.exp()
    zeros = torch.zeros_like(top)
    rows = _ShardedRows(
        top,
        e.sum(1),
        torch.where(e > 0, e * shifted, 0).sum(1),
        target.aligned(shifted),
        torch.where(weights != 0, shifted * weights, 0).sum(1) if options.label_smoothing else zeros,
        target.expected(e),
        target.is_at(x.argmax(1)).to(x.dtype),
        x.abs().sum(1) if options.dependence == "logit_l1" else zeros,
    )
    return torch.stack(rows)


class _JoinedRows(NamedTuple):
    """A branch over all classes, [N] each."""

    log_z: Tensor  # log sum exp x
    entropy: Tensor
    loss: Tensor  # -sum u log p
    smooth: Tensor  # -sum w log p
    confidence: Tensor
    correct: Tensor
    l1: Tensor


def _join(parts: Tensor, mass: Tensor, weight_sum: Tensor, owner: Tensor) -> _JoinedRows:
    """The shards' rows [processes, 8, N], with sum u [processes, N], sum w [processes] and the target's shard [N]."""
    rows = _ShardedRows(*parts.unbind(1))
    top = rows.top.amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    empty = rows.top == -torch.inf
    shift = torch.where(empty, 0, rows.top) - top  # what turns a shard's x - top into the joined one
    share = torch.where(empty, 0, shift.exp())
    partition = (rows.partition * share).sum(0)
    energy = (share * (rows.energy + rows.partition * shift)).sum(0)
    log_z = partition.log()
    entropy = log_z - energy / partition
    first = rows.top.argmax(0)  # ties: the first shard holds the first largest logit
    hit = rows.hit.gather(0, first.unsqueeze(0)).squeeze(0)
    return _JoinedRows(
        top + log_z,
        torch.where(entropy < 0, 0, entropy),  # below 0 by rounding only
        mass.sum(0) * log_z - (rows.aligned + mass * shift).sum(0),
        weight_sum.sum() * log_z - (rows.smooth + weight_sum.unsqueeze(1) * shift).sum(0),
        (rows.confidence * share).sum(0) / partition,
        hit * (first == owner).to(hit.dtype),
        rows.l1.sum(0),
    )


def _check_layout(offsets: Tensor, counts: Tensor, on_host: bool) -> Tensor:
    """0, or NaN (on a CPU an error) if the shards do not follow each other without gap and overlap in the order of the ranks."""
    wrong = (offsets != counts.cumsum(0) - counts).any()
    if on_host and bool(wrong):
        shards = ", ".join(f"[{a}, {a + n})" for a, n in zip(offsets.tolist(), counts.tolist(), strict=True))
        raise ValueError(
            f"offset: the processes hold the classes {shards}, expected shards that follow each other in the order of the ranks; "
            "where they are not all of one size, pass offset= the number of this process's first class"
        )
    return torch.where(wrong, torch.nan, 0.0)


def _sharded_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    schedule: rules.Schedule,
    options: Options,
    group: Group | None,
    offset: int,
    grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As the ``forward`` of an implementation (arl_fast/reference.py), for shards [N, C/processes]."""
    dtype = reference.compute_dtype(logits[0].dtype)
    device = logits[0].device
    on_host = device.type == "cpu" and not torch.compiler.is_compiling()
    n, classes = logits[0].shape
    gamma, _, _ = rules.unpack_schedule(schedule)
    weights = torch.ones(classes, dtype=dtype, device=device) if weight is None else weight

    seen: _Classes | _Probabilities
    if target.is_floating_point():
        labelled = torch.ones(n, dtype=torch.bool, device=device)
        seen = _Probabilities(target.to(dtype), target.to(dtype) * weights)
    else:
        labelled = target != options.ignore_index
        position = target.long() - offset
        here = labelled & (position >= 0) & (position < classes)
        position = torch.where(here, position, 0)
        seen = _Classes(position.unsqueeze(1), here, torch.where(here, weights[position], 0))

    # one collective: rows [M+1, 8, N], the target's mass and height [2, N], and which classes are here
    values = [x.to(dtype) for x in logits]
    rows = torch.stack([_local_rows(x, seen, weights, options) for x in values])
    place = torch.tensor([offset // _SPLIT, offset % _SPLIT, classes // _SPLIT, classes % _SPLIT], dtype=dtype, device=device)
    sent = torch.cat([rows.reshape(-1), seen.mass(), seen.tallest(), place, weights.sum().reshape(1)])
    received = sent.unsqueeze(0) if group is None else _all_gather(sent, group)
    parts, mass, tallest, place, weight_sum = received.split([rows.numel(), n, n, 4, 1], 1)
    parts = parts.reshape(-1, *rows.shape)
    weight_sum = weight_sum.squeeze(1)
    owner = tallest.argmax(0)
    offsets, counts = (place[:, ::2].long() * _SPLIT + place[:, 1::2].long()).unbind(1)
    total_classes = counts.sum()

    poison = _check_layout(offsets, counts, on_host).to(dtype)
    if not target.is_floating_point():
        bad = labelled & ((target < 0) | (target >= total_classes))
        if on_host:
            reference.check_targets(target, int(total_classes), options.ignore_index)
        poison = poison + torch.where(bad, torch.nan, 0.0).to(dtype)

    smoothing = options.label_smoothing
    smooth_share = smoothing / total_classes.to(dtype)
    row_mass = mass.sum(0)
    sums, grads, row_loss = [], [], None
    for branch, x in enumerate(values):
        valid = labelled if mask is None or branch == 0 else labelled & mask[:, branch - 1]
        joined = _join(parts[:, branch], mass, weight_sum, owner)
        loss = (1 - smoothing) * joined.loss + poison
        if smoothing:
            loss = loss + smooth_share * joined.smooth
        dependence = joined.confidence if options.dependence == "confidence" else joined.l1
        norm = torch.ones_like(loss) if target.is_floating_point() else row_mass
        terms = torch.stack([loss, norm, torch.ones_like(loss), joined.correct, joined.entropy, dependence + poison])
        terms = torch.where(valid, terms, 0)
        sums.append(terms.sum(1))
        if options.reduction == "none":
            row_loss = terms[0] if row_loss is None else row_loss + gamma * terms[0]
        if grad:
            scale: float | Tensor = 1.0 if branch == 0 else gamma
            if options.reduction == "mean":
                scale = scale / sums[-1][1]
            p = (x - joined.log_z.unsqueeze(1)).exp()
            if smoothing:
                pull = (1 - smoothing) * row_mass + smooth_share * weight_sum.sum() + poison
                g = seen.subtract(p * pull.unsqueeze(1) - smooth_share * weights, 1 - smoothing)
            else:
                g = seen.subtract(p * (row_mass + poison).unsqueeze(1), 1.0)
            grads.append(torch.where(valid.unsqueeze(1), g * scale, 0).to(reference.grad_dtype(logits[branch].dtype)))
    total, packed = rules.finish(torch.stack(sums, 1), schedule, options)
    return (total if row_loss is None else row_loss), packed, grads


def _compute(
    options: Options,
    schedule: rules.Schedule,
    group: Group | None,
    batch_group: Group | None,
    offset: int,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    logits: Sequence[Tensor],
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """The loss in its final shape, the packed statistics, the factor on the gradients and the gradients of the rows."""
    rows = [_to_rows(x) for x in logits]
    row_target = _to_rows(target) if target.is_floating_point() else target.reshape(-1)
    row_mask = _mask_rows(mask, logits[0])
    loss, packed, grads = _sharded_forward(rows, row_target, row_mask, weight, schedule, options, group, offset, grad)
    factor = None
    if batch_group is not None:
        loss, packed, factor = synchronise(loss, packed, schedule, options, batch_group)
    if options.reduction == "none":
        loss = loss.view(logits[0].shape[:1] + logits[0].shape[2:])
    return loss, packed, factor, grads


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        schedule: rules.Schedule,
        group: Group | None,
        batch_group: Group | None,
        offset: int,
        target: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        link: Tensor | None,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        grad = any(ctx.needs_input_grad[9:])
        loss, packed, factor, grads = _compute(options, schedule, group, batch_group, offset, target, mask, weight, logits, grad)
        ctx.shape, ctx.dtype = logits[0].shape, logits[0].dtype
        link_grad = for_link(link, packed) if link is not None and ctx.needs_input_grad[8] else None
        ctx.save_for_backward(link_grad, factor, *grads)
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        link, factor, *grads = ctx.saved_tensors
        if upstream is None:  # nothing depends on the loss
            return (None,) * (9 + len(grads))
        upstream = upstream.reshape(-1) if upstream.dim() else upstream
        scaled = reference.scale(grads, upstream, factor, ctx.dtype, True)
        return (None,) * 8 + (link, *(_from_rows(g, ctx.shape) for g in scaled))


def sharded_arl_loss(
    fused: Tensor,
    unimodal: Unimodal,
    target: Tensor,
    link: Tensor | None = None,
    group: Any = True,
    offset: int | None = None,
    gamma: float | Tensor = 1.0,
    temperature: float | Tensor = 8.0,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    dependence: str = "confidence",
    entropy_floor: float | None = None,
    gain: str = "residual",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    sync_stats: bool | Any = False,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
) -> tuple[Tensor, BranchStats]:
    """``arl_loss`` for logits of which every process of a group holds some of the classes (a tensor-parallel head).

    All processes give the same batch and get the same loss and statistics, those of the unsharded loss; each gets the
    exact gradient of its shard, to be averaged with nobody. One all-gather of about 8 (M+1) B numbers, no other traffic:
    the logits themselves never leave their process. Plain torch on any device.

    Everything with a dimension of classes is sharded in the same way, everything else as in ``arl_loss``.

    Args:
        fused: [B, C_r] or [B, C_r, d1, ...] logits of this process's classes.
        unimodal: logits of the same shape, one per modality, dict or sequence.
        target: class numbers [B, d1, ...] among all classes (int64, int32), or probabilities of the shard's classes.
        link: the second result of ``modulate``. Features enter a sharded head through ``copy_to_shards``.
        group: True for all processes, a ProcessGroup or a DeviceMesh of one dimension: who holds the classes, in the
            order of the ranks.
        offset: number of this process's first class; None: all shards are of one size, rank * C_r.
        weight: [C_r] class weights of this process's classes.
        sync_stats: True or a group: the processes among which the *batch* is divided, not this loss's ``group``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the shards leave gaps or overlap (on a GPU, and when compiled: the loss is NaN); else as ``arl_loss``.
    """
    refuse_transforms("sharded_arl_loss")
    options = make_options(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)
    logits = check_logits(fused, unimodal, link)
    weight, schedule, batch_group = prepare(fused, len(logits) - 1, target, mask, weight, gamma, temperature, warming, options, sync_stats)
    require_link(link, logits, options)
    classes_group = resolve_group(group, "group")
    if offset is None:
        offset = 0 if classes_group is None else classes_group.rank * fused.shape[1]
    elif isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset: got {offset!r}, expected the number of this process's first class")
    if recorded((link, *logits)):
        loss, packed = _ShardedLoss.apply(options, schedule, classes_group, batch_group, offset, target, mask, weight, link, *logits)
    else:
        loss, packed, *_ = _compute(options, schedule, classes_group, batch_group, offset, target, mask, weight, logits, False)
    return loss, unpack(packed)


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(g, ctx.group), None


def copy_to_shards(x: Tensor, group: Any = True) -> Tensor:
    """Where a tensor that all processes hold alike enters a layer of which each holds a part: identity, gradients added up.

    A sharded head is ``torch.nn.functional.linear(copy_to_shards(z, group), weight_shard, bias_shard)``, with z from ``modulate``.
    """
    group = resolve_group(group, "group")
    return x if group is None or not recorded((x,)) else _CopyToShards.apply(x, group)
