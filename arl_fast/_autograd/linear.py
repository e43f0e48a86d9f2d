"""The loss behind a linear head: features in, loss out, never more than a chunk of logits in memory.

With a linear head the unimodal predictions are pieces of the fused one, so one product per modality and pass
serves all M+1 branches. With z_m [N, D_m], W_m [C, D_m], own bias b_m [C] and g the gradients of the
branches' logits:

    x_m  = z_m W_m^T + b_m          fused x_f = sum_m z_m W_m^T + b ("concat") or sum_m x_m ("sum", "shared")
    t_m  = g_f + g_m                what reaches modality m's product: its own branch and the fused one
    dz_m = gain_m t_m W_m           dW_m = t_m^T z_m          db: column sums

The rows go to the implementation that dispatch.py chose, in chunks of a memory budget; the products to
torch's BLAS.

* One chunk: the logits' gradients [N, C] are kept, and backward makes the products. The usual eager step on a
  CPU is one call of ``csrc/eager/linear.cpp``, with an autograd node of its own.
* Several chunks: forward makes a chunk's logits, their gradients and the products at once and keeps the sums.
  Backward multiplies these by the upstream gradient and the gains, which only the last chunk completes.
* Several chunks where a product must not be made before the upstream gradient is known: one such gradient per
  row (reduction "none"), float16, which needs the loss scale before it is rounded, or statistics of several
  processes. Backward then computes each chunk's logits again: M more products, the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import rules
from .._core.branches import BranchLogits, Targets, from_rows, targets_to_rows
from .._core.checks import LinearHead, check_linear_loss
from .._core.collectives import Group, all_reduce, resolve_group, synchronise
from .._core.dtypes import compute_dtype
from .._core.options import Options, Schedule
from .._core.stats import link_gradient, unpack_sums
from ..implementations import dispatch, multilabel
from .loss import Step, keeps_graph, refuse_second_derivatives
from .products import BUDGET, GradientSums, Layout, chunk_rows, take, times


def _divisor(
    targets: Targets, options: Options, dtype: torch.dtype, branches: int, group: Group | None
) -> Tensor:
    """[M+1] what "mean" divides the gradients by, over all rows (of all processes, per process)."""
    if options.task == "multilabel":
        divisor = multilabel.divisors(targets, branches, dtype)
        return divisor if group is None else all_reduce(divisor, group) / group.size
    target, mask, weight, *_ = targets
    if target.is_floating_point():
        rows = torch.ones_like(target[:, 0], dtype=dtype)
    elif weight is None:
        rows = (target != options.ignore_index).to(dtype)
    else:  # a target out of range is reported, or poisons its row, where the row is computed
        rows = torch.where(target != options.ignore_index, weight[target.clamp(0, len(weight) - 1)], 0)
    columns = (
        rows.unsqueeze(1).expand(-1, branches - 1)
        if mask is None
        else torch.where(mask, rows.unsqueeze(1), 0)
    )
    divisor = torch.cat([rows.sum().view(1), columns.sum(0)])
    return divisor if group is None else all_reduce(divisor, group) / group.size


def _targets_of(targets: Targets, part: slice | None) -> Targets:
    mask = None if targets.mask is None else take(targets.mask, part)
    return targets._replace(target=take(targets.target, part), mask=mask)


class _LinearARL(torch.autograd.Function):
    """(features [N, D_m]..., weights..., biases...) -> loss, packed statistics and, if wanted, logits."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, layout: Layout, recording: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        implementation, options, schedule, targets, group = step
        needs = ctx.needs_input_grad[3:]
        grad = recording and any(needs)
        dtypes = [t.dtype for t in tensors]
        tensors = tuple(t.to(layout.dtype) for t in tensors)
        features, weights, biases = layout.split(tensors)
        weights = layout.by_modality(weights, [z.shape[1] for z in features])
        rows = features[0].shape[0]
        one_chunk = layout.chunk >= rows
        products_now = (
            grad and not one_chunk and options.reduction != "none" and layout.dtype != torch.float16
        )
        # a part of the batch knows neither the statistics of all rows, which the rule wants, nor what "mean"
        # divides by
        is_whole = one_chunk and group is None
        local_options = options if is_whole else options._replace(rule="constant")
        if grad and not is_whole and options.reduction == "mean":
            dtype = compute_dtype(layout.dtype)
            targets = targets._replace(
                divisor=_divisor(targets, options, dtype, layout.modalities + 1, group)
            )

        sums = GradientSums(layout, tensors, needs) if products_now else None
        losses, statistics, pieces = [], [], []
        for part in layout.parts(rows):
            z = [take(z, part) for z in features]
            logits = layout.logits(z, weights, biases)
            loss, packed, grads = implementation.forward(
                logits,
                _targets_of(targets, part),
                schedule,
                local_options,
                products_now or (grad and one_chunk),
            )
            if sums is not None:
                sums.add(part, grads, z, weights)
                grads = []
            losses.append(loss)
            statistics.append(packed)
            if layout.return_logits:
                pieces.append(logits)
            del logits  # before those of the next chunk are made
        if not one_chunk:
            joined = torch.stack([unpack_sums(packed) for packed in statistics]).sum(0)
            loss, packed = rules.finish(joined, schedule, options)
            if options.reduction == "none":
                loss = torch.cat(losses)
        if group is not None:  # the divisor has been that of all processes
            loss, packed, _ = synchronise(loss, packed, schedule, options, group, targets.divisor)
        whole = [branch[0] if one_chunk else torch.cat(branch) for branch in zip(*pieces, strict=True)]

        if grad:
            link = link_gradient(packed) if options.scales else None
            ctx.layout, ctx.needs, ctx.dtypes, ctx.products_made = layout, needs, dtypes, products_now
            if sums is not None:
                ctx.save_for_backward(link, *sums.features, *sums.weights, *sums.biases)
            else:
                _save_for_late(
                    ctx, step._replace(targets=targets, options=local_options), link, grads, tensors
                )
        ctx.mark_non_differentiable(packed, *whole)
        return loss, packed, *whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        if upstream is None:  # nothing depends on the loss
            return (None,) * (3 + len(ctx.needs))
        gradients = _scaled_sums if ctx.products_made else _late_products
        grads = gradients(ctx, upstream, keeps_graph())
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, *cast


