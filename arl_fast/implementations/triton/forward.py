"""The forward kernel: losses, statistics, coefficients and gradients of all branches in one launch.

Grid (programs, M+1): a program belongs to one branch and takes its tiles in turn, so that it keeps its sums
and counts the valid rows once. Rows of up to plan.LARGEST_ROW classes are held in registers, longer ones are
streamed.

With z_c = x_c - max x and e_c = exp z_c a row needs, besides its maximum, s = sum e and sz = sum e z. Then
log p_c = z_c - log s and H = log s - sz / s, without a second pass, and without cancellation under large
offsets. Everything else that a target can ask for is linear in log p. With weights u_c (the smoothing or the
soft target), -sum u_c log p_c = (sum u) log s - sum u_c z_c. The gradient of the row's loss is
d loss / d x_c = e_c (sum of the target's weights) / s - (the target's weight)_c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import at_least, finish_if_last, gamma_of, is_warming, store_sums

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # the maximum before the first logit; finite, so that no difference is NaN
LOWEST_Z = tl.constexpr(-1e30)  # z of a class of probability 0, where it multiplies e = 0: 0 * log 0 = 0


@triton.jit
def select(pointers, branch, BRANCHES: tl.constexpr):
    """The branch's pointer out of a tuple; keeps the common alignment, so that loads stay wide."""
    chosen = pointers[0]
    for i in tl.static_range(1, BRANCHES):
        chosen = tl.where(branch == i, pointers[i], chosen)
    return chosen


@triton.jit
def is_valid(
    target, mask, row, inside, branch, BRANCHES: tl.constexpr, IGNORE: tl.constexpr, SOFT: tl.constexpr
):
    """Which rows take part in a branch, and their class indices (0 for soft targets)."""
    valid = inside
    y = tl.zeros_like(row)
    if not SOFT:
        y = tl.load(target + row, mask=inside, other=0).to(tl.int64)
        valid = valid & (y != IGNORE)
    if mask is not None:
        present = tl.load(mask + row * (BRANCHES - 1) + (branch - 1), mask=valid & (branch > 0), other=1)
        valid = valid & (present != 0)
    return valid, y


