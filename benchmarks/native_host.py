"""Host time of the native CUDA step, on any machine: its autograd node, over launchers that do nothing.

    python -m benchmarks.native_host

The node of ``csrc/eager`` and the binding in ``csrc/cuda_ops.cpp`` serve tensors of the CPU here, so that
allocations cost what they cost there. What a launch itself takes in the driver is left out: a step with M+1
branches has two of them, one cross-entropy four (log-softmax, NLL, and the backwards of both). The CPU
kernels' own steps stand beside. Medians of the process's CPU time, taking turns, relative to one
``F.cross_entropy`` with its backward: B = 64, C = 6, M = 2.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.cpp_extension import load

from arl_fast import ARLLoss, BranchLogits, modulate
from arl_fast._core.branches import Targets
from arl_fast._core.options import Options, Schedule
from arl_fast.implementations import dispatch, native, ops

from .contenders import wired
from .linear import timed

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "csrc/cuda_ops.cpp",
    "csrc/eager/inputs.cpp",
    "csrc/eager/loss.cpp",
    "csrc/eager/modulate.cpp",
    "benchmarks/stub_launchers.cpp",
    "tests/emulation/binding.cpp",
)


def stubbed() -> Any:
    """The native step as a module for CPU tensors, whose launchers return at once."""
    flags = ["-O3", "-DARL_FAST_CUDA_ON_CPU", "-fvisibility=hidden", "-w"]
    return load("arl_native_host", [str(ROOT / name) for name in SOURCES], extra_cflags=flags)


def medians(calls: dict[str, Callable[[], Any]], rounds: int, loops: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call, loops, "cpu"))
    return {name: statistics.median(found) for name, found in samples.items()}


def general_path(module: Any) -> Any:
    """The same launchers as an implementation of the contract, under the Python autograd Function."""

    def modulate_backward(grads: Any, link: Any) -> Any:
        return ops.for_present(grads, lambda given, m: module.cuda_modulate_backward(given, m, link))

    return SimpleNamespace(
        forward=module.cuda_forward, scale=module.cuda_scale, modulate_backward=modulate_backward
    )


def main(rounds: int = 60, loops: int = 100) -> dict[str, float]:
    """Print the table, and return the ratios."""
    torch.set_num_threads(1)
    module = stubbed()
    node = SimpleNamespace(
        fast_loss=module.fast_loss,
        fast_criterion=module.fast_criterion,
        fast_modulate=module.fast_modulate,
        fast_linear_loss=lambda *_: None,
    )
    general = general_path(module)
    leaf, target = torch.randn(64, 6, requires_grad=True), torch.randint(6, (64,))
    logits = [torch.randn(64, 6, requires_grad=True) for _ in range(3)]
    link = torch.zeros(2, requires_grad=True)
    branches = BranchLogits(logits[0], logits[1:], link)
    features = [torch.randn(64, 32, requires_grad=True) * 1 for _ in range(2)]
    criterion, warming = wired(), wired(warmup=10**9)
    one, gradients = torch.ones(()), [torch.randn(64, 32) for _ in range(2)]
    options, schedule, targets = Options(), Schedule(1.0, 8.0), Targets(target)

    def unit() -> None:
        torch.autograd.grad(F.cross_entropy(leaf, target), leaf, one)

    def step(loss: ARLLoss, steps: Any, override: Any) -> Callable[[], None]:
        def run() -> None:
            dispatch.native_steps, dispatch.override = (lambda: steps), override
            torch.autograd.grad(loss(branches, target), [*logits, link], one)

        return run

    def links(steps: Any, override: Any) -> Callable[[], None]:
        def run() -> None:
            dispatch.native_steps, dispatch.override = (lambda: steps), override
            marked, zero = modulate(features)
            torch.autograd.grad([*marked, zero], features, [*gradients, zero.detach()])

        return run

    calls: dict[str, Callable[[], Any]] = {
        "F.cross_entropy, forward and backward": unit,
        "F.cross_entropy, forward": lambda: F.cross_entropy(leaf, target),
        "ARL step, C++ node": step(criterion, node, "native"),
        "ARL step, C++ node, warm-up counted on the device": step(warming, node, "native"),
        "ARL step, Python autograd Function": step(criterion, None, general),
        "forward alone, with all checks and the node": lambda: module.fast_loss(
            options, branches, targets, schedule
        ),
        "forward alone, without": lambda: module.cuda_forward(logits, targets, schedule, options, True),
        "modulate, C++ node": links(node, "native"),
        "modulate, Python autograd Function": links(None, general),
    }
    if native.unavailable("cpu") is None:
        calls |= {
            "CPU: ARL step, C++ node": step(criterion, native, "native"),
            "CPU: ARL step, Python autograd Function": step(criterion, None, "native"),
            "CPU: forward alone, with all checks and the node": lambda: native.fast_loss(
                options, branches, targets, schedule
            ),
            "CPU: forward alone, without": lambda: native._C.forward(
                logits, targets, schedule, options, True
            ),
            "CPU: forward alone, registered op": lambda: ops.forward(
                "native", logits, targets, schedule, options, True
            ),
        }
    for call in calls.values():
        for _ in range(20):
            call()
    found = medians(calls, rounds, loops)
    reference = found["F.cross_entropy, forward and backward"]
    ratios = {name: seconds / reference for name, seconds in found.items()}
    print(f"torch {torch.__version__}; over one torch CE ({reference * 1e6:.0f} us of CPU time)")
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    return ratios


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    main()
