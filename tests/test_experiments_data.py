"""The experiments' readers, on miniatures of the real layouts with real sound and video."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import miniatures
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("PIL")

from experiments.config import CONFIGS
from experiments.data import READERS, media, reader
from experiments.data.base import held_out

SHAPES = {
    "crema-d": {"audio": [1, 257, 188], "visual": [1, 3, 32, 32]},
    "ave": {"audio": [1, 257, 1004], "visual": [3, 3, 32, 32]},
    "ks": {"audio": [1, 257, 1004], "visual": [3, 3, 32, 32]},
    "mosi": {"text": [50, 768], "audio": [50, 5], "vision": [50, 20]},
    "ucf101": {"rgb": [3, 3, 32, 32], "motion": [3, 3, 32, 32]},
    "av-digits": {"audio": [1, 32, 32], "visual": [1, 28, 28]},
    "omniglot": {"image": [1, 28, 28], "strokes": [64, 3]},
    "mfeat": {view: [3] for view in ("fac", "fou", "kar", "mor", "pix", "zer")},
}


def config(name: str, **changes):
    return dataclasses.replace(CONFIGS[name], size=32, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, module in READERS.items():
        made[name] = tmp_path_factory.mktemp(module) / "data"
        getattr(miniatures, module)(made[name])
    return made


@pytest.mark.parametrize("name", list(READERS))
def test_reader_gives_what_the_layout_holds(name, folders):
    module = reader(name)
    assert module.check(folders[name], config(name)).complete
    data = module.load(folders[name], config(name), seed=0)
    assert data.shapes == SHAPES[name]
    for side in (data.train, data.validation, data.test):
        assert len(side) > 0
        for index in (0, len(side) - 1):
            x, label = side[index]
            assert 0 <= int(label) < len(data.classes)
            assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in x.values())


def test_a_damaged_video_gives_what_can_be_decoded_and_an_empty_one_says_so(tmp_path):
    miniatures.write_video(tmp_path / "a.avi", 30, "mpeg4")
    whole = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    assert media.read_frames(tmp_path / "cut.avi", fps=1.0, at_least=3, side=32).shape[0] >= 3
    miniatures.write_wav(tmp_path / "sound.wav", 0.1)
    with pytest.raises(ValueError, match=r"sound\.wav: has no pictures"):
        media.read_frames(tmp_path / "sound.wav", fps=1.0, at_least=3, side=32)
    with pytest.raises(ValueError, match=r"a\.avi: has no sound"):
        media.read_audio(tmp_path / "a.avi", 16000)


@pytest.mark.parametrize("name", list(READERS))
def test_check_names_what_is_missing_and_load_says_where_it_belongs(name, tmp_path):
    found = reader(name).check(tmp_path, config(name))
    assert not found.complete
    assert any("missing" in line for line in found.lines)
    with pytest.raises((FileNotFoundError, ValueError), match="--check"):
        reader(name).load(tmp_path, config(name), seed=0)


def test_check_names_the_clip_whose_sound_is_missing(folders):
    wav = next((folders["crema-d"] / "AudioWAV").iterdir())
    data = wav.read_bytes()
    wav.unlink()
    try:
        found = reader("crema-d").check(folders["crema-d"], config("crema-d"))
        assert not found.complete
        assert f"missing: {wav}" in found.lines
    finally:
        wav.write_bytes(data)


def test_no_speaker_drawer_group_or_clip_is_on_two_sides(folders):
    digits = reader("av-digits")
    splits = [
        digits.json.loads(digits.SPLITS.read_text()),
        reader("omniglot").json.loads(reader("omniglot").SPLITS.read_text()),
    ]
    for split, everyone in zip(splits, (6, 20), strict=True):
        for fold in split["folds"]:
            sides = [set(fold[side]) for side in ("train", "validation", "test")]
            assert sum(map(len, sides)) == len(set.union(*sides)) == everyone
    groups = {
        side: {clip.stem.split("_")[-2] for clip, _ in items}
        for side, items in reader("ucf101")._splits(folders["ucf101"])[0].items()
    }
    assert groups == {"train": {"g10", "g11"}, "validation": {"g08", "g09"}, "test": {"g01"}}
    names = {
        side: {clip.name for clip, _ in items}
        for side, items in reader("ks")._splits(folders["ks"], ["playing drums", "tap dancing"]).items()
    }
    # labels from the table; other classes passed over
    assert names["test"] == {
        "v-pla_000003_000013",
        "v-tap_000003_000013",
    }
    assert not names["train"] & names["validation"]
    assert all(held_out(name) for name in names["validation"])


def test_sound_is_resampled_and_its_spectrogram_peaks_at_the_tone(tmp_path):
    miniatures.write_wav(tmp_path / "a.wav", 1.0, rate=8000, pitch=1000.0)
    samples = media.read_audio(tmp_path / "a.wav", 16000)
    assert abs(len(samples) - 16000) < 200
    assert 0.3 < float(samples.abs().max()) < 0.45  # 12000 / 32768
    bins = media.spectrogram(media.fit_length(samples, 16000), 512, 159, centred=False)
    assert bins.shape == (1, 257, (16000 - 512) // 159 + 1)
    assert int(bins[0, :, 20].argmax()) == 32  # 1000 Hz of bins 31.25 Hz apart


def test_sound_inside_a_video_is_found(folders):
    film = next((folders["ave"] / "AVE").glob("*.mp4"))
    samples = media.read_audio(film, 16000)
    bins = media.spectrogram(media.fit_length(samples, 16000), 512, 159, centred=False)
    assert int(bins[0].mean(1).argmax()) == 14  # 440 Hz


def test_a_clip_without_sound_is_silent_and_says_so(tmp_path):
    miniatures.crema_d(tmp_path)
    data = reader("crema-d").load(tmp_path, config("crema-d"), seed=0)
    miniatures.write_wav(data.test.keys[0].audio, 0.0)
    with pytest.warns(UserWarning, match="silence"):
        x, _ = data.test[0]
    assert torch.allclose(x["audio"], torch.tensor(1e-7).log())


def test_frames_come_from_the_middle_of_equal_parts_and_the_one_after(tmp_path):
    miniatures.write_video(tmp_path / "a.avi", 30, "mpeg4")  # 3 s, frame k has the grey level 8 k
    frames = media.read_frames(tmp_path / "a.avi", fps=1.0, at_least=1, side=32)
    assert frames.shape[:2] == (3, 3)
    assert min(frames.shape[-2:]) == 32
    grey = frames.float().mean((1, 2, 3)) / 8
    assert torch.allclose(grey, torch.tensor([5.0, 15.0, 25.0]), atol=0.7)
    pairs = media.read_frames(tmp_path / "a.avi", fps=1.0, at_least=1, side=32, following=True)
    later = (pairs[:, 1].float() - pairs[:, 0].float()).mean((1, 2, 3))
    assert torch.allclose(later, torch.tensor(8.0), atol=2.0)


def test_training_items_depend_on_seed_and_epoch_alone(folders):
    data = reader("crema-d").load(folders["crema-d"], config("crema-d"), seed=0)
    first = data.train[1][0]["visual"]
    torch.rand(7)  # other draws must not matter
    assert torch.equal(first, data.train[1][0]["visual"])
    data.train.epoch = 1
    assert not torch.equal(first, data.train[1][0]["visual"])
    data.train.epoch, data.train.seed = 0, 1
    assert not torch.equal(first, data.train[1][0]["visual"])
    assert torch.equal(data.test[0][0]["visual"], data.test[0][0]["visual"])


def test_cached_clip_equals_the_decoded_one(folders, tmp_path):
    module = reader("ave")
    plain = module.load(folders["ave"], config("ave"), seed=0).test[0][0]
    for _ in range(2):  # written, then read
        kept = module.load(folders["ave"], config("ave"), seed=0, cache=tmp_path).test[0][0]
        assert all(torch.equal(plain[name], kept[name]) for name in plain)
    assert list(tmp_path.rglob("*.pt"))


def test_crop_keeps_the_range_and_flips_half_of_the_time():
    ramp = torch.arange(64.0).expand(1, 3, 48, 64) * 4
    flipped = 0
    for seed in range(40):
        out = media.crop(ramp, 16, torch.Generator().manual_seed(seed))
        assert out.shape == (1, 3, 16, 16)
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1
        flipped += bool(out[0, 0, 0, 0] > out[0, 0, 0, -1])
    assert 10 <= flipped <= 30
    assert torch.allclose(
        media.crop(ramp, 16, None)[0, 0, 0], torch.linspace(1.5, 61.5, 16) * 4 / 255, atol=0.02
    )


def test_flow_is_read_in_the_place_of_differences(folders):
    data = reader("ucf101").load(folders["ucf101"], config("ucf101", motion="flow"), seed=0)
    motion = data.test[0][0]["motion"]
    assert motion.shape == (3, 2, 32, 32)
    assert torch.allclose(motion, torch.tensor((103 / 255 - 0.5) / 0.25), atol=0.1)
    static = reader("ucf101").load(folders["ucf101"], config("ucf101"), seed=0).test[0][0]["motion"]
    # every frame is 8 levels brighter than the last
    assert torch.allclose(static.mean(), torch.tensor(8 / 255 / 0.1), atol=0.1)


def test_pictures_and_flow_are_cropped_alike(folders, monkeypatch):
    module, states = reader("ucf101"), []
    data = module.load(folders["ucf101"], config("ucf101", motion="flow"), seed=0)
    real = module.crop
    monkeypatch.setattr(module, "crop", lambda x, size, g: states.append(g.get_state()) or real(x, size, g))
    data.train[0]
    assert len(states) == 2
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("sentiments", "labels"), [(2, [0, 0, 0, 1, 1, 1]), (3, [0, 0, 0, 2, 2, 2]), (7, [0, 1, 2, 4, 5, 6])]
)
def test_sentiments_become_classes(folders, sentiments, labels):
    data = reader("mosi").load(folders["mosi"], config("mosi", sentiments=sentiments), seed=0)
    assert [int(data.test[i][1]) for i in range(6)] == labels
    assert len(data.classes) == sentiments


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "aligned_50.pkl").write_bytes(pickle.dumps({"train": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match="print"):
        reader("mosi").load(tmp_path, config("mosi"), seed=0)


def test_pen_path_is_even_along_the_ink():
    path = reader("omniglot")._path(
        "START\n0.0,0.0,0\n90.0,0.0,5\nBREAK\n0.0,-30.0,9\n30.0,-30.0,10\nBREAK\n"
    )
    assert path.shape == (64, 3)
    first = path[:, 2] == 0
    assert int(first.sum()) in (47, 48, 49)  # three quarters of the ink
    steps = (path[first][1:, :2] - path[first][:-1, :2]).norm(dim=1)
    assert torch.allclose(steps, steps.mean(), rtol=1e-3)
    assert path[:, :2].abs().max() == 1
