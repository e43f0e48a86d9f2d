"""transformers.Trainer: its argument ``compute_loss_func``, and ``track(trainer, criterion)``.

Imports transformers only in ``track``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..history import History
from ..loss import ARLLoss
from .loggers import held_out, read

HISTORY_FILE = "arl_history.pt"  # in every checkpoint of the Trainer


def compute_loss_func(criterion: ARLLoss) -> Callable[..., Tensor]:
    """What transformers.Trainer takes as ``compute_loss_func``.

    The Trainer does not divide the loss of a micro-batch by the number of micro-batches; it gives the number
    of items in all of them instead (and over all processes, with ``average_tokens_across_devices``). So the
    loss here is the sum over the micro-batch divided by that number. Statistics, coefficients and gains are
    means over the micro-batch, whatever the number.

    Make the criterion a submodule of the model: then it moves, saves, loads and switches to evaluation with
    it.

    Args:
        criterion: an ``ARLLoss`` with ``reduction="sum"``.

    Returns:
        A function of (outputs, labels, num_items_in_batch=None), with outputs any that ``ARLLoss`` takes, as
        the dict {"fused": ..., name: ..., "link": ...}; a "loss" in it is left out. Without a number of
        items, as in evaluation, the number of valid rows takes its place (for task "multilabel" that of the
        known labels; the Trainer's own number counts every label that is not -100, NaN among them).

    Raises:
        ValueError: the criterion has another reduction.
    """
    if criterion.options.reduction != "sum":
        raise ValueError(
            f"criterion: got reduction={criterion.options.reduction!r}, expected 'sum', which the Trainer's "
            "count divides"
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


def track(trainer: Any, criterion: ARLLoss, history: History | None = None, prefix: str = "arl/") -> History:
    """Let a History collect the criterion's statistics, and the Trainer log them wherever it logs.

    Whenever the Trainer logs (``logging_steps``), the last step's statistics are read and go into the same
    record, as "arl/gain/audio"; after an evaluation the means over its batches, as "eval_arl/accuracy/audio".
    The history is saved with every checkpoint, and read again when the Trainer resumes from it.

    Args:
        trainer: a ``transformers.Trainer``, before ``train()``.
        criterion: the loss that it calls, for example through ``compute_loss_func``.
        history: None: a new one.
        prefix: of all names.

    Returns:
        The history.
    """
    from transformers import TrainerCallback

    kept = criterion.track(History() if history is None else history)

    class Track(TrainerCallback):
        ended = (
            False  # the evaluation and the checkpoint of an epoch come after on_epoch_end, and belong to it
        )

        def close(self) -> None:
            if self.ended:
                kept.end_epoch()
            self.ended = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / HISTORY_FILE
            if state.global_step and saved.exists():
                kept.load_state_dict(History.load(saved).state_dict())

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.close()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ended = True

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            values: dict[str, float] = {}
            if "loss" in logs:
                values = read(criterion.metrics(prefix))
            elif any(name.startswith("eval_") for name in logs):
                kept.end_evaluation()
                values = held_out(kept, f"eval_{prefix}")
            logs.update(values)
            state.log_history[-1].update(values)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.close()
            if state.is_world_process_zero:
                kept.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / HISTORY_FILE)

    # first, so that the callbacks which report to TensorBoard and others see what on_log adds
    trainer.callback_handler.callbacks.insert(0, Track())
    return kept
