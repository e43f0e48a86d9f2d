"""Host time of the Triton launches, on any machine: the kernels are compiled for sm_90, and a driver that
does nothing runs them.

    python -m benchmarks.triton_host

What is left out is what the driver itself takes for a launch, the same for all ways compared here. Medians of
the process's CPU time relative to ``F.cross_entropy(x, y).backward()`` on one CPU thread of the same process:
B = 64, C = 6, M = 2.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule
from arl_fast.implementations.triton import host as implementation
from arl_fast.implementations.triton.launch import Configuration, launch_options

from .linear import timed

OPTIONS, SCHEDULE = Options(), Schedule(1.0, 8.0)


class Driver:
    """As much of Triton's interface to a GPU as compiling and launching ask for."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 1, 2, 64, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def medians(calls: dict[str, Callable[[], Any]], rounds: int, loops: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call, loops, "cpu"))
    return {name: statistics.median(found) for name, found in samples.items()}


def recorded(name: str, step: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """The implementation's launcher of this name, and what ``step`` calls it with."""
    launcher, seen = getattr(implementation, name), []

    def recording(*arguments: Any) -> None:
        seen.append(arguments)
        launcher(*arguments)

    setattr(implementation, name, recording)
    step()
    setattr(implementation, name, launcher)
    return launcher, seen[0]


def own_launch(
    kernel: Any, device: Any, grid: Any, configuration: Configuration, depends: Any, arguments: Any
) -> Callable[[], Any]:
    """The same launch as Triton's users write it."""
    options, constants = (
        launch_options(configuration.threads, configuration.registers),
        configuration.constants,
    )
    return lambda: kernel[grid](*arguments, *constants, **options)


def main(rounds: int = 60, loops: int = 100) -> dict[str, float]:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    implementation.multiprocessors = lambda index: 132  # type: ignore[assignment]
    workspace = implementation.workspaces.take(torch.device("cpu"), torch.float32, 1 << 16)
    implementation.workspaces.take = lambda *_: workspace  # type: ignore[method-assign]  # kept, as on a GPU
    logits, target = [torch.randn(64, 6) for _ in range(3)], torch.randint(6, (64,))
    features, link, one = [torch.randn(64, 512) for _ in range(2)], torch.zeros(2), torch.ones(())
    leaf = torch.randn(64, 6, requires_grad=True)

    steps = {
        "forward": lambda: implementation._launch_forward(logits, Targets(target), SCHEDULE, OPTIONS, True),
        "scale": lambda: implementation.scale(logits, one, None, torch.float32, False),
        "modulate": lambda: implementation.modulate_backward(features, link),
    }

    def unit() -> None:
        F.cross_entropy(leaf, target).backward()
        leaf.grad = None

    calls: dict[str, Callable[[], Any]] = {"torch CE": unit}
    for name, step in steps.items():
        launcher, arguments = recorded(f"run_{name}", step)
        calls[f"{name}: launch, Triton's look-up"] = own_launch(launcher.kernel, *arguments)
        calls[f"{name}: launch"] = functools.partial(launcher, *arguments)
        calls[f"{name}: all of it"] = step
    for call in calls.values():
        for _ in range(20):
            call()
    found = medians(calls, rounds, loops)
    ratios = {name: seconds / found["torch CE"] for name, seconds in found.items()}
    print(
        f"Triton {triton.__version__}, torch {torch.__version__}; "
        f"over one torch CE ({found['torch CE'] * 1e6:.0f} us of CPU time)"
    )
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    return ratios


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    main()
