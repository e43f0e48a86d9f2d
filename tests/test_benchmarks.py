"""The benchmarks run, their gate rejects what is wrong, and their comparison names what got slower."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arl_fast.implementations import dispatch
from benchmarks import cases, compare, contenders, measure, models, plot, rows, step, tables, truth

ROOT = Path(__file__).parent.parent
CASE = cases.Case("tiny", 32, 11, 2, "float32")
LABELS = cases.Case("labels", 32, 11, 2, "float32")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(dispatch, "override", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def gate(contender, case=CASE):
    return measure.Step(contender, case, *cases.make(case, "cpu")).gate()


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        cases.Case("tiny", 64, 40, 3, "bfloat16"),
        cases.Case("large", 8, 5000, 2, "float32"),
        LABELS,
        cases.Case("labels", 9, 40, 3, "bfloat16"),
    ],
    ids=str,
)
def test_every_contender_passes_the_gate(case):
    everyone = contenders.contenders(case, "cpu", compile=False)
    assert {c.name for c in everyone} >= {
        "arl_fast reference",
        "eager ARL",
        "torch CE x (M+1)",
        "torch CE, fused only",
    }
    for contender in everyone:
        gate(contender, case)


def test_both_forms_of_eager_agree():
    logits, target = cases.make(CASE, "cpu")
    results = [
        f(logits, target, torch.zeros(2))
        for f in (contenders.eager_stacked, contenders.eager_split, contenders.eager_for_compiler)
    ]
    for loss, stats in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, value in stats.items():
            torch.testing.assert_close(value, results[0][1][name])


def _wrong(loss):
    return contenders.Contender("wrong", loss)


def _eager(change):
    def loss(logits, target, link):
        eager = contenders.eager_labels if target.is_floating_point() else contenders.eager_split
        value, stats = eager(logits, target, link)
        return change(value, stats, logits)

    return _wrong(loss)


WRONG = {
    "loss": _eager(lambda v, s, x: (v * 1.001, s)),
    "gradient of one branch": _eager(lambda v, s, x: (v + 1e-3 * (x[2] - x[2].detach()).sum(), s)),
    "no gradient": _eager(lambda v, s, x: (v.detach() + sum(0 * y.sum() for y in x), s)),
    "NaN": _eager(lambda v, s, x: (v * torch.nan, s)),
    "entropy": _eager(lambda v, s, x: (v, {**s, "entropy": s["entropy"] * 1.01})),
    "coefficients": _eager(lambda v, s, x: (v, {**s, "coefficients": s["coefficients"].flip(0)})),
}


@pytest.mark.parametrize("case", [CASE, LABELS], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_the_gate_rejects_what_is_wrong(name, case):
    with pytest.raises(truth.Rejected):
        gate(WRONG[name], case)


def test_a_rejected_contender_is_not_timed_and_its_reason_is_kept(tmp_path):
    """The runner itself, with a wrong contender among the right ones."""
    path = tmp_path / "rows.jsonl"
    code = f"""
