"""pytorch-widedeep: which of 19 birds are heard in a recording, from three groups of features.

python examples/widedeep_birds.py [--seeds 3] [--epochs 40]

The data set lies in the package. Its components add up, so each is a modality: where the recording was made
(``wide``), and two perceptrons (``deeptabular``) on its spectrum and on the segments found in it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_widedeep
import torch
from pytorch_widedeep import Trainer
from pytorch_widedeep.models import TabMlp, Wide, WideDeep
from sklearn.metrics import average_precision_score, f1_score

import arl_fast

METHODS = {
    "joint": dict(rule="none", gamma=0.0),
    "+ unimodal losses": dict(rule="none"),
    "+ constant gain": dict(rule="constant"),
    "ARL (share rule)": dict(),
}
LABELS = 19  # the last columns


class Balanced(WideDeep):
    """WideDeep whose components are modalities. In training it returns BranchLogits."""

    def __init__(self, criterion: arl_fast.ARLLoss, **components) -> None:
        super().__init__(**components)
        self.criterion = criterion  # a submodule, so that the Trainer's train() and eval() reach it

    def forward(self, X, y=None):
        spectrum, segments = (part[0](x) for part, x in zip(self.deeptabular, X["deeptabular"], strict=True))
        features, link = arl_fast.modulate(
            {"place": self.wide(X["wide"]), "spectrum": spectrum, "segments": segments}
        )
        logits = {
            "place": features["place"],  # the wide component is its own last layer
            "spectrum": self.deeptabular[0][1](features["spectrum"]),
            "segments": self.deeptabular[1][1](features["segments"]),
        }
        fused = logits["place"] + (logits["spectrum"] + logits["segments"])  # in WideDeep's order
        return arl_fast.BranchLogits(fused, logits, link) if self.training else fused


def birds() -> tuple[dict, dict, dict[str, int]]:
    """Arguments of ``Trainer.fit`` for the training and the test rows, and the groups' sizes."""
    folder = Path(pytorch_widedeep.__file__).parent / "datasets" / "data"
    frames = [pd.read_parquet(folder / f"birds_{part}.parquet.brotli") for part in ("train", "test")]
    train = frames[0]
    names = list(train.columns[:-LABELS])
    place = ["location", "hasSegments"]
    spectrum = [name for name in names if name.startswith("audio")]
    segments = [name for name in names if name not in (*spectrum, *place)]
    codes: dict[tuple[str, object], int] = {}  # of values, from 1; 0 stands for one that was not seen
    for name in place:
        for value in sorted(train[name].unique()):
            codes[name, value] = len(codes) + 1
    parts = []
    for frame in frames:
        x_wide = np.stack([[codes.get((name, value), 0) for value in frame[name]] for name in place], 1)
        x_tab = [
            np.array((frame[own] - train[own].mean()) / (train[own].std() + 1e-6), np.float32).clip(-5, 5)
            for own in (spectrum, segments)
        ]
        target = np.array(frame.iloc[:, -LABELS:].astype(float), np.float32)
        parts.append({"X_wide": x_wide, "X_tab": x_tab, "target": target})
    return parts[0], parts[1], {"place": len(codes), "spectrum": len(spectrum), "segments": len(segments)}


def components(sizes: dict[str, int], labels: int = LABELS) -> dict:
    """Arguments of ``WideDeep``."""

    def perceptron(group: str) -> TabMlp:
        columns = [f"{group}{i}" for i in range(sizes[group])]
        return TabMlp(
            {name: i for i, name in enumerate(columns)}, continuous_cols=columns, mlp_hidden_dims=[64, 32]
        )

    return dict(
        wide=Wide(sizes["place"], labels),
        deeptabular=[perceptron("spectrum"), perceptron("segments")],
        pred_dim=labels,
    )


def fit(
    model: WideDeep,
    criterion: torch.nn.Module | None,
    train: dict,
    epochs: int,
    lr: float,
    objective: str = "multitarget",
) -> Trainer:
    """The package's own training. ``criterion`` None: its own loss for the objective."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    trainer = Trainer(
        model,
        objective=objective,
        custom_loss_function=criterion,
        optimizers=optimizer,
        verbose=0,
        num_workers=0,
        device="cpu",
    )
    trainer.fit(**train, n_epochs=epochs, batch_size=32, shuffle=True)
    return trainer


def scores(trainer: Trainer, rows: dict) -> tuple[float, float, float]:
    """Accuracy over all pairs of a row and a bird; F1 and average precision, means over birds. In percent."""
    logits = trainer.predict(X_wide=rows["X_wide"], X_tab=rows["X_tab"], batch_size=512)
    occurs = rows["target"].any(0)
    target, logits = rows["target"][:, occurs], logits[:, occurs]
    said = logits > 0
    return (
        100 * float((said == target).mean()),
        100 * float(f1_score(target, said, average="macro", zero_division=0)),
        100 * float(average_precision_score(target, logits, average="macro")),
    )


def run(method: str, seed: int, epochs: int, lr: float, train: dict, test: dict, sizes: dict[str, int]):
    """The scores of one model on other rows than those of its training."""
    torch.manual_seed(seed)
    criterion = arl_fast.ARLLoss(task="multilabel", **METHODS[method])
    model = Balanced(criterion, **components(sizes))
    return scores(fit(model, criterion, train, epochs, lr), test)


def take(rows: dict, index: np.ndarray) -> dict:
    return {k: [x[index] for x in v] if isinstance(v, list) else v[index] for k, v in rows.items()}


def best_rate(method: str, rates: Sequence[float], seeds: int, epochs: int, rows: dict, sizes) -> float:
    """The learning rate of the highest average precision on a quarter of the rows, another for each seed."""
    precision = dict.fromkeys(rates, 0.0)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(rows["target"]))
        held_out, rest = take(rows, order[: len(order) // 4]), take(rows, order[len(order) // 4 :])
        for lr in rates:
            precision[lr] += run(method, seed, epochs, lr, rest, held_out, sizes)[2]
    return max(precision, key=precision.__getitem__)


def main(
    seeds: int = 3, epochs: int = 40, rates: Sequence[float] = (0.1, 0.2, 0.4, 0.8)
) -> dict[str, list[tuple[float, float, float]]]:
    """By method, the test scores of every seed, at a learning rate chosen on training rows."""
    torch.set_num_threads(1)  # small products
    train, test, sizes = birds()
    print(f"{len(test['target'])} test rows, {seeds} seeds, in percent: mean ± standard deviation, and for")
    print("average precision the difference to joint training, paired by seed, ± its standard error")
    print(f"{'':20}{'rate':>6}{'accuracy':>14}{'macro F1':>14}{'average precision':>20}{'minus joint':>14}")
    results: dict[str, list[tuple[float, float, float]]] = {}
    for method in METHODS:
        lr = best_rate(method, rates, seeds, epochs, train, sizes)
        results[method] = [run(method, seed, epochs, lr, train, test, sizes) for seed in range(seeds)]
        cells = [spread([row[i] for row in results[method]]) for i in range(3)]
        gain = [own[2] - joint[2] for own, joint in zip(results[method], results["joint"], strict=True)]
        shown = "" if method == "joint" else spread(gain, seeds**0.5)
        print(f"{method:20}{lr:>6}{cells[0]:>14}{cells[1]:>14}{cells[2]:>20}{shown:>14}", flush=True)
    return results


def spread(values: Sequence[float], divisor: float = 1.0) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation / divisor:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
