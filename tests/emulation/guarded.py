"""Tensors that end right before, or start right after, memory that nobody may touch: an access out of range
is a crash.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _READ, _WRITE = 0, 1, 2
_NORESERVE = 0x4000


def _map(size: int) -> int:
    address = _libc.mmap(
        None, size, _READ | _WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0
    )
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(size)
    return address


def _view(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel()
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    bytes_ = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(bytes_, dtype=dtype).view(shape)


def empty(shape: Sequence[int], dtype: torch.dtype, at_start: bool = False) -> Tensor:
    """Uninitialised as far as it can be: NaN, or all ones. Never unmapped: tests are short."""
    size = max(1, torch.Size(shape).numel() * dtype.itemsize)
    page = mmap.PAGESIZE
    pages = -(-size // page) * page
    address = _map(pages + 2 * page)
    _libc.mprotect(address, page, _NONE)
    _libc.mprotect(address + page + pages, page, _NONE)
    x = _view(address + page if at_start else address + page + pages - size, shape, dtype)
    if x.numel():
        x.fill_(torch.nan if dtype.is_floating_point else 255 if dtype == torch.uint8 else 1)
    return x


def copy(x: Tensor, at_start: bool = False) -> Tensor:
    return empty(x.shape, x.dtype, at_start).copy_(x)


def read_only(x: Tensor) -> Tensor:
    """A copy that cannot be written to."""
    size = -(-x.numel() * x.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    address = _map(size)
    y = _view(address, x.shape, x.dtype).copy_(x)
    _libc.mprotect(address, size, _READ)
    return y


def far_apart(x: Tensor, stride: int) -> Tensor:
    """A copy of [N, C] whose rows are ``stride`` elements apart, in memory that is mapped but mostly never
    touched.
    """
    elements = (x.shape[0] - 1) * stride + x.shape[1]
    whole = _view(_map(elements * x.itemsize), (elements,), x.dtype)
    return whole.as_strided(x.shape, (stride, 1)).copy_(x)


def at_bit(x: Tensor, bit: int, value: bool) -> Tensor:
    """A copy, one element past 16-byte alignment, whose address in elements has this bit set or not."""
    step = x.itemsize << bit
    address = _map(2 * step + x.numel() * x.itemsize + mmap.PAGESIZE)
    while (address >> bit) // x.itemsize % 2 != value or address % 16 != x.itemsize % 16:
        address += step - address % step if (address >> bit) // x.itemsize % 2 != value else x.itemsize
    return _view(address, x.shape, x.dtype).copy_(x)
