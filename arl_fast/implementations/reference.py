"""The loss in plain torch: the oracle of the package, and what runs where no kernel does.

Any device, float64 to float16, traceable by torch.compile. An implementation offers the three functions
``forward``, ``scale`` and ``modulate_backward``; docs/architecture.md states the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.branches import Targets
from .._core.checks import check_class_range
from .._core.dtypes import compute_dtype, grad_dtype
from .._core.options import Options, Schedule, is_plain
from .._core.rules import effective_gamma, finish, weighted_sum
from . import multilabel

# Logits to work on at a time: their temporaries fit a CPU's cache. A compiler gets whole branches, which it
# fuses.
_BLOCK = 1 << 18
_LARGE = {torch.float32: 3e38, torch.float64: 1e308}
# Branches of at most so many classes are stacked if they fit a block. Linear heads count on wide ones not
# being copied.
_NARROW = 512


def _on_host(x: Tensor) -> bool:
    """Whether this runs on a CPU, uncompiled: its values may be looked at, and its caches count."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _clear_rows(x: Tensor, keep: Tensor | None) -> None:
    """Zeros where ``keep``, integers as wide as x, is 0 and not -1. NaN * 0 is not 0; masked_fill_ takes 8
    times longer.
    """
    if keep is not None:
        x.view(keep.dtype).bitwise_and_(keep)


