"""Kinetics-Sounds: classes of Kinetics-400 to see and hear (github.com/cvdfoundation/kinetics-dataset).

    DIR/train/.../ID_000010_000020.mp4    flat, or in folders named after the classes
    DIR/val/.../ID_000010_000020.mp4
    DIR/annotations/train.csv, val.csv    label,youtube_id,time_start,time_end,split; for flat folders
    DIR/classes.txt                       optional: one class per line, in the place of the release's list

Videos of other classes are passed over; many are gone from the web, so that the list is what is there. A
tenth of train, by the videos' names, is for validation, and val for testing: the release has no validation
data, and 14,799 + 2,597 clips.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ..config import Config
from . import clips
from .base import Check, Data, held_out, read_list, report

# dataset/data/KineticSound/class.txt of the release
CLASSES = """blowing nose, bowling, chopping wood, ripping paper, shuffling cards, singing, tapping pen, tying
tie, blowing out candles, dribbling basketball, laughing, mowing lawn, shoveling snow, stomping
grapes, tap dancing, tapping guitar, tickling, finger snapping, playing accordion, playing bagpipes,
playing bass guitar, playing clarinet, playing drums, playing guitar, playing harmonica, playing
keyboard, playing organ, playing piano, playing saxophone, playing trombone, playing trumpet,
playing violin, playing xylophone"""


def _classes(folder: Path) -> list[str]:
    given = folder / "classes.txt"
    return [
        _plain(name)
        for name in (read_list(given) if given.exists() else CLASSES.replace("\n", " ").split(","))
    ]


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").lower()


def _items(folder: Path, split: str, classes: list[str]) -> list[tuple[clips.Clip, int]]:
    labels = {}
    table = folder / "annotations" / f"{split}.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                labels[name] = _plain(row["label"])
    items = []
    for path in sorted((folder / split).rglob("*.mp4")):
        label = labels.get(path.stem, _plain(path.parent.name))
        if label in classes:
            items.append((clips.Clip(path.stem, path, path), classes.index(label)))
    return items


def _splits(folder: Path, classes: list[str]) -> dict[str, list[tuple[clips.Clip, int]]]:
    train = _items(folder, "train", classes)
    return {
        "train": [item for item in train if not held_out(item[0].name)],
        "validation": [item for item in train if held_out(item[0].name)],
        "test": _items(folder, "val", classes),
    }


def check(folder: Path, config: Config) -> Check:
    classes = _classes(folder)
    splits = _splits(folder, classes)
    missing = [f"{split} videos" for split, items in splits.items() if not items]
    seen = {label for items in splits.values() for _, label in items}
    missing += [f"videos of the class {name!r}" for i, name in enumerate(classes) if i not in seen]
    found = {f"{name} clips": len(items) for name, items in splits.items()}
    return report(
        found | {"classes": len(classes)},
        missing,
        f"{folder}: train and val hold NAME.mp4, in folders named after classes or with annotations/*.csv",
    )


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    classes = _classes(folder)
    return clips.data(_splits(folder, classes), classes, config, cache)
