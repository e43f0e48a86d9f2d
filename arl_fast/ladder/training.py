"""One plain training loop for every rung, and the loop over rungs, seeds and learning rates."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.branches import BranchLogits, as_branch_logits, mask_of
from ..family import gammas
from ..fusion import FusionWeights
from ..heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead
from ..history import History
from ..loss import ARLLoss
from .methods import FAMILY, WEIGHTED, Method, loss_options
from .methods import methods as all_methods
from .results import Results, load_rows, measure, measure_labels

Forward = Callable[[nn.Module, Any], tuple[Any, Tensor]]
HEADS = (ConcatHead, SumHead, SharedHead, GatedHead, BilinearHead, ZeroedHead)
TARGETS = ("labels", "label", "target", "targets", "y")


class Data(NamedTuple):
    """DataLoaders, or lists of batches. Choices are made on ``validation``."""

    train: Iterable
    validation: Iterable | None
    test: Iterable


class Budget(NamedTuple):
    """What every method gets."""

    epochs: int
    rates: tuple[float, ...]


def sgd(parameters: Iterable, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, as in the paper."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def forward(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
    """The model's output and the target of a batch: (x, ..., target), or a dict with the target as "labels"
    or "target".

    A batch that is a dict is given to the model by name, others by position.
    """
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if name in batch), None)
        if name is None:
            raise ValueError(
                f"batch: got a dict with the keys {list(batch)}, expected one of {TARGETS}; or pass forward="
            )
        return model(**{key: value for key, value in batch.items() if key != name}), batch[name]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"batch: got {type(batch).__name__}, expected (x, ..., target) or a dict; or pass forward="
        )
    *x, target = batch
    return model(*x), target


def to_device(batch: Any, device: Any) -> Any:
    """A batch with all its tensors on the device; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(to_device, batch, [device] * len(batch)))
    return batch


class Setup(NamedTuple):
    """What does not change from run to run."""

    factory: Callable[[], nn.Module]
    optimizer: Callable[[Iterable, float], torch.optim.Optimizer]
    forward: Forward
    device: Any
    criterion: dict[str, Any]  # options of ARLLoss for all methods
    head: Callable[[nn.Module], nn.Module | None]

    @property
    def several_labels(self) -> bool:
        return self.criterion.get("task") == "multilabel"

    def measure(self, logits: dict[str, Tensor], target: Tensor) -> tuple[dict[str, dict[str, float]], str]:
        """Accuracy, macro F1 and loss by branch, and which rows the fused one had right."""
        if self.several_labels:
            return measure_labels(logits, target)
        return measure(logits, target, self.criterion.get("ignore_index", -100))


def train(
    setup: Setup,
    method: Method,
    variant: dict[str, Any],
    data: Data,
    epochs: int,
    rate: float,
    seed: int,
    only: str | None = None,
) -> tuple[nn.Module, History]:
    """A model trained from the seed's start on its batches; ``only``: on that modality's branch."""
    torch.manual_seed(seed)
    generator = getattr(data.train, "generator", None)
    if generator is not None:  # a loader's own, which would go on from the run before
        generator.manual_seed(seed)
    model = setup.factory()
    if method.head is not None:
        model = with_head(model, setup.head(model), method.head)  # type: ignore[arg-type]  # climb has looked
    model.to(setup.device)
    criterion = ARLLoss(**{**setup.criterion, **loss_options(method, variant)}).to(setup.device)
    history = criterion.track(History(limit=512))
    optimizer = setup.optimizer(model.parameters(), rate)
    weight = 1.0  # of the fused loss; gamma is relative to it
    model.train()
    for _ in range(epochs):
        for batch in data.train:
            output, target = setup.forward(model, to_device(batch, setup.device))
            _refuse_mask(output)
            if only is not None:
                alone = by_name(output)[only]
                output = BranchLogits(alone, {only: alone})
            loss = criterion(output, target)
            if weight != 1:
                loss = weight * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if method.weigh is None:
            history.end_epoch()
            continue
        evaluate(setup, model, criterion, data.validation)  # type: ignore[arg-type]  # climb has made sure
        history.end_epoch()
        if (weights := method.weigh(history)) is not None:
            criterion.gamma, weight = tuple(gammas(weights).tolist()), float(weights[0])
    criterion.untrack()
    return model, history


