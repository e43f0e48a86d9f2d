"""The loss over classes that are sharded among processes (a tensor-parallel head)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from ._autograd.link import recorded
from ._core.branches import Unimodal
from ._core.collectives import Group, all_reduce, resolve_group
from ._core.options import LossOptions, with_options
from ._core.spec import BranchStats
from .implementations.sharded import Sharded
from .loss import arl_loss


@with_options
def sharded_arl_loss(
    fused: Tensor,
    unimodal: Unimodal,
    target: Tensor,
    link: Tensor | None = None,
    group: Any = True,
    offset: int | None = None,
    gamma: float | Sequence[float] | Tensor = 1.0,
    temperature: float | Tensor | None = None,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
    sync_stats: bool | Any = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, BranchStats]:
    """``arl_loss`` for logits of which every process of a group holds some of the classes.

    All processes give the same batch and get the same loss and statistics, those of the unsharded loss. Each
    gets the exact gradient of its shard, to be averaged with nobody. There is one all-gather of about 9 (M+1)
    B numbers and no other traffic: the logits never leave their process. Plain torch on any device.

    Everything with a dimension of classes is sharded in the same way, everything else is as in ``arl_loss``.

    Args:
        fused: [B, C_r] or [B, C_r, d1, ...] logits of this process's classes.
        unimodal: logits of the same shape, one per modality, dict or sequence.
        target: class numbers [B, d1, ...] among all classes (int64, int32), or probabilities of the shard's
            classes.
        link: the second result of ``modulate``. Features enter a sharded head through ``copy_to_shards``.
        group: True for all processes, a ProcessGroup or a DeviceMesh of one dimension: who holds the classes,
            in the order of the ranks.
        offset: number of this process's first class; None: all shards are of one size, rank * C_r.
        weight: [C_r] class weights of this process's classes.
        sync_stats: True or a group: the processes among which the *batch* is divided, not this loss's
            ``group``.
        gamma, temperature, rule, mask, warming, dependence, entropy_floor, gain, ignore_index,
            label_smoothing, reduction: as for ``arl_loss``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the shards leave gaps or overlap (on a GPU, and when compiled: the loss is NaN); else as
            ``arl_loss``.
    """
    if options.get("task", "multiclass") != "multiclass":
        raise ValueError(
            "task: got 'multilabel', expected 'multiclass': labels need no exchange; call arl_loss with each "
            "process's labels, reduction='sum' and sync_stats=group"
        )
    shards = resolve_group(group, "group")
    if offset is None:
        offset = shards.rank * fused.shape[1] if shards is not None and isinstance(fused, Tensor) else 0
    elif isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset: got {offset!r}, expected the number of this process's first class")
    return arl_loss(
        fused,
        unimodal,
        target,
        link,
        gamma,
        temperature,
        rule,
        weight=weight,
        mask=mask,
        warming=warming,
        sync_stats=sync_stats,
        implementation=Sharded(shards, offset),
        **options,
    )


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return all_reduce(g, ctx.group), None


def copy_to_shards(x: Tensor, group: Any = True) -> Tensor:
    """Where a tensor that all processes hold alike enters a layer of which each holds a part.

    Forward is the identity; backward adds up the gradients. A sharded head is
    ``torch.nn.functional.linear(copy_to_shards(z, group), weight_shard, bias_shard)``, with z from
    ``modulate``.

    Args:
        x: a tensor, the same on all processes of the group.
        group: as for ``sharded_arl_loss``.
    """
    shards = resolve_group(group, "group")
    return x if shards is None or not recorded((x,)) else _CopyToShards.apply(x, shards)
