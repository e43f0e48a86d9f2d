"""One training run: a method with one learning rate and one seed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from .config import Config
from .data.base import Data, Items, Memory
from .methods import Method
from .models import build

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where and how a run is computed: nothing here is part of the experiment."""

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    workers: int = 0
    rank: int = 0
    world: int = 1
    quiet: bool = False

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


@dataclass
class Run:
    """Predictions: split -> branch -> logits [n, C]; split -> targets [n]; and what training was like."""

    logits: dict[str, dict[str, Tensor]]
    targets: dict[str, Tensor]
    notes: dict[str, Any]
    model: nn.Module | None = None


def batches(
    items: Items, order: list[int], size: int, machine: Machine, drop_last: bool = False
) -> Iterator[Any]:
    """Batches (inputs by modality, targets) of the items in this order, on the device."""
    loader = DataLoader(
        items,
        batch_size=size,
        sampler=order,
        num_workers=machine.workers,
        collate_fn=(lambda batch: batch) if isinstance(items, Memory) else default_collate,
        pin_memory=machine.device.type == "cuda",
        drop_last=drop_last and len(order) >= size,
        # the loader's own draw must not move the global generator
        generator=torch.Generator().manual_seed(0),
    )
    for x, y in loader:
        yield (
            {name: z.to(machine.device, non_blocking=True) for name, z in x.items()},
            y.to(machine.device, non_blocking=True),
        )


@torch.no_grad()
def predict(model: nn.Module, items: Items, size: int, machine: Machine) -> tuple[dict[str, Tensor], Tensor]:
    """Logits [n, C] by branch ("fused" first) and targets [n] of all items, each exactly once."""
    model.eval()
    mine = list(range(machine.rank, len(items), machine.world))
    parts: list[tuple[dict[str, Tensor], Tensor]] = []
    for x, y in batches(items, mine, size, machine):
        with machine.autocast():
            out = model(x)
        parts.append(({"fused": out.fused.float(), **{k: v.float() for k, v in out.unimodal.items()}}, y))
    logits = {name: torch.cat([p[0][name] for p in parts]).cpu() for name in parts[0][0]} if parts else {}
    targets = torch.cat([p[1] for p in parts]).cpu() if parts else torch.empty(0, dtype=torch.int64)
    if machine.world == 1:
        return logits, targets
    seen: list[Any] = [None] * machine.world
    dist.all_gather_object(seen, (mine, logits, targets))
    seen = [part for part in seen if part[0]]
    back = torch.argsort(torch.tensor([i for part in seen for i in part[0]]))
    names = list(seen[0][1])
    return {n: torch.cat([part[1][n] for part in seen])[back] for n in names}, torch.cat(
        [part[2] for part in seen]
    )[back]


def train(
    data: Data,
    config: Config,
    method: Method,
    rate: float,
    seed: int,
    machine: Machine,
    checkpoint: Path | None = None,
) -> Run:
    """Train one model and predict with its selected epoch. Test data is read once, at the end.

    Methods of one seed start from the same weights and see the same batches in the same order, so that
    differences between them are paired. With `checkpoint`, every epoch is saved there and a run that was cut
    off goes on where it stopped, with the same result.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    shapes = data.shapes if method.alone is None else {method.alone: data.shapes[method.alone]}
    model = build(config, shapes, len(data.classes), method.auxiliary).to(machine.device)
    per_epoch = max(1, (len(data.train) // machine.world) // config.batch)
    loss_function = method.loss(config, config.warmup_epochs * per_epoch, machine.world > 1).to(
        machine.device
    )
    optimizer = _optimizer(model, config, rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.decay_epochs), 0.1)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    parallel = DistributedDataParallel(model) if machine.world > 1 else model

    def forward(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return loss_function(parallel(x), y)

    step = torch.compile(forward) if machine.compile else forward
    saved: dict[str, Any] = {"epoch": 0, "best": None, "spent": 0.0}
    states: dict[str, Any] = {
        "model": model,
        "loss": loss_function,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
    }
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=machine.device, weights_only=True)
        for name, part in states.items():
            part.load_state_dict(saved.pop(name))
        torch.set_rng_state(saved.pop("random").cpu())
        if machine.device.type == "cuda":
            torch.cuda.set_rng_state(saved.pop("random_cuda").cpu(), machine.device)
    best, spent = saved["best"], saved["spent"]
    data.train.seed = seed
    epochs = range(saved["epoch"], config.epochs)
    bar = tqdm(
        epochs,
        desc=f"{method.title}, lr {rate:g}, seed {seed}",
        unit="epoch",
        leave=False,
        disable=machine.quiet,
    )
    for epoch in bar:
        data.train.epoch = epoch
        order = torch.randperm(
            len(data.train), generator=torch.Generator().manual_seed(1000 * seed + epoch)
        ).tolist()
        order = order[machine.rank : len(order) // machine.world * machine.world : machine.world]
        model.train()
        loss_function.train()
        seen: list[Any] = []
        for x, y in batches(data.train, order, config.batch, machine, drop_last=True):
            with machine.autocast():
                loss = step(x, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if config.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            scaler.step(optimizer)
            scaler.update()
            seen.append(loss_function.stats)
        schedule.step()
        notes = _training_notes(seen, list(shapes))
        logits, targets = predict(model, data.validation, config.batch, machine)
        accuracy = float((logits["fused"].argmax(1) == targets).float().mean())
        bar.set_postfix(loss=f"{notes['train_loss']:.3f}", validation=f"{100 * accuracy:.1f}")
        if best is None or config.select == "last" or accuracy > best["accuracy"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            best = {"accuracy": accuracy, "epoch": epoch + 1, "weights": weights, "notes": notes}
        if checkpoint is not None and machine.rank == 0:
            parts = {name: part.state_dict() for name, part in states.items()}
            now = {"epoch": epoch + 1, "best": best, "spent": spent + time.perf_counter() - start}
            now["random"] = torch.get_rng_state()
            if machine.device.type == "cuda":
                now["random_cuda"] = torch.cuda.get_rng_state(machine.device)
            _save(parts | now, checkpoint)
    if best is None:
        raise ValueError("epochs: got 0, expected at least 1")
    model.load_state_dict(best["weights"])
    predicted = {
        name: predict(model, getattr(data, name), config.batch, machine) for name in ("validation", "test")
    }
    return Run(
        {name: logits for name, (logits, _) in predicted.items()},
        {name: targets for name, (_, targets) in predicted.items()},
        best["notes"]
        | {"best_epoch": best["epoch"], "seconds": round(spent + time.perf_counter() - start, 1)},
        model,
    )


def _optimizer(model: nn.Module, config: Config, rate: float) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _training_notes(seen: list[Any], modalities: list[str]) -> dict[str, Any]:
    """Means over an epoch's steps, read from the device once: loss, accuracies, coefficients."""
    loss = torch.stack([stats.loss for stats in seen]).float().mean(0).tolist()
    accuracy = torch.stack([stats.accuracy for stats in seen]).float().mean(0).tolist()
    coefficients = torch.stack([stats.coefficients for stats in seen]).float()
    names = ["fused", *modalities]
    return {
        "train_loss": round(loss[0], 4),
        "train_accuracy": {name: round(100 * a, 2) for name, a in zip(names, accuracy, strict=True)},
        "coefficients": {
            name: round(a, 4) for name, a in zip(modalities, coefficients.mean(0).tolist(), strict=True)
        },
        "saturated": round(float((coefficients.amax(1) > 0.99).float().mean()), 3)
        if len(modalities) > 1
        else 0.0,
    }


def _save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
