"""Lightning: ``Trainer(callbacks=[ARLCallback()])`` collects and logs a criterion's statistics."""

from __future__ import annotations

from typing import Any

from ..history import History
from ..loss import ARLLoss
from .loggers import held_out, read

try:
    from lightning.pytorch import Callback
except ImportError:  # the older distribution of the same
    try:
        from pytorch_lightning import Callback  # type: ignore[no-redef,assignment]
    except ImportError as error:
        raise ImportError("arl_fast.integrations.lightning needs Lightning: pip install lightning") from error


class ARLCallback(Callback):
    """Tracks the ARLLoss of a LightningModule with a History, writes its statistics to the trainer's loggers.

    Every ``log_every_n_steps`` optimizer steps the last step's statistics are read and written under names as
    "arl/gain/audio", at the end of an epoch the means over the validation batches as
    "arl/held_out/accuracy/audio". The history is in the checkpoint, and a resumed run goes on. Batches of the
    sanity check are not counted.

    Args:
        criterion: the loss; None: the one ARLLoss among the module's submodules.
        history: None: a new one. It is the attribute ``history`` of the callback.
        prefix: of all names.
    """

    def __init__(
        self, criterion: ARLLoss | None = None, history: History | None = None, prefix: str = "arl/"
    ) -> None:
        self.criterion = criterion
        self.history = History() if history is None else history
        self.prefix = prefix
        self._logged = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.criterion is None:
            found = [m for m in pl_module.modules() if isinstance(m, ARLLoss)]
            if len(found) != 1:
                raise ValueError(
                    f"criterion: got None, and {type(pl_module).__name__} has {len(found)} submodules of "
                    "type ARLLoss, expected one; pass ARLCallback(criterion=...)"
                )
            self.criterion = found[0]
        if stage == "fit":
            self.criterion.track(self.history)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.criterion is not None:
            self.criterion.untrack()

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.criterion is not None
        self.criterion.untrack()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.criterion is not None
        self.criterion.track(self.history)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if trainer.loggers and step != self._logged and step % trainer.log_every_n_steps == 0:
            assert self.criterion is not None
            self._logged = step  # with accumulation several batches have the same step
            self._write(trainer, read(self.criterion.metrics(self.prefix)))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After this epoch's validation."""
        before = len(self.history.rows("held_out")["step"]) if trainer.loggers else 0
        self.history.end_epoch()
        if trainer.loggers and len(self.history.rows("held_out")["step"]) > before:
            self._write(trainer, held_out(self.history, f"{self.prefix}held_out/"))

    def _write(self, trainer: Any, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
