"""``make bench``: everything that this machine can measure, in one file of rows, with a short table last.

    python benchmarks/run.py                         all phases on the CPU, and on the GPU if there is one
    python benchmarks/run.py --device cuda --phases micro,step --out rows.jsonl

Rows go to benchmarks/results/<device>.jsonl, which replaces that device's last run once this one is complete;
what got slower since is named. ``python -m benchmarks.plot`` makes the plots and the tables of
docs/performance.md from there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # called by its path
    sys.path.insert(0, str(ROOT))

from benchmarks import compare, machine, rows, tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PHASES = ("micro", "step", "scaling", "linear", "compiled")


def _micro(device: str, out: str, suites: str, *options: str) -> list[str]:
    return [
        *(
            "-m",
            "pytest",
            "-q",
            "benchmarks/bench_micro.py",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            "--no-header",
            "--benchmark-quiet",
        ),
        *(f"--device={device}", f"--rows={out}", f"--suites={suites}", *options),
    ]


def commands(phase: str, device: str, out: str, tiny: bool) -> list[list[str]]:
    """The Python commands of a phase."""
    if phase == "linear":  # the benchmark of linear heads writes rows of its own kind
        script = ROOT / "benchmarks" / "linear.py"
        extra = ["--tiny", "--seconds=0.1"] if tiny else [f"--seconds={0.2 if device == 'cuda' else 1}"]
        return (
            [["-m", "benchmarks.linear", f"--device={device}", f"--rows={out}", *extra]]
            if script.exists()
            else []
        )
    if phase == "step":
        step = ["-m", "benchmarks.step", f"--device={device}", f"--rows={out}"]
        if tiny:
            return [[*step, "--tiny", "--seconds=0.2"]]
        return [step] if device == "cuda" else [[*step, f"--threads={t}"] for t in threads()]
    if phase == "micro":
        if tiny:
            return [
                _micro(device, out, "tiny", "--rotations=2", "--rounds=3", "--sample=1e-4", "--no-compile")
            ]
        if device == "cuda":
            return [
                _micro(device, out, "paper,large,large-bf16,vocabulary", "--rotations=2", "--no-compile"),
                _micro(device, out, "modalities,huge", "--rotations=2", "--no-compile"),
            ]
        first = [
            _micro(device, out, "paper", "--rotations=6"),
            _micro(device, out, "modalities", "--rotations=6", "--no-compile"),
            _micro(device, out, "large", "--rotations=3"),
            _micro(device, out, "large-bf16", "--rotations=4", "--no-compile"),
            _micro(device, out, "narrow,dense", "--rotations=3", "--no-compile"),
            _micro(device, out, "labels", "--rotations=4", "--no-compile"),
        ]
        more = [
            [
                _micro(
                    device, out, "paper,large,narrow,dense", "--rotations=2", "--no-compile", f"--threads={t}"
                )
            ]
            for t in threads()[1:]
        ]
        return [*first, *(c for cs in more for c in cs)]
    if phase == "compiled":  # on a CPU "micro" has them, and tiny cases have none
        options = ("--rotations=2", "--only-compiled")
        return [_micro(device, out, "paper,large", *options)] if device == "cuda" and not tiny else []
    suites = "tiny" if tiny else "scaling-batch,scaling-classes,scaling-modalities"
    options = ["--rotations=2", "--rounds=3", "--sample=1e-4", "--no-compile"] if tiny else ["--rotations=5"]
    if device == "cuda":
        return [_micro(device, out, suites, *options)]
    return [_micro(device, out, suites, *options, f"--threads={t}") for t in ([1] if tiny else threads())]


def threads() -> list[int]:
    """One thread, and two where there are two cores."""
    return [1, 2] if len(os.sched_getaffinity(0)) > 1 else [1]


def run(phases: list[str], device: str, out: str, tiny: bool = False) -> list[str]:
    """Run the phases one after the other in processes of their own; returns what failed."""
    failed = []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    plugin = machine.have_pytest_benchmark()
    for phase in phases:
        begin = time.perf_counter()
        for command in commands(phase, device, out, tiny):
            if not plugin:
                command = [a for a in command if not a.startswith("--benchmark")]
            status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
            if status:
                failed.append(f"{phase}: status {status} of {' '.join(command)}")
        print(f"-- {phase} on {device}: {time.perf_counter() - begin:.0f} s", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the CPU, and the GPU if there is one"
    )
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument(
        "--out", help="file to append rows to, instead of replacing the device's file in benchmarks/results"
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    phases = options.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"--phases: got {', '.join(sorted(unknown))}, expected some of {', '.join(PHASES)}")
    import torch

    devices = [options.device] if options.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    failed = []
    for device in devices:
        final = RESULTS / f"{machine.slug(device)}.jsonl"
        out = Path(options.out) if options.out else final.with_suffix(".new")
        if not options.out:
            out.unlink(missing_ok=True)
        failed += run(phases, device, str(out), options.tiny)
        found = rows.read(out) if out.exists() else []
        print(tables.terminal(found))
        if not options.out and found:
            if final.exists():
                for change in compare.slower(rows.read(final), found):
                    print(f"SLOWER than the last run {change.factor:.2f}x {change.measure} {change.name}")
            if set(phases) == set(PHASES) and not options.tiny and not failed:
                out.replace(final)
                # of a run of benchmarks.linear alone
                final.with_name(f"linear-{final.name}").unlink(missing_ok=True)
                print(f"rows: {final.relative_to(ROOT)}")
            else:
                print(f"rows of this partial run: {out.relative_to(ROOT)}")
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
