"""The loss in plain torch: the oracle of the package, and what runs where no kernel does.

Any device, float64 to float16, traceable by torch.compile. An implementation offers the three functions below,
``forward``, ``scale`` and ``modulate_backward``; docs/architecture.md states the contract.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .options import Options
from .rules import Schedule, finish
from .stats import BranchStats

aten = torch.ops.aten
_SUM = 2  # at::Reduction::Sum


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, loss and row arithmetic are float64 for float64 logits and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are kept in until backward: the logits' dtype, but float32 for float16 logits.

    A loss scale (torch.amp.GradScaler) must be applied before a gradient is rounded to float16, or it saves nothing.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """On a CPU a class index out of range is an error, as in torch (on a GPU that would stall: the row becomes NaN)."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        value = int(target[bad][0])
        raise IndexError(f"target: got class {value}, expected 0 <= target < {classes} or ignore_index={ignore_index}")


def _hard_rows(
    logp: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class indices: weighted loss (rows or sum), norm, valid rows, correct, p_y and -d(row loss)/d(log p)."""
    classes = logp.shape[1]
    smoothing = options.label_smoothing
    valid = target != options.ignore_index
    bad = valid & ((target < 0) | (target >= classes))
    y = torch.where(valid & ~bad, target, 0).unsqueeze(1)
    poison = torch.where(bad, torch.nan, 0.0).to(logp.dtype)

    # torch's own loss, so that a plain cross-entropy is reproduced bit for bit
    safe = torch.where(valid & ~bad, target, options.ignore_index)
    reduction = 0 if options.reduction == "none" else _SUM
    loss, norm = aten.nll_loss_forward(logp, safe, weight, reduction, options.ignore_index)
    row_weight = valid.to(logp.dtype) if weight is None else torch.where(valid, weight[y.squeeze(1)], 0)
    if reduction == 0:
        norm = row_weight.sum()
    target_p = torch.zeros_like(logp).scatter_(1, y, ((1 - smoothing) * row_weight + poison).unsqueeze(1))
    if smoothing:
        smooth = smoothing / classes * (torch.ones_like(logp) if weight is None else weight.expand_as(logp))
        smooth = torch.where(valid.unsqueeze(1), smooth, 0)
        target_p = target_p + smooth
        smooth_loss = torch.where(valid.unsqueeze(1), -(logp * smooth), 0).sum(1)
        loss = (1 - smoothing) * loss + (smooth_loss if reduction == 0 else smooth_loss.sum())
    loss = loss + (poison if reduction == 0 else poison.sum())
    confidence = logp.gather(1, y).squeeze(1).exp() + poison
    correct = x.argmax(1) == y.squeeze(1)
    return loss, norm, valid, correct, confidence, target_p


def _soft_rows(
    logp: Tensor, x: Tensor, target: Tensor, present: Tensor | None, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class probabilities: as _hard_rows, with the expected probability sum_c t_c p_c in the place of p_y."""
    classes = logp.shape[1]
    valid = torch.ones_like(target[:, 0], dtype=torch.bool) if present is None else present
    target = target.to(logp.dtype)
    target_p = target
    if options.label_smoothing:
        target_p = target_p * (1 - options.label_smoothing) + options.label_smoothing / classes
    if weight is not None:
        target_p = target_p * weight
    target_p = torch.where(valid.unsqueeze(1), target_p, 0)
    loss = -torch.where(valid.unsqueeze(1), logp * target_p, 0).sum(1)
    norm = valid.to(logp.dtype).sum()  # torch divides by the number of rows, whatever the weights
    confidence = (logp.exp() * target).sum(1)
    correct = x.argmax(1) == target.argmax(1)
    return (loss if options.reduction == "none" else loss.sum()), norm, valid, correct, confidence, target_p


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    norm: Tensor | None,
    schedule: Schedule,
    options: Options,
    grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, the packed statistics and, if ``grad``, the gradients of the logits for an upstream gradient of 1.

    Args:
        logits: M+1 tensors [N, C] of one floating dtype, the fused branch first; any strides. Never written to.
        target: [N] int64 or int32 class indices, or [N, C] floating class probabilities.
        mask: [N, M] bool, False where a modality is absent, or None.
        weight: [C] class weights in the compute dtype, or None.
        norm: [M+1] what reduction "mean" divides by, where the rows are only a part of the batch; None: counted here.
        schedule: (gamma, temperature, warming) as Python numbers, or as one tensor [3] in the compute dtype.
        options: see Options. A callable rule is applied here as well.
        grad: whether to write gradients.

    Returns:
        loss (0-d, or [N] for reduction "none"), packed [16M+9] (see stats.py), and M+1 gradients [N, C] or none.
        With reduction "none" a gradient row belongs to that row's own loss.
    """
    dtype = compute_dtype(logits[0].dtype)
    gamma, _, warming = schedule
    gamma = torch.where(warming != 0, 1.0, gamma) if isinstance(warming, Tensor) else (1.0 if warming else gamma)
    soft = target.is_floating_point()
    if not soft:
        target = target.long()
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            check_targets(target, logits[0].shape[1], options.ignore_index)

    sums, grads, row_loss = [], [], None
    for branch, raw in enumerate(logits):
        x = raw.to(dtype)
        logp = torch.log_softmax(x, 1)
        present = None if mask is None or branch == 0 else mask[:, branch - 1]
        if soft:
            loss, divisor, valid, correct, confidence, target_p = _soft_rows(logp, x, target, present, weight, options)
        else:
            y = target if present is None else torch.where(present, target, options.ignore_index)
            loss, divisor, valid, correct, confidence, target_p = _hard_rows(logp, x, y, weight, options)
        p = logp.exp()
        entropy = -(p * logp.clamp_min(torch.finfo(dtype).min)).sum(1)  # 0 log 0 = 0
        dependence = confidence if options.dependence == "confidence" else x.abs().sum(1)
        if options.reduction == "none":
            row_loss = loss if row_loss is None else row_loss + gamma * loss
            loss = loss.sum()
        statistics = torch.stack([correct.to(dtype), entropy, dependence])
        statistics = torch.where(valid, statistics, 0).sum(1)
        sums.append(torch.cat([torch.stack([loss, divisor, valid.to(dtype).sum()]), statistics]))
        if grad:
            scale: float | Tensor = 1.0 if branch == 0 else gamma
            if options.reduction == "mean":
                scale = scale / (divisor if norm is None else norm[branch])
            g = aten._log_softmax_backward_data(-(target_p * scale), logp, 1, dtype)
            grads.append(torch.where(valid.unsqueeze(1), g, 0).to(grad_dtype(raw.dtype)))
    total, packed = finish(torch.stack(sums, 1), schedule, options)
    return (total if row_loss is None else row_loss), packed, grads


def scale(grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    """Gradients [N, C] times the upstream gradient (0-d, or [N] for reduction "none") and the branch's factor.

    Args:
        grads: what ``forward`` returned.
        upstream: gradient of the loss, in the loss's dtype.
        factor: [M+1] in the same dtype, or None for 1.
        dtype: dtype of the result, the logits'.
        keep: the graph is retained, so ``grads`` must stay as they are.
    """
    del keep  # plain torch never scales in place
    if upstream.dim():
        upstream = upstream.unsqueeze(1)
    return [(g.to(upstream.dtype) * (upstream if factor is None else upstream * factor[b])).to(dtype) for b, g in enumerate(grads)]


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """g_m * (1 + link_m) for every modality, rounded once to each gradient's dtype (Eq. 19, with link_m = gain_m - 1)."""
    gain = 1 + link
    return [None if g is None else (g.to(link.dtype) * gain[m]).to(g.dtype) for m, g in enumerate(grads)]


def arl_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, BranchStats]:
    """``arl_fast.arl_loss``, with its arguments, computed in plain torch whatever else could serve the device."""
    from .functional import arl_loss  # which is built on this module

    return arl_loss(*args, **{**kwargs, "implementation": sys.modules[__name__]})
