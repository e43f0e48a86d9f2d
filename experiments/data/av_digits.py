"""AV-digits: spoken digits (Free Spoken Digit Dataset) paired with handwritten ones (MNIST's test images).

    DIR/fsdd/recordings/DIGIT_SPEAKER_INDEX.wav        github.com/Jakobovski/free-spoken-digit-dataset
    DIR/mnist/t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte    also with .gz

A recording is paired with an image of the same digit. Which speakers are for training, validation and testing
is fixed in splits/av-digits.json, five ways; seed k takes the k-th. Images are dealt to the three by their
place in the file, so that no speaker and no image is in two of them. With speakers="mixed", the control,
every speaker is in all three.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from .base import Check, Data, Memory, report
from .media import read_audio, spectrogram

SPLITS = Path(__file__).parents[1] / "splits" / "av-digits.json"
SIDES = ("train", "validation", "test")


def _recordings(folder: Path) -> list[Path]:
    return sorted((folder / "fsdd" / "recordings").glob("*_*_*.wav"))


def _idx(folder: Path, name: str) -> Tensor:
    """An IDX file of unsigned bytes, as MNIST comes."""
    path = folder / "mnist" / name
    zipped = path.with_name(path.name + ".gz")
    if not path.is_file() and not zipped.is_file():
        raise FileNotFoundError(f"{path}[.gz]: no such file; --check lists everything that is missing")
    data = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


def _sound(path: Path, config: Config) -> Tensor:
    """Log-spectrogram [1, 32, 32] of the lower three quarters of the band, padded with silence or cut."""
    length = round(config.seconds * config.sample_rate)
    samples = read_audio(path, config.sample_rate)[:length]
    samples = F.pad(samples, (0, length - len(samples)))
    bins = spectrogram(samples, config.window, config.hop, config.centred)
    return torch.log(F.adaptive_avg_pool2d(bins.exp().square()[:, : config.window * 3 // 8], 32) + 1e-4)


@lru_cache(maxsize=1)
def _sounds(folder: Path, config: Config) -> Tensor:
    return torch.stack([_sound(path, config) for path in _recordings(folder)])


def check(folder: Path, config: Config) -> Check:
    names = ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    missing = [
        f"{folder}/mnist/{name}[.gz]" for name in names if not list((folder / "mnist").glob(f"{name}*"))
    ]
    recordings = _recordings(folder)
    if not recordings:
        missing.append(f"{folder}/fsdd/recordings/*.wav")
    speakers = len({path.stem.split("_")[1] for path in recordings})
    found = {"recordings": len(recordings), "speakers": speakers}
    return report(
        found,
        missing,
        "recordings: github.com/Jakobovski/free-spoken-digit-dataset; images: MNIST's two t10k files",
    )


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    recordings = _recordings(folder)
    if not recordings:
        raise FileNotFoundError(
            f"{folder}/fsdd/recordings/*.wav: no such files; --check lists everything that is missing"
        )
    names = [path.stem.split("_") for path in recordings]
    sounds = _sounds(folder, config)
    said = torch.tensor([int(digit) for digit, _, _ in names])
    pictures = _idx(folder, "t10k-images-idx3-ubyte").float()[:, None]
    written = _idx(folder, "t10k-labels-idx1-ubyte").long()
    sounds, pictures = (sounds - sounds.mean()) / sounds.std(), (pictures - pictures.mean()) / pictures.std()
    folds = json.loads(SPLITS.read_text())["folds"]
    number = seed % len(folds)
    generator = torch.Generator().manual_seed(seed)
    sides = {}
    for place, side in enumerate(SIDES):
        people, limit = (
            set(folds[number][side]),
            {"train": config.per_class, "validation": 30, "test": 100}[side],
        )
        if config.speakers == "apart":
            mine = torch.tensor([person in people for _, person, _ in names])
        else:
            mine = torch.tensor([int(index) % 3 == place for _, _, index in names])
        chosen, shown = [], []
        for digit in range(10):
            voice = (mine & (said == digit)).nonzero()[:, 0]
            image = (written == digit).nonzero()[:, 0][place::3]
            count = min(limit, len(voice), len(image))
            if count == 0:
                raise ValueError(f"AV-digits: no recording or no image of the digit {digit} for {side}")
            chosen.append(voice[torch.randperm(len(voice), generator=generator)[:count]])
            shown.append(image[torch.randperm(len(image), generator=generator)[:count]])
        rows, images = torch.cat(chosen), pictures[torch.cat(shown)]
        images = images + config.noise * torch.randn(images.shape, generator=generator)
        sides[side] = Memory({"audio": sounds[rows], "visual": images}, said[rows])
    fold = f"{number}" if config.speakers == "apart" else "mixed"
    return Data(**sides, classes=[str(digit) for digit in range(10)], fold=fold)
