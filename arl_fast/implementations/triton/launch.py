"""From tensors to a running kernel: launches without Triton's own look-up, and the kernels' workspace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._core._torch import current_device, current_stream
from .forward import forward_kernel

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)


@functools.cache
def multiprocessors(index: int) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def launch_options(threads: int, registers: int | None) -> dict[str, int]:
    if INTERPRETED:
        return {}
    if torch.version.hip is not None:
        return {"num_warps": threads // triton.runtime.driver.active.get_current_target().warp_size}
    return {"num_warps": threads // 32} | ({} if registers is None else {"maxnreg": registers})


# What Triton specialises a kernel on, apart from constants: of a tensor the dtype and whether it begins at a
# multiple of 16 bytes, of a number whether it fits 32 bits. The kernels exempt their numbers from everything
# else.
# On AMD's GPUs also on whether a tensor's memory is smaller than 2 GB.
Kind = Any
ROCM = torch.version.hip is not None


def kind(x: Tensor | None) -> Kind:
    return None if x is None else (x.dtype, _place(x))


def kinds(tensors: Sequence[Tensor]) -> Kind:
    """Of tensors of one dtype."""
    return (tensors[0].dtype, *[_place(x) for x in tensors])


def _place(x: Tensor) -> Any:
    aligned = x.data_ptr() % 16 == 0
    return (aligned, x.untyped_storage().size() < 2**31) if ROCM else aligned


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """What a launch fixes when the kernel is compiled.

    It is compared and hashed by identity, which costs nothing. So build it once for each set of values
    (functools.cache).

    Attributes:
        threads: threads of a program.
        registers: upper bound for each thread, or None.
        constants: the kernel's constexprs in order.
    """

    threads: int
    registers: int | None
    constants: tuple[Any, ...]


class Launcher:
    """A kernel, and its compiled variants by what they depend on.

    Triton finds the variant by looking at every argument, constants included, which takes most of a launch's
    host time (docs/performance.md). The callers here know what can change.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.variants: dict[Any, Any] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        configuration: Configuration,
        depends: tuple[Kind, ...],
        arguments: tuple[Any, ...],
    ) -> None:
        """Run the kernel on the device's current stream.

        Args:
            depends: the ``kind`` of every argument that is not sure to be of the same kind whenever the
                configuration and the other entries are equal.
            arguments: the kernel's parameters in order, up to the constexprs.
        """
        key = (device.index, configuration, depends)
        constants = configuration.constants
        variant = self.variants.get(key)
        with _on(device):
            if variant is not None:
                variant[grid](*arguments, *constants)
            else:
                options = launch_options(configuration.threads, configuration.registers)
                variant = self.kernel[grid](*arguments, *constants, **options)
                if variant is not None:  # as from the interpreter
                    self.variants[key] = variant


_nothing = contextlib.nullcontext()


def _on(device: torch.device) -> Any:
    """Make the tensors' device the current one; costs nothing where it is."""
    if device.type == "cpu" or current_device() == device.index:
        return _nothing
    return torch.cuda.device(device)


class Workspace(NamedTuple):
    """Memory of a launch. Each launch leaves the counters at zero."""

    work: Tensor  # partial sums and counts of rows, of the compute dtype
    counters: (
        Tensor  # int32 [3], by which programs find out who is last and which rows are still to be counted
    )


class Workspaces:
    """One for each device, stream and dtype, zeroed on that stream when it is first used.

    A stream runs one launch after the other, so they can share it. A launch that is being captured gets one
    of its own, zeroed in the graph, since a graph may be replayed on any stream, beside others. So no launch
    waits for another, and nothing that outlives a capture is allocated in it.
    """

    def __init__(self) -> None:
        self.streams: dict[tuple[int, int, torch.dtype], Workspace] = {}

    def take(self, device: torch.device, dtype: torch.dtype, size: int) -> Workspace:
        if device.type == "cpu":
            return new_workspace(device, dtype, size)
        with _on(device):  # the capture query asks the current device's stream
            if torch.cuda.is_current_stream_capturing():
                return new_workspace(device, dtype, size)
        key = (device.index, current_stream(device.index), dtype)
        workspace = self.streams.get(key)
        if workspace is None or workspace.work.shape[0] < size:
            workspace = self.streams[key] = new_workspace(device, dtype, size)
        return workspace


def new_workspace(device: torch.device, dtype: torch.dtype, size: int) -> Workspace:
    return Workspace(
        torch.empty(size, dtype=dtype, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    )


workspaces = Workspaces()
