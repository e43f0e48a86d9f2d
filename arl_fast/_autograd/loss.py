"""The one autograd Function of the loss, and the way to it: check, choose the implementation, apply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import _torch
from .._core.branches import BranchLogits, Targets, from_rows, targets_to_rows, to_rows
from .._core.checks import check_loss
from .._core.collectives import Group, resolve_group, synchronise
from .._core.dtypes import compute_dtype
from .._core.options import Options, Schedule
from ..implementations import dispatch
from ..implementations.sharded import Sharded
from .link import for_link, recorded


class Step(NamedTuple):
    """A checked call of the loss: everything but the logits and the link, as one argument of the Function."""

    implementation: Any
    options: Options
    schedule: Schedule
    targets: Targets
    group: Group | None  # of the processes that the batch is divided among


def compute(
    step: Step, logits: Sequence[Tensor], grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
    """The loss in its final shape, the packed statistics, the gradients' factor, the rows' gradients."""
    implementation, options, schedule, targets, group = step
    local_options = options
    # `synchronise` divides by the divisor of all processes, and runs a callable rule, once
    if group is not None:
        divisor = torch.ones(len(logits), dtype=compute_dtype(logits[0].dtype), device=logits[0].device)
        targets, local_options = targets._replace(divisor=divisor), options.for_kernels
    rows = [to_rows(x) for x in logits]
    loss, packed, grads = implementation.forward(
        rows, targets_to_rows(targets, logits[0]), schedule, local_options, grad
    )
    factor = None
    if group is not None:
        loss, packed, factor = synchronise(loss, packed, schedule, options, group, targets.divisor)
    if options.reduction == "none":
        shape = logits[0].shape
        loss = from_rows(loss, shape) if options.task == "multilabel" else loss.view(shape[:1] + shape[2:])
    return loss, packed, factor, grads


class _ARLLoss(torch.autograd.Function):
    """Loss and packed statistics. Forward writes the gradients of the logits, backward hands them out."""

    @staticmethod
    def forward(ctx: Any, step: Step, link: Tensor | None, *logits: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        loss, packed, factor, grads = compute(step, logits, any(ctx.needs_input_grad[2:]))
        ctx.implementation = step.implementation
        ctx.shape, ctx.dtype, ctx.branches = logits[0].shape, logits[0].dtype, len(logits)
        link_grad = for_link(link, packed) if link is not None and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(link_grad, factor, *grads)
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        link, factor, *grads = ctx.saved_tensors
        if upstream is None:  # nothing depends on the loss
            return None, None, *[None] * ctx.branches
        if upstream.dim():  # of a loss per row, or per row and label
            upstream = to_rows(upstream) if upstream.shape == ctx.shape else upstream.reshape(-1)
        if not grads:  # only the link needs a gradient
            return None, link, *[None] * ctx.branches
        scaled = ctx.implementation.scale(grads, upstream, factor, ctx.dtype, keeps_graph())
        return None, link, *(from_rows(g, ctx.shape) for g in scaled)


def keeps_graph() -> bool:
    """Whether saved gradients must survive this backward, so that it may not write into them."""
    return torch.compiler.is_compiling() or _torch.graph_is_kept()


def refuse_second_derivatives() -> None:
    """Under create_graph, gradients that were computed in forward would pass for constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "arl_loss: got a backward with create_graph=True, but its gradients are computed in the forward "
            "pass and have no derivatives of their own; use torch.nn.functional.cross_entropy on the "
            "branches where second derivatives are needed"
        )


def loss_and_packed(
    branches: BranchLogits,
    targets: Targets,
    schedule: Schedule,
    options: Options,
    sync_stats: bool | Any = False,
    implementation: Any = None,
) -> tuple[Tensor, Tensor]:
    """What every form of the loss calls: the loss and the packed statistics.

    Args:
        sync_stats: True or a group: the processes among which the batch is divided.
        implementation: of the contract; None: the one that dispatch chooses.
    """
    if isinstance(implementation, str):
        raise TypeError(
            f"implementation: got {implementation!r}, expected an object with the functions of "
            "docs/architecture.md; ARL_FAST_IMPL in the environment takes a name"
        )
    if targets.mask is None and (mask := getattr(branches.link, "mask", None)) is not None:
        targets = targets._replace(mask=mask)  # of a head that was given it
    if implementation is None and sync_stats is False and (native := dispatch.native_steps()) is not None:
        result = native.fast_loss(options, branches, targets, schedule)
        if result is not None:  # None where anything is unusual or wrong
            return result
    logits, targets, schedule = check_loss(
        branches, targets, schedule, options, isinstance(implementation, Sharded)
    )
    group = None if sync_stats is False else resolve_group(sync_stats)
    if implementation is None:
        implementation = dispatch.for_loss(logits[0], options, schedule)
    step = Step(implementation, options, schedule, targets, group)
    if recorded((branches.link, *logits)):
        return _ARLLoss.apply(step, branches.link, *logits)
    return compute(step, logits, False)[:2]