def _scaled_sums(ctx: Any, upstream: Tensor, keep: bool) -> list[Tensor | None]:
    """The sums that forward has made, times the upstream gradient and, for the features, the gains."""
    link, *sums = ctx.saved_tensors
    grads: list[Tensor | None] = []
    for i, (g, dtype) in enumerate(zip(sums, ctx.dtypes, strict=True)):
        factor = upstream * (1 + link[i]) if link is not None and i < ctx.layout.modalities else upstream
        grads.append(None if g is None else times(g, factor, keep).to(dtype))
    return grads


def _save_for_late(
    ctx: Any, step: Step, link: Tensor | None, grads: Sequence[Tensor], tensors: Sequence[Tensor]
) -> None:
    """Keep what _late_products needs: tensors by autograd's rules, the rest on ``ctx``."""
    schedule = step.schedule
    if schedule.step is not None:
        schedule = schedule._replace(step=schedule.step.clone())  # the criterion goes on counting
    ctx.implementation, ctx.options, ctx.kept = step.implementation, step.options, len(grads)
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in schedule]
    on_device = [value if isinstance(value, Tensor) else None for value in schedule]
    ctx.save_for_backward(link, *on_device, *step.targets, *grads, *tensors)


def _late_products(ctx: Any, upstream: Tensor, keep: bool) -> list[Tensor | None]:
    """The products with the kept gradients of the logits, or with those of logits that are computed again."""
    layout, implementation = ctx.layout, ctx.implementation
    link, *rest = ctx.saved_tensors
    on_device, targets, rest = rest[:4], Targets(*rest[4:9]), rest[9:]
    schedule = Schedule(*(n if t is None else t for t, n in zip(on_device, ctx.numbers, strict=True)))
    kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
    features, weights, biases = layout.split(tensors)
    weights = layout.by_modality(weights, [z.shape[1] for z in features])
    sums = GradientSums(layout, tensors, ctx.needs)
    for part in layout.parts(features[0].shape[0]):
        z = [take(z, part) for z in features]
        grads = kept
        if not kept:
            logits = layout.logits(z, weights, biases)
            _, _, grads = implementation.forward(
                logits, _targets_of(targets, part), schedule, ctx.options, True
            )
            del logits
        u = take(upstream, part) if upstream.dim() else upstream
        sums.add(part, implementation.scale(grads, u, None, layout.dtype, keep and len(kept) > 0), z, weights)
        grads = []
    if link is not None:
        gains = 1 + link
        features = [
            None if g is None else times(g, gains[m], False).to(g.dtype) for m, g in enumerate(sums.features)
        ]
        sums.features = features
    return [*sums.features, *sums.weights, *sums.biases]


def _product_dtype(x: Tensor) -> torch.dtype:
    """What torch.nn.functional.linear would compute in: under autocast its dtype, but never for float64."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def linear_loss_and_packed(
    head: LinearHead,
    targets: Targets,
    schedule: Schedule,
    options: Options,
    sync_stats: bool | Any = False,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, BranchLogits | None]:
    """What every loss behind a linear head calls: the loss, the packed statistics, the logits if wanted."""
    if sync_stats is False and not return_logits and (native := dispatch.native_steps()) is not None:
        # None where anything is unusual or wrong, or takes several chunks
        result = native.fast_linear_loss(options, head, targets, schedule, BUDGET["cpu"])
        if result is not None:
            return *result, None
    (z, w, b), ((like,), targets, schedule) = check_linear_loss(
        head, _product_dtype, targets, schedule, options
    )
    group = None if sync_stats is False else resolve_group(sync_stats)
    batch, classes, *positions = like.shape
    chunk = head.chunk or chunk_rows(z[0].shape[:-1].numel(), classes, len(z), like.dtype, like.device.type)
    layout = Layout(head.fusion, head.bias_mode, len(z), len(w), like.dtype, chunk, return_logits)
    implementation = dispatch.for_loss(like, options, schedule)
    step = Step(implementation, options, schedule, targets_to_rows(targets, like), group)
    rows = [x.reshape(-1, x.shape[-1]) for x in z]
    # needs_input_grad would not tell whether to record: the parameters need gradients in evaluation too
    loss, packed, *logits = _LinearARL.apply(step, layout, torch.is_grad_enabled(), *rows, *w, *b)
    if options.reduction == "none":
        loss = from_rows(loss, like.shape) if options.task == "multilabel" else loss.view(batch, *positions)
    if not return_logits:
        return loss, packed, None
    fused, *unimodal = [from_rows(x, like.shape) for x in logits]
    features = head.features
    named = dict(zip(features, unimodal, strict=True)) if isinstance(features, Mapping) else unimodal
    return loss, packed, BranchLogits(fused, named)
