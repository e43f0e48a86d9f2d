"""One adapter for TensorBoard, W&B, MLflow, Aim, Accelerate and Fabric. Imports none of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..history import History

Write = Callable[[dict[str, float], int], None]


def read(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one copy from the device for all of them."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)) if metrics else {}


def held_out(history: History, prefix: str = "arl/held_out/") -> dict[str, float]:
    """The history's last held-out means as "arl/held_out/accuracy/audio", ...; empty if there are none."""
    rows = history.rows("held_out")
    kept = [name for name in rows if name.startswith(("loss/", "accuracy/", "entropy/"))]
    return {prefix + name: float(rows[name][-1]) for name in kept} if len(rows["step"]) else {}


def writer(target: Any) -> Write:
    """How to give numbers and a step to ``target``, which has one of these methods, tried in this order.

    ``add_scalar(name, value, step)`` (TensorBoard's SummaryWriter) · ``log_metrics(dict, step=)`` (the mlflow
    module, Lightning's loggers) · ``track(value, name=, step=)`` (Aim's Run) · ``log_dict(dict, step=)``
    (Fabric) · ``log(dict, step=)`` (a W&B run, Accelerate) · ``log(dict)``, to which the step is given as
    "step".

    Raises:
        TypeError: the target has none of these.
    """
    if hasattr(target, "add_scalar"):
        return _one_by_one(lambda name, value, step: target.add_scalar(name, value, step))
    if hasattr(target, "log_metrics"):
        return lambda values, step: target.log_metrics(values, step=step)
    if hasattr(target, "track"):
        return _one_by_one(lambda name, value, step: target.track(value, name=name, step=step))
    if hasattr(target, "log_dict"):
        return lambda values, step: target.log_dict(values, step=step)
    if hasattr(target, "log"):
        parameters = inspect.signature(target.log).parameters.values()
        if any(p.name == "step" or p.kind is p.VAR_KEYWORD for p in parameters):
            return lambda values, step: target.log(values, step=step)
        return lambda values, step: target.log({**values, "step": step})
    raise TypeError(
        f"target: got {type(target).__name__}, expected an object with one of the methods add_scalar, "
        "log_metrics, track, log_dict, log"
    )


def _one_by_one(write: Callable[[str, float, int], Any]) -> Write:
    def write_all(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            write(name, value, step)

    return write_all


class StatsLogger:
    """Writes a criterion's statistics to a logger every so many steps, and reads the device only then.

        stats_logger = StatsLogger(SummaryWriter("runs/1"), criterion, every=50)
        for batch in loader:
            ...
            stats_logger.step()

    Args:
        target: TensorBoard's SummaryWriter, a W&B run, the mlflow module, an Aim run, ...: see ``writer``.
        criterion: an ``ARLLoss``.
        every: number of steps from one record to the next.
        prefix: of all names, "arl/gain/audio".
    """

    def __init__(self, target: Any, criterion: Any, every: int = 50, prefix: str = "arl/") -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, expected a whole number of steps >= 1")
        self.write = writer(target)
        self.criterion = criterion
        self.every = every
        self.prefix = prefix
        self.steps = 0

    def step(self) -> None:
        """Count a step; every ``every``-th is written, under its number."""
        self.steps += 1
        if self.steps % self.every == 0 and (values := read(self.criterion.metrics(self.prefix))):
            self.write(values, self.steps)

    def epoch(self) -> None:
        """Write the held-out means of the epoch that the criterion's history has ended last."""
        history = self.criterion.history
        if history is None:
            raise ValueError(
                "criterion: has no history to read held-out means from; criterion.track() gives it one"
            )
        if values := held_out(history, f"{self.prefix}held_out/"):
            self.write(values, self.steps)