import sys
sys.path.insert(0, "tests")
import pytest, test_benchmarks
from benchmarks import contenders
everyone = contenders.contenders
contenders.contenders = lambda *args: [*everyone(*args)[:2], test_benchmarks.WRONG["loss"]]
arguments = "--suites=tiny --rotations=1 --rounds=2 --sample=1e-5 --no-compile -p no:cacheprovider".split()
sys.exit(pytest.main(["-q", "benchmarks/bench_micro.py", "--rows={path}", *arguments]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows.read(path)
    wrong = [r for r in found if r["contender"] == "wrong"]
    assert len(wrong) == len(cases.SUITES["tiny"])
    assert all("loss: relative error 0.001" in r["rejected"] and "host_us" not in r for r in wrong)
    assert "not timed: wrong" in tables.terminal(found)
    timed = [r for r in found if r["contender"] == "torch CE, fused only"]
    assert {(r["what"], r["cache"]) for r in timed} == {
        ("both", "warm"),
        ("both", "cold"),
        ("forward", "warm"),
        ("backward", "warm"),
    }
    for r in timed:
        assert r["host_us"]["q1"] <= r["host_us"]["median"] <= r["host_us"]["q3"]
        assert r["torch"] == torch.__version__
        assert {"device", "commit", "python", "threads", "errors"} <= set(r)


def test_memory_and_operations_are_counted():
    x = torch.randn(1000)
    found = measure.count_on_cpu(lambda: (x + 1).exp())
    assert found["operations"] == 2
    assert 8000 <= found["peak_bytes"] < 8100  # and the number 1, for a moment


def test_steps_of_training(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    step.main(["--tiny", "--seconds=0.05", f"--rows={path}"])
    found = rows.read(path)
    assert {(r["suite"], r["contender"]) for r in found} == {
        (m, w) for m in ("resnet18 (tiny)", "mlp (tiny)") for w in step.WAYS
    }
    assert all({"median", "q1", "q3"} == set(r["added_percent"]) for r in found)
    assert "arl_fast" in tables.steps(found, "cpu")


def test_the_releases_gain_reaches_the_features():
    encoders, inputs, _ = models.mlps(4, "cpu", 8)
    z = encoders(inputs)[0]
    (g,) = torch.autograd.grad(step._Gain.apply(z, 0.5).sum(), z)
    assert g.eq(1.5).all()


def test_resnet18_has_its_parameters():
    """11.18 million for three channels without the classifier, as everywhere."""
    assert sum(p.numel() for p in models.ResNet18(3).parameters()) == 11_176_512
    assert models.ResNet18(3, 8)(torch.randn(2, 3, 3, 32, 32)).shape == (2, 64)


def test_fit_finds_fixed_cost_and_slope():
    fixed, slope = tables.fit([(x, 5.0 + 0.25 * x) for x in (1, 10, 100, 1000)])
    assert fixed == pytest.approx(5.0)
    assert slope == pytest.approx(0.25)


def row(contender, median, spread=0.02, **changes):
    place = dict(
        kind="cuda",
        device="GPU",
        experiment="micro",
        suite="paper",
        batch=64,
        classes=6,
        modalities=2,
        dtype="float32",
    )
    place |= dict(threads=None, contender=contender, what="both", cache="warm")
    times = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread), "n": 50}
    return place | {"host_us": times, "device_us": copy.deepcopy(times)} | changes


def test_comparison_names_what_got_slower():
    old = [row("arl_fast native", 10.0), row("arl_fast triton", 10.0), row("arl_fast reference", 10.0, 0.5)]
    new = [row("arl_fast native", 13.0), row("arl_fast triton", 10.4), row("arl_fast reference", 13.0, 0.5)]
    bad = compare.slower(old, new)
    assert {(c.measure, round(c.factor, 2)) for c in bad} == {("host", 1.3), ("device", 1.3)}
    assert all("arl_fast native" in c.name for c in bad)
    assert compare.slower(old, old) == []
    assert compare.slower(new, old) == []


def test_comparison_on_a_cpu_is_of_ratios():
    """The whole machine at half speed is no regression; ours slower than the unit is one."""

    def file(unit, ours):
        return [
            row(name, time, kind="cpu", device="CPU", threads=1)
            for name, time in ((compare.UNIT, unit), ("arl_fast native", ours))
        ]

    assert compare.slower(file(5, 10), file(10, 20)) == []
    assert {c.factor for c in compare.slower(file(5, 10), file(5, 20))} == {2.0}


def test_comparison_by_its_command(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    rows.append(old, [row("arl_fast native", 10.0)])
    rows.append(new, [row("arl_fast native", 20.0)])
    command = [sys.executable, "benchmarks/compare.py"]
    done = subprocess.run([*command, old, new], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"SLOWER +2\.00x device +paper 64 6 2 float32 arl_fast native both warm", done.stdout)
    assert subprocess.run([*command, old, old], cwd=ROOT, capture_output=True).returncode == 0


def test_a_contender_that_newly_fails_the_gate_is_a_regression():
    rejected = {k: v for k, v in row("arl_fast native", 1.0).items() if not k.endswith("_us")} | {
        "rejected": "gradients: wrong"
    }
    (change,) = compare.slower([row("arl_fast native", 1.0)], [rejected])
    assert "gradients: wrong" in change.measure


def test_tables_and_plots_from_rows(tmp_path):
    """Of a CPU ratios, of a GPU times; nothing is drawn from nothing."""
    pytest.importorskip("matplotlib")
    names = [compare.UNIT, "arl_fast native", "eager ARL"]
    facts = dict(
        launches=2, launches_forward=1, syncs=0, floor_share=0.5, peak_ratio=1.0, device_method="graph"
    )
    versions = dict(torch="2", python="3", commit="abc", date="2030-01-01", operations=4)
    found = []
    for i, name in enumerate(names):
        for cache in ("warm", "cold"):
            found.append(row(name, 10.0 * (i + 1), cache=cache, **versions, **facts))
            found.append(row(name, 10.0 * (i + 1), cache=cache, suite="large", **versions, **facts))
            found.append(
                row(
                    name,
                    7.0 * (i + 1),
                    cache=cache,
                    kind="cpu",
                    device="CPU",
                    threads=1,
                    peak_ratio=1.0,
                    **versions,
                )
            )
        for suite, column in (("batch", "batch"), ("classes", "classes"), ("modalities", "modalities")):
            for n in (2, 64, 256):
                place = {"suite": f"scaling-{suite}", "kind": "cpu", "device": "CPU", "threads": 1, column: n}
                found.append(row(name, 3.0 + n, **place, **versions))
    drawn = plot.cpu(found, tmp_path) + plot.gpu(found, tmp_path)
    assert {p.name for p in drawn} == {
        "bench-cpu.svg",
        "bench-cpu-scaling.svg",
        "bench-gpu-small.svg",
        "bench-gpu-large.svg",
    }
    assert plot.cpu([], tmp_path) + plot.gpu([], tmp_path) == []
    pieces = plot.generated(found)
    assert "| arl_fast native | 2.00 |" in pieces["cpu-paper"]
    assert "14.0" not in pieces["cpu-paper"]
    assert "| arl_fast native | 20.0 | 20.0 | 20.0 | 2 (1) | 0 | 50 % | 1.00 | yes |" in pieces["gpu-small"]
    page = plot.fill("a\n<!-- bench:cpu-paper -->\nold\n<!-- /bench:cpu-paper -->\nb\n", pieces)
    assert "old" not in page
    assert page.startswith("a\n")
    assert page.endswith("b\n")


def test_the_page_is_what_the_rows_say():
    """docs/performance.md holds the tables that the committed rows give: nothing was typed by hand."""
    page = (ROOT / "docs" / "performance.md").read_text()
    found = [r for file in sorted(plot.RESULTS.glob("*.jsonl")) for r in rows.read(file)]
    assert plot.fill(page, plot.generated(found)) == page


def test_the_gpu_script_parses():
    assert subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=ROOT).returncode == 0
    assert os.access(ROOT / "benchmarks" / "gpu.sh", os.X_OK)
