"""MONAI: a diagnosis, yes or no, from an image and a table, in the form of its tutorial on early fusion.

python examples/monai_image_table.py [--epochs 4]
"""

from __future__ import annotations

import argparse

import torch
from monai.data import DataLoader, Dataset
from monai.metrics import ROCAUCMetric
from monai.networks.nets import DenseNet
from torch import Tensor, nn

import arl_fast


class Classifier(nn.Module):
    """Concatenated features give one logit: image [B, 1, H, W], table [B, 4] -> [B, 1]."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.image = DenseNet(  # the tutorial has DenseNet121
            spatial_dims=2,
            in_channels=1,
            out_channels=32,
            init_features=8,
            growth_rate=8,
            block_config=(2, 2),
        )
        self.table = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.last = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)
        )

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.last(torch.cat([self.image(image), self.table(table)], 1))


class Balanced(Classifier):
    """The same with a prediction from each of the two alone. In training it returns BranchLogits."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(dropout)
        self.head = arl_fast.ZeroedHead(self.fusion)

    def fusion(self, features: dict[str, Tensor]) -> Tensor:
        return self.last(torch.cat([features["image"], features["table"]], 1))

    def forward(self, image: Tensor, table: Tensor) -> arl_fast.BranchLogits | Tensor:
        out = self.head({"image": self.image(image), "table": self.table(table)})
        return out if self.training else out.fused


def patients(rows: int, seed: int = 0) -> Dataset:
    """Made-up ones: a hidden risk brightens the image and raises the last of four numbers in the table."""
    g = torch.Generator().manual_seed(seed)
    risk = torch.randn(rows, 1, generator=g)
    image = 0.3 * risk[..., None, None] + torch.randn(rows, 1, 16, 16, generator=g)
    table = torch.randn(rows, 4, generator=g)
    table[:, 3:] = risk + 0.7 * torch.randn(rows, 1, generator=g)
    label = (risk + 0.5 * torch.randn(rows, 1, generator=g) > 0).float()  # [rows, 1]: the shape of the logit
    return Dataset([dict(image=i, table=t, label=y) for i, t, y in zip(image, table, label, strict=True)])


def train(model: Classifier, criterion: nn.Module, epochs: int, rows: int = 256) -> list[float]:
    """The tutorial's loop, with SGD in the place of Adam, which would cancel the gains. Losses by step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(
        patients(rows), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = criterion(model(batch["image"], batch["table"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(epochs: int = 4) -> dict[str, float]:
    """Area under the ROC curve on held-out rows: of the whole, and from the image or the table alone."""
    torch.manual_seed(0)
    model, criterion = Balanced(), arl_fast.ARLLoss(task="multilabel")
    train(model, criterion, epochs)
    print({name: round(float(value), 3) for name, value in criterion.metrics().items() if "gain" in name})
    batch = next(iter(DataLoader(patients(512, seed=1), batch_size=512)))
    model.eval()
    with torch.no_grad():
        out = model.head({"image": model.image(batch["image"]), "table": model.table(batch["table"])})
    areas = {}
    for name, logits in {"both": out.fused, **out.unimodal}.items():
        metric = ROCAUCMetric()
        metric(y_pred=torch.sigmoid(logits), y=batch["label"])
        areas[name] = float(metric.aggregate())
    print("area under the ROC curve:", {name: round(area, 3) for name, area in areas.items()})
    return areas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(**vars(parser.parse_args()))
