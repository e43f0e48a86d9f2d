"""From rows to tables: Markdown for docs/performance.md and a short text for the terminal.

Ratios are medians over medians of one run: time over that of one torch cross-entropy of the fused logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from . import rows
from .cases import IMAGES
from .compare import UNIT
from .rows import Row

ORDER = (
    "arl_fast native",
    "arl_fast triton",
    "arl_fast reference",
    "eager ARL",
    "compiled eager ARL",
    "compiled reference",
    "release",
    "torch CE x (M+1)",
    "Liger CE x (M+1)",
    "flash-attn CE x (M+1)",
    UNIT,
)


def select(found: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows whose columns have these values; a tuple or list allows several."""
    return [
        r
        for r in found
        if all(r.get(k) in v if isinstance(v, (tuple, list)) else r.get(k) == v for k, v in wanted.items())
    ]


def names(found: Iterable[Row]) -> list[str]:
    present = {r["contender"] for r in found}
    return [n for n in ORDER if n in present] + sorted(present - set(ORDER))


def shape(row: Row) -> str:
    kind = {"float32": "", "bfloat16": " bf16"}[row["dtype"]]
    size = f"{row['batch']} x {row['classes']}"
    if row["suite"] == "dense":
        size = f"[{IMAGES}, {row['classes']}, {row['batch'] // IMAGES}]"
    return f"{size}, M = {row['modalities']}{kind}"


def shapes(found: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(shape(r) for r in found))


def median(row: Row | None, which: str | None = None) -> float | None:
    value = rows.time_of(row, which) if row else None
    return value["median"] if value else None


def ratio(found: list[Row], row: Row) -> float | None:
    """The row's time over the unit's at the same place."""
    place = {
        k: row.get(k)
        for k in (
            "kind",
            "device",
            "suite",
            "batch",
            "classes",
            "modalities",
            "dtype",
            "threads",
            "what",
            "cache",
        )
    }
    units = select(found, contender=UNIT, **place)
    mine, base = median(row), median(units[0]) if units else None
    return mine / base if mine and base else None


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in body)])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def by_shape(found: list[Row], cell: Callable[[Row], str], **wanted: object) -> str:
    """Contenders as lines, shapes as columns."""
    chosen = [r for r in select(found, experiment="micro", **wanted) if "rejected" not in r]
    columns = shapes(chosen)
    at = {(r["contender"], shape(r)): r for r in chosen}
    body = [[n, *(cell(at[n, s]) if (n, s) in at else "" for s in columns)] for n in names(chosen)]
    return markdown(["", *columns], body) if body else "Not measured yet."


def ratios(found: list[Row], **wanted: object) -> str:
    return by_shape(found, lambda r: number(ratio(found, r)), **wanted)


def parts(found: list[Row], **wanted: object) -> str:
    """One shape in detail: forward, backward, both, cold caches, operations, memory."""
    chosen = [r for r in select(found, experiment="micro", **wanted) if "rejected" not in r]
    columns = [("both", "warm"), ("both", "cold"), ("forward", "warm"), ("backward", "warm")]
    at = {(r["contender"], r["what"], r["cache"]): r for r in chosen}
    body = []
    for name in names(chosen):
        both = at.get((name, "both", "warm"), {})
        cells = [number(ratio(found, at[name, w, c])) if (name, w, c) in at else "" for w, c in columns]
        evaluated = at.get((name, "forward", "warm"), {}).get("peak_ratio")
        body.append(
            [name, *cells, str(both.get("operations", "")), number(both.get("peak_ratio")), number(evaluated)]
        )
    head = [
        "",
        "step",
        "step, cold caches",
        "evaluation",
        "backward alone",
        "torch operations",
        "peak memory / logits",
        "in evaluation",
    ]
    return markdown(head, body)


