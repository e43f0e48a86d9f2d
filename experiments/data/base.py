"""What every reader offers: data in three parts, and a list of what is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[dict[str, Tensor], Any]


class Check(NamedTuple):
    """What `--check` found: lines for people, and whether the data can be read."""

    lines: list[str]
    complete: bool


class Data(NamedTuple):
    """Split data. Items are (inputs by modality, class index); `fold` names one of several splits."""

    train: Items
    validation: Items
    test: Items
    classes: list[str]
    fold: str = ""

    @property
    def modalities(self) -> list[str]:
        return list(self.train[0][0])

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(x.shape) for name, x in self.train[0][0].items()}


class Items(Dataset):
    """Data whose random choices depend on (seed, epoch, item) alone, not on workers or order."""

    seed = 0
    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def generator(self, index: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {self.epoch} {index}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Files(Items):
    """Items read from files by `read(key, generator)`; the generator is None outside training."""

    def __init__(
        self,
        keys: Sequence[Any],
        labels: Sequence[int],
        read: Callable[..., dict[str, Tensor]],
        training: bool,
    ) -> None:
        self.keys, self.labels, self.read, self.training = list(keys), list(labels), read, training

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.keys[index], self.generator(index) if self.training else None), self.labels[
            index
        ]


def from_files(
    splits: dict[str, list[tuple[Any, int]]], classes: list[str], read: Callable[..., dict[str, Tensor]]
) -> Data:
    """Data from (key, label) lists for "train", "validation" and "test", read when asked for."""
    made = {}
    for name, items in splits.items():
        if not items:
            raise ValueError(f"the {name} data is empty; --check lists what is there and what is missing")
        keys, labels = zip(*items, strict=True)
        made[name] = Files(keys, labels, read, training=name == "train")
    return Data(made["train"], made["validation"], made["test"], classes)


class Memory(Items):
    """Items held in memory as tensors [n, ...] by modality; a batch is one indexing operation."""

    def __init__(self, x: dict[str, Tensor], y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Sample:
        return {name: x[index] for name, x in self.x.items()}, self.y[index]

    def __getitems__(self, indices: list[int]) -> Sample:
        rows = torch.tensor(indices)
        return {name: x[rows] for name, x in self.x.items()}, self.y[rows]


def held_out(name: str, percent: int = 10) -> bool:
    """Whether an item of the training list is for validation: by its name alone, so the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


def read_list(path: Path) -> list[str]:
    """A text file's lines without blanks; an error that says where the file belongs."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --check lists everything that is missing")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def report(found: dict[str, int], missing: Sequence[str], needed: str) -> Check:
    """Counts of what was found, the first missing names, and what belongs where."""
    lines = [f"{what}: {count}" for what, count in found.items()]
    if missing:
        shown = [f"missing: {name}" for name in list(missing)[:10]]
        lines += [*shown, *([f"... and {len(missing) - 10} more"] if len(missing) > 10 else []), needed]
    return Check(lines, not missing)
