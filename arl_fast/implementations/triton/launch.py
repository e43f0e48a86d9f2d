"""From tensors to a running Triton kernel: launches without Triton's own look-up, and the memory that kernels share."""

from __future__ import annotations

import contextlib
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


# What Triton specialises a kernel on, apart from constants: of a tensor the dtype and whether it begins at a multiple of
# 16 bytes, of a number whether it fits 32 bits. The kernels exempt their numbers from everything else.
Kind = Any


def kind(x: Tensor | None) -> Kind:
    return None if x is None else (x.dtype, x.data_ptr() % 16 == 0)


def kinds(tensors: Sequence[Tensor]) -> Kind:
    """Of tensors of one dtype."""
    return (tensors[0].dtype, *[x.data_ptr() % 16 == 0 for x in tensors])


class Launcher:
    """A kernel, and its compiled variants by what they depend on.

    Triton finds the variant by looking at every argument, constants included, which takes most of a launch's host time
    (docs/performance.md); the callers here know what can change.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.variants: dict[Any, Any] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        registers: int | None,
        depends: tuple[Kind, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Run the kernel on the device's current stream.

        Args:
            depends: the ``kind`` of every argument that is not sure to be of the same kind whenever the constants and the
                other entries are equal.
            arguments, constants: the kernel's parameters in order, the constexprs last.
        """
        key = (device.index, threads, registers, depends, constants)
        variant = self.variants.get(key)
        with _on(device):
            if variant is not None:
                variant[grid](*arguments, *constants)
            else:
                variant = self.kernel[grid](*arguments, *constants, **launch_options(threads, registers))
                if variant is not None:  # as from the interpreter
                    self.variants[key] = variant


_nothing = contextlib.nullcontext()


def _on(device: torch.device) -> Any:
    """Make the tensors' device the current one; costs nothing where it is."""
    if device.type == "cpu" or current_device() == device.index:
        return _nothing
    return torch.cuda.device(device)


class Workspace(NamedTuple):
    """Memory of a launch: counters, by which programs find out who is last and which rows are still to be counted, and
    partial sums. Each launch leaves the counters at zero."""

    state: Tensor  # int32 [3]
    work: Tensor  # of the compute dtype


class Workspaces:
    """One per device, stream and dtype, zeroed on that stream when it is first used: a stream runs one launch after the other.

    A launch that is being captured gets one of its own, zeroed in the graph, since a graph may be replayed on any
    stream, beside others. So nothing waits, and nothing that outlives a capture is allocated in it.
    """

    def __init__(self) -> None:
        self.streams: dict[tuple[int, int, torch.dtype], Workspace] = {}

    def take(self, device: torch.device, dtype: torch.dtype, size: int) -> Workspace:
        if device.type == "cpu":
            return _new_workspace(device, dtype, size)
        with _on(device):  # whose current stream it is that may be capturing
            if torch.cuda.is_current_stream_capturing():
                return _new_workspace(device, dtype, size)
        key = (device.index, current_stream(device.index), dtype)
        workspace = self.streams.get(key)
        if workspace is None or workspace.work.shape[0] < size:
            workspace = self.streams[key] = _new_workspace(device, dtype, size)
        return workspace


def _new_workspace(device: torch.device, dtype: torch.dtype, size: int) -> Workspace:
    return Workspace(
        torch.zeros(3, dtype=torch.int32, device=device), torch.empty(size, dtype=dtype, device=device)
    )


workspaces = Workspaces()
