"""AVE: 4,143 ten-second videos, 28 audio-visual events (sites.google.com/view/audiovisualresearch).

    DIR/AVE/VIDEO.mp4               videos with their sound
    DIR/trainSet.txt, valSet.txt, testSet.txt   lines "Category&VIDEO&Quality&Start&End"
    DIR/Audio/VIDEO.wav, DIR/Image-01-FPS-SE/VIDEO/   optional, in the place of the videos: sound and images

Frames come from the event, Start to End, only if the images are cut to it; from videos they come from all ten
seconds.
"""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from . import clips
from .base import Check, Data, read_list, report

LISTS = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt"}


def _splits(folder: Path) -> tuple[dict[str, list[tuple[clips.Clip, int]]], list[str]]:
    rows = {}
    for split, name in LISTS.items():
        rows[split] = [line.split("&") for line in read_list(folder / name)]
        wrong = [row for row in rows[split] if len(row) != 5]
        if wrong:
            raise ValueError(f"{folder / name}: got {wrong[0]}, expected Category&VIDEO&Quality&Start&End")
    classes = sorted({row[0] for split in rows.values() for row in split})
    splits: dict[str, list[tuple[clips.Clip, int]]] = {}
    for split, lines in rows.items():
        # a video listed twice counts once, with its first event
        unique = {row[1]: row[0] for row in reversed(lines)}
        splits[split] = [
            (_clip(folder, video), classes.index(label)) for video, label in sorted(unique.items())
        ]
    return splits, classes


def _clip(folder: Path, video: str) -> clips.Clip:
    sound, images, film = (
        folder / "Audio" / f"{video}.wav",
        folder / "Image-01-FPS-SE" / video,
        folder / "AVE" / f"{video}.mp4",
    )
    return clips.Clip(video, sound if sound.is_file() else film, images if images.is_dir() else film)


def check(folder: Path, config: Config) -> Check:
    needed = "AVE_Dataset.zip of github.com/YapengTian/AVE-ECCV18 holds the lists and the folder AVE"
    lists = [str(folder / name) for name in LISTS.values() if not (folder / name).is_file()]
    if lists:
        return report({}, lists, needed)
    splits, classes = _splits(folder)
    missing = sorted({str(path) for items in splits.values() for clip, _ in items for path in clip.missing()})
    found = {f"{name} clips": len(items) for name, items in splits.items()}
    return report(found | {"classes": len(classes)}, missing, needed)


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    splits, classes = _splits(folder)
    return clips.data(splits, classes, config, cache)
