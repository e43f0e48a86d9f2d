"""Device code of the last program: partial sums -> the loss, the shares, the coefficients and the gains.

The same steps as arl_fast/_core/rules.py, which is the reference; vectors run over the branches, the fused one first.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY_SHARE = tl.constexpr(1e-12)  # as spec.TINY_SHARE
HUGE_RATIO = tl.constexpr(1e30)  # as spec.HUGE_RATIO
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # keeps 0 / 0 of a batch without modalities away


@triton.jit
def at_least(x, bound):
    """max(x, bound) that lets NaN through, as torch.clamp_min does."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ratio(top, bottom):
    """Eq. 18's ratios are unbounded: 0/0 counts as a tie, and both stay finite so that inf - inf cannot become NaN."""
    tie = (top == 0) & (bottom == 0)
    value = tl.where(tie, 1.0, top / tl.where(tie, 1.0, bottom))
    return tl.minimum(value, HUGE_RATIO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pick(values, index, at):
    """values[at] of a small vector, as a scalar."""
    return tl.sum(tl.where(index == at, values, 0.0), 0)


@triton.jit
def partial_sum(work, offsets, mask, which, programs):
    """One step of a sum over programs; .cg: another SM wrote it, so it must not come from this SM's L1."""
    return tl.load(work + offsets + which * programs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def finish(
    work,
    loss,
    packed,
    programs,
    gamma,
    temperature,
    warming,
    BRANCHES: tl.constexpr,
    REDUCTION: tl.constexpr,
    RULE: tl.constexpr,
    GAIN: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """Add up ``work`` [M+1, 6, programs] in a fixed order and write the loss and the packed vector (stats.py)."""
    T: tl.constexpr = packed.dtype.element_ty
    WIDTH: tl.constexpr = triton.next_power_of_2(BRANCHES)
    STEP: tl.constexpr = 256 * 32 // T.primitive_bitwidth // WIDTH if WIDTH < 32 else 16
    MODALITIES: tl.constexpr = BRANCHES - 1
    b = tl.arange(0, WIDTH)
    branch = b < BRANCHES
    modality = branch & (b > 0)

    zeros = tl.zeros([WIDTH, STEP], T)
    loss_sum, norm, count, correct, entropy, dependence = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, programs, STEP):
        p = start + tl.arange(0, STEP)
        mask = branch[:, None] & (p < programs)[None, :]
        offsets = (b * 6 * programs)[:, None] + p[None, :]
        loss_sum += partial_sum(work, offsets, mask, 0, programs)
        norm += partial_sum(work, offsets, mask, 1, programs)
        count += partial_sum(work, offsets, mask, 2, programs)
        correct += partial_sum(work, offsets, mask, 3, programs)
        entropy += partial_sum(work, offsets, mask, 4, programs)
        dependence += partial_sum(work, offsets, mask, 5, programs)
    loss_sum, norm, count = tl.sum(loss_sum, 1), tl.sum(norm, 1), tl.sum(count, 1)
    correct, entropy, dependence = tl.sum(correct, 1), tl.sum(entropy, 1), tl.sum(dependence, 1)

    sums = packed + 10 * MODALITIES + 3
    tl.store(sums + b, loss_sum, mask=branch)
    tl.store(sums + BRANCHES + b, norm, mask=branch)
    tl.store(sums + 2 * BRANCHES + b, count, mask=branch)
    tl.store(sums + 3 * BRANCHES + b, correct, mask=branch)
    tl.store(sums + 4 * BRANCHES + b, entropy, mask=branch)
    tl.store(sums + 5 * BRANCHES + b, dependence, mask=branch)

    # Eq. 22. All targets ignored: 0/0 = NaN for the fused branch, as torch; an absent modality contributes nothing.
    present = modality & (count > 0)
    rows = tl.maximum(count, 1.0)
    mean_loss = tl.where(present | (b == 0), loss_sum / norm, 0.0)
    if REDUCTION == "mean":
        terms = mean_loss
    else:
        terms = loss_sum
    if REDUCTION != "none":
        tl.store(loss, pick(terms, b, 0) + gamma * tl.sum(tl.where(modality, terms, 0.0), 0))

    # Shares over the modalities present: d (Eq. 4) and, with a floor before the inversion, q (Eq. 17).
    here = tl.sum(present.to(T), 0)
    here_or_one = tl.maximum(here, 1.0)
    entropy = tl.where(modality, entropy / rows, 0.0)
    dependence = tl.where(modality, dependence / rows, 0.0)
    total = tl.sum(entropy, 0)
    share = tl.where(total <= 0, 1.0 / here_or_one, entropy / tl.where(total <= 0, 1.0, total))  # a NaN stays
    if FLOOR is None:
        share = at_least(share, 0.6 / here_or_one)
    else:
        share = at_least(share, FLOOR if FLOOR > TINY_SHARE else TINY_SHARE)
    q = tl.where(present, 1.0 / share, 0.0)
    q = tl.where(
        present, q / at_least(tl.sum(q, 0), SMALLEST), 0.0
    )  # an absent modality's share is 0, also beside a NaN
    total = tl.sum(dependence, 0)
    d = tl.where(
        present, tl.where(total <= 0, 1.0 / here_or_one, dependence / tl.where(total <= 0, 1.0, total)), 0.0
    )

    # Coefficients: a softmax over the modalities present.
    if RULE == "share":
        scores = temperature / 2 * (q - d)
    elif RULE == "paper":  # Eq. 18 with q0/q1 = H1/H0 (Eq. 17) and d0/d1 (Eq. 4)
        variances = ratio(pick(entropy, b, 2), pick(entropy, b, 1))
        dependences = ratio(pick(dependence, b, 1), pick(dependence, b, 2))
        scores = temperature * tl.where(b == 1, variances, dependences)
    else:
        scores = tl.zeros([WIDTH], T)
    top = tl.max(tl.where(present, scores, float("-inf")), 0)
    a = tl.where(present, tl.exp(tl.where(present, scores - top, 0.0)), 0.0)
    a = tl.where(present, a / at_least(tl.sum(a, 0), SMALLEST), 0.0)

    # Gains (Eq. 19): 1 + a, M a or a; 1 for rule "none", an absent modality and during the warm-up.
    if RULE == "none":
        gain = tl.full([WIDTH], 1.0, T)
    else:
        if GAIN == "residual":
            gain = 1.0 + a
        elif GAIN == "mean_one":
            gain = here * a
        else:
            gain = a
        gain = tl.where(warming != 0, 1.0, tl.where(present, gain, 1.0))

    m = b - 1
    tl.store(packed + b, mean_loss, mask=branch)
    tl.store(packed + BRANCHES + b, correct / rows, mask=branch)
    pieces = packed + 2 * BRANCHES + m
    tl.store(pieces, entropy, mask=modality)
    tl.store(pieces + MODALITIES, dependence, mask=modality)
    tl.store(pieces + 2 * MODALITIES, q, mask=modality)
    tl.store(pieces + 3 * MODALITIES, d, mask=modality)
    tl.store(pieces + 4 * MODALITIES, a, mask=modality)
    tl.store(pieces + 5 * MODALITIES, gain, mask=modality)
    tl.store(packed + 8 * MODALITIES + 2 + b, count, mask=branch)
    tl.store(packed + 9 * MODALITIES + 3 + m, gain - 1.0, mask=modality)
