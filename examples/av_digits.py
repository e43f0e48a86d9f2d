"""ARL on real sound and images: spoken digits (Free Spoken Digit Dataset) and handwritten ones (MNIST).

    python examples/av_digits.py FOLDER [--seeds 5] [--noise 0] [--out build/av_digits.png]

FOLDER holds fsdd/recordings/DIGIT_SPEAKER_INDEX.wav and mnist/t10k-images-idx3-ubyte,
mnist/t10k-labels-idx1-ubyte (also with .gz). A recording is paired with an image of the same digit. Of the
six speakers three are for training, one for validation and two for testing, and so for the images: no speaker
and no image is in two of them. Each method has the learning rate that is best for it on the validation data,
and fusion weights come from there too. --noise adds noise to the images, in units of their standard
deviation, so that one modality becomes much weaker than the other.
"""

from __future__ import annotations

import gzip
import time
import wave
from pathlib import Path

import torch
from shared import Net, arguments, picture, show, with_control, write_rows
from torch import Tensor, nn
from torch.nn import functional as F

from arl_fast.ladder import Batches, Budget, Data, climb

MODALITIES = ["audio", "visual"]
PER_CLASS = 60
WIDTH = 64
SAMPLES = 5120  # 0.64 s at 8 kHz
BATCH = 30
BUDGET = Budget(epochs=12, rates=(0.03, 0.1))
METHODS = ["late", "joint", "unimodal", "constant", "share"]


def spectrogram(path: Path) -> Tensor:
    """Log-spectrogram [32, 32] of a mono 16-bit recording, cut or padded to SAMPLES."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{path}: expected mono, 16 bit")
        samples = (
            torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 32768
        )
    samples = F.pad(samples[:SAMPLES], (0, max(0, SAMPLES - len(samples))))
    # [129, 41]
    power = torch.stft(samples, 256, 128, window=torch.hann_window(256), return_complex=True).abs().square()
    return torch.log(F.adaptive_avg_pool2d(power[None, :96], 32)[0] + 1e-4)


def idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, as MNIST comes."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


def standardise(x: Tensor) -> Tensor:
    return ((x - x.mean()) / x.std())[:, None]


class Digits:
    """Both collections in memory; ``split(seed)`` deals out speakers and images and pairs them."""

    def __init__(self, folder: Path, noise: float) -> None:
        recordings = sorted((folder / "fsdd" / "recordings").glob("*.wav"))
        if not recordings:
            raise SystemExit(f"{folder}: no fsdd/recordings/*.wav there")
        names = [path.stem.split("_") for path in recordings]
        self.audio = standardise(torch.stack([spectrogram(path) for path in recordings]))  # [3000, 1, 32, 32]
        self.spoken = torch.tensor([int(digit) for digit, _, _ in names])
        speakers = sorted({speaker for _, speaker, _ in names})
        self.speaker = torch.tensor([speakers.index(speaker) for _, speaker, _ in names])
        # [10000, 1, 28, 28]
        self.visual = standardise(idx(folder / "mnist" / "t10k-images-idx3-ubyte").float())
        self.written = idx(folder / "mnist" / "t10k-labels-idx1-ubyte").long()
        self.noise = noise

    def split(self, seed: int) -> Data:
        generator = torch.Generator().manual_seed(seed)
        speakers = torch.randperm(int(self.speaker.max()) + 1, generator=generator)
        images = torch.randperm(len(self.written), generator=generator)
        sides = []
        for side, (people, per_class) in enumerate(
            ((speakers[:3], PER_CLASS), (speakers[3:5], 100), (speakers[5:], 30))
        ):
            chosen = torch.isin(self.speaker, people)
            sounds, pictures = [], []
            for digit in range(10):
                said = (chosen & (self.spoken == digit)).nonzero()[:, 0]
                third = images[side::3]
                shown = third[self.written[third] == digit][:per_class]
                sounds.append(said[torch.randperm(len(said), generator=generator)[: len(shown)]])
                pictures.append(shown[: len(sounds[-1])])
            visual = self.visual[torch.cat(pictures)]
            visual = visual + self.noise * torch.randn(visual.shape, generator=generator)
            sounds = torch.cat(sounds)
            x = {"audio": self.audio[sounds], "visual": visual}
            sides.append(Batches(x, self.spoken[sounds], None if side else BATCH))
        train, test, validation = sides
        return Data(train, validation, test)


def encoder() -> nn.Module:
    """A small convolutional network, one channel in, WIDTH features out."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(16 * 36, WIDTH),
        nn.ReLU(),
    )


def net() -> Net:
    return Net({m: encoder() for m in MODALITIES}, WIDTH, 10)


def main() -> None:
    parser = arguments(__doc__, seeds=5, out="build/av_digits.png")
    parser.add_argument("folder", type=Path, help="the folder with fsdd/ and mnist/")
    parser.add_argument("--noise", type=float, default=0.0, help="noise added to the images (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    digits = Digits(options.folder, options.noise)
    results = climb(net, digits.split, BUDGET, options.seeds, METHODS)
    results = with_control(results, net, digits.split, BUDGET, options.seeds)
    print(f"\nSpoken and written digits, image noise {options.noise:g}, ", end="")
    print(f"{PER_CLASS} training samples per class, {BUDGET.epochs} epochs, {options.seeds} seeds\n")
    show(results)
    picture(results, options.out)
    if options.rows:
        write_rows(results, options.rows, example="av_digits", noise=options.noise)
    print(f"Picture: {options.out}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
