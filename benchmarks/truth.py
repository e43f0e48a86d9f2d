"""The correctness gate: the method in vectorised float64, against which every contender is judged before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    """Relative errors of a contender's loss, gradients and statistics; raises Rejected beyond what rounding explains.

    Args:
        logits, target: what the contender was given.
        loss, grads: its loss and the gradients of the branches that it covers.
        stats: its "entropy", "dependence" and "coefficients" [M], or None where it computes none.
        dependence, floor: which dependence and which entropy floor it implements.
        branches: how many of the branches its loss covers; None for all.
        coarse: intermediate values in the logits' dtype are forgiven.
    """
    covered = len(logits) if branches is None else branches
    batch, classes = logits[0].shape
    if len(grads) != covered:
        raise Rejected(f"{len(grads)} gradients for {covered} branches")
    rows = max(1, (1 << 22) // classes)  # float64 copies of a few rows at a time
    want_loss = torch.zeros((), dtype=torch.float64, device=target.device)
    difference, size = want_loss.clone(), want_loss.clone()
    entropies, dependences = [], []
    for b in range(covered):
        sums = torch.zeros(3, dtype=torch.float64, device=target.device)
        weight = (1.0 if b == 0 else GAMMA) / batch
        for i in range(0, batch, rows):
            x, y = logits[b][i : i + rows].double(), target[i : i + rows, None]
            logp = torch.log_softmax(x, 1)
            p = logp.exp()
            picked = logp.gather(1, y)
            depend = picked.exp() if dependence == "confidence" else x.abs()
            sums += torch.stack([-picked.sum(), -(p * logp).sum(), depend.sum()])
            g = p.scatter_add_(1, y, torch.full_like(picked, -1.0)) * weight
            difference += (grads[b][i : i + rows].double() - g).square().sum()
            size += g.square().sum()
        want_loss += weight * sums[0]
        entropies.append(sums[1] / batch)
        dependences.append(sums[2] / batch)
    dtype = logits[0].dtype
    errors = {"loss": relative(loss, want_loss), "gradients": float((difference / size).sqrt())}
    limits = {"loss": LOSS, "gradients": GRADIENT[dtype]}
    if coarse and dtype == torch.bfloat16:
        limits = dict.fromkeys(limits, COARSE)
    if stats is not None:
        entropy, depend = torch.stack(entropies[1:]), torch.stack(dependences[1:])
        want = {"entropy": entropy, "dependence": depend, "coefficients": coefficients(entropy, depend, floor)}
        errors |= {name: relative(stats[name], want[name]) for name in want}
        limits |= dict.fromkeys(want, STATISTICS)
    wrong = [f"{name}: relative error {e:.2g} > {limits[name]:.0e}" for name, e in errors.items() if not e <= limits[name]]
    if wrong:
        raise Rejected("; ".join(wrong))
    return errors
