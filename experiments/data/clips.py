"""Clips with sound and pictures, which CREMA-D, AVE and Kinetics-Sounds have in common."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from .base import Data, from_files
from .media import (
    MEAN,
    STD,
    NoSound,
    cached,
    choose,
    crop,
    fit_length,
    list_images,
    read_audio,
    read_frames,
    read_image,
    spectrogram,
)


class Clip(NamedTuple):
    """Where one clip's sound and pictures are: a file with sound, and a video or a folder of images."""

    name: str
    audio: Path
    visual: Path

    def missing(self) -> list[Path]:
        return [path for path in (self.audio, self.visual) if not path.exists()]


def read_clip(
    clip: Clip, generator: torch.Generator | None, config: Config, cache: Path | None
) -> dict[str, Tensor]:
    """{"audio": log-spectrogram [1, bins, times], "visual": [frames, 3, size, size]}.

    The generator is None outside training.
    """

    def decode() -> dict[str, Tensor]:
        try:
            samples = read_audio(clip.audio, config.sample_rate)
        except NoSound as error:  # one of CREMA-D's recordings, and videos from the web
            warnings.warn(f"{error}; silence takes its place", stacklevel=2)
            samples = torch.zeros(config.sample_rate)
        return {"samples": (samples.clamp(-1, 1) * 32767).to(torch.int16), "frames": _frames(clip, config)}

    # everything that shapes what is kept belongs to its name
    kind = f"{config.sample_rate}-{config.fps:g}-{config.frames}-{config.size}"
    stored = cached(cache and cache / kind / f"{clip.name}.pt", decode)
    samples = fit_length(stored["samples"].float() / 32767, round(config.seconds * config.sample_rate))
    frames = stored["frames"][choose(len(stored["frames"]), config.frames, generator)]
    return {
        "audio": spectrogram(samples, config.window, config.hop, config.centred),
        "visual": (crop(frames, config.size, generator) - MEAN) / STD,
    }


def _frames(clip: Clip, config: Config) -> Tensor:
    if not clip.visual.is_dir():
        return read_frames(clip.visual, config.fps, config.frames, side=round(config.size * 8 / 7))
    images = list_images(clip.visual)
    if not images:
        raise FileNotFoundError(f"{clip.visual}: no images in this folder")
    return torch.stack([read_image(path) for path in images])


def data(
    splits: dict[str, list[tuple[Clip, int]]], classes: list[str], config: Config, cache: Path | None
) -> Data:
    """Data from (clip, label) lists for "train", "validation" and "test"."""
    return from_files(splits, classes, partial(read_clip, config=config, cache=cache))