@triton.jit
def count_rows(
    target,
    mask,
    weight,
    branch,
    start,
    end,
    T: tl.constexpr,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFT: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the rows from ``start`` to ``end`` add to a branch's divisor under reduction "mean".

    With LABELS, of task "multilabel", the rows are pairs of a row and one of so many labels.
    """
    total = tl.zeros([BLOCK], T)
    for first in range(start, end, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        if LABELS is not None:
            label = tl.load(target + row, mask=row < end, other=0.0).to(T)
            known = (label == label) & (row < end)
            valid, y = is_valid(target, mask, row // LABELS, known, branch, BRANCHES, IGNORE, SOFT)
        else:
            valid, y = is_valid(target, mask, row, row < end, branch, BRANCHES, IGNORE, SOFT)
        if not SOFT:
            valid = valid & (y >= 0) & (y < C)
        if weight is not None and not SOFT:
            total += tl.load(weight + y, mask=valid, other=0.0)
        else:
            total += tl.where(valid, 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit
def share_counting(
    target,
    mask,
    weight,
    counts,
    counters,
    branch,
    rows,
    T: tl.constexpr,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFT: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``count_rows`` of all rows where they are many: the programs of all branches share the work.

    A program takes chunks until none is left, and only then waits for those that others still count. A
    program that has taken a chunk is running and finishes it without waiting. So this ends however few
    programs the device runs at a time.
    """
    size = tl.cdiv(tl.cdiv(rows, BLOCK), CHUNKS) * BLOCK
    chunks = tl.cdiv(rows, size)
    chunk = tl.atomic_add(counters + 1, 1, sem="relaxed", scope="gpu")
    while chunk < chunks:
        start = chunk * size
        end = start + tl.minimum(size, rows - start)
        for b in range(BRANCHES):
            count = count_rows(
                target, mask, weight, b, start, end, T, C, BRANCHES, IGNORE, SOFT, LABELS, BLOCK
            )
            tl.store(counts + b * CHUNKS + chunk, count)
        tl.debug_barrier()
        tl.atomic_add(counters + 2, 1, sem="release", scope="gpu")
        chunk = tl.atomic_add(counters + 1, 1, sem="relaxed", scope="gpu")
    # An atomic operation, because AMD's compiler makes an ordinary load of a volatile one and reads it once.
    # Acquire makes the counts visible.
    while tl.atomic_add(counters + 2, 0, sem="acquire", scope="gpu") < chunks:
        pass
    all_chunks = tl.arange(0, CHUNKS)
    found = tl.load(
        counts + branch * CHUNKS + all_chunks, mask=all_chunks < chunks, other=0.0, cache_modifier=".cg"
    )
    return tl.sum(found, 0)


@triton.jit
def weights_of(
    target,
    weight,
    base,
    cols,
    keep,
    T: tl.constexpr,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFT: tl.constexpr,
):
    """(t, u): soft target probabilities, and the class's weight in sum u log p; 0 where ``keep`` is false.

    For class indices u is what the smoothing spreads, to be multiplied by SMOOTHING / C; t is unused.
    """
    if SOFT:
        t = tl.load(target + base + cols, mask=keep, other=0.0).to(T)
        u = t * (1 - SMOOTHING) + SMOOTHING / C
    else:
        t = tl.where(keep, 1.0, 0.0).to(T)
        u = t
    if weight is not None:
        u = u * tl.load(weight + cols, mask=keep, other=0.0)
    return t, tl.where(keep, u, 0.0)


# A tile is [steps, owners, lanes]. An owner is a row, or a thread of the one row that is streamed. The steps
# of an owner shall lie within a thread, so reductions begin with them. Of two axes of equal stride, Triton
# before 3.7 spreads the first over neighbouring threads, and later versions the last. Before 3.7 the axes of
# steps and owners are swapped.
OWNERS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def tile_columns(
    STEPS: tl.constexpr, STEP: tl.constexpr, OWNERS: tl.constexpr, OWNER: tl.constexpr, LANES: tl.constexpr
):
    """Columns of a tile whose steps and owners are STEP and OWNER columns apart.

    The last step comes first. Triton would spread ascending steps of one column over neighbouring threads, to
    read them together.
    """
    step = (STEPS - 1 - tl.arange(0, STEPS)) * STEP
    owner, lane = tl.arange(0, OWNERS) * OWNER, tl.arange(0, LANES)
    if OWNERS_FIRST:
        return step[None, :, None] + owner[:, None, None] + lane[None, None, :]
    else:
        return step[:, None, None] + owner[None, :, None] + lane[None, None, :]


@triton.jit
def per_owner(values):
    """One value per owner, shaped to meet a tile."""
    if OWNERS_FIRST:
        return values[:, None, None]
    else:
        return values[None, :, None]


@triton.jit
def sum_of_owner(tile):
    return tl.sum(tl.sum(tile, 1 if OWNERS_FIRST else 0), 1)


@triton.jit
def max_of_owner(tile):
    return tl.max(tl.max(tile, 1 if OWNERS_FIRST else 0), 1)


@triton.jit
def min_of_owner(tile):
    return tl.min(tl.min(tile, 1 if OWNERS_FIRST else 0), 1)


@triton.jit
def stream_row(
    x,
    target,
    weight,
    base_x,
    base_t,
    valid,
    T: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    OWNERS: tl.constexpr,
    LANES: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFT: tl.constexpr,
    NEEDS_L1: tl.constexpr,
):
    """One pass over a long row. Every thread keeps a softmax of its own, and they are joined after the loop.

    Threads exchange nothing within the loop. A change of maximum costs one exponential per STEPS * LANES
    logits.

    Returns top, s, sz, first (the column of the first largest logit), u_sum = sum u, uz = sum u z, te = sum t
    e, first_t (the column of the first largest target), l1 = sum |x|.
    """
    offsets = tile_columns(STEPS, OWNERS * LANES, OWNERS, LANES, LANES)
    zero = tl.zeros([OWNERS], T)
    top = tl.full([OWNERS], LOWEST, T)
    s, sz, u_sum, uz, te, l1 = zero, zero, zero, zero, zero, zero
    first = tl.full([OWNERS], C, tl.int32)
    top_t, first_t = top, first
    for start in range(0, C, STEPS * OWNERS * LANES):
        cols = start + offsets
        keep = (cols < C) & valid
        raw = tl.load(x + base_x + cols, mask=keep, other=float("-inf"), eviction_policy="evict_last").to(T)
        new = max_of_owner(raw)
        at = min_of_owner(tl.where(raw == per_owner(new), cols, C))
        first = tl.where(new > top, at, first)
        new = tl.maximum(new, top)
        shift = top - new
        z = raw - per_owner(new)
        e = tl.exp2(z * LOG2E)
        rescale = tl.exp2(shift * LOG2E)
        sz = rescale * (sz + shift * s) + sum_of_owner(tl.maximum(z, LOWEST_Z) * e)
        s = rescale * s + sum_of_owner(e)
        if SOFT or SMOOTHING > 0:
            t, u = weights_of(target, weight, base_t, cols, keep, T, C, SMOOTHING, SOFT)
            uz += shift * u_sum + sum_of_owner(tl.where(keep, u * z, 0.0))
            u_sum += sum_of_owner(u)
            if SOFT:
                te = rescale * te + sum_of_owner(t * e)
                t = tl.where(keep, t, float("-inf"))
                new_t = max_of_owner(t)
                at = min_of_owner(tl.where(t == per_owner(new_t), cols, C))
                first_t = tl.where(new_t > top_t, at, first_t)
                top_t = tl.maximum(new_t, top_t)
        if NEEDS_L1:
            l1 += sum_of_owner(tl.where(keep, tl.abs(raw), 0.0))
        top = new
    row_top = tl.max(top, 0)
    shift = tl.maximum(top - row_top, LOWEST_Z)
    rescale = tl.exp2(shift * LOG2E)
    first = tl.min(tl.where(top == row_top, first, C), 0)
    first_t = tl.min(tl.where(top_t == tl.max(top_t, 0), first_t, C), 0)
    sz = tl.sum(rescale * (sz + shift * s), 0)
    uz = tl.sum(uz + shift * u_sum, 0)
    return (
        row_top,
        tl.sum(rescale * s, 0),
        sz,
        first,
        tl.sum(u_sum, 0),
        uz,
        tl.sum(rescale * te, 0),
        first_t,
        tl.sum(l1, 0),
    )


@triton.jit(do_not_specialize=["gamma_stride", "warmup", "rows"])
def forward_kernel(
    logits,  # tuple of M+1 [rows, C] of row stride STRIDE, columns adjacent
    grads,  # tuple of M+1 [rows, C] contiguous, or None: nothing is written
    target,  # [rows] class indices or [rows, C] contiguous probabilities
    mask,  # [rows, M] contiguous bool, or None
    weight,  # [C] or None
    divisor,  # [M+1] what reduction "mean" divides gradients by; None: count here
    gamma,  # [] or [M] or None: the numbers below
    temperature,  # [] or None: the number below
    step,  # [] integer, the number of steps so far, or None: 0
    row_loss,  # [M+1, rows] for reduction "none", else None
    work,  # partial sums [M+1, sums, programs], then counts [M+1, CHUNKS]
    counters,  # [3] int32, zero before and after: programs arrived, chunks of rows taken, chunks counted
    loss,  # []
    packed,  # where PACKED says
    gamma_stride: tl.int64,  # 0 for gamma []
    gammas,  # tuple of numbers (finish.gamma_of), or None
    temperature_number: tl.float64,
    warmup: tl.int64,  # steps
    rows,
    C: tl.constexpr,
    STRIDE: tl.constexpr,  # a constant like C: its divisors decide how wide loads may be
    BRANCHES: tl.constexpr,
    SOFT: tl.constexpr,
    OPTIONS: tl.constexpr,  # options.Options
    PLAN: tl.constexpr,  # plan.Plan
    COUNTING: tl.constexpr,  # plan.Counting
    SUMS: tl.constexpr,  # finish.Sums
    PACKED: tl.constexpr,  # finish.Packed
):
    T: tl.constexpr = packed.dtype.element_ty
    MODALITIES: tl.constexpr = BRANCHES - 1
    IGNORE: tl.constexpr = OPTIONS.ignore_index
    SMOOTHING: tl.constexpr = OPTIONS.label_smoothing
    USES_U: tl.constexpr = SOFT or SMOOTHING > 0
    NEEDS_L1: tl.constexpr = OPTIONS.dependence == "logit_l1"
    ONLINE: tl.constexpr = PLAN.online
    STEPS: tl.constexpr = PLAN.steps
    OWNERS: tl.constexpr = PLAN.owners
    LANES: tl.constexpr = PLAN.lanes
    ROWS: tl.constexpr = 1 if ONLINE else OWNERS
    p, programs, branch = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    x = select(logits, branch, BRANCHES)

    warming = is_warming(step, warmup)
    scale = tl.full((), 1.0, T)
    if grads is not None:
        g = select(grads, branch, BRANCHES)
        own = gamma_of(gamma, gamma_stride, gammas, branch - 1, branch > 0, MODALITIES, T)
        scale = tl.where((branch == 0) | warming, 1.0, own)
        if OPTIONS.reduction == "mean":
            if divisor is not None:
                branch_divisor = tl.load(divisor + branch)
            elif SOFT and mask is None:  # all rows are valid
                branch_divisor = rows.to(T)
            elif rows <= COUNTING.shared_above:
                branch_divisor = count_rows(
                    target, mask, weight, branch, 0, rows, T, C, BRANCHES, IGNORE, SOFT, None, COUNTING.block
                )
            else:
                branch_divisor = share_counting(
                    target,
                    mask,
                    weight,
                    work + BRANCHES * len(SUMS) * programs,
                    counters,
                    branch,
                    rows,
                    T,
                    C,
                    BRANCHES,
                    IGNORE,
                    SOFT,
                    None,
                    COUNTING.block,
                    COUNTING.chunks,
                )
            scale = scale / branch_divisor

    zero = tl.zeros([ROWS], T)
    loss_sum, divisor_sum, count = zero, zero, zero
    correct_sum, entropy_sum, dependence_sum = zero, zero, zero
    for tile in range(p, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < rows
        valid, y = is_valid(target, mask, row, inside, branch, BRANCHES, IGNORE, SOFT)
        if not SOFT:
            bad = valid & ((y < 0) | (y >= C))
            y = tl.where(valid & (y >= 0) & (y < C), y, 0)
            x_y = tl.load(x + row * STRIDE + y, mask=valid, other=0.0).to(T)
            if weight is not None:
                w = tl.load(weight + y, mask=valid, other=0.0)
            else:
                w = tl.where(valid, 1.0, 0.0).to(T)

        # One pass over the logits: the row's maximum and sums.
        if ONLINE:
            base = (tile + tl.zeros((), tl.int64)).to(tl.int64)
            row_valid = tl.sum(valid.to(tl.int32), 0) > 0
            top, s, sz, first, u_sum, uz, te, first_t, l1 = stream_row(
                x,
                target,
                weight,
                base * STRIDE,
                base * C,
                row_valid,
                T,
                C,
                STEPS,
                OWNERS,
                LANES,
                SMOOTHING,
                SOFT,
                NEEDS_L1,
            )
        else:
            cols = tile_columns(STEPS, LANES, OWNERS, 0, LANES)
            real = cols < C
            keep = real & per_owner(valid)
            # rows that are not valid are not read: zeros stand in, so that nothing of theirs becomes NaN
            filler = per_owner(tl.where(valid, float("-inf"), 0.0))
            raw = tl.load(x + per_owner(row * STRIDE) + cols, mask=keep, other=filler).to(T)
            top = max_of_owner(raw)
            z = raw - per_owner(top)
            e = tl.exp2(z * LOG2E)
            s = sum_of_owner(e)
            sz = sum_of_owner(tl.maximum(z, LOWEST_Z) * e)
            first = min_of_owner(tl.where(z == 0, cols, C))
            if USES_U:
                t, u = weights_of(target, weight, per_owner(row * C), cols, keep, T, C, SMOOTHING, SOFT)
                u_sum = sum_of_owner(u)
                uz = sum_of_owner(tl.where(keep, u * z, 0.0))
                if SOFT:
                    te = sum_of_owner(t * e)
                    t = tl.where(real, t, float("-inf"))
                    first_t = min_of_owner(tl.where(t == per_owner(max_of_owner(t)), cols, C))
            if NEEDS_L1:
                l1 = sum_of_owner(tl.where(keep, tl.abs(raw), 0.0))

        # What the row contributes. Its gradient is e e_factor - u u_factor, less y_factor scale at the target
        # class; e_factor still lacks scale / s.
        log_s = tl.log(s)
        entropy = at_least(log_s - sz / s, 0.0)
        if SOFT:
            nll = u_sum * log_s - uz
            confidence = te / s
            correct = first == first_t
            w = tl.where(valid, 1.0, 0.0).to(T)
            e_factor = u_sum
            u_factor = tl.where(valid, scale, 0.0)
        else:
            z_y = x_y - top
            e_y = tl.exp2(z_y * LOG2E)
            poison = tl.where(bad, float("nan"), 0.0)  # a class index out of range
            nll = (1 - SMOOTHING) * w * (log_s - z_y) + poison
            confidence = e_y / s + poison
            correct = first == y
            y_factor = (1 - SMOOTHING) * w
            e_factor = y_factor + poison
            u_factor = zero
            if SMOOTHING > 0:
                nll += SMOOTHING / C * (u_sum * log_s - uz)
                e_factor += SMOOTHING / C * u_sum
                u_factor = tl.where(valid, SMOOTHING / C * scale, 0.0)
        dependence = confidence
        if NEEDS_L1:
            dependence = l1
        nll = tl.where(valid, nll, 0.0)
        loss_sum += nll
        divisor_sum += tl.where(valid, w, 0.0)
        count += tl.where(valid, 1.0, 0.0)
        correct_sum += tl.where(valid & correct, 1.0, 0.0)
        entropy_sum += tl.where(valid, entropy, 0.0)
        dependence_sum += tl.where(valid, dependence, 0.0)
        if row_loss is not None:
            tl.store(row_loss + branch.to(tl.int64) * rows + row, nll, mask=inside)

        if grads is not None:
            e_factor = tl.where(valid, e_factor * scale / s, 0.0)
            G: tl.constexpr = g.dtype.element_ty
            if ONLINE:
                # rows that are not valid read as zeros: keep their e finite
                top = tl.where(row_valid, top, 0.0)
                row_e_factor = tl.sum(e_factor, 0)
                row_u_factor = tl.sum(u_factor, 0)
                for start in range(0, C, STEPS * OWNERS * LANES):
                    cols = start + tile_columns(STEPS, OWNERS * LANES, OWNERS, LANES, LANES)
                    keep = cols < C
                    read = keep & row_valid
                    raw = tl.load(
                        x + base * STRIDE + cols, mask=read, other=0.0, eviction_policy="evict_first"
                    ).to(T)
                    d = tl.exp2((raw - top) * LOG2E) * row_e_factor
                    if USES_U:
                        _, u = weights_of(target, weight, base * C, cols, read, T, C, SMOOTHING, SOFT)
                        d -= u * row_u_factor
                    tl.store(g + base * C + cols, d.to(G), mask=keep, eviction_policy="evict_first")
            else:
                d = e * per_owner(e_factor)
                if USES_U:
                    d -= u * per_owner(u_factor)
                tl.store(g + per_owner(row * C) + cols, d.to(G), mask=real & per_owner(inside))
            if not SOFT:
                # The target class, formed in T before it is rounded; the barrier orders it after the row's
                # other stores.
                d_y = e_y * e_factor - y_factor * scale
                if SMOOTHING > 0:
                    d_y -= w * u_factor
                tl.debug_barrier()
                tl.store(g + row * C + y, d_y.to(G), mask=valid)

    store_sums(
        work,
        branch,
        tl.sum(loss_sum, 0),
        tl.sum(divisor_sum, 0),
        tl.sum(count, 0),
        tl.sum(correct_sum, 0),
        tl.sum(entropy_sum, 0),
        tl.sum(dependence_sum, 0),
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
