"""The forward kernel: losses, statistics, coefficients and gradients of all branches in one launch.

Grid (programs, M+1): a program belongs to one branch and takes its tiles in turn, so that it keeps six sums and counts
the valid rows once. Rows of up to plan.LARGEST_ROW classes are held in registers, longer ones are streamed.

With z_c = x_c - max x and e_c = exp z_c a row needs, besides its maximum, s = sum e and sz = sum e z; then
log p_c = z_c - log s and H = log s - sz / s, without a second pass and without cancellation under large offsets.
Everything else that a target can ask for is linear in log p: with weights u_c (the smoothing or the soft target),
-sum u_c log p_c = U log s - sum u_c z_c, and d loss / d x_c = e_c (sum of target weights) / s - (target weight)_c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import at_least, finish

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a maximum before the first logit: finite, so that differences never are NaN
FLOOR_Z = tl.constexpr(-1e30)  # 0 * log 0 = 0: z of a class that cannot be, where it only multiplies e = 0


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
    BLOCK: tl.constexpr,
):
    """What the rows from ``start`` to ``end`` add to the number by which reduction "mean" divides a branch."""
    total = tl.zeros([BLOCK], T)
    for first in range(start, end, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        valid, y = is_valid(target, mask, row, row < end, branch, BRANCHES, IGNORE, SOFT)
        if not SOFT:
            valid = valid & (y >= 0) & (y < C)
        if weight is not None and not SOFT:
            total += tl.load(weight + y, mask=valid, other=0.0)
        else:
            total += tl.where(valid, 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit
def count_together(
    target,
    mask,
    weight,
    parts,
    state,
    branch,
    rows,
    T: tl.constexpr,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``count_rows`` of all rows where they are many: the programs of all branches share the work.

    A program takes chunks until none is left, and only then waits for those that others still count. Whoever has taken a
    chunk is running and finishes it without waiting, so this ends however few programs the device runs at a time.
    """
    size = tl.cdiv(tl.cdiv(rows, BLOCK), CHUNKS) * BLOCK
    chunks = tl.cdiv(rows, size)
    mine = tl.atomic_add(state + 1, 1, sem="relaxed", scope="gpu")
    while mine < chunks:
        start = mine * size
        end = start + tl.minimum(size, rows - start)
        for b in range(BRANCHES):
            part = count_rows(target, mask, weight, b, start, end, T, C, BRANCHES, IGNORE, SOFT, BLOCK)
            tl.store(parts + b * CHUNKS + mine, part)
        tl.debug_barrier()
        tl.atomic_add(state + 2, 1, sem="release", scope="gpu")
        mine = tl.atomic_add(state + 1, 1, sem="relaxed", scope="gpu")
    # not a volatile load, which is an ordinary one on AMD and would be read once; acquire: the counts are seen from here on
    while tl.atomic_add(state + 2, 0, sem="acquire", scope="gpu") < chunks:
        pass
    part = tl.arange(0, CHUNKS)
    return tl.sum(
        tl.load(parts + branch * CHUNKS + part, mask=part < chunks, other=0.0, cache_modifier=".cg"), 0
    )


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


# A tile is [steps, owners, lanes], an owner being a row, or a thread of the one row that is streamed. Steps are to lie
# within a thread, so that is where joining begins; lanes do when a thread owns a row, and else span few threads. Triton
# before 3.7 gives neighbouring threads the first of two equal axes, later ones the last: there, steps and owners swap.
OWNERS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def tile_columns(
    STEPS: tl.constexpr, STEP: tl.constexpr, OWNERS: tl.constexpr, OWNER: tl.constexpr, LANES: tl.constexpr
):
    """Columns of a tile whose steps and owners are STEP and OWNER columns apart.

    The last step comes first: steps of one column that ascend would be dealt out to neighbouring threads, to be read as one.
    """
    step = (STEPS - 1 - tl.arange(0, STEPS)) * STEP
    owner, lane = tl.arange(0, OWNERS) * OWNER, tl.arange(0, LANES)
    if OWNERS_FIRST:
        return step[None, :, None] + owner[:, None, None] + lane[None, None, :]
    else:
        return step[:, None, None] + owner[None, :, None] + lane[None, None, :]


