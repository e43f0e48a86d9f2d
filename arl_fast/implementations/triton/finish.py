"""Device code of the last program: from the sums over the batch to the loss, the shares, the coefficients and
the gains.

The same steps as arl_fast/_core/rules.py, which is the reference. Vectors run over the branches, the fused
one first.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import triton
import triton.language as tl

from ..._core import spec
from ..._core.stats import packed_offset

FLOOR = tl.constexpr(spec.FLOOR)
TINY_SHARE = tl.constexpr(spec.TINY_SHARE)
HUGE_RATIO = tl.constexpr(spec.HUGE_RATIO)
# the smallest normal float32; without modalities 0 / 0 stays 0
SMALLEST = tl.constexpr(1.1754943508222875e-38)

# Constants of the kernels, which read the fields of a NamedTuple by name.
Sums = namedtuple("Sums", spec.SUMS)  # type: ignore[misc]
SUMS = Sums(*range(len(spec.SUMS)))  # the position of each sum of a branch
Packed = namedtuple("Packed", spec.PACKED)  # type: ignore[misc]


@functools.cache
def packed_layout(modalities: int) -> Any:
    """Where each field of the packed vector begins."""
    return Packed(*[packed_offset(field, modalities) for field in spec.PACKED])


@triton.jit
def at_least(x, bound):
    """max(x, bound) that keeps a NaN, as torch.clamp_min does."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ratio(top, bottom):
    """A ratio of Eq. 18. 0/0 counts as a tie, and the result stays finite: inf - inf would be NaN."""
    tie = (top == 0) & (bottom == 0)
    value = tl.where(tie, 1.0, top / tl.where(tie, 1.0, bottom))
    return tl.minimum(value, HUGE_RATIO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pick(values, index, at):
    """values[at] of a small vector, as a scalar."""
    return tl.sum(tl.where(index == at, values, 0.0), 0)


@triton.jit
def gamma_of(gamma, gamma_stride, gammas, modality, keep, MODALITIES: tl.constexpr, T: tl.constexpr):
    """Gamma of one modality, or of a vector of modalities; without meaning where ``keep`` is false.

    Args:
        gamma, gamma_stride: gamma on the device, and 0 if it is one for all modalities, or None.
        gammas: otherwise the numbers as a tuple of one or MODALITIES (``host.gamma_numbers``).
    """
    if gamma is not None:
        value = tl.load(gamma + modality * gamma_stride, mask=keep, other=0.0).to(T)
    else:
        DOUBLE: tl.constexpr = T.primitive_bitwidth == 64
        COUNT: tl.constexpr = len(gammas) // 2 if DOUBLE else len(gammas)
        value = tl.zeros_like(modality).to(T)
        for i in tl.static_range(COUNT):
            number = tl.full((), gammas[i], T)
            if DOUBLE:
                number += tl.full((), gammas[COUNT + i], T)
            value = tl.where((modality == i) | (COUNT == 1), number, value)
    return value


@triton.jit
def is_warming(step, warmup):
    """Whether this step belongs to the warm-up; ``step`` is the counter on the device, or None for 0."""
    steps_done = tl.zeros((), tl.int64)
    if step is not None:
        steps_done = tl.load(step).to(tl.int64)
    return steps_done < warmup


@triton.jit
def store_sums(work, branch, loss, divisor, count, correct, entropy, dependence, SUMS: tl.constexpr):
    """Write this program's sums of a branch, scalars, to the partial sums [M+1, sums, programs]."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    partial = work + branch * len(SUMS) * programs + p
    tl.store(partial + SUMS.loss * programs, loss)
    tl.store(partial + SUMS.divisor * programs, divisor)
    tl.store(partial + SUMS.count * programs, count)
    tl.store(partial + SUMS.correct * programs, correct)
    tl.store(partial + SUMS.entropy * programs, entropy)
    tl.store(partial + SUMS.dependence * programs, dependence)


@triton.jit
def finish_if_last(
    work,
    counters,
    loss,
    packed,
    gamma,
    gamma_stride,
    gammas,
    temperature,
    temperature_number,
    warming,
    BRANCHES: tl.constexpr,
    OPTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``finish`` in the program that comes last; it leaves the counters at zero.

    An atomic counter identifies it. Release before it counts and acquire afterwards make the sums of all
    others visible to it. All have arrived then, so it may reset the counters.
    """
    T: tl.constexpr = packed.dtype.element_ty
    programs = tl.num_programs(0)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu")
    if arrived == programs * tl.num_programs(1) - 1:
        if temperature is not None:
            t_rule = tl.load(temperature).to(T)
        else:  # float64 whoever calls, rounded once, here
            t_rule = tl.full((), temperature_number, tl.float64).to(T)
        finish(
            work,
            loss,
            packed,
            programs,
            gamma,
            gamma_stride,
            gammas,
            t_rule,
            warming,
            BRANCHES,
            OPTIONS,
            SUMS,
            PACKED,
        )
        tl.store(counters + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3)


@triton.jit
def partial_sum(partial_sums, offsets, mask, which, programs):
    """One step of a sum over programs. Another multiprocessor wrote it: .cg reads past this one's L1."""
    return tl.load(partial_sums + offsets + which * programs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def finish(
    partial_sums,
    loss,
    packed,
    programs,
    gamma,
    gamma_stride,
    gammas,
    temperature,
    warming,
    BRANCHES: tl.constexpr,
    OPTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Add the partial sums [M+1, sums, programs] in a fixed order; write the loss and the packed vector."""
    T: tl.constexpr = packed.dtype.element_ty
    WIDTH: tl.constexpr = triton.next_power_of_2(BRANCHES)
    STEP: tl.constexpr = 256 * 32 // T.primitive_bitwidth // WIDTH if WIDTH < 32 else 16
    MODALITIES: tl.constexpr = BRANCHES - 1
    b = tl.arange(0, WIDTH)
    m = b - 1
    branch = b < BRANCHES
    modality = branch & (b > 0)

    zeros = tl.zeros([WIDTH, STEP], T)
    loss_sum, divisor, count = zeros, zeros, zeros
    correct, entropy, dependence = zeros, zeros, zeros
    for start in range(0, programs, STEP):
        p = start + tl.arange(0, STEP)
        mask = branch[:, None] & (p < programs)[None, :]
        offsets = (b * len(SUMS) * programs)[:, None] + p[None, :]
        loss_sum += partial_sum(partial_sums, offsets, mask, SUMS.loss, programs)
        divisor += partial_sum(partial_sums, offsets, mask, SUMS.divisor, programs)
        count += partial_sum(partial_sums, offsets, mask, SUMS.count, programs)
        correct += partial_sum(partial_sums, offsets, mask, SUMS.correct, programs)
        entropy += partial_sum(partial_sums, offsets, mask, SUMS.entropy, programs)
        dependence += partial_sum(partial_sums, offsets, mask, SUMS.dependence, programs)
    loss_sum, divisor, count = tl.sum(loss_sum, 1), tl.sum(divisor, 1), tl.sum(count, 1)
    correct, entropy, dependence = tl.sum(correct, 1), tl.sum(entropy, 1), tl.sum(dependence, 1)

    sums = packed + PACKED.sums + b
    tl.store(sums + SUMS.loss * BRANCHES, loss_sum, mask=branch)
    tl.store(sums + SUMS.divisor * BRANCHES, divisor, mask=branch)
    tl.store(sums + SUMS.count * BRANCHES, count, mask=branch)
    tl.store(sums + SUMS.correct * BRANCHES, correct, mask=branch)
    tl.store(sums + SUMS.entropy * BRANCHES, entropy, mask=branch)
    tl.store(sums + SUMS.dependence * BRANCHES, dependence, mask=branch)

    # Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes
    # nothing.
    present = modality & (count > 0)
    rows = tl.maximum(count, 1.0)
    mean_loss = tl.where(present | (b == 0), loss_sum / divisor, 0.0)
    if OPTIONS.reduction == "mean":
        terms = mean_loss
    else:
        terms = loss_sum
    if OPTIONS.reduction != "none":
        factor = gamma_of(gamma, gamma_stride, gammas, m, modality, MODALITIES, T)
        factor = tl.where((b == 0) | warming, 1.0, factor)
        tl.store(loss, tl.sum(tl.where(branch, factor * terms, 0.0), 0))

    # Shares over the modalities present: d (Eq. 4) and, with a floor before the inversion, q (Eq. 17).
    n_present = tl.sum(present.to(T), 0)
    n_or_one = tl.maximum(n_present, 1.0)
    entropy = tl.where(modality, entropy / rows, 0.0)
    dependence = tl.where(modality, dependence / rows, 0.0)
    total = tl.sum(entropy, 0)
    share = tl.where(total <= 0, 1.0 / n_or_one, entropy / tl.where(total <= 0, 1.0, total))  # a NaN stays
    if OPTIONS.entropy_floor is None:
        share = at_least(share, 1.0 / n_or_one * FLOOR)
    else:
        share = at_least(share, OPTIONS.entropy_floor if OPTIONS.entropy_floor > TINY_SHARE else TINY_SHARE)
    # an absent modality's shares are 0, also beside a NaN
    q = tl.where(present, 1.0 / share, 0.0)
    q = tl.where(present, q / at_least(tl.sum(q, 0), SMALLEST), 0.0)
    total = tl.sum(dependence, 0)
    d = tl.where(total <= 0, 1.0 / n_or_one, dependence / tl.where(total <= 0, 1.0, total))
    d = tl.where(present, d, 0.0)

    # Coefficients: a softmax over the modalities present.
    if OPTIONS.rule == "share":
        scores = temperature / 2 * (q - d)
    elif OPTIONS.rule == "paper":  # Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
        variances = ratio(pick(entropy, b, 2), pick(entropy, b, 1))
        dependences = ratio(pick(dependence, b, 1), pick(dependence, b, 2))
        scores = temperature * tl.where(b == 1, variances, dependences)
    else:
        scores = tl.zeros([WIDTH], T)
    top = tl.max(tl.where(present, scores, float("-inf")), 0)
    a = tl.where(present, tl.exp(tl.where(present, scores - top, 0.0)), 0.0)
    a = tl.where(present, a / at_least(tl.sum(a, 0), SMALLEST), 0.0)
    if OPTIONS.rule == "ogm":  # 1 - tanh x = 2 / (1 + exp 2x) where a modality is ahead of the others' mean
        others = (tl.sum(dependence, 0) - dependence) / tl.maximum(n_present - 1, 1.0)
        rho = tl.where(n_present > 1, ratio(dependence, others), 1.0)
        a = tl.where(rho <= 1, 1.0, 2.0 / (1.0 + tl.exp(2 * temperature * rho)))
        a = tl.where(present, a, 0.0)

    # Gains (Eq. 19): 1 + a, M a or a; 1 for rule "none", an absent modality and during the warm-up.
    if OPTIONS.rule == "none":
        gain = tl.full([WIDTH], 1.0, T)
    else:
        if OPTIONS.gain == "residual":
            gain = 1.0 + a
        elif OPTIONS.gain == "mean_one":
            gain = n_present * a
        else:
            gain = a
        gain = tl.where(warming, 1.0, tl.where(present, gain, 1.0))

    tl.store(packed + PACKED.loss + b, mean_loss, mask=branch)
    tl.store(packed + PACKED.accuracy + b, correct / rows, mask=branch)
    tl.store(packed + PACKED.entropy + m, entropy, mask=modality)
    tl.store(packed + PACKED.dependence + m, dependence, mask=modality)
    tl.store(packed + PACKED.inverse_variance + m, q, mask=modality)
    tl.store(packed + PACKED.dependence_share + m, d, mask=modality)
    tl.store(packed + PACKED.coefficients + m, a, mask=modality)
    tl.store(packed + PACKED.gains + m, gain, mask=modality)
    tl.store(packed + PACKED.count + b, count, mask=branch)
    tl.store(packed + PACKED.link + m, gain - 1.0, mask=modality)