def _targets(
    target: Tensor, classes: int, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Of class indices [N], as [1, N, 1]: class, whether it counts, weight, NaN where out of range, else 0.

    On a CPU out of range is an error, so there the last one is None; so is the second where all rows count.
    """
    index = target.long().view(1, -1, 1)
    if _on_host(target) and target.shape[0]:
        low, high = (int(end) for end in torch.aminmax(target))
        if low >= 0 and high < classes and not 0 <= options.ignore_index < classes:
            return index, None, None if weight is None else weight[index], None
    valid = index != options.ignore_index
    y = index.clamp(0, classes - 1)  # of an ignored row any class
    known = torch.where(valid, index, y)
    row_weight = None if weight is None else weight[y]
    if _on_host(target):
        if not torch.equal(known, y):
            check_class_range(target, classes, options.ignore_index)
        return y, valid, row_weight, None
    good = known == y
    row_weight = good.to(torch.float32) if row_weight is None else row_weight * good
    return y, valid, row_weight, torch.where(good, 0.0, torch.nan)


def _blocks(logits: Sequence[Tensor]) -> Iterator[tuple[int, slice, Tensor]]:
    """Which rows of which branch to work on at a time, and their logits [n, C]."""
    n, classes = logits[0].shape
    step = max(1, torch.get_num_threads() * _BLOCK // classes) if _on_host(logits[0]) else 0
    for branch, x in enumerate(logits):
        for part in (
            [slice(start, start + step) for start in range(0, max(n, 1), step)] if step else [slice(None)]
        ):
            yield branch, part, x[part]


def _is_first_largest(x: Tensor, label: Tensor, below: Tensor) -> Tensor:
    """Whether the first largest of x [..., C] is at ``label`` [..., 1]; a NaN counts as the largest.

    Args:
        below: x minus its largest element, [..., C].
    """
    if not _on_host(x):
        return x.argmax(-1, keepdim=True) == label
    first = below.gather(-1, label) == 0
    # How many are the largest of their row, without a search, which would take as long as two softmaxes. It
    # is too many for elements that almost are, and NaN for a row with NaN or an infinity.
    largest = torch.add(1.0, below, alpha=_LARGE[x.dtype]).clamp_min_(0)
    if not largest.sum().item() <= label.numel():
        rows = (largest.sum(-1) <= 1).logical_not_().nonzero(as_tuple=True)
        first[rows] = x[rows].argmax(-1, keepdim=True) == label[rows]
    return first


def _rows(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    options: Options,
    grad: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What is known of each row of logits x [..., C], and its gradient; y: classes [..., 1] or probabilities.

    Known are the loss, whether the prediction is correct, the entropy, and the dependence, [..., 4]. The
    gradient [..., C], for which there may be a place, ``out``, is that of the loss. Weights of class indices
    without smoothing are left to the caller, who multiplies both.
    """
    soft = y.is_floating_point()
    smoothing = options.label_smoothing
    p = torch.softmax(x, -1, out=out)
    log_p = x - x.amax(-1, keepdim=True)  # and log Z, below
    log_z = p.amax(-1, keepdim=True).log_().neg_()  # the largest p is 1 / Z
    correct = _is_first_largest(x, y.argmax(-1, keepdim=True) if soft else y, log_p)
    u = None  # of the loss -sum_c u_c log p_c, unless it is 1 at y and 0 elsewhere
    if soft:
        confidence = (y * p).sum(-1, keepdim=True)
    else:
        loss = log_z - log_p.gather(-1, y)
        confidence = p.gather(-1, y)
    if soft or smoothing:
        u = y if soft else torch.zeros_like(p).scatter_(-1, y, 1.0)
        u = u * (1 - smoothing) + smoothing / p.shape[-1] if smoothing else u
        u = u if weight is None else u * weight
        loss = (u * (log_z - log_p)).sum(-1, keepdim=True)
    dependence = confidence if options.dependence == "confidence" else x.abs().sum(-1, keepdim=True)
    # -sum_c p_c log p_c, with 0 log 0 = 0
    entropy = log_z - log_p.clamp_min_(torch.finfo(p.dtype).min).mul_(p).sum(-1, keepdim=True)
    known = torch.cat([loss, correct.to(p.dtype), entropy, dependence], -1)
    if not grad:
        return known, None
    if u is not None:
        return known, p.mul_(u.sum(-1, keepdim=True)).sub_(u)  # p sum_c u_c - u
    return known, p.scatter_(-1, y, torch.expm1(-loss))  # p_y - 1 at y


def _torch_cross_entropy(
    x: Tensor, target: Tensor, poison: Tensor | None, weight: Tensor | None, options: Options, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's own loss of logits [N, C] and its gradient, to the last bit; ``poison`` [1, N, 1] is added."""
    if poison is not None:
        target = target.masked_fill(poison.isnan().view(-1), options.ignore_index)
    with torch.set_grad_enabled(grad):
        x = x.detach().requires_grad_(grad)
        loss = F.cross_entropy(
            x,
            target,
            weight,
            ignore_index=options.ignore_index,
            reduction=options.reduction,
            label_smoothing=options.label_smoothing,
        )
    g = torch.autograd.grad(loss, x, torch.ones_like(loss))[0] if grad else None
    if poison is None:
        return loss.detach(), g
    loss = loss.detach() + (poison.view(-1) if options.reduction == "none" else poison.sum())
    return loss, None if g is None else g + poison[0]


def forward(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the packed statistics and, if ``grad``, the gradients of the logits for an upstream of 1.

    Args:
        logits: M+1 tensors [N, C] of one floating dtype, the fused branch first; any strides. Never written
            to.
        targets: ``target`` [N] int64 or int32 class indices, or [N, C] floating class probabilities, with
            task "multilabel" [N, C] labels in [0, 1] or NaN; ``mask`` [N, M] bool or None; ``weight`` [C],
            with task "multilabel" also ``pos_weight`` [C], and ``divisor`` [M+1] in the compute dtype or
            None.
        schedule: gamma, temperature and the warm-up; its tensors are on the device, gamma and temperature of
            the compute dtype.
        options: see Options. A callable rule is applied here as well.
        grad: whether to write gradients.

    Returns:
        loss (0-d; for reduction "none" [N], with task "multilabel" [N, C]), packed (spec.PACKED), and M+1
        gradients [N, C] or none. With reduction "none" a gradient row belongs to that row's own loss.
    """
    if options.task == "multilabel":
        return multilabel.forward(logits, targets, schedule, options, grad)
    target, mask, weight, divisor, _ = targets
    dtype, result_dtype = compute_dtype(logits[0].dtype), grad_dtype(logits[0].dtype)
    branches = len(logits)
    n, classes = logits[0].shape
    gamma = effective_gamma(schedule)
    row_weight = poison = None  # [1, N, 1]
    if target.is_floating_point():
        y, valid = target.to(dtype).unsqueeze(0), None
    else:
        y, valid, row_weight, poison = _targets(target, classes, weight, options)
    keep = None  # [M+1, N, 1], without a mask [1, N, 1]; None: all rows of all branches
    if valid is None and mask is None:
        count = torch.full((branches,), n, dtype=dtype, device=target.device)
        divisors = count if row_weight is None else row_weight.sum().expand(branches)
    else:
        if valid is None:
            valid = torch.ones(1, n, 1, dtype=torch.bool, device=target.device)
        if mask is not None:
            valid = torch.cat([valid, valid & mask.t().unsqueeze(2)])
        keep = -valid.to(torch.int64 if dtype == torch.float64 else torch.int32)
        valid = valid.to(dtype)
        count = valid.sum((1, 2)).expand(branches)
        # torch divides the loss of probabilities by the number of rows, whatever the weights
        divisors = count if row_weight is None else (valid * row_weight).sum((1, 2)).expand(branches)
    if options.label_smoothing:
        row_weight = None  # the classes have been weighted one by one
    if grad:  # the factor on the gradient of a row's own loss, [M+1, 1 or N, 1]
        if options.reduction == "mean":
            factor = (divisors if divisor is None else divisor).reciprocal()
        else:
            factor = torch.ones_like(count)
        if isinstance(gamma, tuple):
            for term, own in zip(factor[1:].unbind(), gamma, strict=True):
                term.mul_(own)
        elif isinstance(gamma, Tensor) or gamma != 1:
            factor[1:].mul_(gamma)
        factor = factor.view(branches, 1, 1)
        if row_weight is not None:
            factor = factor * row_weight
        if poison is not None:
            factor = factor + poison

    y = y.expand(branches, n, -1)
    grads: list[Tensor] = []
    if not torch.compiler.is_compiling() and classes <= _NARROW and branches * n * classes <= _BLOCK:
        x = torch.stack(list(logits)).to(dtype)
        rows, g = _rows(x, y, weight, options, grad)  # [M+1, N, 4], [M+1, N, C]
        if g is not None:
            _clear_rows(g.mul_(factor), keep)
            grads = list(g.to(result_dtype).unbind(0))
    else:
        if grad:
            # one block where it is large: freed apart, their pages would go back to the system every step
            if _on_host(target) and branches * n * classes > _BLOCK:
                grads = list(torch.empty(branches, n, classes, dtype=result_dtype).unbind(0))
            else:
                grads = [torch.empty(n, classes, dtype=result_dtype, device=target.device) for _ in logits]
            factor = factor.expand(branches, n, 1)
            keep_rows = None if keep is None else keep.expand(branches, n, 1)
        in_place = grad and result_dtype == dtype and not torch.compiler.is_compiling()
        known = []
        for branch, part, x in _blocks(logits):
            out = grads[branch][part] if in_place else None
            rows, g = _rows(x.to(dtype), y[branch, part], weight, options, grad, out)
            known.append(rows)
            if g is not None:
                _clear_rows(
                    g.mul_(factor[branch, part]), None if keep_rows is None else keep_rows[branch, part]
                )
                if not in_place:
                    grads[branch][part] = g
        rows = torch.cat(known).view(branches, n, 4)

    if row_weight is not None:
        rows[:, :, :1].mul_(row_weight)
    if poison is not None:
        rows = rows + poison
    _clear_rows(rows, keep)
    loss, *others = rows.sum(1).unbind(1)
    sums = torch.stack([loss, divisors, count, *others])
    total, packed = finish(sums, schedule, options)
    if options.reduction == "none":
        total = rows[0, :, 0] + weighted_sum(gamma, rows[1:, :, 0])

    # the baseline of comparisons
    if is_plain(options, schedule) and divisor is None and not torch.compiler.is_compiling():
        target = target.to(dtype) if target.is_floating_point() else target.long()
        total, g = _torch_cross_entropy(logits[0].to(dtype), target, poison, weight, options, grad)
        if g is not None:
            _clear_rows(g, None if keep is None else keep[0])
            grads[0] = g.to(result_dtype)
    return total, packed, grads


def scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
) -> Sequence[Tensor]:
    """Gradients [N, C] times the upstream gradient (0-d, or [N] for reduction "none") and branch's factor.

    Args:
        grads: what ``forward`` returned.
        upstream: gradient of the loss, in the loss's dtype: 0-d, [N] or, with several labels, [N, C].
        factor: [M+1] in the same dtype, or None for 1.
        dtype: dtype of the result, the logits'.
        keep: the graph is retained, so ``grads`` must stay as they are.
    """
    if upstream.dim():
        upstream = upstream.unsqueeze(1) if upstream.dim() == 1 else upstream
    elif not keep and factor is None and dtype == upstream.dtype and _on_host(upstream) and upstream == 1:
        return grads
    factors = [upstream if factor is None else upstream * factor[b] for b in range(len(grads))]
    if keep or dtype != upstream.dtype:
        return [(g.to(upstream.dtype) * f).to(dtype) for g, f in zip(grads, factors, strict=True)]
    return [g.mul_(f) for g, f in zip(grads, factors, strict=True)]


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """g_m * (1 + link_m) for every modality, rounded once to each gradient's dtype (Eq. 19, with link_m =
    gain_m - 1).
    """
    gain = 1 + link
    return [None if g is None else (g.to(link.dtype) * gain[m]).to(g.dtype) for m, g in enumerate(grads)]
