"""CREMA-D: 7,442 acted sentences, six emotions (github.com/CheyneyComputerScience/CREMA-D).

DIR/AudioWAV/1001_DFA_ANG_XX.wav
DIR/VideoFlash/1001_DFA_ANG_XX.flv, or images in DIR/Image-01-FPS/1001_DFA_ANG_XX/
DIR/train.csv, DIR/test.csv     lines "1001_DFA_ANG_XX,ANG", as in dataset/data/CREMAD of the release
DIR/val.csv                     optional; without it a tenth of train.csv, by the clips' names
"""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from . import clips
from .base import Check, Data, held_out, read_list, report

CLASSES = ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]


def _splits(folder: Path) -> dict[str, list[tuple[clips.Clip, int]]]:
    train, test = _read(folder, "train.csv"), _read(folder, "test.csv")
    if (folder / "val.csv").exists():
        return {"train": train, "validation": _read(folder, "val.csv"), "test": test}
    return {
        "train": [item for item in train if not held_out(item[0].name)],
        "validation": [item for item in train if held_out(item[0].name)],
        "test": test,
    }


def _read(folder: Path, list_name: str) -> list[tuple[clips.Clip, int]]:
    items = []
    for line in read_list(folder / list_name):
        name, _, emotion = line.partition(",")
        if emotion not in CLASSES:
            raise ValueError(
                f"{folder / list_name}: got the line {line!r}, expected NAME,EMOTION with one of {CLASSES}"
            )
        images = folder / "Image-01-FPS" / name
        visual = images if images.is_dir() else folder / "VideoFlash" / f"{name}.flv"
        items.append((clips.Clip(name, folder / "AudioWAV" / f"{name}.wav", visual), CLASSES.index(emotion)))
    return items


def check(folder: Path, config: Config) -> Check:
    lists = [str(folder / name) for name in ("train.csv", "test.csv") if not (folder / name).is_file()]
    if lists:
        return report(
            {}, lists, "the lists are in dataset/data/CREMAD of github.com/shicaiwei123/ICCV2025-ARL"
        )
    splits = _splits(folder)
    missing = [str(path) for items in splits.values() for clip, _ in items for path in clip.missing()]
    return report(
        {f"{name} clips": len(items) for name, items in splits.items()},
        missing,
        "AudioWAV and VideoFlash: github.com/CheyneyComputerScience/CREMA-D (git lfs pull)",
    )


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    return clips.data(_splits(folder), CLASSES, config, cache)
