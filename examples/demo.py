"""ARL on real data in a minute, without a GPU: handwritten digits, two halves as two modalities.

    python examples/demo.py [--seeds 10] [--out build/demo.png]

Then once more with a noisy right half. The methods, the training loop and the tables are ``arl_fast.ladder``.
What the result shows, and what not, is in the README.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from shared import Net, arguments, mlp, picture, show, with_control, write_rows
from sklearn.datasets import load_digits

from arl_fast.ladder import Batches, Budget, Data, climb

HALVES = ["left", "right"]
PER_CLASS = 12
VALIDATION = 48  # rows for the fusion weights: two whole batches, where the control trains on them
NOISE = 1.0  # of the noisy right half, in standard deviations of a pixel
WIDTH = 64
BATCH = 24
BUDGET = Budget(epochs=50, rates=(0.05,))
METHODS = ["late", "joint", "unimodal", "constant", "share"]


def net() -> Net:
    """One small MLP per half."""
    return Net({m: mlp(32, WIDTH) for m in HALVES}, WIDTH, 10)


def split(seed: int, noise: float = 0.0) -> Data:
    """PER_CLASS training samples of each class, VALIDATION others; the test set is the rest, about 1,630."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    y = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train = torch.cat([order[y[order] == c][:PER_CLASS] for c in range(10)])
    rest = order[~torch.isin(order, train)]
    right = images[:, :, 4:]
    right = right + noise * images.std() * torch.randn(right.shape, generator=generator)
    x = {"left": images[:, :, :4].flatten(1), "right": right.flatten(1)}

    def rows(index: torch.Tensor, size: int | None = None) -> Batches:
        return Batches({m: x[m][index] for m in HALVES}, y[index], size)

    return Data(rows(train, BATCH), rows(rest[:VALIDATION]), rows(rest[VALIDATION:]))


def main(arguments_given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, seeds=10, out="build/demo.png").parse_args(arguments_given)
    torch.set_num_threads(1)  # the models are too small to be worth a second thread
    start = time.perf_counter()
    settings = []
    for noise, methods in ((0.0, METHODS), (NOISE, ["joint", "share"])):
        data = partial(split, noise=noise)
        results = climb(net, data, BUDGET, options.seeds, methods)
        settings.append(with_control(results, net, data, BUDGET, options.seeds))
        if options.rows:
            write_rows(settings[-1], options.rows, example="demo", noise=noise)
    title = f"{PER_CLASS} training samples per class, {BUDGET.epochs} epochs, {options.seeds} seeds"
    print(f"\nHandwritten digits, {title}; fusion weights from {VALIDATION} validation rows\n")
    show(settings[0])
    print("\nThe same with a noisy right half\n")
    show(settings[1])
    picture(settings[0], options.out)
    print(f"Picture: {options.out}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