def gpu(found: list[Row], **wanted: object) -> str:
    """Absolute times on a GPU: device and host apart, counts, share of the copy bandwidth."""
    chosen = [
        r
        for r in select(found, kind="cuda", experiment="micro", what="both", **wanted)
        if "rejected" not in r
    ]
    at = {(r["contender"], shape(r), r["cache"]): r for r in chosen}
    body = []
    for s in shapes(chosen):
        for name in names(chosen):
            warm, cold = at.get((name, s, "warm")), at.get((name, s, "cold"))
            if warm is None:
                continue
            share, cells = (cold or warm).get("floor_share"), [s, name]
            cells += [
                number(median(warm, "device_us"), 1),
                number(median(cold, "device_us"), 1),
                number(median(warm, "host_us"), 1),
            ]
            cells += [
                f"{warm.get('launches', '')} ({warm.get('launches_forward', '')})",
                str(warm.get("syncs", "")),
            ]
            cells += ["" if share is None else f"{100 * share:.0f} %", number(warm.get("peak_ratio"))]
            body.append([*cells, "yes" if warm.get("device_method") == "graph" else "no"])
    head = [
        "shape",
        "",
        "device us, warm",
        "cold",
        "host us",
        "launches (forward)",
        "syncs",
        "share of copy bandwidth, cold",
    ]
    return markdown([*head, "peak memory / logits", "CUDA graph"], body) if body else "Not measured yet."


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fixed cost and slope of time = fixed + slope * elements, by least squares of the relative error."""
    w = [1 / (t * t) for _, t in points]
    sw = sum(w)
    mx, mt = (
        sum(a * x for a, (x, _) in zip(w, points, strict=True)) / sw,
        sum(a * t for a, (_, t) in zip(w, points, strict=True)) / sw,
    )
    sxx = sum(a * (x - mx) ** 2 for a, (x, _) in zip(w, points, strict=True))
    slope = sum(a * (x - mx) * (t - mt) for a, (x, t) in zip(w, points, strict=True)) / sxx
    return mt - slope * mx, slope


def fits(found: list[Row], kind: str) -> str:
    """Fitted fixed cost and slope per logit of every scaling suite; on a CPU relative to the unit's fit over
    the same suite.
    """
    body = []
    chosen = [
        r
        for r in select(found, kind=kind, experiment="micro", what="both", cache="warm")
        if r["suite"].startswith("scaling")
    ]
    for suite in dict.fromkeys(r["suite"] for r in chosen):
        for threads in dict.fromkeys(r["threads"] for r in chosen):
            own = select(chosen, suite=suite, threads=threads)
            found_fits = {}
            for name in names(own):
                branches = (lambda r: 1) if name == UNIT else (lambda r: r["modalities"] + 1)
                points = [
                    (branches(r) * r["batch"] * r["classes"], t)
                    for r in select(own, contender=name)
                    if (t := median(r))
                ]
                if len({x for x, _ in points}) > 1:
                    found_fits[name] = fit(points)
            base = found_fits.get(UNIT)
            for name, (fixed, slope) in found_fits.items():
                if kind == "cuda":
                    cells = [f"{fixed:.1f} us", f"{1e6 * slope:.2f} ps"]
                elif base is None and suite != "scaling-modalities":
                    continue
                else:
                    base = base or found_fits.get("eager ARL")
                    cells = (
                        [f"{fixed / base[0]:.2f}", f"{slope / base[1]:.2f}"]
                        if base and min(base) > 0
                        else ["", ""]
                    )
                over = {"batch": "B", "classes": "C", "modalities": "M"}[suite.removeprefix("scaling-")]
                body.append([over, *([str(threads)] if kind == "cpu" else []), name, *cells])
    head = ["over", *(["threads"] if kind == "cpu" else []), "", "fixed cost", "slope per logit"]
    return markdown(head, body) if body else "Not measured yet."


def steps(found: list[Row], kind: str) -> str:
    """What each way of training adds to a joint cross-entropy step, in percent."""
    body = []
    for row in select(found, kind=kind, experiment="step"):
        if row["contender"] == "joint CE" and kind == "cpu":
            continue
        percent = row["added_percent"]
        time = [f"{row['host_us']['median'] / 1e3:.2f} ms"] if kind == "cuda" else [str(row["threads"])]
        added = f"{percent['median']:+.1f} % ({percent['q1']:+.1f} to {percent['q3']:+.1f})"
        body.append([row["suite"], *time, row["contender"], added])
    head = ["model", "step" if kind == "cuda" else "threads", "", "added to the joint step (quartiles)"]
    return markdown(head, body) if body else "Not measured yet."


def runs(found: list[Row]) -> str:
    """Where the rows come from."""
    seen = {}
    for r in found:
        versions = [f"torch {r['torch']}", f"Python {r['python']}"] + [
            f"{k} {r[k]}" for k in ("triton", "cuda", "driver") if r.get(k)
        ]
        threads = sorted({x["threads"] for x in select(found, device=r["device"]) if x.get("threads")})
        seen[r["device"], r["commit"]] = [
            r["device"],
            ", ".join(map(str, threads)),
            ", ".join(versions),
            f"`{r['commit']}`",
            r["date"],
        ]
    return markdown(["device", "threads", "versions", "commit", "date"], seen.values())


def terminal(found: list[Row]) -> str:
    """The short table that a run prints last."""
    out = []
    for row in [r for r in found if "rejected" in r]:
        out.append(f"not timed: {row['contender']} at {shape(row)}: {row['rejected']}")
    for kind in ("cpu", "cuda"):
        chosen = [
            r
            for r in select(found, kind=kind, experiment="micro", what="both", cache="warm")
            if "rejected" not in r
        ]
        chosen = [r for r in chosen if not r["suite"].startswith("scaling")]
        for threads in dict.fromkeys(r["threads"] for r in chosen):
            own = select(chosen, threads=threads)
            what = (
                "device us / host us / launches / share of copy"
                if kind == "cuda"
                else f"time over one torch CE, {threads} thread(s)"
            )
            out.append(f"\n{kind}, forward and backward: {what}")
            for s in shapes(own):
                cells = []
                for row in sorted(
                    (r for r in own if shape(r) == s), key=lambda r: names(own).index(r["contender"])
                ):
                    if kind == "cuda":
                        times = f"{number(median(row), 1)}/{number(median(row, 'host_us'), 1)}"
                        value = f"{times}/{row.get('launches')}"
                        value += f"/{100 * row.get('floor_share', 0):.0f}%"
                    else:
                        value = number(ratio(found, row))
                    cells.append(f"{row['contender']} {value}")
                out.append(
                    f"  {s}: " + "; ".join(c for c in cells if not (kind == "cpu" and c.startswith(UNIT)))
                )
        for row in select(found, kind=kind, experiment="step"):
            p = row["added_percent"]
            out.append(
                f"  step {row['suite']} {row['contender']}: {p['median']:+.1f} % "
                f"[{p['q1']:+.1f}, {p['q3']:+.1f}]"
            )
    return "\n".join(out)


if __name__ == "__main__":
    print(terminal(rows.read(sys.argv[1])))
