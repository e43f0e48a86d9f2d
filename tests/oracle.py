"""The method in float64, from the formulas of docs/method.md, with Python loops: truth, not from the package.

Gradients of the logits come from autograd through these formulas, the coefficients from plain Python numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Truth:
    loss: Tensor
    grads: list[Tensor]
    stats: dict[str, list[float]]


def arl(
    logits: list[Tensor],
    target: Tensor,
    *,
    gamma: float | tuple[float, ...] | Tensor = 1.0,
    temperature: float = 8.0,
    rule: str = "share",
    dependence: str = "confidence",
    entropy_floor: float | None = None,
    gain: str = "residual",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    warming: bool = False,
    upstream: Tensor | float = 1.0,
) -> Truth:
    """Loss, gradients (times ``upstream``) and statistics for logits [B, C] or [B, C, d1, ...], the fused
    branch first.
    """
    leaves = [x.detach().double().clone().requires_grad_() for x in logits]
    rows = [x.movedim(1, -1).reshape(-1, x.shape[1]) for x in leaves]
    n, classes = rows[0].shape
    positions = n // max(1, logits[0].shape[0])
    soft = target.is_floating_point()
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    if soft:
        t = target.double().movedim(1, -1).reshape(-1, classes)
        valid = [True] * n
    else:
        y = target.reshape(-1).tolist()
        valid = [v != ignore_index for v in y]
        t = torch.zeros(n, classes, dtype=torch.float64)
        for i, v in enumerate(y):
            if valid[i]:
                t[i, v] = 1.0
    modalities = len(rows) - 1
    gammas = [
        1.0 if warming else float(g) for g in torch.as_tensor(gamma, dtype=torch.float64).expand(modalities)
    ]

    def present(branch: int, i: int) -> bool:
        return branch == 0 or mask is None or bool(mask[i // positions, branch - 1])

    branch_losses, row_losses, columns = [], [], []
    for b, x in enumerate(rows):
        per_row, norm, stats = [], 0.0, dict(correct=0.0, entropy=0.0, dependence=0.0)
        count = 0
        for i in range(n):
            if not (valid[i] and present(b, i)):
                per_row.append(torch.zeros((), dtype=torch.float64))
                continue
            count += 1
            logp = x[i] - torch.logsumexp(x[i], 0)
            smoothed = (1 - label_smoothing) * t[i] + label_smoothing / classes
            ce = torch.zeros((), dtype=torch.float64)
            for c in range(classes):
                coefficient = (
                    float(w[c] * smoothed[c])
                    if soft
                    else float((1 - label_smoothing) * t[i][c] * w[c] + label_smoothing / classes * w[c])
                )
                if coefficient:
                    ce = ce - coefficient * logp[c]
            per_row.append(ce)
            norm += 1.0 if soft else float((w * t[i]).sum())
            values = logp.detach()
            p = values.exp()
            # tolerate a certain prediction: 0 log 0 = 0
            stats["entropy"] += -sum(float(p[c] * values[c]) for c in range(classes) if p[c] > 0)
            stats["dependence"] += (
                float((t[i] * p).sum()) if dependence == "confidence" else float(x[i].detach().abs().sum())
            )
            stats["correct"] += float(int(x[i].argmax()) == int(t[i].argmax()))
        total = torch.stack(per_row).sum() if per_row else torch.zeros((), dtype=torch.float64)
        branch_losses.append((total, norm))
        row_losses.append(torch.stack(per_row) if per_row else torch.zeros(0, dtype=torch.float64))
        columns.append((count, stats))

    def mean(b: int) -> Tensor:
        total, norm = branch_losses[b]
        if columns[b][0] == 0 and b > 0:
            return torch.zeros((), dtype=torch.float64)
        return total / norm if norm else total * math.nan

    if reduction == "mean":
        loss = mean(0) + sum(g * mean(m + 1) for m, g in enumerate(gammas))
    elif reduction == "sum":
        loss = branch_losses[0][0] + sum(g * branch_losses[m + 1][0] for m, g in enumerate(gammas))
    else:
        loss = row_losses[0] + sum(g * row for g, row in zip(gammas, row_losses[1:], strict=True))
        loss = loss.reshape(target.shape[:1] + target.shape[2:] if soft else target.shape)
    if n:
        grads = torch.autograd.grad((loss * upstream).sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    else:
        grads = [torch.zeros_like(x) for x in leaves]

    # Section 1: batch statistics, shares, coefficients, gains.
    count = [c for c, _ in columns]
    here = [m for m in range(modalities) if count[m + 1] > 0]
    entropy = [columns[m + 1][1]["entropy"] / max(1, count[m + 1]) for m in range(modalities)]
    depend = [columns[m + 1][1]["dependence"] / max(1, count[m + 1]) for m in range(modalities)]
    q, d, a, gains = ([0.0] * modalities for _ in range(4))
    gains = [1.0] * modalities
    if here:
        floor = 0.6 / len(here) if entropy_floor is None else max(entropy_floor, 1e-12)
        total = sum(entropy[m] for m in here)
        inverse = {m: 1 / max(entropy[m] / total if total > 0 else 1 / len(here), floor) for m in here}
        total_d = sum(depend[m] for m in here)
        for m in here:
            q[m] = inverse[m] / sum(inverse.values())
            d[m] = depend[m] / total_d if total_d > 0 else 1 / len(here)
        if rule == "share":
            scores = {m: temperature / 2 * (q[m] - d[m]) for m in here}
        elif rule == "paper":

            def ratio(top: float, bottom: float) -> float:
                return 1.0 if top == bottom == 0 else (1e30 if bottom == 0 else min(top / bottom, 1e30))

            pair = [ratio(entropy[1], entropy[0]), ratio(depend[0], depend[1])]
            scores = {m: temperature * pair[m] for m in here}
        else:
            scores = {m: 0.0 for m in here}
        top = max(scores.values())
        powers = {m: math.exp(scores[m] - top) for m in here}
        for m in here:
            a[m] = powers[m] / sum(powers.values())
            gains[m] = {"residual": 1 + a[m], "mean_one": len(here) * a[m], "plain": a[m]}[gain]
            if rule == "ogm":
                others = [depend[k] for k in here if k != m]
                average = sum(others) / len(others) if others else math.inf
                rho = (1.0 if depend[m] == 0 else math.inf) if average == 0 else depend[m] / average
                a[m] = gains[m] = 1 - math.tanh(temperature * rho) if rho > 1 else 1.0
    if warming or rule == "none":
        gains = [1.0] * modalities
    stats = dict(
        loss=[float(mean(b).detach()) for b in range(modalities + 1)],
        accuracy=[columns[b][1]["correct"] / max(1, count[b]) for b in range(modalities + 1)],
        entropy=entropy,
        dependence=depend,
        inverse_variance=q,
        dependence_share=d,
        coefficients=a,
        gains=gains,
        count=[float(c) for c in count],
    )
    return Truth(loss.detach(), grads, stats)
