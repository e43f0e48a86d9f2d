"""The loss for several yes-or-no labels per row (``task="multilabel"``), in plain torch.

A label is a logit of its own: p = sigmoid(x) is the probability of "yes". Each pair of a row and a label
counts by itself, so that means run over the pairs whose label is known (not NaN) and whose modality is
present:

    loss        -w (q log p + (1 - t) log(1 - p)) with q = pos_weight t, as in torch
    entropy     -p log p - (1 - p) log(1 - p)
    confidence  t p + (1 - t)(1 - p), the probability of the true value
    correct     x > 0 where t > 1/2, and x <= 0 elsewhere

From the sums over the pairs on, everything is as for classes (rules.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.branches import Targets
from .._core.dtypes import compute_dtype, grad_dtype
from .._core.options import Options, Schedule, is_plain
from .._core.rules import effective_gamma, finish, gamma_of, weighted_sum


def known_labels(targets: Targets, branches: int) -> list[Tensor]:
    """For each branch [N, C] bool: the label is known and the branch's modality present."""
    known = ~targets.target.isnan()
    if targets.mask is None:
        return [known] * branches
    return [known, *(known & present.unsqueeze(1) for present in targets.mask.unbind(1))]


def divisors(targets: Targets, branches: int, dtype: torch.dtype) -> Tensor:
    """[M+1] what reduction "mean" divides by: the number of pairs that count."""
    return torch.stack([known.sum(dtype=dtype) for known in known_labels(targets, branches)])


def forward(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward, for targets [N, C] in [0, 1] or NaN. With reduction "none" the loss is [N, C]."""
    dtype = compute_dtype(logits[0].dtype)
    branches = len(logits)
    weight, pos_weight = targets.weight, targets.pos_weight
    gamma = effective_gamma(schedule)
    label = targets.target.to(dtype).nan_to_num()
    count = divisors(targets, branches, dtype)
    if options.reduction != "mean":
        factors = torch.ones_like(count)
    else:
        factors = (count if targets.divisor is None else targets.divisor).reciprocal()
    yes = label if pos_weight is None else label * pos_weight  # what multiplies log p in the loss
    sums, losses, grads = [], [], []
    for branch, (raw, known) in enumerate(zip(logits, known_labels(targets, branches), strict=True)):
        x = torch.where(known, raw.to(dtype), 0)  # what does not count is not read, NaN included
        loss = F.binary_cross_entropy_with_logits(x, label, weight, reduction="none", pos_weight=pos_weight)
        p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
        entropy = torch.special.entr(p) + torch.special.entr(not_p)
        confidence = label * p + (1 - label) * not_p
        dependence = confidence if options.dependence == "confidence" else x.abs()
        correct = ((x > 0) == (label > 0.5)).to(dtype)
        terms = torch.stack([loss, correct, entropy, dependence]) * known
        loss_sum, correct_sum, entropy_sum, dependence_sum = terms.sum((1, 2))
        losses.append(terms[0])
        sums.append(
            torch.stack([loss_sum, count[branch], count[branch], correct_sum, entropy_sum, dependence_sum])
        )
        if grad:
            g = (1 - label) * p - yes * not_p  # d loss / d x
            g = g if weight is None else g * weight
            own = factors[branch]
            if branch > 0:
                own = own * gamma_of(gamma, branch - 1)
            # a branch without a pair that counts has the divisor 0: its gradient is 0, not 0 / 0
            grads.append(torch.where(known, g * own, 0).to(grad_dtype(raw.dtype)))
    total, packed = finish(torch.stack(sums, 1), schedule, options)
    if options.reduction == "none":
        total = losses[0] + weighted_sum(gamma, torch.stack(losses[1:]))
    if is_plain(options, schedule) and targets.divisor is None and not torch.compiler.is_compiling():
        total, own_grad = _torch_loss(logits[0].to(dtype), label, targets, options, grad)
        grads[:1] = [] if own_grad is None else [own_grad.to(grad_dtype(logits[0].dtype))]
    return total, packed, grads


def _torch_loss(
    x: Tensor, label: Tensor, targets: Targets, options: Options, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's own loss of the fused logits and its gradient: to the last bit where every label is known."""
    known = ~targets.target.isnan()
    with torch.set_grad_enabled(grad):
        x = torch.where(known, x, 0).detach().requires_grad_(grad)
        loss = F.binary_cross_entropy_with_logits(
            x, label, targets.weight, reduction=options.reduction, pos_weight=targets.pos_weight
        )
    g = torch.autograd.grad(loss, x, torch.ones_like(loss))[0] if grad else None
    loss = loss.detach()
    if options.reduction == "none":
        loss = torch.where(known, loss, 0)
    else:  # an unknown label was taken for a "no" of logit 0, with a weight that it must not have
        surplus = F.binary_cross_entropy_with_logits(
            torch.zeros_like(x), label, targets.weight, reduction="none", pos_weight=targets.pos_weight
        )
        surplus = torch.where(known, 0, surplus.detach()).sum()
        if options.reduction == "mean":
            count = known.sum(dtype=loss.dtype)
            share = known.numel() / count  # 1 where every label is known
            loss = loss * share - surplus / count
            g = None if g is None else g * share
        else:
            loss = loss - surplus
    return loss, None if g is None else torch.where(known, g, 0)
