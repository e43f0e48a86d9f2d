"""Omniglot (Lake et al., 2015): characters as images and as the pen's path, each by 20 drawers.

    DIR/images_background_small1.zip, DIR/strokes_background_small1.zip    github.com/brendenlake/omniglot

Any images_NAME.zip with its strokes_NAME.zip is read, as it is. A class is a character, a sample one
drawer's. Which drawers are for training, validation and testing is fixed in splits/omniglot.json, five ways;
seed k takes the k-th.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from .base import Check, Data, Memory, report

SPLITS = Path(__file__).parents[1] / "splits" / "omniglot.json"
SIDE, POINTS = 28, 64


def _archives(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of an archive of images and its archive of strokes."""
    return [
        (path, path.with_name(path.name.replace("images", "strokes", 1)))
        for path in sorted(folder.glob("images_*.zip"))
    ]


def _image(data: bytes) -> Tensor:
    """Ink as 1: [1, 28, 28]."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(
            image.height, image.width
        )
    ink = 1 - pixels.float() / 255
    return F.interpolate(ink[None, None], (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[
        0
    ]


def _path(text: str) -> Tensor:
    """Strokes as lines "x,y,time" between START and BREAK: 64 points evenly spaced along the ink.

    Returns [64, 3]: x and y about 0 with the longer side 2, and the number of the stroke divided by 4.
    """
    points, strokes = [], 0
    for line in text.split("\n"):
        line = line.strip()
        if line == "BREAK":
            strokes += 1
        elif line and line != "START":
            x, y, _ = line.split(",")
            points.append((float(x), float(y), float(strokes)))
    if not points:
        raise ValueError("a file of strokes without a point")
    path = torch.tensor(points)
    place = path[:, :2]
    low, high = place.amin(0), place.amax(0)
    place = 2 * (place - (low + high) / 2) / (high - low).amax().clamp(min=1)
    path = torch.cat([place, path[:, 2:] / 4], 1)
    # the pen's way in the air is no ink
    steps = (path[1:, :2] - path[:-1, :2]).norm(dim=1) * (path[1:, 2] == path[:-1, 2])
    length = torch.cat([torch.zeros(1), steps.cumsum(0)])
    at = torch.linspace(0, float(length[-1]), POINTS)
    after = (
        torch.searchsorted(length, at).clamp(1, max(1, len(length) - 1))
        if len(path) > 1
        else torch.zeros(POINTS, dtype=torch.long)
    )
    before = (after - 1).clamp(min=0)
    share = ((at - length[before]) / (length[after] - length[before]).clamp(min=1e-9)).clamp(0, 1)[:, None]
    mixed = path[before] + share * (path[after] - path[before])
    return torch.cat([mixed[:, :2], torch.where(share > 0.5, path[after, 2:], path[before, 2:])], 1)


@lru_cache(maxsize=1)
def _everything(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Images, paths, labels, drawers, classes. A character in two archives counts once."""
    samples: dict[str, tuple[bytes, str]] = {}
    for images, strokes in _archives(folder):
        with zipfile.ZipFile(images) as i, zipfile.ZipFile(strokes) as s:
            texts = {_name(n): n for n in s.namelist() if n.endswith(".txt") and not n.startswith("__MACOSX")}
            for entry in i.namelist():
                name = _name(entry)
                if entry.endswith(".png") and not entry.startswith("__MACOSX") and name not in samples:
                    if name not in texts:
                        raise ValueError(f"{strokes}: has no strokes for {name}")
                    samples[name] = (i.read(entry), s.read(texts[name]).decode())
    if not samples:
        raise FileNotFoundError(
            f"{folder}/images_*.zip: no such files; --check lists everything that is missing"
        )
    names = sorted(samples)
    classes = sorted({name.rpartition("/")[0] for name in names})
    labels = torch.tensor([classes.index(name.rpartition("/")[0]) for name in names])
    drawers = torch.tensor([int(name.rpartition("_")[2]) for name in names])
    images_ = torch.stack([_image(samples[name][0]) for name in names])
    paths = torch.stack([_path(samples[name][1]) for name in names])
    return images_, paths, labels, drawers, classes


def _name(entry: str) -> str:
    """Alphabet/character/number_drawer, without the archive's folder and the ending."""
    return entry.partition("/")[2].rpartition(".")[0]


def check(folder: Path, config: Config) -> Check:
    pairs = _archives(folder)
    missing = [str(strokes) for _, strokes in pairs if not strokes.is_file()]
    if not pairs:
        missing.append(f"{folder}/images_*.zip")
    needed = "images_NAME.zip and strokes_NAME.zip: the folder python of github.com/brendenlake/omniglot"
    return report({"archives of images": len(pairs)}, missing, needed)


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    images, paths, labels, drawers, classes = _everything(folder)
    folds = json.loads(SPLITS.read_text())["folds"]
    number = seed % len(folds)
    sides = {}
    for side in ("train", "validation", "test"):
        rows = torch.isin(drawers, torch.tensor(folds[number][side])).nonzero()[:, 0]
        sides[side] = Memory({"image": images[rows], "strokes": paths[rows]}, labels[rows])
    return Data(**sides, classes=classes, fold=str(number))
