"""Sound and pictures from files: decoding (by PyAV, imported when needed), spectrograms, frames, crops."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGES = (".jpg", ".jpeg", ".png")
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's, as in the release
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class NoSound(ValueError):
    """A file without a sound track, or with an empty one."""


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'reading sound and video needs PyAV: pip install "arl_fast[experiments]", or pip install av'
        ) from error
    return av


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --check lists everything that is missing")
    return _av().open(str(path))


def read_audio(path: Path, rate: int) -> Tensor:
    """The sound of a WAV or video file as mono samples [n] in -1 to 1 at `rate` Hz."""
    av = _av()
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    with _open(path) as container:
        if not container.streams.audio:
            raise NoSound(f"{path}: has no sound")
        pieces = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        pieces += resampler.resample(None)  # what the resampler still holds
    if not pieces:
        raise NoSound(f"{path}: its sound is empty")
    return torch.cat([torch.from_numpy(piece.to_ndarray()[0].copy()) for piece in pieces])


def fit_length(samples: Tensor, length: int) -> Tensor:
    """Repeated until long enough, then cut, as the release does."""
    return samples.repeat(-(-length // len(samples)))[:length]


def spectrogram(samples: Tensor, window: int, hop: int, centred: bool) -> Tensor:
    """log(|Fourier transform| + 1e-7) of samples [n]: [1, window // 2 + 1, frames]."""
    transform = torch.stft(
        samples.clamp(-1, 1),
        window,
        hop,
        window=torch.hann_window(window),
        center=centred,
        pad_mode="constant",
        return_complex=True,
    )
    return torch.log(transform.abs() + 1e-7)[None]


def read_frames(path: Path, fps: float, at_least: int, side: int, following: bool = False) -> Tensor:
    """Frames of a video, evenly spaced: uint8 [n, 3, H, W], their shorter side `side`.

    n is `fps` per second, but not fewer than `at_least`. With `following`, each frame and the one after it:
    [n, 2, 3, H, W]. Only these frames are held in memory, whatever the video's length.
    """
    count, rate = _length(path)
    chosen = [(i,) for i in centres(count, max(at_least, round(count / rate * fps)))]
    if following:
        chosen = [(min(i, max(count - 2, 0)), min(i + 1, count - 1)) for (i,) in chosen]  # type: ignore[misc]
    needed, kept = {i for group in chosen for i in group}, {}
    with _open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(_pictures(container)):
            if number in needed:
                kept[number] = _shrink(frame, side)
            if number == max(needed):
                break
    if not kept:
        raise ValueError(f"{path}: no frame could be decoded")
    last = kept[max(kept)]  # of a damaged file, fewer frames can be decoded than it says it has
    frames = [torch.stack([kept.get(i, last) for i in group]) for group in chosen]
    return torch.stack(frames) if following else torch.cat(frames)


def _pictures(container: Any) -> Iterator[Any]:
    """The frames that can be decoded: for a damaged packet PyAV 19 raises an error where 18 gave none."""
    for packet in container.demux(video=0):
        with contextlib.suppress(_av().error.InvalidDataError):
            yield from packet.decode()


def _length(path: Path) -> tuple[int, float]:
    """Number of frames, counted without decoding, and frames per second."""
    with _open(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: has no pictures")
        count = sum(1 for packet in container.demux(video=0) if packet.size)
        rate = float(container.streams.video[0].average_rate or 25)
    if not count:
        raise ValueError(f"{path}: no frame could be decoded")
    return count, rate


def _shrink(frame: Any, side: int) -> Tensor:
    scale = side / min(frame.width, frame.height)
    width, height = (max(side, round(scale * n)) for n in (frame.width, frame.height))
    return torch.from_numpy(frame.to_ndarray(width=width, height=height, format="rgb24").copy()).permute(
        2, 0, 1
    )


def list_images(folder: Path) -> list[Path]:
    """A folder's images in the order of their names: the file system's own order is no order."""
    return (
        sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    )


def read_image(path: Path, mode: str = "RGB") -> Tensor:
    """An image file: uint8 [channels, H, W]."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def centres(available: int, count: int) -> list[int]:
    """The middle of each of `count` equal parts of range(available)."""
    return [min(available - 1, int((k + 0.5) * available / count)) for k in range(count)]


def choose(available: int, count: int, generator: torch.Generator | None) -> list[int]:
    """One of each of `count` equal parts: at random in training (with a generator), the middle otherwise."""
    if generator is None:
        return centres(available, count)
    at = torch.rand(count, generator=generator)
    return [min(available - 1, int((k + float(at[k])) * available / count)) for k in range(count)]


def crop(pictures: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """uint8 or float [n, C, H, W] of 0 to 255 -> float [n, C, size, size] of 0 to 1.

    In training, a random part of 8 to 100 % of the area, 3:4 to 4:3, flipped half of the time, the same for
    all n (torchvision's RandomResizedCrop and RandomHorizontalFlip); otherwise everything, resized.
    """
    x = pictures.float() / 255
    if generator is not None:
        height, width = x.shape[-2:]
        area, shape, top, left, flip = torch.rand(5, generator=generator).tolist()
        area = height * width * (0.08 + 0.92 * area)
        ratio = (3 / 4) ** (1 - 2 * shape)
        w, h = (
            min(width, max(1, round((area * ratio) ** 0.5))),
            min(height, max(1, round((area / ratio) ** 0.5))),
        )
        i, j = int(top * (height - h + 1)), int(left * (width - w + 1))
        x = x[..., i : i + h, j : j + w]
        if flip < 0.5:
            x = x.flip(-1)
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def cached(file: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` returns, kept in `file` if given; several processes may share the file."""
    if file is not None and file.exists():
        return torch.load(file, weights_only=True)
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        torch.save(made, partial)
        os.replace(partial, file)
    return made
