"""What every reader offers: three data sets with their modalities and classes, and a list of what is missing."""

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
    """One data set, split. Items are (inputs by modality, class index); `fold` names the split where there are several."""

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
    """A data set whose random choices depend on (seed, epoch, item) alone, not on workers, order or what ran before."""

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
    """Items read from files: `read(key, generator)` gives one item's inputs; the generator is None outside training."""

    def __init__(self, keys: Sequence[Any], labels: Sequence[int], read: Callable[..., dict[str, Tensor]], training: bool) -> None:
        self.keys, self.labels, self.read, self.training = list(keys), list(labels), read, training

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.keys[index], self.generator(index) if self.training else None), self.labels[index]


class Memory(Items):
    """Items held in memory as whole tensors [n, ...] by modality; batches are taken by one indexing operation."""

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
    """Whether an item of the training list belongs to the validation data: the same on every machine, by its name alone."""
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
