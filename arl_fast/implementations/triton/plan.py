"""How the Triton kernels are launched: a rule in pure Python instead of autotuning at the first call.

Only the size of the grid depends on the number of rows, so a batch of another size compiles nothing.
docs/performance.md has the reasons; benchmarks/static_report.py shows what each plan compiles to.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..._core.options import Options
from ..._core.spec import SUMS

THREADS = 128
PER_THREAD, PER_THREAD_F64 = 16, 4  # logits that a thread holds
LARGEST_ROW = 8192  # longer rows are streamed twice (the second time from L2) instead of kept in registers
LARGEST_ROW_F64 = 1024  # a float64 takes two registers
# Upper bounds on the registers of a thread. They are small and spill nothing, with the exceptions that
# tests/test_triton_static.py names.
REGISTERS = 96  # rows that up to four warps hold
REGISTERS_WIDE = 64  # rows that more warps hold
REGISTERS_STREAMED = 80
REGISTERS_MORE_SUMS = 128  # rows that need more sums than the plain loss
REGISTERS_F64 = 255
REGISTER_FILE = 65536  # of a multiprocessor
REGISTERS_PAIRS = {4: 64, 8: 96}  # by the pairs of a row and a label that a thread holds
REGISTERS_PAIRS_F64 = 128
FLAT_BLOCK = 4096  # elements of a tile in the kernels that only multiply,
FLAT_THREADS = 256  # 16 for each thread
FLAT_RESIDENT = 4  # programs of a multiprocessor


class Counting(NamedTuple):
    """How the valid rows are counted, which the gradients of a mean need first.

    Attributes:
        shared_above: up to so many rows every program counts all of them itself. Their 64 KB of targets come
            from L1 for all but the first program of a multiprocessor, which takes about 2 us. Waiting for
            others would cost the same.
        block: rows of one step of counting.
        chunks: pieces of the rows where all programs share the counting.
    """

    shared_above: int = 8192
    block: int = 1024
    chunks: int = 256


COUNTING = Counting()


class Plan(NamedTuple):
    """How the forward kernel treats the rows of a class count: in tiles [steps, owners, lanes] of logits.

    Attributes:
        online: rows are streamed: a tile is a chunk of one row, an owner one of its threads, lanes are one
            load.
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


class PairPlan(NamedTuple):
    """How the kernel of task "multilabel" treats pairs of a row and a label: in tiles [threads, lanes].

    Attributes:
        threads: of a program.
        lanes: pairs of a thread, one load of its logits.
        registers: upper bound for each thread.
    """

    threads: int
    lanes: int
    registers: int

    @property
    def rows(self) -> int:
        """Pairs of a tile."""
        return self.threads * self.lanes


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def vector(classes: int, itemsize: int) -> int:
    """Logits of one load: up to 16 bytes, as far as every row begins at a multiple of it."""
    return min(16 // itemsize, classes & -classes)


def needs_more_sums(soft: bool, options: Options) -> bool:
    """Whether a row needs more sums than the plain loss does, and so more registers."""
    return soft or options.label_smoothing > 0 or options.dependence == "logit_l1"


@functools.cache
def plan(classes: int, itemsize: int, more_sums: bool) -> Plan:
    """The plan for rows of ``classes`` logits of ``itemsize`` bytes.

    Rows of up to 16 logits have a thread each. Longer ones are shared by just enough threads to leave 16
    logits to each: up to 512 classes nothing crosses a warp, beyond that several warps share a row, and
    beyond LARGEST_ROW it is streamed. Where accesses are narrow, registers suffice for fewer logits: a
    quarter of them in a streamed row, and half of them in a row of 256 threads that needs more sums.
    """
    double = itemsize == 8
    aligned = vector(classes, itemsize)
    online = classes > (LARGEST_ROW_F64 if double else LARGEST_ROW)
    per_thread = PER_THREAD_F64 if double else PER_THREAD
    # each access of less than 16 bytes has an address of its own
    narrow = aligned * itemsize < 16 and not double
    if online:
        lanes, threads = aligned, 256
        steps, owners = (per_thread // 4 if narrow else per_thread) // lanes, threads
    else:
        block = power_of_two(classes)
        sharing = max(1, block // per_thread)
        if more_sums and narrow and sharing == 256:
            sharing = 512
        threads = max(THREADS, sharing)
        lanes = min(block, sharing * aligned)
        steps, owners = block // lanes, threads // sharing
    registers = REGISTERS_STREAMED if online else REGISTERS_WIDE if threads > THREADS else REGISTERS
    if more_sums:
        registers = REGISTERS_MORE_SUMS
    if double:
        registers = REGISTERS_F64
    return Plan(online, steps, owners, lanes, threads, registers)


def pair_plan(itemsize: int, grad_itemsize: int, more: bool) -> PairPlan:
    """The plan for logits and gradients of so many bytes: accesses of 16 bytes for the wider of them.

    Args:
        more: the row or the label of a pair matters, or the loss of each pair is wanted. Registers suffice
            for four pairs then, and 16-bit logits come in loads of 8 bytes.
    """
    lanes = 16 // max(itemsize, grad_itemsize)
    if itemsize == 8:
        return PairPlan(THREADS, lanes, REGISTERS_F64 if more else REGISTERS_PAIRS_F64)
    if more:
        return PairPlan(THREADS, 4, REGISTERS_MORE_SUMS)
    return PairPlan(THREADS, lanes, REGISTERS_PAIRS[lanes])


def resident_programs(plan: Plan | PairPlan, multiprocessors: int) -> int:
    """Programs that the device holds at a time, as far as registers decide."""
    return multiprocessors * (REGISTER_FILE // (plan.registers * plan.threads))


@functools.lru_cache(maxsize=1024)
def programs(rows: int, branches: int, plan: Plan | PairPlan, multiprocessors: int) -> int:
    """Programs per branch: one per tile until the device is full, then each takes several tiles in turn.

    All programs run at once: those of a second wave would take as long again. This bounds the partial sums
    that the last program adds up, and the work of counting (see Counting).
    """
    tiles = -(-rows // plan.rows)
    return max(1, min(tiles, resident_programs(plan, multiprocessors) // branches))


def flat_programs(elements: int, tensors: int, multiprocessors: int) -> int:
    """Programs per tensor of the kernels that only multiply."""
    tiles = -(-elements // FLAT_BLOCK)
    return max(1, min(tiles, multiprocessors * FLAT_RESIDENT // tensors))


def workspace(branches: int, programs: int) -> int:
    """Elements of the workspace: the sums of each program, and the counts of each chunk of rows."""
    return branches * (len(SUMS) * programs + COUNTING.chunks)
