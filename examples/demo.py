"""ARL on real data in a minute, without a GPU: handwritten digits, the left and the right half as two modalities.

    python examples/demo.py [--seeds 10] [--out build/demo.png]

A ladder of methods with one budget: same split, initialisation, batches, learning rate and number of steps. What the
result shows, and what not, is in the README.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import arl_fast
from arl_fast import plots

PER_CLASS, EPOCHS, BATCH, LEARNING_RATE, WIDTH = 12, 50, 24, 0.05, 64
HALVES = ["left", "right"]
NO_EXTRAS = dict(gamma=0.0, rule="none")  # plain cross-entropy of the fused prediction, bit for bit torch's
LADDER: dict[str, tuple[list[str], dict]] = {
    "left half alone": (["left"], NO_EXTRAS),
    "right half alone": (["right"], NO_EXTRAS),
    "joint cross-entropy": (HALVES, NO_EXTRAS),
    "+ unimodal losses": (HALVES, dict(rule="none")),
    "+ constant gain": (HALVES, dict(rule="constant")),
    "ARL (share rule)": (HALVES, dict(rule="share")),
}
JOINT, ARL = "joint cross-entropy", "ARL (share rule)"


def split(seed: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    """PER_CLASS training samples of each class; all the others, about 1,680, are the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    target = torch.tensor(digits.target)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    train = torch.cat([order[target[order] == c][:PER_CLASS] for c in range(10)])
    test = order[~torch.isin(order, train)]
    halves = {"left": images[:, :, :4].flatten(1), "right": images[:, :, 4:].flatten(1)}
    return {m: x[train] for m, x in halves.items()}, target[train], {m: x[test] for m, x in halves.items()}, target[test]


class Net(nn.Module):
    """One small MLP per modality and a head on the concatenation, which returns the fused and the unimodal logits."""

    def __init__(self, modalities: list[str]) -> None:
        super().__init__()
        encoder = {m: nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()) for m in modalities}
        self.encoder = nn.ModuleDict(encoder)
        self.head = arl_fast.ConcatHead(dict.fromkeys(modalities, WIDTH), num_classes=10)

    def forward(self, x: dict[str, Tensor]) -> arl_fast.BranchLogits:
        return self.head({m: encoder(x[m]) for m, encoder in self.encoder.items()})


def train(modalities: list[str], options: dict, seed: int) -> tuple[dict[str, float], list[arl_fast.BranchStats]]:
    """Test accuracy in percent of the model ("fused") and of each modality alone, and the statistics of every step."""
    x, y, x_test, y_test = split(seed)
    torch.manual_seed(seed)
    model = Net(modalities)
    criterion = arl_fast.ARLLoss(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            loss = criterion(model({m: x[m][rows] for m in modalities}), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(criterion.stats)
    with torch.no_grad():
        out = model(x_test)
    branches = {"fused": out.fused, **out.unimodal}
    return {name: 100 * (logits.argmax(1) == y_test).float().mean().item() for name, logits in branches.items()}, history


def table(accuracy: dict[str, dict[str, Tensor]]) -> str:
    """Mean and standard deviation over seeds; the difference is taken seed by seed, with its standard error."""
    many = len(accuracy[JOINT]["fused"]) > 1
    lines = [f"{'test accuracy, %':<22}{'both halves':>14}{'minus joint':>16}{'left alone':>14}{'right alone':>14}"]
    for name, branches in accuracy.items():
        fused = branches["fused"]
        cells = {m: f"{a.mean():.1f} ± {a.std() if many else 0:.1f}" for m, a in branches.items()}
        if len(branches) == 2:  # one modality: its only branch is the fused one
            lines.append(f"{name:<22}{'':>14}{'':>16}{cells.get('left', ''):>14}{cells.get('right', ''):>14}")
            continue
        difference = fused - accuracy[JOINT]["fused"]
        error = difference.std() / len(difference) ** 0.5 if many else 0
        shown = "" if name == JOINT else f"{difference.mean():+.1f} ± {error:.1f}"
        lines.append(f"{name:<22}{cells['fused']:>14}{shown:>16}{cells['left']:>14}{cells['right']:>14}")
    return "\n".join(lines)


def picture(accuracy: dict[str, dict[str, Tensor]], runs: dict[str, list[list[arl_fast.BranchStats]]], out: Path) -> None:
    """Accuracies of all seeds; shares and coefficients over training, the mean over seeds with its standard deviation."""
    plots.require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plots.style():
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[1.35, 1, 1], layout="constrained")
        plots.accuracies(accuracy, ax=left)
        left.set_title("Test accuracy, every seed")
        plots.shares(runs[ARL], HALVES, ax=middle, only=["left"])
        middle.set_title("ARL: shares of the left half (right: 1 minus these)")
        plots.coefficients(runs[ARL], HALVES, ax=right)
        right.set_title("ARL: coefficients")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, transparent=True)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="where the picture goes (default build/demo.png)")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: got {arguments.seeds}, expected at least 1")

    torch.set_num_threads(1)  # the models are too small to be worth a second thread
    start = time.perf_counter()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in LADDER}
    runs: dict[str, list[list[arl_fast.BranchStats]]] = {name: [] for name in LADDER}
    with tqdm(total=arguments.seeds * len(LADDER), desc="training", unit="model") as bar:
        for seed in range(arguments.seeds):
            for name, (modalities, options) in LADDER.items():
                result, history = train(modalities, options, seed)
                results[name].append(result)
                runs[name].append(history)
                bar.update()
    accuracy = {name: {m: torch.tensor([r[m] for r in rows]) for m in rows[0]} for name, rows in results.items()}

    print(f"\nHandwritten digits, {PER_CLASS} training samples per class, {EPOCHS} epochs, {arguments.seeds} seeds\n")
    print(table(accuracy))
    print("\nMean ± standard deviation over seeds; the difference to joint training is paired, ± its standard error.")
    picture(accuracy, runs, arguments.out)
    print(f"Picture: {arguments.out}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
