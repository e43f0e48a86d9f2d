"""What the examples on real data share: a model, a control, the picture, the command line.

Training, tables and differences are ``arl_fast.ladder``'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import arl_fast
from arl_fast import plots
from arl_fast.ladder import Batches, Budget, Data, Results, climb

CONTROL = "ARL, validation rows trained on"


class Net(nn.Module):
    """One encoder per modality and a head on the concatenation: fused and unimodal logits."""

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = arl_fast.ConcatHead(dict.fromkeys(encoders, width), num_classes=classes)

    def forward(self, x: dict[str, Tensor]) -> arl_fast.BranchLogits:
        return self.head({m: encoder(x[m]) for m, encoder in self.encoders.items()})


def mlp(inputs: int, width: int) -> nn.Module:
    """An encoder of two layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def with_control(
    results: Results,
    factory: Callable[[], nn.Module],
    data: Callable[[int], Data],
    budget: Budget,
    seeds: int,
) -> Results:
    """The results, and what the validation rows are worth where ARL, at its rate, is trained on them too."""

    def more(seed: int) -> Data:
        train, validation, test = data(seed)
        x = {m: torch.cat([train.x[m], validation.x[m]]) for m in train.x}
        return Data(Batches(x, torch.cat([train.y, validation.y]), train.size), None, test)

    budget = budget._replace(rates=(results.rate("share"),))
    rows = [row | {"method": CONTROL} for row in climb(factory, more, budget, seeds, ["share"]).rows]
    return Results([*results.rows, *rows], results.modalities, results.histories)


def show(results: Results) -> None:
    """The table, and what fusion weights and the control add, paired by seed."""
    print(results.table())
    for name, other in (("weights", "unimodal"), ("share_weights", "share"), (CONTROL, "share")):
        if name in results.chosen and len(results.seeds) > 1:
            mean, error, _ = results.difference(name, other)
            added, base = (results.title(n).removeprefix("+ ") for n in (name, other))
            print(f"{added} minus {base}: {100 * mean:+.1f} ± {100 * error:.1f}")


def picture(results: Results, out: Path) -> None:
    """Accuracies of all seeds; ARL's shares and coefficients, their mean over seeds with its deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, second = results.modalities
    histories = results.history("share")
    with plots.style():
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12, 4.2), width_ratios=[1.35, 1, 1], layout="constrained"
        )
        plots.accuracies(results.accuracy(), ax=left)
        left.set_title("Test accuracy, every seed")
        plots.shares(histories, results.modalities, ax=middle, only=[first])
        middle.set_title(f"ARL: shares of {first} ({second}: 1 minus these)")
        plots.coefficients(histories, results.modalities, ax=right)
        right.set_title("ARL: coefficients")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, transparent=True)
        plt.close(figure)


def write_rows(results: Results, path: Path, **setting: object) -> None:
    """The rows of the ladder, with the setting before them, as JSON lines at the end of a file."""
    with path.open("a") as file:
        for row in results.rows:
            kept = {name: value for name, value in row.items() if name not in ("correct", "of")}
            file.write(json.dumps(setting | kept) + "\n")


def arguments(description: str | None, seeds: int, out: str | None = None) -> argparse.ArgumentParser:
    """The command line: --seeds, --rows and, for a picture, --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=_positive, default=seeds, help=f"number of seeds (default {seeds})")
    parser.add_argument("--rows", type=Path, help="file to append all results to, as JSON lines")
    if out is not None:
        parser.add_argument("--out", type=Path, default=Path(out), help=f"where the picture goes ({out})")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return number
