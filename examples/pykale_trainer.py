"""PyKale: its MultimodalNNTrainer, a LightningModule, with ARL.

python examples/pykale_trainer.py [--epochs 15]

The left and the right half of scikit-learn's digits are the modalities, the right one noisy.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from kale.embed.multimodal_fusion import Concat
from kale.pipeline.base_nn_trainer import MultimodalNNTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import arl_fast


class Balanced(MultimodalNNTrainer):
    """Its loss sees the predictions of the modalities too; ``forward`` is still the whole model's logits."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.branches = arl_fast.ZeroedHead(self.fuse)

    def fuse(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.fusion_module(features))

    def compute_loss(self, batch, split_name="valid"):
        features = [encoder(x.float()) for encoder, x in zip(self.encoders, batch[:-1], strict=True)]
        loss = self.objective(self.branches(features), batch[-1].long())
        return loss, {"loss": loss.item(), "accuracy": float(self.objective.stats.accuracy[0])}


def model_parts(hidden: int = 32) -> dict:
    """Arguments of MultimodalNNTrainer."""
    encoders = [nn.Sequential(nn.Flatten(), nn.Linear(32, hidden), nn.ReLU()) for _ in range(2)]
    head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return dict(encoders=encoders, fusion=Concat(), head=head, lr=0.1)


def halves() -> tuple[TensorDataset, TensorDataset]:
    """Training and test rows: left [8, 4], right [8, 4], digit."""
    images, digits = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    noise = torch.randn(len(images), 8, 4, generator=torch.Generator().manual_seed(0))
    rows = [images[..., :4], images[..., 4:] + 0.5 * noise, digits]
    return TensorDataset(*(x[:500] for x in rows)), TensorDataset(*(x[500:] for x in rows))


def fit(module: MultimodalNNTrainer, epochs: int) -> pl.Trainer:
    """The package's own training."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(0)
    trainer.fit(module, DataLoader(halves()[0], batch_size=25, shuffle=True, generator=order))
    return trainer


def main(epochs: int = 15) -> dict[str, float]:
    """Test accuracy by branch."""
    pl.seed_everything(0, verbose=False)
    module = Balanced(**model_parts(), objective=arl_fast.ARLLoss())
    trainer = fit(module, epochs)
    gains = module.objective.stats.gains.tolist()
    trainer.test(module, DataLoader(halves()[1], batch_size=2000), verbose=False)  # one batch: its statistics
    found = dict(zip(("both", "left", "right"), module.objective.stats.accuracy.tolist(), strict=True))
    print("test accuracy:", {name: round(value, 3) for name, value in found.items()}, "last gains:", gains)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    main(**vars(parser.parse_args()))
