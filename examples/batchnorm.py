"""BatchNorm in a fusion under ZeroedHead: whose running statistics? python examples/batchnorm.py [--seeds 8]

The demo's data (handwritten digits, two halves) and encoders, and a fusion with a norm in it. The unimodal
passes of training normalise by their own batch; what they do to the running statistics decides what
evaluation sees.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from demo import HALVES, split
from torch import nn

import arl_fast

WIDTH = 64
KINDS = {
    "LayerNorm": (nn.LayerNorm, {}),
    "BatchNorm, statistics of the fused pass (default)": (nn.BatchNorm1d, {}),
    "BatchNorm, statistics of all passes (track_unimodal=True)": (nn.BatchNorm1d, {"track_unimodal": True}),
}


class Fusion(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), norm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))

    def forward(self, z):
        return self.layers(torch.cat(list(z.values()), 1))


def train(seed: int, norm, options, epochs: int = 50, batch: int = 24) -> list[float]:
    """Test accuracy in evaluation mode: together, left alone, right alone."""
    data = split(seed)
    torch.manual_seed(seed)
    encoders = nn.ModuleDict(
        {
            m: nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
            for m in HALVES
        }
    )
    head, criterion = arl_fast.ZeroedHead(Fusion(norm), **options), arl_fast.ARLLoss()
    optimizer = torch.optim.SGD([*encoders.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y)).split(batch):
            out = head({m: encoders[m](data.x[m][rows]) for m in HALVES})
            optimizer.zero_grad()
            criterion(out, data.y[rows]).backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        out = head({m: encoders[m](data.x_test[m]) for m in HALVES})
    return [float((x.argmax(1) == data.y_test).float().mean()) for x in (out.fused, *out.unimodal.values())]


def main(seeds: int = 8, epochs: int = 50) -> dict[str, list[list[float]]]:
    torch.set_num_threads(1)
    results = {}
    print("| norm in the fusion | together | left alone | right alone |\n|---|---|---|---|")
    for name, (norm, options) in KINDS.items():
        results[name] = [train(seed, norm, options, epochs) for seed in range(seeds)]
        cells = [
            f"{100 * statistics.mean(column):.1f} ± {100 * statistics.stdev(column) if seeds > 1 else 0:.1f}"
            for column in zip(*results[name], strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    main(parser.parse_args().seeds)
