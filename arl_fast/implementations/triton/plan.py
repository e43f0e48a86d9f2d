"""How the Triton kernels are launched: a written-down rule, pure Python, instead of autotuning at the first call.

Nothing here depends on the number of rows except the size of the grid, so a batch of another size compiles nothing.
docs/performance.md has the reasons; benchmarks/static_report.py shows what each plan compiles to.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

THREADS = 128
PER_THREAD, PER_THREAD_F64 = 16, 4  # logits that a thread holds
LARGEST_ROW = 8192  # beyond, a row is streamed twice (the second time from L2) instead of kept in registers
LARGEST_ROW_F64 = 1024  # a float64 takes two registers
# Bounds for each thread, small ones that spill nothing, with one exception (tests/test_triton_static.py): for rows that up to four
# warps hold, for those that more hold, for streamed rows, for rows that need further sums, and for float64.
REGISTERS, REGISTERS_WIDE, REGISTERS_STREAMED, REGISTERS_HEAVY, REGISTERS_F64 = 96, 64, 80, 128, 255
REGISTER_FILE = 65536  # of a multiprocessor
# Gradients of a mean need the number of valid rows first. Up to here every program counts them itself: 64 KB of targets
# come from L1 for all but the first program of a multiprocessor, about 2 us, which is what waiting for others would cost.
COUNT_ALONE = 8192
COUNT_BLOCK = 1024  # rows of one step of counting
COUNT_CHUNKS = 256  # pieces that all programs together count more rows in
FLAT_BLOCK = 4096  # elements of a tile in the kernels that only multiply,
FLAT_THREADS = 256  # 16 for each thread


class Plan(NamedTuple):
    """How the forward kernel treats the rows of a class count: in tiles [steps, owners, lanes] of logits.

    Attributes:
        online: rows are streamed: a tile is a chunk of one row, an owner one of its threads, lanes are one load.
            Otherwise a tile holds whole rows in registers: an owner is a row, which steps and lanes cover.
        steps, owners, lanes: powers of two.
        threads: threads of a program.
        registers: upper bound for each thread, so that enough programs share a multiprocessor.
    """

    online: bool
    steps: int
    owners: int
    lanes: int
    threads: int
    registers: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 1 if self.online else self.owners


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def vector(classes: int, itemsize: int) -> int:
    """Logits of one load: up to 16 bytes, as far as every row begins at a multiple of it."""
    return min(16 // itemsize, classes & -classes)


def heavy(soft: bool, label_smoothing: float, dependence: str) -> bool:
    """Whether rows need further sums than those of the plain loss, and more registers for them."""
    return soft or label_smoothing > 0 or dependence == "logit_l1"


@functools.cache
def plan(classes: int, itemsize: int, heavy: bool) -> Plan:
    """The plan for rows of ``classes`` logits of ``itemsize`` bytes.

    Rows of up to 16 logits have a thread each; longer ones are shared by just enough threads to leave 16 logits to each:
    up to 512 classes nothing crosses a warp, beyond several warps share a row, and beyond LARGEST_ROW it is streamed.
    Where accesses are narrow, registers suffice for fewer: a quarter of a streamed row, half of a heavy row of 256 threads.
    """
    double = itemsize == 8
    aligned = vector(classes, itemsize)
    online = classes > (LARGEST_ROW_F64 if double else LARGEST_ROW)
    per_thread = PER_THREAD_F64 if double else PER_THREAD
    narrow = (
        aligned * itemsize < 16 and not double
    )  # accesses of less than 16 bytes, each with an address of its own
    if online:
        lanes, threads = aligned, 256
        steps, owners = (per_thread // 4 if narrow else per_thread) // lanes, threads
    else:
        block = power_of_two(classes)
        sharing = max(1, block // per_thread)
        if heavy and narrow and sharing == 256:
            sharing = 512
        threads = max(THREADS, sharing)
        lanes = min(block, sharing * aligned)
        steps, owners = block // lanes, threads // sharing
    registers = REGISTERS_STREAMED if online else REGISTERS_WIDE if threads > THREADS else REGISTERS
    if heavy:
        registers = REGISTERS_HEAVY
    if double:
        registers = REGISTERS_F64
    return Plan(online, steps, owners, lanes, threads, registers)


@functools.lru_cache(maxsize=1024)
def programs(rows: int, branches: int, plan: Plan, multiprocessors: int) -> int:
    """Programs per branch: one per tile until the device is full, then each takes several tiles in turn.

    A bound on the programs is a bound on the partial sums that the last of them adds up, and on counting (see below).
    """
    tiles = -(-rows // plan.rows)
    resident = -(-multiprocessors * (REGISTER_FILE // (plan.registers * plan.threads)) // branches)
    return max(1, min(tiles, resident))


def flat_programs(elements: int, tensors: int, multiprocessors: int) -> int:
    """Programs per tensor of the kernels that only multiply."""
    tiles = -(-elements // FLAT_BLOCK)
    return max(1, min(tiles, -(-multiprocessors * 4 // tensors)))


def workspace(branches: int, programs: int) -> int:
    """Elements of the workspace: six sums of each program, and the counts of each chunk of rows."""
    return branches * (6 * programs + COUNT_CHUNKS)
