"""The experiments' command line: whole runs on miniatures, resumption, several processes, rows and tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import miniatures
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from experiments import rows, run, table, train
from experiments.data import READERS

SMALL = ["--quiet", "--epochs", "2", "--size", "32", "--batch", "4", "--rates", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, module in READERS.items():
        made[name] = tmp_path_factory.mktemp(module) / "data"
        getattr(miniatures, module)(made[name])
    return made


def call(folders, name, out, *options):
    return run.main(["--dataset", name, "--data", str(folders[name]), "--out", str(out), *SMALL, *options])


def without_time(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize("name", list(READERS))
def test_every_configuration_runs_to_its_table(name, folders, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert (
        call(
            folders, name, out, "--seeds", "1", "--epochs", "1", "--method", "joint", "arl", "--seconds", "1"
        )
        == 0
    )
    written = rows.read(out)
    assert [row["method"] for row in written] == ["joint", "arl"]
    for row in written:
        assert 0 <= row["test"]["fused"]["macro_f1"] <= 100
        assert row["dataset"] == name
    assert table.main([str(out)]) == 0
    assert "ARL (share rule)" in capsys.readouterr().out


def test_the_ladder_its_rows_and_its_figure(folders, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    call(folders, "av-digits", out, "--method", "ladder", "--seeds", "2")
    written = rows.read(out)
    names = [
        "alone:audio",
        "alone:visual",
        "late",
        "joint",
        "unimodal",
        "constant",
        "arl",
        "arl-paper",
        "arl-reversed",
        "unimodal-auxiliary",
        "arl-simple-mml",
    ]
    assert [(row["seed"], row["method"]) for row in written] == [
        (seed, name) for seed in (0, 1) for name in names
    ]
    by = {(row["method"], row["seed"]): row for row in written}
    assert by["late", 0]["test"]["audio"] == by["alone:audio", 0]["test"]["fused"]
    assert set(by["late", 0]["weights"]) == set(by["arl", 0]["weights"]) == {"audio", "visual"}
    assert set(by["arl-simple-mml", 0]["weights"]) == {"fused", "audio", "visual"}
    assert "weighted" not in by["alone:audio", 0]["test"]
    assert by["arl", 0]["fold"] == "0"
    assert by["arl", 1]["fold"] == "1"
    size = out.stat().st_size
    call(folders, "av-digits", out, "--method", "ladder", "--seeds", "2")
    assert out.stat().st_size == size  # nothing is run twice
    assert not list((tmp_path / "rows.work").glob("*.checkpoint.pt"))
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    table.main([str(out), "--versus", "constant", "--figure", str(tmp_path / "figure.svg")])
    printed = capsys.readouterr().out
    assert "minus + constant gain" in printed
    assert "with fusion weights" in printed
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    table.main([str(out), "--branches"])
    assert "test confidence" in capsys.readouterr().out


def test_a_run_that_was_cut_off_goes_on_with_the_same_result(folders, tmp_path, monkeypatch):
    options = [
        "--method",
        "arl",
        "--seeds",
        "1",
        "--epochs",
        "4",
        "--fusion",
        "transformer",
        "--encoder",
        "transformer",
    ]
    call(folders, "mosi", tmp_path / "whole.jsonl", *options)
    real, calls = train.predict, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 3:  # in the third epoch
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "predict", cut)
    with pytest.raises(KeyboardInterrupt):
        call(folders, "mosi", tmp_path / "cut.jsonl", *options)
    assert not (tmp_path / "cut.jsonl").exists()
    monkeypatch.setattr(train, "predict", real)
    epochs = []
    notes = train._training_notes
    monkeypatch.setattr(train, "_training_notes", lambda *a: epochs.append(1) or notes(*a))
    call(folders, "mosi", tmp_path / "cut.jsonl", *options)
    assert len(epochs) == 2  # epochs 3 and 4 only
    assert without_time(rows.read(tmp_path / "cut.jsonl")[0]) == without_time(
        rows.read(tmp_path / "whole.jsonl")[0]
    )


def test_test_data_is_read_once_at_the_end_and_methods_are_paired(folders, tmp_path, monkeypatch):
    read, starts, orders = [], [], []
    real_predict, real_build, real_batches = train.predict, train.build, train.batches

    def predict(model, items, *rest):
        read.append(len(items))
        return real_predict(model, items, *rest)

    def build(*arguments):
        net = real_build(*arguments)
        starts.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        return net

    def batches(items, order, *rest, **options):
        orders.append(order)
        return real_batches(items, order, *rest, **options)

    monkeypatch.setattr(train, "predict", predict)
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "batches", batches)
    call(
        folders,
        "mfeat",
        tmp_path / "rows.jsonl",
        "--method",
        "joint",
        "arl",
        "--seeds",
        "1",
        "--batch",
        "400",
    )
    validation, test = 400, 400
    once = [1200, validation, 1200, validation, validation, test]  # two epochs, then the selected one
    assert [len(order) for order in orders] == 2 * once
    assert read == 2 * [validation, validation, validation, test]
    assert torch.equal(*starts)
    assert orders[: len(once)] == orders[len(once) :]
    assert orders[0] != orders[2]  # another order in the second epoch


def test_mixed_precision_and_workers_and_kept_models(folders, tmp_path):
    out = tmp_path / "rows.jsonl"
    call(
        folders,
        "crema-d",
        out,
        "--method",
        "arl",
        "--seeds",
        "1",
        "--precision",
        "bf16",
        "--workers",
        "1",
        "--keep-models",
        "--fusion",
        "mmtm",
    )
    (row,) = rows.read(out)
    assert row["machine"]["precision"] == "bf16"
    assert row["changes"]["fusion"] == "mmtm"
    assert len(list((tmp_path / "rows.work").glob("*.model.pt"))) == 1


def test_check_and_errors_of_the_command_line(folders, tmp_path, capsys):
    assert run.main(["--dataset", "ave", "--data", str(folders["ave"]), "--check"]) == 0
    assert "complete" in capsys.readouterr().out
    assert run.main(["--dataset", "ave", "--data", str(tmp_path), "--check"]) == 1
    assert "trainSet.txt" in capsys.readouterr().out
    for options, words in [
        (["--data", str(tmp_path / "no")], "not a folder"),
        (["--data", str(folders["ave"]), "--seeds", "0"], "at least 1"),
        (["--data", str(folders["ave"]), "--fusion", "best"], "invalid choice"),
        (["--data", str(folders["ave"]), "--method", "ogm", "--quiet"], "expected ladder"),
        (["--data", str(tmp_path), "--quiet"], "--check"),
    ]:
        with pytest.raises(SystemExit):
            run.main(["--dataset", "ave", *options])
        assert words in capsys.readouterr().err


def test_scores_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 7, generator=generator), torch.randint(5, (50,), generator=generator)
    logits[:, 6] = -9  # a class that never occurs
    score, predicted = rows.scores(logits, targets), logits.argmax(1)
    assert score["accuracy"] == pytest.approx(100 * metrics.accuracy_score(targets, predicted), abs=1e-3)
    assert score["macro_f1"] == pytest.approx(
        100 * metrics.f1_score(targets, predicted, average="macro"), abs=1e-3
    )
    assert score["cross_entropy"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-4
    )


def row(method, seed, rate, validation, test, **changes):
    branches = {"accuracy": test, "macro_f1": test, "cross_entropy": 1.0, "confidence": 50.0}
    return {
        **{"dataset": "av-digits", "method": method, "seed": seed, "rate": rate, "changes": changes},
        "validation": {"fused": {"accuracy": validation}},
        "test": dict.fromkeys(("fused", "audio", "visual"), branches),
    }


def test_the_rate_is_chosen_on_validation_data_and_differences_are_paired(tmp_path):
    made = [
        *(row("joint", s, 0.1, 50.0, t) for s, t in enumerate((10.0, 20.0, 30.0))),
        *(row("arl", s, 0.1, 60.0, t) for s, t in enumerate((12.0, 22.0, 32.0))),
        *(row("arl", s, 0.3, 59.0, 99.0) for s in range(3)),  # better on test data, worse on validation data
        *(row("constant", s, 0.1, 40.0, 12.0) for s in range(3)),
        row("constant", 0, 0.3, 90.0, 90.0),  # one seed only: a search that is not over
    ]
    chosen = table.choose(made)
    assert [r["rate"] for r in chosen["arl"].values()] == [0.1] * 3
    assert len(chosen["constant"]) == 3
    assert table.paired(chosen["arl"], chosen["joint"]) == "+2.0 ± 0.0"
    assert table.over_seeds([10.0, 20.0, 30.0]) == "20.0 ± 10.0"
    assert list(table.grouped([*made, row("arl", 0, 0.1, 1.0, 1.0, noise=1.0)])) == [
        "av-digits",
        "av-digits (noise = 1.0)",
    ]


RESULTS = sorted((Path(__file__).parents[1] / "experiments" / "results").glob("*.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_tables_of_the_page_are_those_of_the_rows(path):
    page = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text()
    for group in table.grouped(rows.read(path)).values():
        assert table.results(table.choose(group), table.modalities(group), "joint") in page


def test_rows_survive_a_crash_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, row("joint", 0, 0.1, 1.0, 1.0))
    with path.open("a") as file:
        file.write('{"dataset": "av-di')
    assert len(rows.read(path)) == 1
    rows.append(path, row("arl", 0, 0.1, 1.0, 1.0))
    assert [r["method"] for r in rows.read(path)] == ["joint", "arl"]
    path.write_text("no row\n" + json.dumps(row("joint", 0, 0.1, 1.0, 1.0)) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        rows.read(path)


def test_compiled(folders, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: counted.append(1) or graph)
    )
    call(
        folders,
        "mfeat",
        tmp_path / "rows.jsonl",
        "--method",
        "arl",
        "--seeds",
        "1",
        "--compile",
        "--batch",
        "300",
    )
    assert counted == [1]  # one graph, model and loss together, for all steps
    assert len(rows.read(tmp_path / "rows.jsonl")) == 1


@pytest.mark.slow
def test_two_processes(folders, tmp_path):
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    common = [
        "--dataset",
        "av-digits",
        "--data",
        str(folders["av-digits"]),
        "--method",
        "arl",
        "--seeds",
        "1",
        *SMALL,
    ]
    out = tmp_path / "two.jsonl"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "experiments.run",
    ]
    subprocess.run(
        [*launcher, *common, "--out", str(out)], check=True, cwd=root, env=environment, timeout=300
    )
    (row,) = rows.read(out)
    assert row["machine"]["processes"] == 2
    assert row["sizes"]["test"] == 30  # every item scored once, on whichever process
