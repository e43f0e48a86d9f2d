"""From the sums over a batch to the loss, the shares, the coefficients and the gains (docs/method.md).

Plain torch without a host read: this is the reference for the same few lines inside every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options, Schedule
from .spec import FLOOR, HUGE_RATIO, PACKED, PER_BRANCH, SUMS, TINY_SHARE
from .stats import unpack, unpack_sums

Gammas = float | tuple[float, ...] | Tensor


def effective_gamma(schedule: Schedule) -> Gammas:
    """What multiplies the unimodal losses in this step: gamma, but 1 while the warm-up lasts."""
    gamma, warming = schedule.gamma, schedule.warming
    if not isinstance(warming, Tensor):
        return 1.0 if warming else gamma
    if isinstance(gamma, tuple):
        gamma = torch.stack([torch.where(warming, 1.0, g) for g in gamma])
    return torch.where(warming, 1.0, gamma)


def gamma_of(gamma: Gammas, modality: int) -> float | Tensor:
    """Gamma of one modality."""
    many = isinstance(gamma, tuple) or (isinstance(gamma, Tensor) and gamma.dim() == 1)
    return gamma[modality] if many else gamma  # type: ignore[index, return-value]


def weighted_sum(gamma: Gammas, terms: Tensor) -> Tensor:
    """sum_m gamma_m terms_m over the first dimension, the modalities."""
    if isinstance(gamma, tuple):
        return torch.stack([g * term for g, term in zip(gamma, terms.unbind(), strict=True)]).sum(0)
    if isinstance(gamma, Tensor) and gamma.dim() == 1:
        return (gamma.to(terms.dtype).view(-1, *[1] * (terms.dim() - 1)) * terms).sum(0)
    return gamma * terms.sum(0)


# Below, ``absent`` [M] marks the modalities without a row in this batch. None: it is known that there are
# none, which spares a CPU half of the operations.


def _absent(count: Tensor) -> Tensor | None:
    """From the rows [M] of each modality; a CPU may look at them."""
    if count.device.type == "cpu" and not torch.compiler.is_compiling() and all(count.tolist()):
        return None
    return count.logical_not()


def _present(values: Tensor, absent: Tensor | None) -> float | Tensor:
    """How many modalities of [M] are present, 0-d of the same dtype or a number."""
    return values.shape[0] if absent is None else absent.logical_not().sum(dtype=values.dtype)


def _normalised(values: Tensor, absent: Tensor | None) -> Tensor:
    """Values [..., M] over their sum; 0 for an absent modality, also beside a NaN."""
    if absent is None:
        return values / values.sum(-1, keepdim=True)
    values = values.masked_fill(absent, 0)
    return (values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)).masked_fill_(
        absent, 0
    )


def shares(statistics: Tensor, absent: Tensor | None) -> Tensor:
    """Shares of H and of D (Eq. 4) from means [2, M], over the present modalities; uniform if all are 0."""
    return _normalised(statistics.clamp_min(torch.finfo(statistics.dtype).tiny), absent)  # a NaN stays


def inverse_variance(share: Tensor, absent: Tensor | None, floor: float | None) -> Tensor:
    """Shares q [M] proportional to 1 / max(H_m / sum H, floor) over the present modalities (Eq. 17)."""
    least = FLOOR / _present(share, absent) if floor is None else max(floor, TINY_SHARE)
    return _normalised(share.clamp_min(least).reciprocal(), absent)


def _softmax(scores: Tensor, absent: Tensor | None) -> Tensor:
    if absent is None:
        return torch.softmax(scores, 0)
    # NaN if all are absent
    return torch.softmax(scores.masked_fill(absent, -torch.inf), 0).masked_fill_(absent, 0)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where((top == 0) & (bottom == 0), 1, top / bottom).clamp_max(HUGE_RATIO)


def held_back(s: Tensor, alpha: float | Tensor, absent: Tensor | None) -> Tensor:
    """OGM's gains [M] of the present modalities, from their confidences s; 0 for an absent one.

    rho_m = s_m / mean of the others' s, k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1; alone k_m = 1.
    1 - tanh x is computed as 2 / (1 + exp 2x), which keeps its digits where x is large.
    """
    others = _present(s, absent) - 1
    alone = others <= 0
    rho = _ratio(s, (s.sum() - s) / (others + alone))
    k = torch.where((rho <= 1) | alone, 1, 2 / (1 + torch.exp(2 * alpha * rho)))  # a NaN stays
    return k if absent is None else k.masked_fill_(absent, 0)


def coefficients(
    rule: str,
    temperature: float | Tensor,
    entropy: Tensor,
    dependence: Tensor,
    q: Tensor,
    d: Tensor,
    absent: Tensor | None,
) -> Tensor:
    """Coefficients a [M] of a built-in rule; a modality absent from the batch gets 0."""
    if rule == "share":
        return _softmax(temperature / 2 * (q - d), absent)
    if rule == "paper":  # Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
        inverse_variances = _ratio(entropy[1], entropy[0])
        dependences = _ratio(dependence[0], dependence[1])
        return _softmax(temperature * torch.stack([inverse_variances, dependences]), absent)
    if rule == "ogm":
        return held_back(dependence, temperature, absent)
    return _softmax(torch.zeros_like(q), absent)  # "constant", and "none", which leaves it unused


def gains(a: Tensor, absent: Tensor | None, warming: bool | Tensor, options: Options) -> Tensor:
    """Gains [M]: 1 + a (Eq. 19), M a, or a; 1 for rule "none", an absent modality and during warm-up."""
    if options.rule == "none" or (not isinstance(warming, Tensor) and warming):
        return torch.ones_like(a)
    if options.gain == "residual":
        gain = 1 + a  # an absent modality's a is 0
    else:
        gain = _present(a, absent) * a if options.gain == "mean_one" else a
        gain = gain if absent is None else torch.where(absent, 1, gain)
    return torch.where(warming, 1, gain) if isinstance(warming, Tensor) else gain


def finish(sums: Tensor, schedule: Schedule, options: Options) -> tuple[Tensor, Tensor]:
    """Sums [6, M+1] -> the loss (0-d; for reduction "none" the sum over rows) and the packed vector."""
    loss_sum, divisor, count, *_ = sums.unbind(0)
    means = dict(zip(SUMS[3:], (sums[3:] / count.clamp_min(1)).unbind(0), strict=True))
    absent = _absent(count[1:])

    # Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes
    # nothing.
    loss = loss_sum / divisor
    if absent is not None:
        loss[1:].masked_fill_(absent, 0)
    terms = loss if options.reduction == "mean" else loss_sum
    total = terms[0] + weighted_sum(effective_gamma(schedule), terms[1:])

    # means by field: those of a modality leave the fused branch out
    values = {field: mean if field in PER_BRANCH else mean[1:] for field, mean in means.items()}
    entropy, dependence = values["entropy"], values["dependence"]
    share, d = shares(torch.stack([entropy, dependence]), absent)
    q = inverse_variance(share, absent, options.entropy_floor)
    rule = options.rule if isinstance(options.rule, str) else "constant"
    a = coefficients(rule, schedule.temperature, entropy, dependence, q, d, absent)
    gain = gains(a, absent, schedule.warming, options)
    values |= {"loss": loss, "accuracy": means["correct"], "inverse_variance": q, "dependence_share": d}
    values |= {"coefficients": a, "gains": gain, "count": count, "link": gain - 1, "sums": sums.reshape(-1)}
    packed = torch.cat([values[field] for field in PACKED])
    if not isinstance(options.rule, str):
        packed = apply_rule(packed, schedule, options)
    return total, packed


def apply_rule(packed: Tensor, schedule: Schedule, options: Options) -> Tensor:
    """Let a callable rule, from BranchStats to coefficients [M], replace the coefficients and the gains.

    The rule sees the uniform coefficients and the gains that these would give.
    """
    assert callable(options.rule)
    stats = unpack(packed)
    a = options.rule(stats)
    if not isinstance(a, Tensor) or a.shape != stats.entropy.shape:
        what = f"a tensor of shape {list(a.shape)}" if isinstance(a, Tensor) else type(a).__name__
        raise ValueError(
            f"rule: the callable returned {what}, expected coefficients of shape {list(stats.entropy.shape)}"
        )
    absent = stats.count[1:].logical_not()
    a = torch.where(absent, 0, a.detach().to(stats.entropy))
    gain = gains(a, absent, schedule.warming, options)
    replaced = stats._replace(coefficients=a, gains=gain)
    return torch.cat([*replaced, gain - 1, unpack_sums(packed).reshape(-1)])
