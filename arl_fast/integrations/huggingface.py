"""transformers.Trainer: ``Trainer(compute_loss_func=compute_loss_func(criterion))``. Does not import transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..loss import ARLLoss


def compute_loss_func(criterion: ARLLoss) -> Callable[..., Tensor]:
    """What transformers.Trainer takes as ``compute_loss_func``.

    The Trainer does not divide the loss of a micro-batch by the number of micro-batches; it gives the number of items in
    all of them instead (and over all processes, with ``average_tokens_across_devices``). So the loss here is the sum over
    the micro-batch divided by that number. Statistics, coefficients and gains are means over the micro-batch, whatever
    the number.

    Make the criterion a submodule of the model: then it moves, saves, loads and switches to evaluation with it.

    Args:
        criterion: an ``ARLLoss`` with ``reduction="sum"``.

    Returns:
        A function of (outputs, labels, num_items_in_batch=None), with outputs any that ``ARLLoss`` takes, as the dict
        {"fused": ..., name: ..., "link": ...}; a "loss" in it is left out. Without a number of items, as in evaluation,
        the number of valid rows takes its place.

    Raises:
        ValueError: the criterion has another reduction.
    """
    if criterion.options.reduction != "sum":
        raise ValueError(
            f"criterion: got reduction={criterion.options.reduction!r}, expected 'sum', which the Trainer's count divides"
        )

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if isinstance(outputs, dict):
            outputs = {name: x for name, x in outputs.items() if name != "loss"}
        total = criterion(outputs, labels)
        if num_items_in_batch is None:
            assert criterion.stats is not None
            num_items_in_batch = criterion.stats.count[0]
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    return compute_loss