@torch.no_grad()
def evaluate(setup: Setup, model: nn.Module, criterion: ARLLoss, data: Iterable) -> None:
    """Let the criterion, and with it its history, see data that are not trained on."""
    model.eval()
    criterion.eval()
    with torch.random.fork_rng(devices=[]):  # a loader draws from it; training batches stay
        for batch in data:
            criterion(*setup.forward(model, to_device(batch, setup.device)))
    model.train()
    criterion.train()


def with_head(model: nn.Module, head: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with its head wrapped, wherever it stands."""
    if head is model:
        return wrap(head)
    wrapped = wrap(head)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head:
                setattr(module, name, wrapped)
    return model


def _refuse_mask(output: Any) -> None:
    """The tables compare branches on the same rows, and late fusion adds up all of them."""
    if mask_of(output) is not None:
        raise ValueError(
            "forward: got an output with a mask of absent modalities, which the ladder does not take: give "
            "it rows in which all modalities are present"
        )


def by_name(output: Any) -> dict[str, Tensor]:
    """Logits of all branches: "fused", then the modalities."""
    fused, unimodal, _ = as_branch_logits(output)
    named = unimodal if isinstance(unimodal, Mapping) else {str(m): x for m, x in enumerate(unimodal)}
    return {"fused": fused, **named}


@torch.no_grad()
def predict(setup: Setup, model: nn.Module, data: Iterable) -> tuple[dict[str, Tensor], Tensor]:
    """Logits [N, C] by branch and targets [N], of several labels [N, C], over all batches, on the host."""
    model.eval()
    logits: dict[str, list[Tensor]] = {}
    targets = []
    for batch in data:
        output, target = setup.forward(model, to_device(batch, setup.device))
        if setup.several_labels:
            target = _rows(target).float()
        else:
            target = (target.argmax(1) if target.is_floating_point() else target).reshape(-1)
        for name, x in by_name(output).items():
            logits.setdefault(name, []).append(_rows(x).float().cpu())
        targets.append(target.cpu())
    model.train()
    if not targets:
        raise ValueError("data: got no batch to evaluate on")
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(targets)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def modalities_of(setup: Setup, data: Iterable) -> list[str]:
    """The names of the model's branches, from its output for one batch."""
    model = setup.factory().to(setup.device).eval()
    with torch.no_grad():
        return list(by_name(setup.forward(model, to_device(next(iter(data)), setup.device))[0]))[1:]


def head_of(model: nn.Module) -> nn.Module | None:
    """The model's one head of this package; None where there is none, or more than one."""
    found = [module for module in model.modules() if isinstance(module, HEADS)]
    return found[0] if len(found) == 1 else None


def climb(
    factory: Callable[[], nn.Module],
    data: Callable[[int], Data],
    budget: Budget,
    seeds: int | Sequence[int] = 5,
    methods: Sequence[str] | Mapping[str, Method] | None = None,
    rows: str | Path | None = None,
    device: Any = "cpu",
    optimizer: Callable[[Iterable, float], torch.optim.Optimizer] = sgd,
    forward: Forward = forward,
    criterion: Mapping[str, Any] | None = None,
    head: Callable[[nn.Module], nn.Module | None] = head_of,
    progress: bool = True,
) -> Results:
    """Train every method with every seed, learning rate and variant. Seeds torch's global generator.

    Args:
        factory: makes the model, whose output is what ``ARLLoss`` takes: BranchLogits, or a tuple or dict of
            that form.
        data: a seed's Data. Batches are (x, ..., target) or dicts, see ``forward``.
        budget: epochs and learning rates to choose from; more than one needs validation data.
        seeds: how many, or which.
        methods: names, of ``methods(modalities)``, or Methods by name; None: all but other people's ("ogm",
            "dgl", "blending").
        rows: a file to which each trained model adds its line, as JSON. Models whose lines are there already
            are not trained again, so that a run which was cut off goes on. It knows methods, seeds, rates and
            epochs, not the model or the data: one file for each of these.
        device: where to train.
        optimizer: from parameters and a learning rate.
        forward: from a model and a batch to its output and the target.
        criterion: options of ARLLoss for all methods, such as ``weight`` or ``ignore_index``. With
            ``task="multilabel"`` accuracy counts known labels, and macro F1 is the mean over labels.
        head: from a model to its head, for fusion weights; by default its one head of this package, or None,
            for a pool of the predictions.
        progress: show a progress bar (tqdm, if installed).

    Returns:
        Results: rows, tables, differences.

    Raises:
        ValueError: an unknown method, several choices without validation data, a row of other settings in the
            file.
    """
    setup = Setup(factory, optimizer, forward, device, dict(criterion or {}), head)
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    loaded, loaded_seed = data(seeds[0]), seeds[0]
    modalities = modalities_of(setup, loaded.train)
    rungs = _chosen(methods, modalities)
    if loaded.validation is None:
        if len(budget.rates) > 1 or any(len(m.variants) > 1 for m in rungs.values()):
            raise ValueError(
                "data: got no validation data, which a choice of learning rates or variants is made on"
            )
        if weighing := [name for name, m in rungs.items() if m.weigh is not None]:
            raise ValueError(f"data: got no validation data, from which {weighing} weigh their losses")
    wrapping = [name for name, m in rungs.items() if m.head is not None]
    if wrapping and setup.head(setup.factory()) is None:
        raise ValueError(f"head: found none in the model, or several, but {wrapping} wrap it: pass head=")
    path = None if rows is None else Path(rows)
    done = _finished(path) if path is not None and path.exists() else []
    for row in done:
        if row["epochs"] != budget.epochs:
            raise ValueError(
                f"rows: {path} has models of {row['epochs']} epochs, but the budget says {budget.epochs}: "
                "use another file"
            )
    known = {_key(row) for row in done}
    histories: dict[tuple, History] = {}
    runs = [
        (seed, name, rate, variant)
        for seed in seeds
        for name in rungs
        for rate in budget.rates
        for variant in rungs[name].variants
    ]
    with _bar(len(runs), progress) as bar:
        for seed, name, rate, variant in runs:
            if _key(dict(method=name, seed=seed, rate=rate, variant=variant)) not in known:
                if seed != loaded_seed:
                    loaded, loaded_seed = data(seed), seed
                new, history = _run(setup, name, rungs[name], variant, loaded, budget, rate, seed, modalities)
                histories |= {_key(row): history for row in new}
                done += new
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write("".join(json.dumps(row) + "\n" for row in new))
            bar.update()
    wanted = {_key(dict(method=n, seed=s, rate=r, variant=v)) for s, n, r, v in runs}
    kept = [row for row in done if _key(row | {"method": row["of"]}) in wanted]
    return Results(kept, modalities, histories)


def _chosen(wanted: Sequence[str] | Mapping[str, Method] | None, modalities: list[str]) -> dict[str, Method]:
    if isinstance(wanted, Mapping):
        return dict(wanted)
    rungs = all_methods(modalities)
    unknown = [name for name in wanted or () if name not in rungs]
    if unknown:
        raise ValueError(
            f"methods: got {unknown}, expected some of {list(rungs)} for {len(modalities)} modalities"
        )
    return {
        name: m for name, m in rungs.items() if (name not in FAMILY if wanted is None else name in wanted)
    }


def _finished(path: Path) -> list[dict[str, Any]]:
    """The rows of models whose lines are all there. The file is cut back to them."""
    rows = load_rows(path)
    whole = {_key(row) for row in rows}
    # a model's own row is its last
    kept = [row for row in rows if _key(row | {"method": row["of"]}) in whole]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _key(row: Mapping[str, Any]) -> tuple:
    return row["method"], row["seed"], row["rate"], json.dumps(row["variant"])


def _run(
    setup: Setup,
    name: str,
    method: Method,
    variant: dict[str, Any],
    data: Data,
    budget: Budget,
    rate: float,
    seed: int,
    modalities: list[str],
) -> tuple[list[dict[str, Any]], History]:
    """The rows of one trained model, the one of the method last."""
    common = dict(seed=seed, rate=rate, variant=variant, epochs=budget.epochs, of=name)
    start = time.perf_counter()

    def row(method: str, validation: Any, test: Any) -> dict[str, Any]:
        result = {"method": method, **common, "seconds": round(time.perf_counter() - start, 2)}
        if validation is not None:
            result["validation"] = setup.measure(*validation)[0]
        result["test"], result["correct"] = setup.measure(*test)
        return result

    if name == "late":
        rows, parts = [], []
        for m in modalities:
            model, history = train(setup, method, variant, data, budget.epochs, rate, seed, only=m)
            parts.append(_predictions(setup, model, data))
            rows.append(row(f"alone {m}", *_each(parts[-1], lambda logits, m=m: {"fused": logits[m]})))  # type: ignore[misc]
        sides = []
        for side in zip(*parts, strict=True):
            logits = {m: part[0][m] for m, part in zip(modalities, side, strict=True) if part is not None}
            total = {"fused": torch.stack(list(logits.values())).sum(0), **logits} if logits else None
            sides.append(None if total is None else (total, side[0][1]))
        return [*rows, row(name, *sides)], history

    model, history = train(setup, method, variant, data, budget.epochs, rate, seed)
    sides = _predictions(setup, model, data)
    own = row(name, *sides)
    last = history.series("accuracy", "epochs")[-1].tolist()
    own["training_accuracy"] = dict(zip(["fused", *modalities], last, strict=True))
    if name in WEIGHTED and (weighted := _fusion_weights(setup, model, sides)) is not None:
        weights, sides = weighted
        return [row(WEIGHTED[name], *sides) | {"weights": weights}, own], history
    return [own], history


# logits by branch and targets: of the validation data, or None where there are none, and of the test data
Predictions = list[tuple[dict[str, Tensor], Tensor] | None]


def _predictions(setup: Setup, model: nn.Module, data: Data) -> Predictions:
    return [None if side is None else predict(setup, model, side) for side in (data.validation, data.test)]


def _each(sides: Predictions, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Predictions:
    return [None if side is None else (change(side[0]), side[1]) for side in sides]


def _fusion_weights(
    setup: Setup, model: nn.Module, sides: Predictions
) -> tuple[dict[str, float], Predictions] | None:
    """The same predictions with weights that are fitted on the validation rows, if there are any."""
    if sides[0] is None:
        return None

    def branches(logits: dict[str, Tensor]) -> BranchLogits:
        moved = {name: x.to(setup.device) for name, x in logits.items()}
        return BranchLogits(moved.pop("fused"), moved)

    logits, target = sides[0]
    options = {name: setup.criterion[name] for name in ("ignore_index", "task") if name in setup.criterion}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a branch that beats the whole: the table shows it
        fusion = FusionWeights.fit(setup.head(model), branches(logits), target.to(setup.device), **options)
    with torch.no_grad():
        weighted = _each(sides, lambda logits: {**logits, "fused": fusion(branches(logits)).float().cpu()})
    weights = fusion.weights.detach().cpu().tolist()
    return dict(zip(list(logits)[-len(weights) :], weights, strict=True)), weighted


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    class Silent:
        def update(self) -> None:
            pass

    if shown:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc="training", unit="model", file=sys.stderr) as bar:
                yield bar
            return
    yield Silent()
