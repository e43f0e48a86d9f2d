"""ARL on real data in a minute, without a GPU: handwritten digits, the left and the right half as two modalities.

    python examples/demo.py [--seeds 10] [--out build/demo.png]

The training loop, with arl_fast in it, is in ladder.py. What the result shows, and what not, is in the README.
"""

from __future__ import annotations

import time

import torch
from ladder import Budget, Net, Split, arguments, climb, picture, table
from sklearn.datasets import load_digits
from torch import nn

HALVES = ["left", "right"]
PER_CLASS = 12
WIDTH = 64
BUDGET = Budget(epochs=50, batch=24, rates=(0.05,))


def net(modalities: list[str]) -> Net:
    """One small MLP per half."""
    return Net(
        {
            m: nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
            for m in modalities
        },
        WIDTH,
        10,
    )


def split(seed: int) -> Split:
    """PER_CLASS training samples of each class; all the others, about 1,680, are the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train = torch.cat([order[y[order] == c][:PER_CLASS] for c in range(10)])
    test = order[~torch.isin(order, train)]
    x = {"left": images[:, :, :4].flatten(1), "right": images[:, :, 4:].flatten(1)}
    return Split({m: x[m][train] for m in HALVES}, y[train], {m: x[m][test] for m in HALVES}, y[test])


def main() -> None:
    options = arguments(__doc__, seeds=10, out="build/demo.png").parse_args()
    torch.set_num_threads(1)  # the models are too small to be worth a second thread
    start = time.perf_counter()
    results = climb(net, split, HALVES, BUDGET, options.seeds)
    print(
        f"\nHandwritten digits, {PER_CLASS} training samples per class, {BUDGET.epochs} epochs, {options.seeds} seeds\n"
    )
    print(table(results.accuracy, HALVES))
    picture(results, HALVES, options.out)
    print(f"Picture: {options.out}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
