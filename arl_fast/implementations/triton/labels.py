"""The forward kernel of task "multilabel": losses, statistics, coefficients and gradients in one launch.

The formulas are those of arl_fast/implementations/multilabel.py. Each pair of a row and a label counts by
itself, so the kernel runs over the N C pairs of a branch in tiles, as over one long row. The grid is
(programs, M+1). The programs of all branches run at once and meet the same targets at about the same time, so
these come from DRAM once and then from L2.

With e = exp(-|x|) the smaller of p and 1 - p is e / (1 + e), the larger 1 / (1 + e), and -log of them |x| + l
and l, where l = log(1 + e). Nothing cancels, and one exponential and one division serve a pair:
loss = (q + 1 - t) l + |x| (1 - t where x > 0, else q), entropy = l + |x| e / (1 + e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import finish_if_last, gamma_of, is_warming, store_sums
from .forward import LOG2E, count_rows, select, share_counting

LARGEST_X = tl.constexpr(1e30)  # stands for |x| = inf, where it multiplies e = 0


@triton.jit
def load(pointers, inside, other):
    """Those inside, or all. A mask of unknown size makes an access narrow, so only the last tile has one."""
    if inside is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=other)
    return values


@triton.jit
def log1p_of(s):
    """log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, to rounding. 1 + e would lose a small e."""
    TERMS: tl.constexpr = 16 if s.dtype.primitive_bitwidth == 64 else 7
    square = s * s
    series = tl.full(s.shape, 2 / (2 * TERMS - 1), s.dtype)
    for k in tl.static_range(2, TERMS + 1):
        series = series * square + 2 / (2 * (TERMS - k) + 1)
    return s * series


@triton.jit
def pair_terms(x, t, known, yes_weight, weight, T: tl.constexpr, NEEDS_L1: tl.constexpr):
    """Loss, its derivative, correct, entropy and dependence of pairs; 0 where the label is not known.

    Args:
        x, t: logits and labels, anything where they are not known.
        yes_weight, weight: of each pair, or None for 1.
    """
    # A certain and right "no" has loss, entropy and derivative 0: it stands in for what does not count.
    x = tl.where(known, x, -LARGEST_X)
    t = tl.where(known, t, 0.0)
    size = tl.abs(x)
    e = tl.exp2(size * -LOG2E)
    both = 1 / ((1 + e) * (2 + e))
    larger = both * (2 + e)
    smaller = e * larger
    log1p = log1p_of(both * (1 + e) * e)
    positive = x > 0
    p = tl.where(positive, larger, smaller)
    not_p = tl.where(positive, smaller, larger)
    no = 1 - t
    if yes_weight is None:
        nll = log1p + size * tl.where(positive, no, t)
        slope = no * p - t * not_p
    else:
        yes = t * yes_weight
        nll = (yes + no) * log1p + size * tl.where(positive, no, yes)
        slope = no * p - yes * not_p
    if weight is not None:
        nll = nll * weight
        slope = slope * weight
    if NEEDS_L1:
        dependence = size
    else:
        dependence = t * p + no * not_p
    return (
        nll,
        slope,
        tl.where(known & (positive == (t > 0.5)), 1.0, 0.0).to(T),
        log1p + tl.minimum(size, LARGEST_X) * smaller,
        tl.where(known, dependence, 0.0),
    )


@triton.jit
def tile_of_pairs(
    x,
    g,
    target,
    mask,
    weight,
    pos_weight,
    pair_loss,
    branch,
    tile,
    pairs,
    factor,
    scale,
    T: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BRANCHES: tl.constexpr,
    OPTIONS: tl.constexpr,
    PLAN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of a branch's pairs: write gradient and loss, return the sums of each thread.

    Args:
        factor: what the branch's losses are multiplied by in the loss of a pair.
        scale: what its gradients are multiplied by.
        WHOLE: all pairs of the tile exist.
    """
    THREADS: tl.constexpr = PLAN.threads
    LANES: tl.constexpr = PLAN.lanes
    first = (tile + tl.zeros((), tl.int64)) * (THREADS * LANES)
    offsets = tl.arange(0, THREADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = None
    if not WHOLE:
        inside = first + offsets < pairs
    if mask is not None or weight is not None or pos_weight is not None or STRIDE is not None:
        place = (first % C).to(tl.int32) + offsets
        row = first // C + place // C
        label = place % C
    t = load(target + first + offsets, inside, 0.0).to(T)
    known = t == t
    if not WHOLE:
        known = known & inside
    if mask is not None:
        present = tl.load(mask + row * (BRANCHES - 1) + (branch - 1), mask=known & (branch > 0), other=1)
        known = known & (present != 0)
    if STRIDE is None:
        logit = load(x + first + offsets, inside, 0.0).to(T)
    else:
        logit = load(x + row * STRIDE + label, inside, 0.0).to(T)
    pair_weight, yes_weight = None, None
    if weight is not None:
        pair_weight = tl.load(weight + label)
    if pos_weight is not None:
        yes_weight = tl.load(pos_weight + label)
    nll, slope, correct, entropy, dependence = pair_terms(
        logit, t, known, yes_weight, pair_weight, T, OPTIONS.dependence == "logit_l1"
    )
    if pair_loss is not None:
        out = pair_loss + first + offsets
        earlier = branch > 0
        if not WHOLE:
            earlier = earlier & inside
        total = factor * nll + tl.load(out, mask=earlier, other=0.0)
        if WHOLE:
            tl.store(out, total)
        else:
            tl.store(out, total, mask=inside)
    if g is not None:
        slope = (slope * scale).to(g.dtype.element_ty)
        if WHOLE:
            tl.store(g + first + offsets, slope)
        else:
            tl.store(g + first + offsets, slope, mask=inside)
    return (
        tl.sum(nll, 1),
        tl.sum(tl.where(known, 1.0, 0.0).to(T), 1),
        tl.sum(correct, 1),
        tl.sum(entropy, 1),
        tl.sum(dependence, 1),
    )


@triton.jit
def process_branch(
    logits,
    grads,
    target,
    mask,
    weight,
    pos_weight,
    divisor,
    gamma,
    work,
    counters,
    pair_loss,
    gamma_stride,
    gammas,
    warming,
    branch,
    pairs,
    T: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BRANCHES: tl.constexpr,
    OPTIONS: tl.constexpr,
    PLAN: tl.constexpr,
    COUNTING: tl.constexpr,
    SUMS: tl.constexpr,
):
    """This program's tiles of a branch: gradients, losses of the pairs if asked for, and the partial sums."""
    THREADS: tl.constexpr = PLAN.threads
    TILE: tl.constexpr = THREADS * PLAN.lanes
    COUNTED: tl.constexpr = 1 if mask is None else BRANCHES  # branches whose counts may differ
    p, programs = tl.program_id(0), tl.num_programs(0)
    x = select(logits, branch, BRANCHES)
    g = None
    factor = gamma_of(gamma, gamma_stride, gammas, branch - 1, branch > 0, BRANCHES - 1, T)
    factor = tl.where((branch == 0) | warming, 1.0, factor).to(T)
    scale = factor
    if grads is not None:
        g = select(grads, branch, BRANCHES)
        if OPTIONS.reduction == "mean":
            if divisor is not None:
                branch_divisor = tl.load(divisor + branch)
            elif pairs <= COUNTING.shared_above:
                branch_divisor = count_rows(
                    target, mask, None, branch, 0, pairs, T, C, BRANCHES, 0, True, C, COUNTING.block
                )
            else:
                branch_divisor = share_counting(
                    target,
                    mask,
                    None,
                    work + BRANCHES * len(SUMS) * programs,
                    counters,
                    0 if COUNTED == 1 else branch,
                    pairs,
                    T,
                    C,
                    COUNTED,
                    0,
                    True,
                    C,
                    COUNTING.block,
                    COUNTING.chunks,
                )
            # without a pair that counts all gradients are 0, not 0 / 0
            scale = tl.where(branch_divisor == 0, 0.0, factor / branch_divisor)

    zero = tl.zeros([THREADS], T)
    loss_sum, count, correct_sum, entropy_sum, dependence_sum = zero, zero, zero, zero, zero
    whole = pairs // TILE
    for tile in range(p, whole, programs):
        nll, known, correct, entropy, dependence = tile_of_pairs(
            x,
            g,
            target,
            mask,
            weight,
            pos_weight,
            pair_loss,
            branch,
            tile,
            pairs,
            factor,
            scale,
            T,
            C,
            STRIDE,
            BRANCHES,
            OPTIONS,
            PLAN,
            True,
        )
        loss_sum += nll
        count += known
        correct_sum += correct
        entropy_sum += entropy
        dependence_sum += dependence
    if whole % programs == p:  # what is left, if anything
        nll, known, correct, entropy, dependence = tile_of_pairs(
            x,
            g,
            target,
            mask,
            weight,
            pos_weight,
            pair_loss,
            branch,
            whole,
            pairs,
            factor,
            scale,
            T,
            C,
            STRIDE,
            BRANCHES,
            OPTIONS,
            PLAN,
            False,
        )
        loss_sum += nll
        count += known
        correct_sum += correct
        entropy_sum += entropy
        dependence_sum += dependence
    n = tl.sum(count, 0)
    store_sums(
        work,
        branch,
        tl.sum(loss_sum, 0),
        n,
        n,
        tl.sum(correct_sum, 0),
        tl.sum(entropy_sum, 0),
        tl.sum(dependence_sum, 0),
        SUMS,
    )


@triton.jit(do_not_specialize=["gamma_stride", "warmup", "pairs"])
def labels_kernel(
    logits,  # tuple of M+1 [rows, labels] of row stride STRIDE, labels adjacent
    grads,  # tuple of M+1 [rows, labels] contiguous, or None: nothing is written
    target,  # [rows, labels] contiguous, in [0, 1] or NaN for unknown
    mask,  # [rows, M] contiguous bool, or None
    weight,  # [labels] or None
    pos_weight,  # [labels] or None
    divisor,  # [M+1] what reduction "mean" divides gradients by; None: count here
    gamma,  # [] or [M] or None: the numbers below
    temperature,  # [] or None: the number below
    step,  # [] integer, the number of steps so far, or None: 0
    work,  # partial sums [M+1, sums, programs], then counts [M+1, CHUNKS]
    counters,  # [3] int32, zero before and after: programs arrived, chunks of pairs taken, chunks counted
    loss,  # [], or [rows, labels] for reduction "none", with a grid of (programs, 1)
    packed,  # where PACKED says
    gamma_stride: tl.int64,  # 0 for gamma []
    gammas,  # tuple of numbers (finish.gamma_of), or None
    temperature_number: tl.float64,
    warmup: tl.int64,  # steps
    pairs,
    C: tl.constexpr,  # labels; 1 where no row or label matters, so that another count compiles nothing
    STRIDE: tl.constexpr,  # None: the logits are contiguous
    BRANCHES: tl.constexpr,
    OPTIONS: tl.constexpr,  # options.Options
    PLAN: tl.constexpr,  # plan.PairPlan
    COUNTING: tl.constexpr,  # plan.Counting
    SUMS: tl.constexpr,  # finish.Sums
    PACKED: tl.constexpr,  # finish.Packed
):
    T: tl.constexpr = packed.dtype.element_ty
    warming = is_warming(step, warmup)
    if OPTIONS.reduction == "none":  # the losses of a pair are added up by the thread that holds it
        for branch in range(tl.program_id(1), BRANCHES):
            process_branch(
                logits,
                grads,
                target,
                mask,
                weight,
                pos_weight,
                divisor,
                gamma,
                work,
                counters,
                loss,
                gamma_stride,
                gammas,
                warming,
                branch + tl.zeros((), tl.int32),
                pairs,
                T,
                C,
                STRIDE,
                BRANCHES,
                OPTIONS,
                PLAN,
                COUNTING,
                SUMS,
            )
            tl.debug_barrier()  # what has been stored here is read for the next branch
    else:
        process_branch(
            logits,
            grads,
            target,
            mask,
            weight,
            pos_weight,
            divisor,
            gamma,
            work,
            counters,
            None,
            gamma_stride,
            gammas,
            warming,
            tl.program_id(1),
            pairs,
            T,
            C,
            STRIDE,
            BRANCHES,
            OPTIONS,
            PLAN,
            COUNTING,
            SUMS,
        )
    finish_if_last(
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
        BRANCHES,
        OPTIONS,
        SUMS,
        PACKED,
    )
