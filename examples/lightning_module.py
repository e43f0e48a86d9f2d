"""A LightningModule with automatic optimization; accumulation, clipping and precision are the Trainer's.

python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from synthetic import TwoModalities, pairs
from torch.utils.data import DataLoader

import arl_fast


class ARLModule(lightning.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TwoModalities()
        self.criterion = arl_fast.ARLLoss(warmup=4)  # a submodule: moved, saved and restored with the model

    def training_step(self, batch, index):
        audio, visual, target = batch
        loss = self.criterion(self.model(audio, visual), target)
        stats = self.criterion.stats
        # device tensors: no sync
        self.log_dict({"loss": loss, "gain/audio": stats.gains[0], "gain/visual": stats.gains[1]})
        return loss

    def validation_step(self, batch, index):
        audio, visual, target = batch
        self.criterion(self.model(audio, visual), target)
        names = ("fused", "audio", "visual")
        self.log_dict(
            {f"accuracy/{name}": a for name, a in zip(names, self.criterion.stats.accuracy, strict=True)},
            batch_size=len(target),
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main(epochs: int = 2, rows: int = 256, **trainer) -> tuple[ARLModule, dict[str, float]]:
    """Train and validate; ``trainer`` goes to lightning.Trainer."""
    lightning.seed_everything(0, verbose=False)
    module = ARLModule()
    options = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 40.0,
        "logger": False,
        "enable_checkpointing": False,
    }
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    fit = lightning.Trainer(max_epochs=epochs, **{**options, **trainer})
    fit.fit(
        module,
        DataLoader(pairs(rows), batch_size=32, shuffle=True),
        DataLoader(pairs(256, seed=2), batch_size=128),
    )
    return module, {name: float(value) for name, value in fit.callback_metrics.items()}


if __name__ == "__main__":
    print(main()[1])
