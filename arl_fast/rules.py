"""From the sums over a batch to the loss, the shares, the coefficients and the gains (section 1 of docs/method.md).

Plain torch without a host read: this is the reference for the same few lines inside every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options
from .stats import unpack, unpack_sums

# gamma, temperature and whether the warm-up still runs: Python numbers, or one device tensor [3] of them.
Schedule = tuple[float, float, bool] | Tensor

TINY_SHARE = 1e-12  # keeps 1 / share finite when the caller asks for entropy_floor=0
HUGE_RATIO = 1e30  # Eq. 18's unbounded ratios stay finite: inf - inf must not become NaN


def inverse_variance(entropy: Tensor, present: Tensor, floor: float | None) -> Tensor:
    """Shares q [M] proportional to 1 / max(H_m / sum H, floor) over the present modalities (Eq. 17)."""
    modalities = present.sum().clamp_min(1).to(entropy.dtype)
    total = entropy.sum()
    share = torch.where(total <= 0, 1 / modalities, entropy / total)  # a NaN stays
    share = torch.maximum(share, 0.6 / modalities) if floor is None else share.clamp_min(max(floor, TINY_SHARE))
    inverse = torch.where(present, 1 / share, 0)
    return inverse / inverse.sum().clamp_min(torch.finfo(inverse.dtype).tiny)


def dependence_share(dependence: Tensor, present: Tensor) -> Tensor:
    """Shares d [M] = D_m / sum D over the present modalities (Eq. 4)."""
    modalities = present.sum().clamp_min(1).to(dependence.dtype)
    total = dependence.sum()
    return torch.where(present, torch.where(total <= 0, 1 / modalities, dependence / total), 0)


def _softmax(scores: Tensor, present: Tensor) -> Tensor:
    scores = scores.masked_fill(~present, -torch.inf)
    powers = torch.where(present, torch.exp(scores - scores.amax()), 0)
    return powers / powers.sum().clamp_min(torch.finfo(powers.dtype).tiny)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where((top == 0) & (bottom == 0), 1, top / bottom).clamp_max(HUGE_RATIO)


def coefficients(
    rule: str, temperature: float | Tensor, entropy: Tensor, dependence: Tensor, q: Tensor, d: Tensor, present: Tensor
) -> Tensor:
    """Coefficients a [M] of a built-in rule; a modality absent from the batch gets 0."""
    if rule == "share":
        return _softmax(temperature / 2 * (q - d), present)
    if rule == "paper":  # Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
        inverse_variances = _ratio(entropy[1], entropy[0])
        dependences = _ratio(dependence[0], dependence[1])
        return _softmax(temperature * torch.stack([inverse_variances, dependences]), present)
    return _softmax(torch.zeros_like(q), present)  # "constant", and "none", which leaves it unused


def gains(a: Tensor, present: Tensor, warming: bool | Tensor, options: Options) -> Tensor:
    """Gains [M]: 1 + a (Eq. 19), M a, or a; 1 for rule "none", an absent modality and during warm-up."""
    if options.rule == "none":
        return torch.ones_like(a)
    if options.gain == "residual":
        gain = 1 + a
    elif options.gain == "mean_one":
        gain = present.sum() * a
    else:
        gain = a
    scaled = present & ~warming if isinstance(warming, Tensor) else present & (not warming)
    return torch.where(scaled, gain, 1)


def finish(sums: Tensor, schedule: Schedule, options: Options) -> tuple[Tensor, Tensor]:
    """Sums [6, M+1] -> the loss, a 0-d tensor (for reduction "none" the sum over rows), and the packed vector [16M+9]."""
    gamma, temperature, warming = schedule
    if isinstance(warming, Tensor):
        warming = warming != 0
        gamma = torch.where(warming, 1.0, gamma)
    elif warming:
        gamma = 1.0
    loss_sum, norm, count, correct, entropy, dependence = sums.unbind(0)
    present = count > 0
    rows = count.clamp_min(1)

    # Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes nothing.
    loss = loss_sum / norm
    loss = torch.cat([loss[:1], torch.where(present, loss, 0)[1:]])
    terms = loss if options.reduction == "mean" else loss_sum
    total = terms[0] + gamma * terms[1:].sum()

    present = present[1:]
    entropy = (entropy / rows)[1:]
    dependence = (dependence / rows)[1:]
    q = inverse_variance(entropy, present, options.entropy_floor)
    d = dependence_share(dependence, present)
    rule = options.rule if isinstance(options.rule, str) else "constant"
    a = coefficients(rule, temperature, entropy, dependence, q, d, present)
    gain = gains(a, present, warming, options)
    pieces = [loss, correct / rows, entropy, dependence, q, d, a, gain, count, gain - 1, sums.reshape(-1)]
    packed = torch.cat(pieces)
    if not isinstance(options.rule, str):
        packed = apply_rule(packed, schedule, options)
    return total, packed


def apply_rule(packed: Tensor, schedule: Schedule, options: Options) -> Tensor:
    """Let a user's rule, a callable from BranchStats to coefficients [M], replace the coefficients and the gains.

    The rule sees the uniform coefficients and the gains that these would give.
    """
    assert callable(options.rule)
    stats = unpack(packed)
    a = options.rule(stats)
    if not isinstance(a, Tensor) or a.shape != stats.entropy.shape:
        what = f"a tensor of shape {list(a.shape)}" if isinstance(a, Tensor) else type(a).__name__
        raise ValueError(f"rule: the callable returned {what}, expected coefficients of shape {list(stats.entropy.shape)}")
    present = stats.count[1:] > 0
    a = torch.where(present, a.detach().to(stats.entropy), 0)
    warming = schedule[2]
    gain = gains(a, present, warming != 0 if isinstance(warming, Tensor) else warming, options)
    replaced = stats._replace(coefficients=a, gains=gain)
    return torch.cat([*replaced, gain - 1, unpack_sums(packed).reshape(-1)])
