"""Experimental: one gamma per modality, from how good its branch is on held-out rows.

    python examples/gamma_by_modality.py [--seeds 6] [--rows FILE]

After every epoch gamma_m becomes gamma (s_m / max_k s_k)^2, with s_m the mean true-class probability of
branch m on held-out rows, which is what ``criterion.stats.dependence`` says in evaluation. A branch that is
worth little out of sample then gets a small unimodal loss, and memorises less. "Sum kept" scales these gammas
so that they add up to M, as with gamma = 1. The control trains with gamma = 1. Scikit-learn's digits, cut
into views.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from fusion_guard import BUDGET, SETTINGS, cut
from ladder import Net, positive
from torch import Tensor, nn
from tqdm import tqdm

import arl_fast

HELD_OUT, WIDTH = 50, 64
RECIPES = ("gamma 1", "by held-out confidence", "sum kept")


def train(recipe: str, setting: str, seed: int) -> float:
    """Test accuracy in percent."""
    views, y, training, rest = cut(setting, seed)
    held_out, test = rest[:HELD_OUT], rest[HELD_OUT:]
    torch.manual_seed(seed)
    encoders: dict[str, nn.Module] = {
        m: nn.Sequential(nn.Linear(v.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        for m, v in views.items()
    }
    net = Net(encoders, WIDTH, 10)
    criterion = arl_fast.ARLLoss(rule="constant")
    optimizer = torch.optim.SGD(net.parameters(), lr=BUDGET.rates[0], momentum=0.9)
    batches = torch.Generator().manual_seed(seed)

    def of(rows: Tensor) -> dict[str, Tensor]:
        return {m: v[rows] for m, v in views.items()}

    for _ in range(BUDGET.epochs):
        for batch in training[torch.randperm(len(training), generator=batches)].split(BUDGET.batch):
            optimizer.zero_grad()
            criterion(net(of(batch)), y[batch]).backward()
            optimizer.step()
        if recipe != "gamma 1":
            with torch.no_grad():
                criterion(net(of(held_out)), y[held_out])
            s = criterion.stats.dependence
            gamma = (s / s.max()) ** 2
            criterion.gamma = gamma * len(s) / gamma.sum() if recipe == "sum kept" else gamma
    with torch.no_grad():
        return 100 * float((net(of(test)).fused.argmax(1) == y[test]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=6, help="models of each setting (default 6)")
    parser.add_argument("--rows", type=Path, help="file to append the results to, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for setting in SETTINGS:
        accuracy = {
            recipe: torch.tensor([train(recipe, setting, seed) for seed in range(options.seeds)])
            for recipe in tqdm(RECIPES, desc=setting, unit="recipe")
        }
        base = accuracy["gamma 1"]
        line = f"{setting:26} gamma 1: {base.mean():.1f}"
        for recipe in RECIPES[1:]:
            gain = accuracy[recipe] - base
            line += f"; {recipe}: {gain.mean():+.1f} ± {gain.std() / options.seeds**0.5:.1f}"
        print(line)
        if options.rows:
            row = {"setting": setting, "seeds": options.seeds}
            with options.rows.open("a") as file:
                print(json.dumps(row | {name: found.tolist() for name, found in accuracy.items()}), file=file)


if __name__ == "__main__":
    main()
