"""What ARL adds to a whole training step: ``python -m benchmarks.step --device cuda --rows FILE``.

One set of encoders and one input per model. The ways of training differ only in head, loss and gain: plain
joint cross-entropy; the release's way; arl_fast. Each has its own copy of the parameters and its SGD. Their
steps take turns, a few at a time, in an order that is rotated; the overhead is the median over the turns of
the ratio to the joint step of the same turn. On a GPU the clock stops after the device has finished the
turn's steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import arl_fast

from . import machine, models, rows
from .cases import GAMMA
from .contenders import release

CLASSES = 6
WAYS = ("joint CE", "release", "arl_fast")


class _Gain(torch.autograd.Function):
    """Identity that multiplies the gradient by 1 + coefficient, a number the host knows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g + g * ctx.coefficient, None


def training_step(
    way: str, encoders: nn.Module, inputs: list[Tensor], target: Tensor, size: int
) -> Callable[[], None]:
    """One step of training, as a callable: forward, backward, SGD with momentum."""
    encoders = copy.deepcopy(encoders)
    device = target.device
    head: nn.Module
    if way == "arl_fast":
        head = arl_fast.ConcatHead([size, size], CLASSES).to(device)
        criterion = arl_fast.ARLLoss(gamma=GAMMA)

        def loss() -> Tensor:
            return criterion(head(encoders(inputs)), target)

    else:
        head = nn.Linear(2 * size, CLASSES).to(device)
        coefficients = [0.5, 0.5]  # of the step before: the release assigns them after the forward pass

        def loss() -> Tensor:
            z = encoders(inputs)
            if way == "joint CE":
                return F.cross_entropy(head(torch.cat(z, 1)), target)
            a, v = (_Gain.apply(x, c) for x, c in zip(z, coefficients, strict=True))
            logits = [
                head(torch.cat(pair, 1))
                for pair in ((a, v), (a, torch.zeros_like(v)), (torch.zeros_like(a), v))
            ]
            total, stats = release(logits, target, torch.empty(0))
            coefficients[:] = stats["coefficients"].tolist()
            return total

    optimizer = torch.optim.SGD([*encoders.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def measure(
    model: str,
    encoders: nn.Module,
    inputs: list[Tensor],
    size: int,
    device: str,
    seconds: float,
    threads: int,
) -> list[rows.Row]:
    """Time the three ways in turns for about ``seconds``; one row each, with ``added_percent`` over the joint
    step.
    """
    batch = inputs[0].shape[0]
    target = torch.randint(0, CLASSES, (batch,), device=device)
    steps = {way: training_step(way, encoders, inputs, target, size) for way in WAYS}

    clock = machine.timer(device, threads)

    def turn(step: Callable[[], None], times: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        for _ in range(times):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - begin) / times

    for step in steps.values():
        turn(step, 3)
    once = turn(steps["joint CE"], 3)
    times = max(1, min(10, round(0.02 / once)))
    turns = max(5, round(seconds / (len(WAYS) * times * once)))
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(turns):
        shift = i % len(WAYS)
        for way in WAYS[shift:] + WAYS[:shift]:
            samples[way].append(turn(steps[way], times))
    common = machine.describe(device) | dict(
        experiment="step", suite=model, batch=batch, classes=CLASSES, modalities=2
    )
    common |= dict(
        dtype="float32",
        threads=threads if device == "cpu" else None,
        what="step",
        cache="warm",
        clock=clock.__name__,
    )
    out = []
    for way, mine in samples.items():
        added = [100 * (a / b - 1) for a, b in zip(mine, samples["joint CE"], strict=True)]
        q1, median, q3 = statistics.quantiles(added, n=4, method="inclusive")
        percent = {"median": round(median, 2), "q1": round(q1, 2), "q3": round(q3, 2)}
        out.append(common | {"contender": way, "host_us": rows.summary(mine), "added_percent": percent})
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="per model")
    parser.add_argument("--rows", help="file to append rows to")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda":  # as one would train; the same for every way
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        if options.tiny:
            found = {
                "resnet18 (tiny)": models.resnets(2, device, small=True),
                "mlp (tiny)": models.mlps(4, device, 16),
            }
        else:
            found = {"mlp": models.mlps(64, device)}
            if device == "cuda":
                found["resnet18"] = models.resnets(64, device)
        machine.warm_up(device, 0.01 if options.tiny else 0.5)
        for model, (encoders, inputs, size) in found.items():
            measured = measure(model, encoders, inputs, size, device, options.seconds, options.threads)
            for row in measured:
                percent = row["added_percent"]
                print(
                    f"{model:10} {row['contender']:10} adds {percent['median']:+.1f} % "
                    f"[{percent['q1']:+.1f}, {percent['q3']:+.1f}]"
                )
            if options.rows:
                rows.append(options.rows, measured)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
