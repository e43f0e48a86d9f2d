"""The diagnosis: what it recommends for which held-out numbers; a user's own model goes through it."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import arl_fast
from arl_fast.diagnose import decide
from arl_fast.diagnose.__main__ import main
from arl_fast.diagnose.run import halves
from arl_fast.ladder import Results
from arl_fast.ladder.results import bits_to_hex

ROOT = Path(__file__).parents[1]
NAMES = ["audio", "visual"]
ROWS = 1000


def results(
    rungs: dict[str, float], branches=(0.9, 0.4), spread: float = 0.01, training: float = 0.5, rates=None
) -> Results:
    """Three seeds; a rung's fused accuracy, the branches' after unimodal losses (a tenth less after joint
    training).
    """
    rows = []
    for seed in range(3):
        for name, accuracy in rungs.items():
            own = accuracy + spread * (seed - 1) * (-1 if name == "joint" else 1)
            sides = {"fused": own} | {
                m: b - (0.1 if name == "joint" else 0) for m, b in zip(NAMES, branches, strict=True)
            }
            test = {name: {"accuracy": a, "macro_f1": a, "loss": 1.0} for name, a in sides.items()}
            right = torch.arange(ROWS) < round(own * ROWS)
            row = dict(
                method=name,
                of=name,
                seed=seed,
                rate=(rates or {}).get(name, 0.1),
                variant={},
                test=test,
                validation=test,
            )
            rows.append(
                row
                | {
                    "correct": bits_to_hex(right),
                    "training_accuracy": dict.fromkeys(["fused", *NAMES], training),
                }
            )
    return Results(rows, NAMES)


def test_recommends_the_simplest_rung_that_none_clearly_beats():
    base = {"joint": 0.70, "unimodal": 0.80, "constant": 0.805, "share": 0.806}
    verdict = decide(results(base, spread=0.002))
    assert verdict.recommendation == "unimodal"
    assert verdict.r == pytest.approx(4 / 9)
    assert verdict.reasons[0].startswith("Unimodal losses against joint training: +10.0 ± ")
    assert "Not clearly better than that: constant gain, ARL (share rule)." in verdict.reasons
    assert any(
        "visual undertrained: alone it predicts 30.0 %, and 40.0 % after" in reason
        for reason in verdict.reasons
    )
    assert any("audio alone, after unimodal losses, predicts 90.0 %" in reason for reason in verdict.reasons)
    assert decide(results(base | {"share": 0.9}, spread=0.002)).recommendation == "share"
    assert decide(results(base | {"weights": 0.9}, spread=0.002)).recommendation == "weights"
    assert decide(results(base | {"share": 0.6}, spread=0.002)).recommendation == "unimodal"


def test_says_that_a_difference_is_within_noise():
    """The same means, with seeds that scatter by more than the difference; and rungs that lose."""
    noisy = decide(results({"joint": 0.70, "unimodal": 0.75, "constant": 0.75, "share": 0.75}, spread=0.08))
    assert noisy.recommendation == "joint"
    assert noisy.reasons[0] == "No rung is clearly better than joint training: the rest is within noise."
    few = decide(results({"joint": 0.70, "unimodal": 0.78, "constant": 0.70, "share": 0.70}, spread=0.03))
    assert few.recommendation == "joint"
    assert "More seeds may tell more, 3 are too few to: unimodal losses +8.0 ± " in few.reasons[1]
    worse = decide(results({"joint": 0.80, "unimodal": 0.70, "constant": 0.70, "share": 0.80}, spread=0.002))
    assert worse.recommendation == "joint"
    assert worse.reasons[0].endswith("and clearly worse: unimodal losses, constant gain.")


def test_few_held_out_rows_are_noise_too():
    """Seeds that agree to the last row do not make 10 of 40 rows a clear difference, but 250 of 1,000 are
    one.
    """
    verdicts = []
    for count in (12, ROWS):
        out = results({"joint": 0.50, "unimodal": 0.75, "constant": 0.75, "share": 0.75}, spread=0.0)
        for row in out.rows:
            row["correct"] = bits_to_hex(
                torch.arange(count) < round(row["test"]["fused"]["accuracy"] * count)
            )
        verdicts.append(decide(out).recommendation)
    assert verdicts == ["joint", "unimodal"]


def test_even_branches_need_no_rule():
    """r >= 0.75: unimodal losses or not, whatever the rules did."""
    rungs = {"joint": 0.70, "unimodal": 0.80, "constant": 0.80, "share": 0.95, "weights": 0.95}
    verdict = decide(results(rungs, branches=(0.8, 0.64), spread=0.002))
    assert verdict.r == pytest.approx(0.8)
    assert verdict.recommendation == "unimodal"
    assert any("r = 0.80" in reason and "more training rows did" in reason for reason in verdict.reasons)
    assert (
        decide(results(rungs | {"unimodal": 0.70}, branches=(0.8, 0.64), spread=0.002)).recommendation
        == "joint"
    )


def test_training_statistics_only_warn():
    rungs = {"joint": 0.70, "unimodal": 0.80, "constant": 0.80, "share": 0.80}
    plain, memorised = (decide(results(rungs, spread=0.002, training=t)) for t in (0.5, 1.0))
    assert plain._replace(reasons=[]) == memorised._replace(reasons=[])
    assert [r for r in memorised.reasons if r not in plain.reasons] == [
        "visual memorises: 100.0 % of the training rows, 40.0 % of the held-out ones. "
        "Its training statistics, and the rules which rest on them, overrate it."
    ]


def test_says_when_the_best_rate_is_the_last_one_tried():
    rungs = {"joint": 0.70, "unimodal": 0.80, "constant": 0.80, "share": 0.80}
    out = results(rungs)
    slower = [dict(row, rate=0.01, validation={"fused": {"accuracy": 0.0, "loss": 1.0}}) for row in out.rows]
    verdict = decide(Results(out.rows + slower, NAMES))
    assert any("The best learning rate was the largest tried, 0.1" in reason for reason in verdict.reasons)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)])
        self.head = arl_fast.ConcatHead({"audio": 8, "visual": 8}, 3)

    def forward(self, audio, visual):
        return self.head(
            {m: e(x).relu() for m, e, x in zip(NAMES, self.encoders, (audio, visual), strict=True)}
        )


def dataset(rows: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    x = [centres[y] + noise * torch.randn(rows, 6, generator=generator) for noise in (1, 3)]
    return TensorDataset(*x, y)


def test_a_users_model_goes_through(tmp_path):
    """Text, JSON and a page that needs nothing else; a second call reads the rows of the first."""
    loaders = DataLoader(dataset(60, 0), 20, shuffle=True), DataLoader(dataset(101, 1), 30)
    options = dict(epochs=2, rates=(0.05, 0.1), seeds=2, out=tmp_path, progress=False)
    found = arl_fast.diagnose(Net, *loaders, **options)
    assert str(found).startswith("Recommendation: ")
    assert "ARL (share rule)" in str(found)
    saved = json.loads((tmp_path / "diagnosis.json").read_text())
    assert set(saved["rungs"]) >= {"joint", "unimodal", "constant", "share"}
    assert saved["verdict"]["r"] == found.verdict.r
    assert set(saved["verdict"]["differences"]) == set(saved["rungs"]) - {"joint"}
    assert found.results.chosen["joint"][0]["correct"].startswith("51:")  # the other half of 101 rows
    page = (tmp_path / "diagnosis.html").read_text()
    opened = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert not {"src", "href"} & {name for name, _ in attributes}
            if tag not in ("meta",):
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Check().feed(page)
    assert not opened
    assert page.count("<svg") == 2
    before = (tmp_path / "rows.jsonl").read_text()
    again = arl_fast.diagnose(Net, *loaders, **options)
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert str(again) == str(found)


def test_a_given_model_is_copied():
    model = Net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    loaders = DataLoader(dataset(40, 0), 20, shuffle=True), DataLoader(dataset(40, 1), 20)
    found = arl_fast.diagnose(model, *loaders, epochs=1, rates=(0.1,), seeds=2, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert "1 epochs from the given weights" in str(found)


def test_halves_share_nothing_and_are_all():
    parts = halves(DataLoader(dataset(21, 0), 4))
    seen = [[tuple(row.tolist()) for x, _, _ in part for row in x] for part in parts]
    everything = {tuple(row.tolist()) for row in dataset(21, 0).tensors[0]}
    assert sorted(map(len, seen)) == [10, 11]
    assert set(seen[0]) | set(seen[1]) == everything
    assert not set(seen[0]) & set(seen[1])
    assert [list(half) for half in halves([1, 2, 3, 4, 5])] == [[1, 3, 5], [2, 4]]


def test_halves_are_of_the_rows_that_the_loader_draws():
    loader = DataLoader(TensorDataset(torch.arange(100)), 4, sampler=SubsetRandomSampler(range(80, 100)))
    parts = [{int(row) for (batch,) in part for row in batch} for part in halves(loader)]
    assert parts[0] | parts[1] == set(range(80, 100))
    assert list(map(len, parts)) == [10, 10]


def test_wrong_input_is_named():
    loader = DataLoader(dataset(20, 0), 20)
    with pytest.raises(ValueError, match="seeds: got 1, expected at least 2"):
        arl_fast.diagnose(Net, loader, loader, seeds=1)
    with pytest.raises(ValueError, match="rates: got none"):
        arl_fast.diagnose(Net, loader, loader, rates=())
    with pytest.raises(ValueError, match="val_loader: got fewer than 2 batches"):
        arl_fast.diagnose(Net, loader, [1])
    with pytest.raises(ValueError, match="val_loader: got a dataset of 1 samples"):
        arl_fast.diagnose(Net, loader, DataLoader(dataset(1, 0), 1))


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from test_diagnose import *\n"
        "def task():\n"
        "    return dict(model_or_factory=Net, train_loader=DataLoader(dataset(40, 0), 20),\n"
        "                val_loader=DataLoader(dataset(40, 1), 20), progress=False)\n"
        "def nothing():\n    return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["mine:task", "--epochs", "1", "--seeds", "2", "--rates", "0.1"])
    assert capsys.readouterr().out.startswith("Recommendation: ")
    assert (tmp_path / "diagnosis" / "diagnosis.html").exists()
    for task, message in (
        ("mine:nothing", "did not return a dict with model_or_factory, train_loader, val_loader"),
        ("mine", "task: got 'mine', expected module:function"),
    ):
        with pytest.raises(SystemExit):
            main([task])
        assert message in capsys.readouterr().err


def test_runs_as_a_module_without_warnings():
    """``arl_fast.diagnose`` is a function and a package: neither hides the other."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "arl_fast.diagnose", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m arl_fast.diagnose" in done.stdout
    assert callable(arl_fast.diagnose)


