"""What got slower between two row files: ``python benchmarks/compare.py old.jsonl new.jsonl``.

Rows are matched by device, case, contender and what was measured. On a GPU times are compared as they are,
host and device apart; on a CPU, where the machine's speed varies with its other guests, the ratio to the unit
(torch's cross-entropy of the fused logits) of the same run. A row got slower if it did by more than the
tolerance and by more than the spread: the new lower quartile lies above the old upper one. The tolerance is
10 % on a GPU and 30 % on a CPU: runs of the same code on a CPU with other guests differ by that much. Exit
status 1 if anything of arl_fast did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # called by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import rows

UNIT = "torch CE, fused only"


class Change(NamedTuple):
    name: str
    measure: str
    factor: float
    beyond_noise: bool
    kind: str

    def more_than(self, tolerance: float | None) -> bool:
        """Slower beyond noise and tolerance."""
        return self.beyond_noise and self.factor > 1 + _tolerance(self.kind, tolerance)

    def less_than(self, tolerance: float | None) -> bool:
        return self.beyond_noise and self.factor < 1 / (1 + _tolerance(self.kind, tolerance))


def _tolerance(kind: str, given: float | None) -> float:
    return given if given is not None else {"cuda": 0.1}.get(kind, 0.3)


def _units(found: list[rows.Row]) -> dict[tuple, float]:
    """Median of the unit for every row's key, with the contender taken out of it."""
    return {
        _place(row): row["host_us"]["median"]
        for row in found
        if row.get("contender") == UNIT and "host_us" in row
    }


def _place(row: rows.Row) -> tuple:
    return rows.key({**row, "contender": None})


def _quartiles(row: rows.Row, which: str, units: dict[tuple, float]) -> tuple[float, float, float] | None:
    value = row.get(which)
    if value is None:
        return None
    if row.get("kind") == "cuda":
        scale = 1.0
    elif _place(row) in units and row["contender"] != UNIT:
        scale = units[_place(row)]
    elif row.get("experiment") == "step" or row["contender"] == UNIT:
        return None  # steps are compared by what they add
    else:
        scale = 1.0
    return value["q1"] / scale, value["median"] / scale, value["q3"] / scale


def changes(old: list[rows.Row], new: list[rows.Row]) -> Iterator[Change]:
    """Every measurement that both files have, with new over old."""
    before, old_units, new_units = {rows.key(row): row for row in old}, _units(old), _units(new)
    for row in new:
        past = before.get(rows.key(row))
        if past is None:
            continue
        name = " ".join(str(row[k]) for k in rows.KEY[3:] if row.get(k) is not None)
        if "rejected" in row and "rejected" not in past:
            yield Change(name, f"rejected: {row['rejected']}", float("inf"), True, row["kind"])
        for which in ("host_us", "device_us"):
            a, b = _quartiles(past, which, old_units), _quartiles(row, which, new_units)
            if a and b:
                yield Change(
                    name, which.removesuffix("_us"), b[1] / a[1], b[0] > a[2] or b[2] < a[0], row["kind"]
                )
        if "added_percent" in row and "added_percent" in past:
            a, b = (1 + row_["added_percent"]["median"] / 100 for row_ in (past, row))
            yield Change(
                name,
                "step over joint",
                b / a,
                row["added_percent"]["q1"] > past["added_percent"]["q3"],
                row["kind"],
            )


def slower(old: list[rows.Row], new: list[rows.Row], tolerance: float | None = None) -> list[Change]:
    """What of arl_fast got slower beyond tolerance and noise, the worst first."""
    bad = [c for c in changes(old, new) if "arl_fast" in c.name and c.more_than(tolerance)]
    return sorted(bad, key=lambda c: -c.factor)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument(
        "--tolerance", type=float, help="share by which a row may get slower (0.1 on a GPU, 0.3 on a CPU)"
    )
    options = parser.parse_args(arguments)
    old, new = rows.read(options.old), rows.read(options.new)
    everything = [c for c in changes(old, new) if "arl_fast" in c.name]
    if not everything:
        print("no row of arl_fast is in both files (another device, or other cases)")
        return 2
    bad = slower(old, new, options.tolerance)
    faster = [c for c in everything if c.less_than(options.tolerance)]
    for change in bad:
        print(f"SLOWER {change.factor:5.2f}x {change.measure:6} {change.name}")
    for change in sorted(faster, key=lambda c: c.factor):
        print(f"faster {change.factor:5.2f}x {change.measure:6} {change.name}")
    print(
        f"{len(everything)} measurements compared, {len(bad)} slower, {len(faster)} faster, "
        "the others within noise"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
