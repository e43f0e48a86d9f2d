"""UCF101: 13,320 clips of 101 actions (crcv.ucf.edu/data/UCF101.php), the first of the three splits.

    DIR/UCF-101/CLASS/v_CLASS_gNN_cNN.avi
    DIR/ucfTrainTestlist/classInd.txt, trainlist01.txt, testlist01.txt
    DIR/tvl1_flow/u/v_CLASS_gNN_cNN/frame000001.jpg, DIR/tvl1_flow/v/...    for motion="flow": images of
        optical flow, as distributed at ftp.tugraz.at/pub/feichtenhofer/tsfusion

Clips of one group show the same scene, so that the groups 8 and 9 of the training list are for validation as
a whole. Motion is the difference of a frame and the one after it (3 channels), or horizontal and vertical
flow (2 channels).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from .base import Check, Data, from_files, read_list, report
from .media import MEAN, STD, cached, choose, crop, list_images, read_frames, read_image

VALIDATION_GROUPS = ("g08", "g09")


def _splits(folder: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    lists = folder / "ucfTrainTestlist"
    classes = [line.split()[1] for line in read_list(lists / "classInd.txt")]
    splits: dict[str, list[tuple[Path, int]]] = {"train": [], "validation": [], "test": []}
    for name in ("trainlist01.txt", "testlist01.txt"):
        for line in read_list(lists / name):
            clip = Path(line.split()[0])
            if clip.parent.name not in classes:
                raise ValueError(f"{lists / name}: got the line {line!r}, expected CLASS/CLIP.avi")
            held = clip.stem.split("_")[-2] in VALIDATION_GROUPS
            side = "test" if name.startswith("test") else "validation" if held else "train"
            splits[side].append((clip, classes.index(clip.parent.name)))
    return splits, classes


def _flow(folder: Path, clip: Path) -> list[Path]:
    return [folder / "tvl1_flow" / axis / clip.stem for axis in "uv"]


def check(folder: Path, config: Config) -> Check:
    needed = "UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip of crcv.ucf.edu/data/UCF101.php"
    lists = [
        folder / "ucfTrainTestlist" / name for name in ("classInd.txt", "trainlist01.txt", "testlist01.txt")
    ]
    absent = [str(path) for path in lists if not path.is_file()]
    if absent:
        return report({}, absent, needed)
    splits, classes = _splits(folder)
    missing = []
    for items in splits.values():
        for clip, _ in items:
            needs = [folder / "UCF-101" / clip, *(_flow(folder, clip) if config.motion == "flow" else [])]
            missing += [str(path) for path in needs if not path.exists()]
    found = {f"{name} clips": len(items) for name, items in splits.items()}
    return report(found | {"classes": len(classes)}, missing, needed)


def _read(
    clip: Path, generator: torch.Generator | None, folder: Path, config: Config, cache: Path | None
) -> dict[str, Tensor]:
    """{"rgb": [frames, 3, size, size], "motion": [frames, 2 or 3, size, size]}, both cropped alike."""

    def decode() -> dict[str, Tensor]:
        side = round(config.size * 8 / 7)
        return {
            "pairs": read_frames(folder / "UCF-101" / clip, config.fps, config.frames, side, following=True)
        }

    pairs = cached(
        cache and cache / f"{config.fps:g}-{config.frames}-{config.size}" / f"{clip.stem}.pt", decode
    )["pairs"]
    state = None if generator is None else generator.get_state()
    chosen = pairs[choose(len(pairs), config.frames, generator)]
    if config.motion == "difference":
        both = crop(chosen.flatten(0, 1), config.size, generator).unflatten(0, chosen.shape[:2])
        return {"rgb": (both[:, 0] - MEAN) / STD, "motion": (both[:, 1] - both[:, 0]) / 0.1}
    rgb = crop(chosen[:, 0], config.size, generator)
    if generator is not None and state is not None:
        generator.set_state(state)  # the same places in time and the same crop
    axes = [list_images(path) for path in _flow(folder, clip)]
    count = min(len(images) for images in axes)
    if count == 0:
        raise FileNotFoundError(
            f"{_flow(folder, clip)[0]}: no images of optical flow; --check lists everything that is missing"
        )
    places = choose(count, config.frames, generator)
    flow = torch.stack([torch.cat([read_image(images[i], "L") for images in axes]) for i in places])
    return {"rgb": (rgb - MEAN) / STD, "motion": (crop(flow, config.size, generator) - 0.5) / 0.25}


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    splits, classes = _splits(folder)
    read = partial(_read, folder=folder, config=config, cache=cache)
    return from_files(splits, classes, read)
