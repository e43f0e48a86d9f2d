"""Kernels of the backward passes: each tensor times a number, in one launch with grid (programs, tensors)."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import select


@triton.jit
def multiply_tile(
    source, result, index, factor, upstream, size, PER_ROW: tl.constexpr, C: tl.constexpr, keep
):
    """result = source * factor (* upstream of the row), computed in the factor's dtype and rounded once."""
    if keep is None:
        value = tl.load(source + index).to(factor.dtype)
    else:
        value = tl.load(source + index, mask=keep, other=0.0).to(factor.dtype)
    if PER_ROW:
        if keep is None:
            row = tl.load(upstream + index // C)
        else:
            row = tl.load(upstream + index // C, mask=keep, other=0.0)
        value = value * (row * factor)
    else:
        value = value * factor
    if keep is None:
        tl.store(result + index, value.to(result.dtype.element_ty))
    else:
        tl.store(result + index, value.to(result.dtype.element_ty), mask=keep)


@triton.jit
def multiply(
    source, result, factor, upstream, size, PER_ROW: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Tiles in turn. Only the last is masked: a mask of unknown size would make every access narrow."""
    size = size + tl.zeros((), tl.int64)
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), tl.cdiv(size, BLOCK), programs):
        start = tile * BLOCK
        index = start + tl.arange(0, BLOCK)
        if start + BLOCK <= size:
            multiply_tile(source, result, index, factor, upstream, size, PER_ROW, C, None)
        else:
            multiply_tile(source, result, index, factor, upstream, size, PER_ROW, C, index < size)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    sources,  # tuple of M+1 gradients, contiguous
    results,  # tuple of M+1, the same tensors if IN_PLACE
    upstream,  # [] or [rows]
    factor,  # [M+1] or None
    size,
    C: tl.constexpr,  # elements of a row; 1 unless PER_ROW, so that another class count compiles nothing
    BRANCHES: tl.constexpr,
    PER_ROW: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the logits times the upstream gradient and the branch's factor."""
    branch = tl.program_id(1)
    source, result = select(sources, branch, BRANCHES), select(results, branch, BRANCHES)
    value = tl.full((), 1.0, upstream.dtype.element_ty)
    if factor is not None:
        value = tl.load(factor + branch)
    if not PER_ROW:
        value = value * tl.load(upstream)
    if IN_PLACE and not PER_ROW:
        if value != 1:  # loss.backward(): nothing to do and nothing is read
            multiply(source, result, value, upstream, size, PER_ROW, C, BLOCK)
    else:
        multiply(source, result, value, upstream, size, PER_ROW, C, BLOCK)


@triton.jit
def modulate_kernel(
    sources,  # tuple of gradients of features, contiguous
    results,
    sizes,  # tuple of 2 n + 1, n their numbers of elements: odd, or Triton would specialise on divisors of n
    link,  # [M]
    MODALITIES: tl.constexpr,  # tuple: which entry of the link belongs to each
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_m * (1 + link_m) with link_m = gain_m - 1 (Eq. 19), computed in the link's dtype and rounded once."""
    i = tl.program_id(1)
    source, result = select(sources, i, TENSORS), select(results, i, TENSORS)
    size, at = select(sizes, i, TENSORS) // 2, select(MODALITIES, i, TENSORS)
    multiply(source, result, 1 + tl.load(link + at), link, size, False, 1, BLOCK)
