"""The correctness gate: the method in vectorised float64, against which every contender is judged before it
is timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import GAMMA, TEMPERATURE

# Relative error that rounding allows: arithmetic in float32, gradients in the logits' dtype.
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 6e-3}
LOSS = 2e-5
COARSE = 2e-2  # a plain cross-entropy of bfloat16 logits keeps log p and the loss in bfloat16
STATISTICS = 2e-4


class Rejected(Exception):
    """A contender computes something else than the method: it must not be timed."""


def relative(got: Tensor, want: Tensor) -> float:
    error, size = float((got.double() - want.double()).norm()), float(want.double().norm())
    return error / size if size else error


def coefficients(entropy: Tensor, dependence: Tensor, floor: float | None) -> Tensor:
    """softmax(T/2 (q - d)) of the shares q ~ 1 / max(H_m / sum H, floor) and d = D_m / sum D."""
    q = 1 / (entropy / entropy.sum()).clamp_min(0.6 / len(entropy) if floor is None else floor)
    return torch.softmax(TEMPERATURE / 2 * (q / q.sum() - dependence / dependence.sum()), 0)


def _parts(batch: int, classes: int) -> list[slice]:
    """Rows at a time, so that float64 copies stay small."""
    rows = max(1, (1 << 20) // classes)
    return [slice(i, i + rows) for i in range(0, batch, rows)]


_last: dict = {}  # of one case at a time: the truth is the same for all its contenders


def forget() -> None:
    _last.clear()


def _labels(logits: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, entropy and confidence of every branch [M+1] over all pairs of row and label, in float64."""
    sums = torch.zeros(3, len(logits), dtype=torch.float64, device=target.device)
    for b, branch in enumerate(logits):
        for part in _parts(*branch.shape):
            x, t = branch[part].double(), target[part].double()
            yes, no = F.softplus(-x), F.softplus(x)  # minus log p and minus log (1 - p)
            p, q = torch.sigmoid(x), torch.sigmoid(-x)
            values = (t * yes + (1 - t) * no, p * yes + q * no, t * p + (1 - t) * q)
            sums[:, b] += torch.stack([v.sum() for v in values])
    loss, entropy, depend = sums / target.numel()
    return loss, entropy, depend


def _rows(logits: Sequence[Tensor], target: Tensor, dependence: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, entropy and dependence of every branch [M+1], and the logsumexp of every row [M+1, B], in
    float64.
    """
    mark = (*map(id, logits), id(target))  # alive for as long as they are kept here
    if (mark, dependence) in _last:
        return _last[mark, dependence][1]
    if any(known != mark for known, _ in _last):
        forget()
    batch, classes = logits[0].shape
    lse = torch.empty(len(logits), batch, dtype=torch.float64, device=target.device)
    sums = torch.zeros(3, len(logits), dtype=torch.float64, device=target.device)
    for b, branch in enumerate(logits):
        for part in _parts(batch, classes):
            x, y = branch[part].double(), target[part, None]
            lse[b, part] = x.logsumexp(1)
            logp = x - lse[b, part, None]
            picked = logp.gather(1, y)
            depend = picked.exp() if dependence == "confidence" else x.abs_()
            sums[:, b] += torch.stack([-picked.sum(), -(logp.exp() * logp).sum(), depend.sum()])
    loss, entropy, depend = sums / batch
    _last[mark, dependence] = ((*logits, target), (loss, entropy, depend, lse))
    return loss, entropy, depend, lse


def check(
    logits: Sequence[Tensor],
    target: Tensor,
    loss: Tensor,
    grads: Sequence[Tensor],
    stats: dict[str, Tensor] | None,
    dependence: str = "confidence",
    floor: float | None = None,
    branches: int | None = None,
    coarse: bool = False,
) -> dict[str, float]:
    """Relative errors of a contender's loss, gradients and statistics; raises Rejected if too large.

    Args:
        logits, target: what the contender was given.
        loss, grads: its loss and the gradients of the branches that it covers.
        stats: its "entropy", "dependence" and "coefficients" [M], or None where it computes none.
        dependence, floor: which dependence and which entropy floor it implements.
        branches: how many of the branches its loss covers; None for all.
        coarse: intermediate values in the logits' dtype are forgiven.
    """
    covered = len(logits) if branches is None else branches
    if logits[0].dim() == 3:  # the positions of images are rows
        logits, grads = ([x.movedim(1, -1).flatten(0, 1) for x in tensors] for tensors in (logits, grads))
        target = target.flatten()
    batch, classes = logits[0].shape
    if len(grads) != covered:
        raise Rejected(f"{len(grads)} gradients for {covered} branches")
    labels = target.is_floating_point()
    if labels:
        losses, entropies, dependences = _labels(logits, target)
    else:
        losses, entropies, dependences, lse = _rows(logits, target, dependence)
    weights = [(1.0 if b == 0 else GAMMA) for b in range(covered)]
    want_loss = sum(w * value for w, value in zip(weights, losses[:covered], strict=True))
    difference, size = (torch.zeros((), dtype=torch.float64, device=target.device) for _ in range(2))
    for b, weight in enumerate(weights):
        for part in _parts(batch, classes):
            x = logits[b][part].double()
            if labels:
                g = (torch.sigmoid(x) - target[part]).mul_(weight / target.numel())
            else:
                g = (x - lse[b][part, None]).exp_()
                g.scatter_add_(1, target[part, None], g.new_full((len(g), 1), -1.0)).mul_(weight / batch)
            size += torch.linalg.vector_norm(g) ** 2
            difference += torch.linalg.vector_norm(g.sub_(grads[b][part])) ** 2
    dtype = logits[0].dtype
    errors = {"loss": relative(loss, want_loss), "gradients": float((difference / size).sqrt())}
    limits = {"loss": LOSS, "gradients": GRADIENT[dtype]}
    if coarse and dtype == torch.bfloat16:
        limits = dict.fromkeys(limits, COARSE)
    if stats is not None:
        entropy, depend = entropies[1:], dependences[1:]
        want = {
            "entropy": entropy,
            "dependence": depend,
            "coefficients": coefficients(entropy, depend, floor),
        }
        errors |= {name: relative(stats[name], want[name]) for name in want}
        limits |= dict.fromkeys(want, STATISTICS)
    wrong = [
        f"{name}: relative error {e:.2g} > {limits[name]:.0e}"
        for name, e in errors.items()
        if not e <= limits[name]
    ]
    if wrong:
        raise Rejected("; ".join(wrong))
    return errors