def test_several_labels_per_row(tmp_path):
    """Rare labels: accuracy is high for whoever says no, so that branches are compared by macro F1."""
    y = (torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) < 0.15).float()
    x = torch.cat([y, y], 1) + torch.cat([0.3 * torch.randn(300, 4), 3 * torch.randn(300, 4)], 1)
    y[::9, 1] = torch.nan

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoders = nn.ModuleDict({m: nn.Linear(4, 8) for m in NAMES})
            self.head = arl_fast.ConcatHead(dict.fromkeys(NAMES, 8), 4)

        def forward(self, x):
            parts = zip(NAMES, x.split(4, 1), strict=True)
            return self.head({m: self.encoders[m](part).relu() for m, part in parts})

    data = TensorDataset(x, y)
    diagnosis = arl_fast.diagnose(
        Net,
        DataLoader(data, 30, shuffle=True),
        DataLoader(data, 100),
        epochs=15,
        rates=(0.5,),
        seeds=2,
        criterion={"task": "multilabel"},
        progress=False,
        out=tmp_path,
    )
    found, verdict = diagnosis.results, diagnosis.verdict
    accuracy = [float(found.values("unimodal", m).mean()) for m in NAMES]
    assert accuracy[1] / accuracy[0] > 0.75 > verdict.r
    assert verdict.branches["audio"] == float(found.values("unimodal", "audio", "macro_f1").mean())
    assert "visual alone reaches a macro F1 of" in str(diagnosis)
    assert "largest branch macro F1" in str(diagnosis)
    assert len(found.chosen["weights"][0]["weights"]) == 2
    assert (tmp_path / "diagnosis.html").exists()
