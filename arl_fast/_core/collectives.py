"""Process groups, and the statistics of a batch that is divided among processes (one small all-reduce).

All are functional collectives, so the same code runs eagerly, compiled with ``fullgraph=True``, and on any
backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _torch, rules
from .options import Options, Schedule
from .stats import unpack_sums


class Group(NamedTuple):
    """A process group as collectives take it: plain values, constants for the compiler."""

    name: str
    size: int
    rank: int


def resolve_group(group: Any, argument: str = "sync_stats") -> Group | None:
    """The group that True, a ProcessGroup or a one-dimensional DeviceMesh stands for; None for one process.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: anything else, or a mesh of several dimensions.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{argument}: got {group!r}, but torch.distributed is not initialised: start the script with "
            "torchrun and call torch.distributed.init_process_group() first, or use sync_stats=False on a "
            "single process"
        )
    if group is True:
        group = dist.group.WORLD
    elif hasattr(group, "mesh_dim_names"):  # DeviceMesh, without importing it
        if group.ndim != 1:
            raise ValueError(
                f"{argument}: got a DeviceMesh of {group.ndim} dimensions, expected one: pass "
                "mesh['name of the dimension']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{argument}: got {type(group).__name__}, expected True, a ProcessGroup or a DeviceMesh of one "
            "dimension"
        )
    size = dist.get_world_size(group)
    return None if size == 1 else Group(group.group_name, size, dist.get_rank(group))


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the processes."""
    return _torch.all_reduce(x, group.name)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n] -> [processes, n]."""
    return _torch.all_gather(x, group.size, group.name)


def synchronise(
    loss: Tensor,
    packed: Tensor,
    schedule: Schedule,
    options: Options,
    group: Group,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and statistics of the joined batch from those of this process's share of it.

    Statistics, coefficients and gains are those of the joined batch, equal on all processes. With reduction
    "mean" so is the loss, and the returned factor turns this share's gradients into those whose *average*
    over the processes, which DDP and FSDP form, is the gradient of the joined batch, however unequal the
    shares. With "sum" and "none" loss and gradients stay this share's own: they are for a loop that
    normalises by itself.

    Args:
        loss, packed: what an implementation returned for this share.
        schedule, options: as the implementation got them.
        group: from ``resolve_group``.
        divisor: [M+1] what the gradients were divided by, if the implementation was given that.

    Returns:
        loss, packed, and the factor [M+1] for ``scale``, or None for 1.
    """
    local = unpack_sums(packed)
    sums = all_reduce(local, group)
    total, packed = rules.finish(sums, schedule, options)
    if options.reduction != "mean":
        return loss, packed, None
    _, joined_divisor, count = sums[:3]
    factor = (local[1] if divisor is None else divisor) * group.size / joined_divisor
    # a branch without a valid row has no gradient, not 0/0
    return total, packed, torch.where(count > 0, factor, 0)
