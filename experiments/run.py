"""Run a paper's experiment: every method asked for, with every seed and learning rate, one row each.

    python -m experiments.run --dataset crema-d --data DIR --check
    python -m experiments.run --dataset crema-d --data DIR --method ladder --seeds 5
    torchrun --nproc-per-node 4 -m experiments.run --dataset ks --data DIR --precision bf16 --batch 16
    python -m experiments.table runs/crema-d.jsonl

Rows go to --out (runs/DATASET.jsonl). What is there already is not run again, and a run that was cut off goes
on at its last epoch. --data DIR: experiments/data/ says for each data set what belongs there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tqdm import tqdm

import arl_fast

from . import rows
from .config import CONFIGS, Config, add_options, from_options
from .data import reader
from .data.base import Data
from .methods import Method, select
from .train import DTYPES, Machine, Run, train
from .weights import weighted


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, choices=list(CONFIGS))
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="the folder with the data")
    parser.add_argument("--check", action="store_true", help="only list what is there and what is missing")
    parser.add_argument(
        "--method",
        nargs="+",
        default=["ladder"],
        help="joint, unimodal, constant, arl, ..., alone, or ladder: all",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default 5)")
    parser.add_argument("--out", type=Path, help="file of the rows (default runs/DATASET.jsonl)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep decoded sound and frames there: decoding takes most of the time",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile model and loss")
    parser.add_argument("--workers", type=int, default=0, help="processes that read the data")
    parser.add_argument(
        "--keep-models", action="store_true", help="keep the weights of the selected epoch beside the rows"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    config, changes = from_options(options.dataset, options)
    module = reader(options.dataset)
    if not options.data.is_dir():
        parser.error(f"--data: {options.data} is not a folder")
    if options.check:
        found = module.check(options.data, config)
        print("\n".join(found.lines))
        print("complete" if found.complete else "incomplete")
        return 0 if found.complete else 1
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}, expected at least 1")
    machine = _machine(options)
    out = options.out or Path("runs") / f"{options.dataset}.jsonl"
    done = {rows.key(row) for row in rows.read(out)} if out.exists() else set()
    try:
        with tqdm(total=options.seeds, desc=options.dataset, unit="seed", disable=machine.quiet) as bar:
            for seed in range(options.seeds):
                try:
                    data = module.load(options.data, config, seed, options.cache)
                    todo = select(options.method, data.modalities, config)
                except (FileNotFoundError, ValueError) as error:
                    parser.error(str(error))
                for rate in config.rates:
                    _climb(options, config, changes, data, todo, rate, seed, machine, out, done)
                bar.update()
    finally:
        if machine.world > 1:
            dist.destroy_process_group()
    if machine.rank == 0:
        print(f"rows: {out}    table: python -m experiments.table {out}")
    return 0


def _climb(
    options: argparse.Namespace,
    config: Config,
    changes: dict[str, Any],
    data: Data,
    todo: dict[str, Method],
    rate: float,
    seed: int,
    machine: Machine,
    out: Path,
    done: set[str],
) -> None:
    """All methods of one seed and learning rate; late fusion adds up what each modality alone predicts."""
    folder = out.parent / f"{out.stem}.work"

    def about(name: str) -> dict[str, Any]:
        return {"dataset": options.dataset, "method": name, "seed": seed, "rate": rate, "changes": changes}

    def file(name: str, kind: str) -> Path:
        digest = hashlib.sha256(rows.key(about(name)).encode()).hexdigest()[:8]
        return folder / f"{options.dataset}-{name.replace(':', '-')}-{seed}-{digest}.{kind}.pt"

    late_to_come = any(method.late and rows.key(about(name)) not in done for name, method in todo.items())
    for name, method in todo.items():
        keep = late_to_come and method.alone is not None
        if rows.key(about(name)) in done and not (keep and not file(name, "predictions").exists()):
            continue
        if method.late:
            alone = [file(other, "predictions") for other, m in todo.items() if m.alone is not None]
            run = _added_up([torch.load(path, weights_only=True) for path in alone])
        else:
            run = train(data, config, method, rate, seed, machine, file(name, "checkpoint"))
        if machine.rank == 0:
            if keep:
                torch.save({"logits": run.logits, "targets": run.targets}, file(name, "predictions"))
            if options.keep_models and run.model is not None:
                torch.save(run.model.state_dict(), file(name, "model"))
            rows.append(out, about(name) | _results(run, data, machine))
            file(name, "checkpoint").unlink(missing_ok=True)
        if machine.world > 1:
            dist.barrier()


def _added_up(parts: list[dict[str, Any]]) -> Run:
    logits = {}
    for split in ("validation", "test"):
        alone = {name: x for part in parts for name, x in part["logits"][split].items() if name != "fused"}
        logits[split] = {"fused": torch.stack(list(alone.values())).sum(0), **alone}
    return Run(logits, parts[0]["targets"], {})


def _results(run: Run, data: Data, machine: Machine) -> dict[str, Any]:
    scored = {
        split: {name: rows.scores(x, run.targets[split]) for name, x in branches.items()}
        for split, branches in run.logits.items()
    }
    found: dict[str, Any] = {}
    if len(scored["test"]) > 2:  # fused and several modalities
        head = None if run.model is None else cast(Any, run.model).head.cpu()
        logits, found["weights"] = weighted(head, run.logits, run.targets)
        scored["test"]["weighted"] = rows.scores(logits, run.targets["test"])
    return {
        **found,
        "fold": data.fold,
        "sizes": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "validation": {name: {"accuracy": score["accuracy"]} for name, score in scored["validation"].items()},
        "test": scored["test"],
        **run.notes,
        "machine": {
            "device": _device_name(machine.device),
            "precision": machine.precision,
            "processes": machine.world,
        },
        "versions": {"arl_fast": arl_fast.__version__, "torch": torch.__version__},
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _machine(options: argparse.Namespace) -> Machine:
    device, rank, world = torch.device(options.device), 0, int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank = dist.get_rank()
    return Machine(
        device, options.precision, options.compile, options.workers, rank, world, options.quiet or rank > 0
    )


if __name__ == "__main__":
    sys.exit(main())
