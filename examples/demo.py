"""ARL on real data in a minute, without a GPU: handwritten digits, two halves as two modalities.

    python examples/demo.py [--seeds 10] [--out build/demo.png]

Then once more with a noisy right half. The training loop, with arl_fast in it, is in ladder.py. What the
result shows, and what not, is in the README.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from ladder import ARL, JOINT, Budget, Net, Split, arguments, climb, picture, table, write_rows
from sklearn.datasets import load_digits
from torch import nn

HALVES = ["left", "right"]
PER_CLASS = 12
VALIDATION = 48  # rows for the fusion weights: two whole batches, where the control trains on them
NOISE = 1.0  # of the noisy right half, in standard deviations of a pixel
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


def split(seed: int, noise: float = 0.0) -> Split:
    """PER_CLASS training samples of each class, VALIDATION others; the test set is the rest, about 1,630."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    y = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train = torch.cat([order[y[order] == c][:PER_CLASS] for c in range(10)])
    rest = order[~torch.isin(order, train)]
    validation, test = rest[:VALIDATION], rest[VALIDATION:]
    right = images[:, :, 4:]
    right = right + noise * images.std() * torch.randn(right.shape, generator=generator)
    x = {"left": images[:, :, :4].flatten(1), "right": right.flatten(1)}
    pick = [{m: x[m][rows] for m in HALVES} for rows in (train, test, validation)]
    return Split(pick[0], y[train], pick[1], y[test], pick[2], y[validation])


def main() -> None:
    options = arguments(__doc__, seeds=10, out="build/demo.png").parse_args()
    torch.set_num_threads(1)  # the models are too small to be worth a second thread
    start = time.perf_counter()
    title = f"{PER_CLASS} training samples per class, {BUDGET.epochs} epochs, {options.seeds} seeds"
    results = climb(net, split, HALVES, BUDGET, options.seeds)
    noisy = climb(net, partial(split, noise=NOISE), HALVES, BUDGET, options.seeds, only=[JOINT, ARL])
    print(f"\nHandwritten digits, {title}; fusion weights from {VALIDATION} validation rows\n")
    print(table(results.accuracy, HALVES))
    print("\nThe same with a noisy right half\n")
    print(table(noisy.accuracy, HALVES))
    picture(results, HALVES, options.out)
    if options.rows:
        write_rows(results, options.rows, example="demo", noise=0.0)
        write_rows(noisy, options.rows, example="demo", noise=NOISE)
    print(f"Picture: {options.out}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
