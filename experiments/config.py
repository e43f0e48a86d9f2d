"""One configuration per data set. Every field is an option of ``python -m experiments.run``.

Values are the paper's where it states them; comments name what the authors' release does instead
(docs/errata.md).
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """How one data set is read, modelled and trained."""

    # data
    frames: int = 3  # per clip
    fps: float = 1.0  # frames kept per second of video, from which `frames` are chosen
    size: int = 224  # side of a frame after cropping, in pixels
    sample_rate: int = 16000  # Hz
    seconds: float = 10.0  # of sound: shorter recordings are repeated, longer ones cut
    window: int = 512  # of the Fourier transform, in samples
    hop: int = 159
    centred: bool = False  # pad the sound by half a window on both sides
    motion: str = (
        "difference"  # UCF101's second modality: "difference" of frames or "flow" (images of optical flow)
    )
    sentiments: int = (
        2  # MOSI's classes: 2 (below 0 or not), 3 (negative, neutral, positive) or 7 (-3 to 3, rounded)
    )
    speakers: str = "apart"  # AV-digits: "apart", or "mixed" where training and test share their speakers
    noise: float = 0.0  # AV-digits: noise on the images, in units of their standard deviation
    per_class: int = 60  # AV-digits: training samples per class
    # model
    encoder: str = "resnet18"  # or "swin" (needs torchvision), "transformer", "small", "mlp"
    fusion: str = "concat"  # or "sum", "shared", "gated", "bilinear", "mmtm", "transformer"
    width: int = 512  # features per modality, where the encoder does not fix them
    # training
    epochs: int = 100
    batch: int = 64  # per process
    optimizer: str = "sgd"  # or "adamw"
    rates: tuple[float, ...] = (1e-3,)  # learning rates; of several, the best on validation data counts
    momentum: float = 0.9
    weight_decay: float = 1e-4
    # learning rate x 0.1 there; the release means 70 and 150, and is an epoch early
    decay_epochs: tuple[int, ...] = (70,)
    clip: float = 40.0  # global gradient norm, as in the release; 0: none
    gamma: float = 4.0  # the release's scripts: CREMA-D 4, AVE 5, Kinetics-Sounds 3
    temperature: float = 4.0
    gain: str = (
        "residual"  # 1 + a; "plain" a is the paper's ablation, "mean_one" M a leaves the mean step as it is
    )
    warmup_epochs: int = 0  # the release: 6
    select: str = "best"  # epoch on validation data, or "last"; the release: the best on *test* data


_SMALL = Config(
    encoder="small",
    width=64,
    batch=32,
    rates=(0.03, 0.1),
    decay_epochs=(),
    clip=0.0,
    weight_decay=0.0,
    gamma=1.0,
    temperature=8.0,
)

CONFIGS: dict[str, Config] = {
    # three seconds at 22,050 Hz, 257 x 188; one frame
    "crema-d": Config(frames=1, sample_rate=22050, seconds=3.0, hop=353, centred=True, temperature=8.0),
    # ten seconds at 16,000 Hz give the paper's 257 x 1004; the release reads one frame of AVE
    "ave": Config(),
    # the release: a random five-second crop with a window of 256, at test time as well
    "ks": Config(),
    "mosi": Config(
        encoder="transformer",
        width=64,
        epochs=50,
        batch=32,
        optimizer="adamw",
        rates=(1e-3, 1e-4),
        decay_epochs=(),
        clip=1.0,
    ),
    "ucf101": Config(),
    "av-digits": dataclasses.replace(
        _SMALL, epochs=15, sample_rate=8000, seconds=0.64, window=256, hop=128, centred=True
    ),
    "omniglot": dataclasses.replace(_SMALL, epochs=20, batch=64),
    "mfeat": dataclasses.replace(_SMALL, encoder="mlp", epochs=20),
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "motion": ("difference", "flow"),
    "sentiments": (2, 3, 7),
    "speakers": ("apart", "mixed"),
    "encoder": ("resnet18", "swin", "transformer", "small", "mlp"),
    "fusion": ("concat", "sum", "shared", "gated", "bilinear", "mmtm", "transformer"),
    "gain": ("residual", "plain", "mean_one"),
    "optimizer": ("sgd", "adamw"),
    "select": ("best", "last"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option per field; one that is not given keeps the data set's value."""
    group = parser.add_argument_group("configuration (by default the data set's in experiments/config.py)")
    for field in dataclasses.fields(Config):
        name, value = "--" + field.name.replace("_", "-"), field.default
        if isinstance(value, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        elif isinstance(value, tuple):
            kind = float if field.name == "rates" else int
            group.add_argument(name, type=kind, nargs="*", metavar=kind.__name__.upper())
        else:
            group.add_argument(name, type=type(value), choices=CHOICES.get(field.name), metavar=None)


def from_options(dataset: str, options: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """The data set's configuration with the options given, and which of them changed it."""
    config = CONFIGS[dataset]
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Config)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    changes = {name: v for name, v in given.items() if v != getattr(config, name)}
    config = dataclasses.replace(config, **changes)
    return config, {name: v for name, v in changes.items() if name != "rates"}  # every row has its own rate
