"""The forward kernel: losses, statistics, coefficients and gradients of all branches in one launch.

Grid (programs, M+1): a program belongs to one branch and takes its tiles in turn, so that it keeps six sums and counts
the valid rows once. Rows of up to triton_rule.LARGEST_ROW classes are held in registers, longer ones are streamed.

With z_c = x_c - max x and e_c = exp z_c a row needs, besides its maximum, s = sum e and sz = sum e z; then
log p_c = z_c - log s and H = log s - sz / s, without a second pass and without cancellation under large offsets.
Everything else that a target can ask for is linear in log p: with weights u_c (the smoothing or the soft target),
-sum u_c log p_c = U log s - sum u_c z_c, and d loss / d x_c = e_c (sum of target weights) / s - (target weight)_c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_finish import at_least, finish

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
def is_valid(target, mask, row, inside, branch, BRANCHES: tl.constexpr, IGNORE: tl.constexpr, SOFT: tl.constexpr):
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
def count_norm(
    target,
    mask,
    weight,
    branch,
    first,
    step,
    rows,
    T: tl.constexpr,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What reduction "mean" divides a branch by, over blocks of rows ``first``, ``first + step``, ..."""
    total = tl.zeros([BLOCK], T)
    for start in range(first * BLOCK, rows, step * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        valid, y = is_valid(target, mask, row, row < rows, branch, BRANCHES, IGNORE, SOFT)
        if not SOFT:
            valid = valid & (y >= 0) & (y < C)
        if weight is not None and not SOFT:
            total += tl.load(weight + y, mask=valid, other=0.0)
        else:
            total += tl.where(valid, 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows"])
def count_kernel(
    target,
    mask,
    weight,
    parts,
    rows,
    C: tl.constexpr,
    BRANCHES: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For many rows: partial norms [M+1, programs] that the forward kernel adds up."""
    T: tl.constexpr = parts.dtype.element_ty
    p, programs, branch = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    total = count_norm(target, mask, weight, branch, p, programs, rows, T, C, BRANCHES, IGNORE, SOFT, BLOCK)
    tl.store(parts + branch * programs + p, total)


@triton.jit
def weights_of(
    target, weight, base, cols, keep, T: tl.constexpr, C: tl.constexpr, SMOOTHING: tl.constexpr, SOFT: tl.constexpr
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
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFT: tl.constexpr,
    NEEDS_L1: tl.constexpr,
):
    """One pass over a long row. Every lane keeps a softmax of its own; lanes meet once, after the loop.

    Returns top, s, sz, first (of the largest logit), U = sum u, uz = sum u z, te = sum t e, first_t, l1.
    """
    LANES: tl.constexpr = CHUNK // STEPS
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zero = tl.zeros([LANES], T)
    top = tl.full([LANES], LOWEST, T)
    s, sz, u_sum, uz, te, l1 = zero, zero, zero, zero, zero, zero
    first = tl.full([LANES], C, tl.int32)
    top_t, first_t = top, first
    for start in range(0, C, CHUNK):
        cols = start + offsets
        keep = (cols < C) & valid
        raw = tl.load(x + base_x + cols, mask=keep, other=float("-inf"), eviction_policy="evict_last").to(T)
        new = tl.max(raw, 0)
        at = tl.min(tl.where(raw == new[None, :], cols, C), 0)
        first = tl.where(new > top, at, first)
        new = tl.maximum(new, top)
        shift = top - new
        z = raw - new[None, :]
        e = tl.exp2(z * LOG2E)
        fade = tl.exp2(shift * LOG2E)
        sz = fade * (sz + shift * s) + tl.sum(tl.maximum(z, FLOOR_Z) * e, 0)
        s = fade * s + tl.sum(e, 0)
        if SOFT or SMOOTHING > 0:
            t, u = weights_of(target, weight, base_t, cols, keep, T, C, SMOOTHING, SOFT)
            uz += shift * u_sum + tl.sum(tl.where(keep, u * z, 0.0), 0)
            u_sum += tl.sum(u, 0)
            if SOFT:
                te = fade * te + tl.sum(t * e, 0)
                t = tl.where(keep, t, float("-inf"))
                new_t = tl.max(t, 0)
                at = tl.min(tl.where(t == new_t[None, :], cols, C), 0)
                first_t = tl.where(new_t > top_t, at, first_t)
                top_t = tl.maximum(new_t, top_t)
        if NEEDS_L1:
            l1 += tl.sum(tl.where(keep, tl.abs(raw), 0.0), 0)
        top = new
    row_top = tl.max(top, 0)
    shift = tl.maximum(top - row_top, FLOOR_Z)
    fade = tl.exp2(shift * LOG2E)
    first = tl.min(tl.where(top == row_top, first, C), 0)
    first_t = tl.min(tl.where(top_t == tl.max(top_t, 0), first_t, C), 0)
    sz = tl.sum(fade * (sz + shift * s), 0)
    uz = tl.sum(uz + shift * u_sum, 0)
    return row_top, tl.sum(fade * s, 0), sz, first, tl.sum(u_sum, 0), uz, tl.sum(fade * te, 0), first_t, tl.sum(l1, 0)


@triton.jit(do_not_specialize=["rows", "gamma", "temperature", "warming"])
def forward_kernel(
    logits,  # tuple of M+1 [rows, C] of row stride STRIDE, columns adjacent
    grads,  # tuple of M+1 [rows, C] contiguous, or None: nothing is written
    target,  # [rows] class indices or [rows, C] contiguous probabilities
    mask,  # [rows, M] contiguous bool, or None
    weight,  # [C] or None
    norm,  # [M+1, NORM_PARTS] what reduction "mean" divides gradients by, in parts; None: count here
    schedule,  # [3] gamma, temperature, warming on the device, or None: the numbers below
    row_loss,  # [M+1, rows] for reduction "none", else None
    work,  # [M+1, 6, programs]
    ticket,  # [1] int32, zero before and after
    loss,  # []
    packed,  # [16 M + 9]
    rows,
    gamma: tl.float64,
    temperature: tl.float64,
    warming,
    C: tl.constexpr,
    STRIDE: tl.constexpr,  # a constant like C: its divisors decide how wide loads may be
    BRANCHES: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    SOFT: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    REDUCTION: tl.constexpr,
    DEPENDENCE: tl.constexpr,
    RULE: tl.constexpr,
    GAIN: tl.constexpr,
    FLOOR: tl.constexpr,
    ONLINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    T: tl.constexpr = packed.dtype.element_ty
    USES_U: tl.constexpr = SOFT or SMOOTHING > 0
    NEEDS_L1: tl.constexpr = DEPENDENCE == "logit_l1"
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
            if norm is None:
                scale = scale / count_norm(
                    target, mask, weight, branch, 0, 1, rows, T, C, BRANCHES, IGNORE, SOFT, COUNT_BLOCK
                )
            else:
                part = tl.arange(0, triton.next_power_of_2(NORM_PARTS))
                parts = tl.load(norm + branch * NORM_PARTS + part, mask=part < NORM_PARTS, other=0.0)
                scale = scale / tl.sum(parts, 0)

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
                x, target, weight, base * STRIDE, base * C, row_valid, T, C, BLOCK, STEPS, SMOOTHING, SOFT, NEEDS_L1
            )
        else:
            cols = tl.arange(0, BLOCK)
            real = (cols < C)[None, :]
            keep = real & valid[:, None]
            # rows that are not valid are not read: zeros stand in, so that nothing of theirs becomes NaN
            filler = tl.where(valid, float("-inf"), 0.0)[:, None]
            raw = tl.load(x + (row * STRIDE)[:, None] + cols[None, :], mask=keep, other=filler).to(T)
            top = tl.max(raw, 1)
            z = raw - top[:, None]
            e = tl.exp2(z * LOG2E)
            s = tl.sum(e, 1)
            sz = tl.sum(tl.maximum(z, FLOOR_Z) * e, 1)
            first = tl.min(tl.where(z == 0, cols[None, :], C), 1)
            if USES_U:
                t, u = weights_of(target, weight, (row * C)[:, None], cols[None, :], keep, T, C, SMOOTHING, SOFT)
                u_sum = tl.sum(u, 1)
                uz = tl.sum(tl.where(keep, u * z, 0.0), 1)
                if SOFT:
                    te = tl.sum(t * e, 1)
                    t = tl.where(real, t, float("-inf"))
                    first_t = tl.min(tl.where(t == tl.max(t, 1)[:, None], cols[None, :], C), 1)
            if NEEDS_L1:
                l1 = tl.sum(tl.where(keep, tl.abs(raw), 0.0), 1)

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
                pull_row = tl.sum(pull, 0)
                push_row = tl.sum(push, 0)
                for start in range(0, C, BLOCK):
                    LANES: tl.constexpr = BLOCK // STEPS
                    cols = start + tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
                    keep = cols < C
                    read = keep & row_valid
                    raw = tl.load(x + base * STRIDE + cols, mask=read, other=0.0, eviction_policy="evict_first").to(T)
                    z = tl.where(row_valid, raw - top, 0.0)
                    d = tl.exp2(z * LOG2E) * pull_row
                    if USES_U:
                        _, u = weights_of(target, weight, base * C, cols, read, T, C, SMOOTHING, SOFT)
                        d -= u * push_row
                    tl.store(g + base * C + cols, d.to(G), mask=keep, eviction_policy="evict_first")
            else:
                d = e * pull[:, None]
                if USES_U:
                    d -= u * push[:, None]
                tl.store(g + (row * C)[:, None] + cols[None, :], d.to(G), mask=real & inside[:, None])
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

    # The last program to arrive sees the sums of all others: release before the ticket, acquire after it.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if arrived == programs * BRANCHES - 1:
        finish(work, loss, packed, programs, gamma_t, temperature_t, warming_t, BRANCHES, REDUCTION, RULE, GAIN, FLOOR)
        tl.store(ticket, 0)
