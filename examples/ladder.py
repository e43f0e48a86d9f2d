"""What the examples share: the ladder of methods, a plain training loop, and the table of results.

All methods of a seed start from the same split and initialisation and see the same batches as often, so that
differences between them are paired. The learning rate is one for all or, where a budget offers several, each
method's best on validation data. Fusion weights come from the validation data too; their control has these
rows in its training data.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import arl_fast
from arl_fast import BranchStats, plots

JOINT, UNIMODAL, ARL = "joint cross-entropy", "+ unimodal losses", "ARL (share rule)"
WEIGHTED = {UNIMODAL: "unimodal losses, fusion weights", ARL: "ARL, fusion weights"}
CONTROL = "ARL, validation rows trained on"


class Split(NamedTuple):
    """One seed's data: inputs by modality, class indices."""

    x: dict[str, Tensor]
    y: Tensor
    x_test: dict[str, Tensor]
    y_test: Tensor
    x_val: dict[str, Tensor] | None = None
    y_val: Tensor | None = None


class Budget(NamedTuple):
    """What every method gets. Several learning rates ask for validation data in the split."""

    epochs: int
    batch: int
    rates: tuple[float, ...]


class Net(nn.Module):
    """One encoder per modality and a head on the concatenation, which returns the fused and the unimodal
    logits.
    """

    def __init__(self, encoders: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = arl_fast.ConcatHead(dict.fromkeys(encoders, width), num_classes=classes)

    def forward(self, x: dict[str, Tensor]) -> arl_fast.BranchLogits:
        return self.head({m: encoder(x[m]) for m, encoder in self.encoders.items()})


def ladder(modalities: list[str]) -> dict[str, tuple[list[str], dict]]:
    """Method -> its modalities and its options of ARLLoss."""
    plain = dict(gamma=0.0, rule="none")  # the cross-entropy of the fused logits, bit for bit torch's
    return {f"{m} alone": ([m], plain) for m in modalities} | {
        JOINT: (modalities, plain),
        UNIMODAL: (modalities, dict(rule="none")),
        "+ constant gain": (modalities, dict(rule="constant")),
        ARL: (modalities, dict(rule="share")),
    }


class Run(NamedTuple):
    """One trained model: accuracies in percent of the whole ("fused") and of each branch, statistics by step.

    With fusion weights: test accuracy, validation accuracy (cross-fitted), the weights.
    """

    test: dict[str, float]
    validation: float
    history: list[BranchStats]
    weighted: float = 0.0
    weighted_validation: float = 0.0
    weights: Sequence[float] = ()


def train(model: Net, options: dict, data: Split, budget: Budget, rate: float, seed: int) -> Run:
    modalities = list(model.encoders)
    criterion = arl_fast.ARLLoss(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(data.y), generator=order).split(budget.batch):
            loss = criterion(model({m: data.x[m][rows] for m in modalities}), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(criterion.stats)
    run = Run(evaluate(model, data.x_test, data.y_test), 0.0, history)
    if data.x_val is None or data.y_val is None:
        return run
    run = run._replace(validation=evaluate(model, data.x_val, data.y_val)["fused"])
    return run if len(modalities) == 1 else run._replace(**weigh(model, data))


@torch.no_grad()
def weigh(model: Net, data: Split) -> dict:
    """The trained model with fusion weights from the validation rows: fields of Run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one modality alone does better: the table shows it
        fusion = arl_fast.FusionWeights.fit(model.head, model(data.x_val), data.y_val)
    right = fusion(model(data.x_test)).argmax(1) == data.y_test
    return {
        "weighted": 100 * right.float().mean().item(),
        "weighted_validation": 100 * fusion.report.after["fused"].accuracy,
        "weights": fusion.weights.tolist(),
    }


@torch.no_grad()
def evaluate(model: Net, x: dict[str, Tensor], y: Tensor) -> dict[str, float]:
    model.eval()
    out = model(x)
    return {
        name: 100 * (logits.argmax(1) == y).float().mean().item()
        for name, logits in {"fused": out.fused, **out.unimodal}.items()
    }


class Results(NamedTuple):
    """Method -> branch -> accuracies [seeds]; method -> seed -> statistics of all steps; method -> rate;
    method -> seed -> fusion weights.
    """

    accuracy: dict[str, dict[str, Tensor]]
    histories: dict[str, list[list[BranchStats]]]
    rates: dict[str, float]
    weights: dict[str, list[list[float]]]


def climb(
    net: Callable[[list[str]], Net],
    split: Callable[[int], Split],
    modalities: list[str],
    budget: Budget,
    seeds: int,
    only: Sequence[str] | None = None,
) -> Results:
    """Train every method of the ladder (or ``only`` some) on every seed, with a progress bar.

    With validation data, fusion weights for some of them and the control: ARL trained on the validation rows
        as well.
    """
    methods = {name: method for name, method in ladder(modalities).items() if only is None or name in only}
    runs: dict[str, dict[float, list[Run]]] = {name: {rate: [] for rate in budget.rates} for name in methods}
    with tqdm(total=seeds * len(methods) * len(budget.rates), desc="training", unit="model") as bar:
        for seed in range(seeds):
            data = split(seed)
            for name, (used, options) in methods.items():
                for rate in budget.rates:
                    torch.manual_seed(seed)
                    runs[name][rate].append(train(net(used), options, data, budget, rate, seed))
                    bar.update()
    rates = {
        name: max(by_rate, key=lambda rate, r=by_rate: sum(run.validation for run in r[rate]))
        for name, by_rate in runs.items()
    }
    best = {name: by_rate[rates[name]] for name, by_rate in runs.items()}
    accuracy = {
        name: {m: torch.tensor([run.test[m] for run in chosen]) for m in chosen[0].test}
        for name, chosen in best.items()
    }
    histories = {name: [run.history for run in chosen] for name, chosen in best.items()}
    weights = {}
    if data.x_val is not None:
        for name, title in ((name, title) for name, title in WEIGHTED.items() if name in runs):
            rates[title] = max(
                budget.rates, key=lambda rate: sum(r.weighted_validation for r in runs[name][rate])
            )
            chosen = runs[name][rates[title]]
            accuracy[title] = {"fused": torch.tensor([run.weighted for run in chosen])}
            weights[title] = [list(run.weights) for run in chosen]
        rates[CONTROL] = rates[ARL]
        control = []
        for seed in tqdm(range(seeds), desc="control", unit="model"):
            data = split(seed)
            data = data._replace(
                x={m: torch.cat([data.x[m], data.x_val[m]]) for m in modalities},
                y=torch.cat([data.y, data.y_val]),
                x_val=None,
            )
            torch.manual_seed(seed)
            control.append(train(net(modalities), methods[ARL][1], data, budget, rates[CONTROL], seed).test)
        accuracy[CONTROL] = {m: torch.tensor([test[m] for test in control]) for m in control[0]}
    return Results(accuracy, histories, rates, weights)


def table(accuracy: dict[str, dict[str, Tensor]], modalities: list[str]) -> str:
    """Mean and standard deviation over seeds; the difference is paired by seed, with its standard error."""
    seeds = len(accuracy[JOINT]["fused"])
    titles = ["together", "minus joint", *(f"{m} alone" for m in modalities)]
    lines = [f"{'test accuracy, %':<32}" + "".join(f"{title:>17}" for title in titles)]
    for name, branches in accuracy.items():
        cells = {
            m: f"{a.mean():.1f} ± {a.std():.1f}" if seeds > 1 else f"{a.item():.1f}"
            for m, a in branches.items()
        }
        if len(branches) == 2:  # a single modality: its branch is the whole model
            together = difference = ""
        else:
            delta = branches["fused"] - accuracy[JOINT]["fused"]
            difference = (
                f"{delta.mean():+.1f} ± {delta.std() / seeds**0.5:.1f}"
                if seeds > 1
                else f"{delta.item():+.1f}"
            )
            together, difference = cells["fused"], "" if name == JOINT else difference
        lines.append(
            f"{name:<32}"
            + "".join(f"{c:>17}" for c in [together, difference, *(cells.get(m, "") for m in modalities)])
        )
    if seeds > 1:
        lines.append("\nMean ± standard deviation over seeds; minus joint: paired, ± its standard error.")
        lines += [
            f"{title} minus {name}: {delta.mean():+.1f} ± {delta.std() / seeds**0.5:.1f}"
            for title, name in [*((title, name) for name, title in WEIGHTED.items()), (CONTROL, ARL)]
            if title in accuracy
            for delta in [accuracy[title]["fused"] - accuracy[name]["fused"]]
        ]
    return "\n".join(lines)


def write_rows(results: Results, path: Path, **setting: object) -> None:
    """One JSON object per method and seed, appended to a file."""
    with path.open("a") as file:
        for name, branches in results.accuracy.items():
            for seed in range(len(branches["fused"])):
                row = setting | {"method": name, "rate": results.rates[name], "seed": seed}
                row["accuracy"] = {m: round(a[seed].item(), 2) for m, a in branches.items()}
                if name in results.weights:
                    row["weights"] = [round(w, 4) for w in results.weights[name][seed]]
                file.write(json.dumps(row) + "\n")


def picture(results: Results, modalities: list[str], out: Path) -> None:
    """Accuracies of all seeds; shares and coefficients over training, the mean over seeds with its standard
    deviation.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plots.style():
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12, 3.8), width_ratios=[1.35, 1, 1], layout="constrained"
        )
        plots.accuracies(results.accuracy, ax=left)
        left.set_title("Test accuracy, every seed")
        first, second = modalities
        plots.shares(results.histories[ARL], modalities, ax=middle, only=[first])
        middle.set_title(f"ARL: shares of {first} ({second}: 1 minus these)")
        plots.coefficients(results.histories[ARL], modalities, ax=right)
        right.set_title("ARL: coefficients")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, transparent=True)
        plt.close(figure)


def arguments(description: str | None, seeds: int, out: str) -> argparse.ArgumentParser:
    """The command line that the examples share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"number of seeds (default {seeds})")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where the picture goes (default {out})")
    parser.add_argument("--rows", type=Path, help="file to append all accuracies to, as JSON lines")
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return number
