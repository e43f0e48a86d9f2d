"""How the Triton kernels are launched: a written-down rule, pure Python, instead of autotuning at the first call.

Nothing here depends on the number of rows except the size of the grid, so a batch of another size compiles nothing.
docs/performance.md has the reasons; benchmarks/static_report.py shows what each plan compiles to.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

TILE = 2048  # logits of one tile while several rows share it: 16 for each thread of 4 warps
LARGEST_ROW = 8192  # beyond, a row is streamed twice (the second time from L2) instead of kept in registers
LARGEST_ROW_F64 = 2048  # a float64 takes two registers
WARPS_PER_SM = 32  # programs stay resident and take rows in turns: enough loads in flight, few partial sums
COUNT_IN_PLACE = 8192  # up to here every program counts the targets itself (they sit in L1); beyond, one more launch
COUNT_BLOCK = 1024
COUNT_PROGRAMS = 64
FLAT_BLOCK = 4096  # elements of a tile in the kernels that only multiply


class Plan(NamedTuple):
    """How the forward kernel treats the rows of a class count.

    Attributes:
        online: whether rows are streamed in chunks (True) or kept in registers (False).
        rows: rows of a tile (1 if online).
        block: columns of a tile; a power of two, at least the number of classes unless online.
        steps: consecutive vectors of a thread that one step of the online loop joins (1 if not online).
        warps: warps of 32 threads per program.
    """

    online: bool
    rows: int
    block: int
    steps: int
    warps: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def plan(classes: int, itemsize: int) -> Plan:
    """The plan for rows of ``classes`` logits of ``itemsize`` bytes.

    Up to TILE columns several rows share a program; up to LARGEST_ROW one row fills it, with at most 32 logits for each
    thread. Longer rows are streamed: 8 warps, 16 bytes per thread and load, 32 logits per thread and step.
    """
    if classes > (LARGEST_ROW_F64 if itemsize == 8 else LARGEST_ROW):
        vector = 16 // itemsize
        width = 8 * 32 * vector
        steps = (16 if itemsize == 8 else 32) // vector
        return Plan(True, 1, width * steps, steps, 8)
    block = power_of_two(classes)
    return Plan(False, max(1, TILE // block), block, 1, 8 if block == LARGEST_ROW else 4)


@functools.lru_cache(maxsize=1024)
def programs(rows: int, branches: int, plan: Plan, multiprocessors: int) -> int:
    """Programs per branch: one per tile until the device is full, then each takes several tiles in turn."""
    tiles = -(-rows // plan.rows)
    resident = -(-multiprocessors * (WARPS_PER_SM // plan.warps) // branches)
    return max(1, min(tiles, resident))


def counting_programs(rows: int) -> int:
    """Programs of the launch that counts valid rows beforehand; 0: the forward kernel counts them itself."""
    if rows <= COUNT_IN_PLACE:
        return 0
    return min(COUNT_PROGRAMS, -(-rows // COUNT_BLOCK))


def flat_programs(elements: int, tensors: int, multiprocessors: int) -> int:
    """Programs per tensor of the kernels that only multiply."""
    tiles = -(-elements // FLAT_BLOCK)
    return max(1, min(tiles, -(-multiprocessors * (WARPS_PER_SM // 4) // tensors)))
