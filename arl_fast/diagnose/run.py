"""The paired runs of a diagnosis, and what comes out of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from ..ladder import Budget, Data, Results, climb
from ..ladder.training import Forward, forward, head_of, sgd
from .page import page
from .verdict import EVEN, Verdict, decide

RUNGS = ("joint", "unimodal", "constant", "share")


class Diagnosis:
    """What ``diagnose`` found. ``print(diagnosis)`` shows it.

    Attributes:
        results: the ladder's Results: rows, tables, differences.
        verdict: the recommendation, its reasons and the numbers behind it.
    """

    def __init__(self, results: Results, about: Mapping[str, Any]) -> None:
        self.results = results
        self.about = dict(about)
        self.verdict: Verdict = decide(results)

    def __str__(self) -> str:
        """The summary: recommendation, reasons, table."""
        lines = [f"Recommendation: {self.verdict.advice}", ""]
        lines += [f"- {reason}" for reason in self.verdict.reasons]
        return "\n".join([*lines, "", self.results.table(same_rows=True), "", self.method()])

    def method(self) -> str:
        """How it was found out."""
        a = self.about
        rates = " or ".join(f"{rate:g}" for rate in a["rates"])
        same = " from the given weights" if a["same_start"] else ""
        labels = self.results.several_labels
        measure, studies = ("macro F1", ", of one class per row,") if labels else ("accuracy", "")
        return (
            f"Each rung: {a['epochs']} epochs{same}, {len(self.results.seeds)} seeds, learning rate {rates}. "
            "All numbers are from one half of the held-out rows; learning rates were chosen and fusion "
            "weights fitted on the other half. Differences are paired by seed; their errors take in seeds "
            'and rows, and "clear" means outside the 95 % interval. '
            f"r = {self.verdict.r:.2f} is the smallest over the largest branch {measure} after training with "
            f"unimodal losses; in the studies behind this package{studies} no rule mattered where it was "
            f"above {EVEN}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        verdict = self.verdict._asdict() | {
            "differences": {
                name: d._asdict() | {"clear": d.clear} for name, d in self.verdict.differences.items()
            }
        }
        chosen = {
            name: {
                "rate": self.results.rate(name),
                "accuracy": self.results.values(name).tolist(),
                "macro_f1": self.results.values(name, what="macro_f1").tolist(),
                "branches": {m: self.results.values(name, m).tolist() for m in self.results.modalities},
            }
            for name in self.results.chosen
        }
        return {
            "verdict": verdict,
            "rungs": chosen,
            "modalities": self.results.modalities,
            "about": self.about,
        }

    def html(self) -> str:
        """A page of its own: text, tables and drawings, no other files."""
        return page(self.results, self.verdict, self.method())

    def save(self, folder: str | Path) -> Path:
        """Write diagnosis.json and diagnosis.html into a folder, and return the page's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "diagnosis.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        path = folder / "diagnosis.html"
        path.write_text(self.html())
        return path


def diagnose(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    train_loader: Iterable,
    val_loader: Iterable,
    *,
    epochs: int = 5,
    rates: Sequence[float] = (0.03, 0.1),
    seeds: int = 3,
    out: str | Path | None = None,
    device: Any = "cpu",
    optimizer: Callable[[Iterable, float], torch.optim.Optimizer] = sgd,
    forward: Forward = forward,
    criterion: Mapping[str, Any] | None = None,
    head: Callable[[nn.Module], nn.Module | None] = head_of,
    progress: bool = True,
) -> Diagnosis:
    """Do I need ARL? Short paired trainings of a model: joint, unimodal losses, constant gain, ARL.

    It trains ``4 * seeds * len(rates)`` models for ``epochs`` each. What it says holds for budgets like that:
    give it the epochs that the model needs to get somewhere. It rests on held-out rows only; training
    statistics mislead once a branch memorises.

    Args:
        model_or_factory: a factory of models, or a model, of which every run trains a copy: then all seeds
            start from its weights and differ in the order of batches only. The output is what ``ARLLoss``
            takes.
        train_loader, val_loader: batches (x, ..., target) or dicts, see ``arl_fast.ladder.training.forward``.
            The validation loader must not shuffle. Its rows are dealt into two halves, of samples where it is
            a DataLoader of a map-style dataset, of batches otherwise: one to choose learning rates on, one to
            report.
        epochs, rates, seeds: the budget of every rung.
        out: a folder for rows.jsonl (a diagnosis that was cut off goes on from it), diagnosis.json and
            diagnosis.html.
        device, optimizer, forward, criterion, head, progress: as for ``arl_fast.ladder.climb``.

    Returns:
        Diagnosis: ``print`` it, or ``save`` it.

    Raises:
        ValueError: fewer than two seeds, no rates, or a validation loader with too little in it to be halved.
    """
    if seeds < 2:
        raise ValueError(
            f"seeds: got {seeds}, expected at least 2: a single run cannot tell a difference from noise"
        )
    if not rates:
        raise ValueError("rates: got none, expected at least one learning rate")
    same_start = isinstance(model_or_factory, nn.Module)
    factory: Any = partial(copy.deepcopy, model_or_factory) if same_start else model_or_factory
    validation, report = halves(val_loader)
    data = Data(train_loader, validation, report)
    rows = None if out is None else Path(out) / "rows.jsonl"
    results = climb(
        factory,
        lambda seed: data,
        Budget(epochs, tuple(rates)),
        seeds,
        RUNGS,
        rows,
        device,
        optimizer,
        forward,
        criterion,
        head,
        progress,
    )
    diagnosis = Diagnosis(
        results, {"epochs": epochs, "rates": list(rates), "seeds": seeds, "same_start": same_start}
    )
    if out is not None:
        diagnosis.save(out)
    return diagnosis


def halves(loader: Iterable) -> tuple[Iterable, Iterable]:
    """Two halves of a loader: of its dataset's samples, at random but fixed, or every other batch."""
    dataset = getattr(loader, "dataset", None)
    if (
        isinstance(loader, DataLoader)
        and isinstance(dataset, Dataset)
        and hasattr(dataset, "__len__")
        and loader.batch_size
    ):
        whole = isinstance(loader.sampler, (SequentialSampler, RandomSampler))
        samples = list(range(len(dataset))) if whole else sorted(set(loader.sampler))
        if len(samples) < 2:
            raise ValueError(
                f"val_loader: got a dataset of {len(samples)} samples, expected at least 2, to be halved"
            )
        shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        order = [samples[i] for i in shuffled.tolist()]
        options: dict[str, Any] = dict(
            batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )
        first, second = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
        return DataLoader(Subset(dataset, first), **options), DataLoader(Subset(dataset, second), **options)
    if len(list(islice(iter(loader), 2))) < 2:
        raise ValueError(
            "val_loader: got fewer than 2 batches, expected at least 2, to be halved; use smaller batches"
        )
    return _EveryOther(loader, 0), _EveryOther(loader, 1)


class _EveryOther:
    def __init__(self, loader: Iterable, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.start, None, 2)