@triton.jit
def wide(values):
    """One value per owner, shaped to meet a tile."""
    if OWNERS_FIRST:
        return values[:, None, None]
    else:
        return values[None, :, None]


@triton.jit
def join_sum(tile):
    return tl.sum(tl.sum(tile, 1 if OWNERS_FIRST else 0), 1)


@triton.jit
def join_max(tile):
    return tl.max(tl.max(tile, 1 if OWNERS_FIRST else 0), 1)


@triton.jit
def join_min(tile):
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
    """One pass over a long row. Every thread keeps a softmax of its own; they meet once, after the loop.

    The loop needs no exchange between threads, and a change of maximum costs one exponential per STEPS * LANES logits.
    Returns top, s, sz, first (of the largest logit), U = sum u, uz = sum u z, te = sum t e, first_t, l1.
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
        new = join_max(raw)
        at = join_min(tl.where(raw == wide(new), cols, C))
        first = tl.where(new > top, at, first)
        new = tl.maximum(new, top)
        shift = top - new
        z = raw - wide(new)
        e = tl.exp2(z * LOG2E)
        fade = tl.exp2(shift * LOG2E)
        sz = fade * (sz + shift * s) + join_sum(tl.maximum(z, FLOOR_Z) * e)
        s = fade * s + join_sum(e)
        if SOFT or SMOOTHING > 0:
            t, u = weights_of(target, weight, base_t, cols, keep, T, C, SMOOTHING, SOFT)
            uz += shift * u_sum + join_sum(tl.where(keep, u * z, 0.0))
            u_sum += join_sum(u)
            if SOFT:
                te = fade * te + join_sum(t * e)
                t = tl.where(keep, t, float("-inf"))
                new_t = join_max(t)
                at = join_min(tl.where(t == wide(new_t), cols, C))
                first_t = tl.where(new_t > top_t, at, first_t)
                top_t = tl.maximum(new_t, top_t)
        if NEEDS_L1:
            l1 += join_sum(tl.where(keep, tl.abs(raw), 0.0))
        top = new
    row_top = tl.max(top, 0)
    shift = tl.maximum(top - row_top, FLOOR_Z)
    fade = tl.exp2(shift * LOG2E)
    first = tl.min(tl.where(top == row_top, first, C), 0)
    first_t = tl.min(tl.where(top_t == tl.max(top_t, 0), first_t, C), 0)
    sz = tl.sum(fade * (sz + shift * s), 0)
    uz = tl.sum(uz + shift * u_sum, 0)
    return (
        row_top,
        tl.sum(fade * s, 0),
        sz,
        first,
        tl.sum(u_sum, 0),
        uz,
        tl.sum(fade * te, 0),
        first_t,
        tl.sum(l1, 0),
    )


@triton.jit(do_not_specialize=["rows", "gamma", "temperature", "warming"])
def forward_kernel(
    logits,  # tuple of M+1 [rows, C] of row stride STRIDE, columns adjacent
    grads,  # tuple of M+1 [rows, C] contiguous, or None: nothing is written
    target,  # [rows] class indices or [rows, C] contiguous probabilities
    mask,  # [rows, M] contiguous bool, or None
    weight,  # [C] or None
    norm,  # [M+1] what reduction "mean" divides gradients by; None: count here
    schedule,  # [3] gamma, temperature, warming on the device, or None: the numbers below
    row_loss,  # [M+1, rows] for reduction "none", else None
    work,  # [M+1, 6, programs], then [M+1, CHUNKS]
    state,  # [3] int32, zero before and after: programs that have arrived, chunks of rows taken, chunks counted
    loss,  # []
    packed,  # [16 M + 9]
    rows,
    gamma: tl.float64,
    temperature: tl.float64,
    warming,
    C: tl.constexpr,
    STRIDE: tl.constexpr,  # a constant like C: its divisors decide how wide loads may be
    BRANCHES: tl.constexpr,
    SOFT: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    REDUCTION: tl.constexpr,
    DEPENDENCE: tl.constexpr,
    RULE: tl.constexpr,
    GAIN: tl.constexpr,
    FLOOR: tl.constexpr,
    ONLINE: tl.constexpr,
    STEPS: tl.constexpr,
    OWNERS: tl.constexpr,
    LANES: tl.constexpr,
    ALONE: tl.constexpr,  # up to here a program counts the valid rows by itself
    BLOCK: tl.constexpr,  # rows of one step of counting
    CHUNKS: tl.constexpr,
):
    T: tl.constexpr = packed.dtype.element_ty
    USES_U: tl.constexpr = SOFT or SMOOTHING > 0
    NEEDS_L1: tl.constexpr = DEPENDENCE == "logit_l1"
    ROWS: tl.constexpr = 1 if ONLINE else OWNERS
    p, programs, branch = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    x = select(logits, branch, BRANCHES)

    if schedule is not None:
        gamma_t = tl.load(schedule)
        temperature_t = tl.load(schedule + 1)
        warming_t = tl.load(schedule + 2)
    else:  # the numbers are float64 whoever calls, and rounded once, here
        gamma_t = tl.full((), gamma, tl.float64).to(T)
        temperature_t = tl.full((), temperature, tl.float64).to(T)
        warming_t = tl.full((), warming, tl.int32).to(T)
    gamma_t = tl.where(warming_t != 0, 1.0, gamma_t)

    scale = tl.where(branch == 0, 1.0, gamma_t)
    if grads is not None:
        g = select(grads, branch, BRANCHES)
        if REDUCTION == "mean":
            if norm is not None:
                divisor = tl.load(norm + branch)
            elif SOFT and mask is None:  # all rows are valid
                divisor = rows.to(T)
            elif rows <= ALONE:
                divisor = count_rows(
                    target, mask, weight, branch, 0, rows, T, C, BRANCHES, IGNORE, SOFT, BLOCK
                )
            else:
                parts = work + BRANCHES * 6 * programs
                divisor = count_together(
                    target,
                    mask,
                    weight,
                    parts,
                    state,
                    branch,
                    rows,
                    T,
                    C,
                    BRANCHES,
                    IGNORE,
                    SOFT,
                    BLOCK,
                    CHUNKS,
                )
            scale = scale / divisor

    zero = tl.zeros([ROWS], T)
    loss_sum, norm_sum, count, correct_sum, entropy_sum, dependence_sum = zero, zero, zero, zero, zero, zero
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
            keep = real & wide(valid)
            # rows that are not valid are not read: zeros stand in, so that nothing of theirs becomes NaN
            filler = wide(tl.where(valid, float("-inf"), 0.0))
            raw = tl.load(x + wide(row * STRIDE) + cols, mask=keep, other=filler).to(T)
            top = join_max(raw)
            z = raw - wide(top)
            e = tl.exp2(z * LOG2E)
            s = join_sum(e)
            sz = join_sum(tl.maximum(z, FLOOR_Z) * e)
            first = join_min(tl.where(z == 0, cols, C))
            if USES_U:
                t, u = weights_of(target, weight, wide(row * C), cols, keep, T, C, SMOOTHING, SOFT)
                u_sum = join_sum(u)
                uz = join_sum(tl.where(keep, u * z, 0.0))
                if SOFT:
                    te = join_sum(t * e)
                    t = tl.where(real, t, float("-inf"))
                    first_t = join_min(tl.where(t == wide(join_max(t)), cols, C))
            if NEEDS_L1:
                l1 = join_sum(tl.where(keep, tl.abs(raw), 0.0))

        # What the row contributes. `pull` multiplies p in the gradient, `push` u, `hit` the target class.
        log_s = tl.log(s)
        entropy = at_least(log_s - sz / s, 0.0)
        if SOFT:
            nll = u_sum * log_s - uz
            confidence = te / s
            correct = first == first_t
            w = tl.where(valid, 1.0, 0.0).to(T)
            pull = u_sum
            push = tl.where(valid, scale, 0.0)
        else:
            z_y = x_y - top
            e_y = tl.exp2(z_y * LOG2E)
            poison = tl.where(bad, float("nan"), 0.0)  # a class index out of range
            nll = (1 - SMOOTHING) * w * (log_s - z_y) + poison
            confidence = e_y / s + poison
            correct = first == y
            hit = (1 - SMOOTHING) * w
            pull = hit + poison
            push = zero
            if SMOOTHING > 0:
                nll += SMOOTHING / C * (u_sum * log_s - uz)
                pull += SMOOTHING / C * u_sum
                push = tl.where(valid, SMOOTHING / C * scale, 0.0)
        dependence = confidence
        if NEEDS_L1:
            dependence = l1
        nll = tl.where(valid, nll, 0.0)
        loss_sum += nll
        norm_sum += tl.where(valid, w, 0.0)
        count += tl.where(valid, 1.0, 0.0)
        correct_sum += tl.where(valid & correct, 1.0, 0.0)
        entropy_sum += tl.where(valid, entropy, 0.0)
        dependence_sum += tl.where(valid, dependence, 0.0)
        if row_loss is not None:
            tl.store(row_loss + branch.to(tl.int64) * rows + row, nll, mask=inside)

        if grads is not None:
            pull = tl.where(valid, pull * scale / s, 0.0)
            G: tl.constexpr = g.dtype.element_ty
            if ONLINE:
                top = tl.where(
                    row_valid, top, 0.0
                )  # rows that are not valid read as zeros: keep their e finite
                pull_row = tl.sum(pull, 0)
                push_row = tl.sum(push, 0)
                for start in range(0, C, STEPS * OWNERS * LANES):
                    cols = start + tile_columns(STEPS, OWNERS * LANES, OWNERS, LANES, LANES)
                    keep = cols < C
                    read = keep & row_valid
                    raw = tl.load(
                        x + base * STRIDE + cols, mask=read, other=0.0, eviction_policy="evict_first"
                    ).to(T)
                    d = tl.exp2((raw - top) * LOG2E) * pull_row
                    if USES_U:
                        _, u = weights_of(target, weight, base * C, cols, read, T, C, SMOOTHING, SOFT)
                        d -= u * push_row
                    tl.store(g + base * C + cols, d.to(G), mask=keep, eviction_policy="evict_first")
            else:
                d = e * wide(pull)
                if USES_U:
                    d -= u * wide(push)
                tl.store(g + wide(row * C) + cols, d.to(G), mask=real & wide(inside))
            if not SOFT:
                # The target class, formed in T before it is rounded; the barrier orders it after the row's other stores.
                d_y = e_y * pull - hit * scale
                if SMOOTHING > 0:
                    d_y -= w * push
                tl.debug_barrier()
                tl.store(g + row * C + y, d_y.to(G), mask=valid)

    partial = work + branch * 6 * programs + p
    tl.store(partial, tl.sum(loss_sum, 0))
    tl.store(partial + programs, tl.sum(norm_sum, 0))
    tl.store(partial + 2 * programs, tl.sum(count, 0))
    tl.store(partial + 3 * programs, tl.sum(correct_sum, 0))
    tl.store(partial + 4 * programs, tl.sum(entropy_sum, 0))
    tl.store(partial + 5 * programs, tl.sum(dependence_sum, 0))

    # The last program to arrive sees the sums of all others: release before it counts, acquire after.
    tl.debug_barrier()
    arrived = tl.atomic_add(state, 1, sem="acq_rel", scope="gpu")
    if arrived == programs * BRANCHES - 1:
        finish(
            work,
            loss,
            packed,
            programs,
            gamma_t,
            temperature_t,
            warming_t,
            BRANCHES,
            REDUCTION,
            RULE,
            GAIN,
            FLOOR,
        )
        tl.store(
            state + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3
        )  # nobody waits any more: all have arrived
