"""Miniatures of every data set's real layout: a few files each, with real WAV and video."""

from __future__ import annotations

import math
import pickle
import struct
import wave
import zipfile
from pathlib import Path

import numpy as np


def write_wav(path: Path, seconds: float, rate: int = 16000, pitch: float = 440.0) -> None:
    """A tone as mono 16-bit WAV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [int(12000 * math.sin(2 * math.pi * pitch * i / rate)) for i in range(int(seconds * rate))]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def write_video(
    path: Path, frames: int, codec: str, sound: bool = False, size: tuple[int, int] = (64, 48), rate: int = 10
) -> None:
    """A video whose k-th frame has the grey level 8 k, with a tone if asked for."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        video.bit_rate = 2_000_000
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for k in range(frames):
            grey = np.full((size[1], size[0], 3), min(255, 8 * k), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            length = 16000 * frames // rate
            tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / 16000)).astype(np.float32)[None]
            for start in range(0, length, 1024):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(tone[:, start : start + 1024]), format="fltp", layout="mono"
                )
                frame.sample_rate, frame.pts = 16000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def write_image(path: Path, value: int, slope: int = 0, size: tuple[int, int] = (48, 40)) -> None:
    """Grey, brighter by `slope` per column."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    row = (value + slope * np.arange(size[0])).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.broadcast_to(row[None, :, None], (size[1], size[0], 3)).copy()).save(path)


def crema_d(folder: Path) -> None:
    """Two clips per emotion and list; half of the clips as FLV video, half as folders of images."""
    lists: dict[str, list[str]] = {"train.csv": [], "val.csv": [], "test.csv": []}
    actor = 1001
    for e, emotion in enumerate(["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]):
        for name in lists:
            for take in range(2 if name == "train.csv" else 1):
                clip = f"{actor}_DFA_{emotion}_XX"
                actor += 1
                lists[name].append(f"{clip},{emotion}")
                write_wav(folder / "AudioWAV" / f"{clip}.wav", 0.4, pitch=200 + 100 * e)
                if take:
                    for k in (1, 2):
                        write_image(folder / "Image-01-FPS" / clip / f"0000{k}.jpg", 20 * e, slope=3)
                else:
                    write_video(folder / "VideoFlash" / f"{clip}.flv", 5, "flv1")
    for name, lines in lists.items():
        (folder / name).write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")


def ave(folder: Path) -> None:
    for part, name in enumerate(("trainSet.txt", "valSet.txt", "testSet.txt")):
        lines = []
        for c, label in enumerate(("Church bell", "Male speech, man speaking")):
            for take in range(3 if part == 0 else 1):
                video = f"-v{part}{c}{take}"
                write_video(folder / "AVE" / f"{video}.mp4", 12, "mpeg4", sound=True)
                lines.append(f"{label}&{video}&good&0&10")
        (folder / name).write_text("\n".join(lines) + "\n")


def kinetics_sounds(folder: Path) -> None:
    """Training videos in folders named after the classes, validation videos flat with a table."""
    (folder / "annotations").mkdir(parents=True)
    rows = ["label,youtube_id,time_start,time_end,split"]
    for label in ("playing drums", "tap dancing", "archery"):
        for take in range(12 if label == "playing drums" else 4):
            write_video(
                folder / "train" / label.replace(" ", "_") / f"{label[:3]}{take}_000000_000010.mp4",
                3,
                "mpeg4",
                sound=True,
            )
        write_video(folder / "val" / f"v-{label[:3]}_000003_000013.mp4", 3, "mpeg4", sound=True)
        rows.append(f"{label},v-{label[:3]},3,13,val")
    (folder / "annotations" / "val.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("playing drums\ntap dancing\n")


def ucf101(folder: Path) -> None:
    (folder / "ucfTrainTestlist").mkdir(parents=True)
    train, test = [], []
    for c, name in enumerate(("ApplyLipstick", "Archery"), 1):
        for group in (1, 8, 9, 10, 11):
            clip = f"{name}/v_{name}_g{group:02d}_c01.avi"
            write_video(folder / "UCF-101" / clip, 6, "mpeg4")
            for axis in "uv":
                for k in range(1, 6):
                    write_image(folder / "tvl1_flow" / axis / Path(clip).stem / f"frame{k:06d}.jpg", 100 + k)
            (test.append(clip) if group == 1 else train.append(f"{clip} {c}"))
    (folder / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyLipstick\n2 Archery\n")
    (folder / "ucfTrainTestlist" / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (folder / "ucfTrainTestlist" / "testlist01.txt").write_text("\n".join(test) + "\n")


def mosi(folder: Path) -> None:
    draw = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 10), ("valid", 6), ("test", 6)):
        scores = np.linspace(-3, 3, count).astype(np.float32)
        splits[name] = {
            "id": [f"video${i}" for i in range(count)],
            "raw_text": np.array(["words"] * count),
            "text": draw.standard_normal((count, 50, 768)).astype(np.float32),
            "audio": draw.standard_normal((count, 50, 5)),
            "vision": draw.standard_normal((count, 50, 20)),
            "regression_labels": scores,
        }
    splits["train"]["audio"][0, 0, 0] = -np.inf  # as in the real file, where a logarithm of zero is left
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "aligned_50.pkl").open("wb") as file:
        pickle.dump(splits, file)


def av_digits(folder: Path) -> None:
    for digit in range(10):
        for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
            for take in range(3):
                path = folder / "fsdd" / "recordings" / f"{digit}_{speaker}_{take}.wav"
                write_wav(path, 0.2 + 0.1 * take, rate=8000, pitch=200 + 50 * digit)
    labels = np.tile(np.arange(10), 9).astype(np.uint8)
    images = np.repeat(labels * 20, 28 * 28).astype(np.uint8)
    (folder / "mnist").mkdir(parents=True)
    (folder / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(
        struct.pack(">4BI", 0, 0, 8, 1, 90) + labels.tobytes()
    )
    header = struct.pack(">4B3I", 0, 0, 8, 3, 90, 28, 28)
    (folder / "mnist" / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())


def omniglot(folder: Path) -> None:
    import io

    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    with (
        zipfile.ZipFile(folder / "images_background_small1.zip", "w") as images,
        zipfile.ZipFile(folder / "strokes_background_small1.zip", "w") as strokes,
    ):
        strokes.writestr("__MACOSX/strokes_background_small1/._.DS_Store", "")
        for c in (1, 2):
            for drawer in range(1, 21):
                name = f"Greek/character{c:02d}/{c:04d}_{drawer:02d}"
                picture = Image.new("1", (105, 105), 1)
                ImageDraw.Draw(picture).line([(20, 20), (80, 20 * c)], fill=0, width=3)
                data = io.BytesIO()
                picture.save(data, "PNG")
                images.writestr(f"images_background_small1/{name}.png", data.getvalue())
                lines = "START\n20.0,-20.0,0\n80.0,-20.0,400\nBREAK\n" + (
                    "50.0,-60.0,900\nBREAK\n" if c == 2 else ""
                )
                strokes.writestr(f"strokes_background_small1/{name}.txt", lines)


def mfeat(folder: Path) -> None:
    """Every file with its 2,000 lines, 200 per digit, but only a few columns."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in ("fac", "fou", "kar", "mor", "pix", "zer"):
        np.savetxt(folder / f"mfeat-{name}", draw.integers(0, 9, (2000, 3)), fmt="%d")
