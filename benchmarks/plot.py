"""``python -m benchmarks.plot``: the plots in docs/ and the tables of docs/performance.md.

Everything comes from the rows in benchmarks/results. Plots have no background and mid-tone colours, so that
they read on light and dark pages; of a CPU they show ratios, of a GPU times.

    python -m benchmarks.plot --rows FILE --out FOLDER    plots of one file of rows, and no page
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import linear, rows, tables
from .compare import UNIT
from .rows import Row
from .run import RESULTS, ROOT

GREY = "#808080"
COLOURS = {
    "arl_fast native": "#2f8fd0",
    "arl_fast triton": "#2aa7a0",
    "arl_fast reference": "#7a8fd6",
    "eager ARL": "#e08a2e",
    "compiled eager ARL": "#c9a227",
    "compiled reference": "#9a9a3a",
    "release": "#d0554f",
    "torch CE x (M+1)": "#a06cc0",
    "Liger CE x (M+1)": "#c06c9a",
    "flash-attn CE x (M+1)": "#a8795a",
    UNIT: GREY,
}


def _matplotlib() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            **{
                key: GREY
                for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
            },
            **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False},
            **{
                "savefig.transparent": True,
                "svg.hashsalt": "arl_fast",
                "figure.constrained_layout.use": True,
            },
        }
    )
    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    _matplotlib().close(figure)
    return path


def _bars(axis: Any, chosen: list[Row], value: Callable[[Row], float | None], title: str) -> None:
    """Groups of bars by shape, on a logarithmic scale, the best arl_fast bar labelled."""
    shapes, names = tables.shapes(chosen), [n for n in tables.names(chosen) if n != UNIT]
    width = 0.8 / max(1, len(names))
    at = {(r["contender"], tables.shape(r)): r for r in chosen}
    for i, name in enumerate(names):
        places, heights = [], []
        for j, shape in enumerate(shapes):
            if (name, shape) in at and (v := value(at[name, shape])) is not None:
                places.append(j + (i - (len(names) - 1) / 2) * width)
                heights.append(v)
        bars = axis.bar(places, heights, width * 0.92, color=COLOURS.get(name, GREY), label=name)
        if name == names[0]:
            axis.bar_label(
                bars,
                [f"{v:.2g}" for v in heights],
                label_type="center",
                rotation=90,
                fontsize=7,
                color="white",
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_xticks(range(len(shapes)), [s.replace(", ", "\n") for s in shapes])
    axis.tick_params(axis="x", length=0)
    axis.set_title(title, fontsize=9, loc="left")


def cpu(found: list[Row], folder: Path) -> list[Path]:
    """Ratios to one torch cross-entropy, and scaling."""
    plt = _matplotlib()
    base = [
        r
        for r in tables.select(found, kind="cpu", experiment="micro", what="both", cache="warm")
        if "rejected" not in r
    ]
    out = []
    one = tables.select(base, threads=1)
    panels = {
        "B = 64, the paper's data sets": tables.select(one, suite="paper"),
        "large": tables.select(one, suite=("large", "large-bf16")),
    }
    panels = {title: chosen for title, chosen in panels.items() if chosen}
    if panels:
        figure, axes = plt.subplots(
            1, len(panels), figsize=(10, 3.2), width_ratios=[len(tables.shapes(c)) for c in panels.values()]
        )
        for axis, (title, chosen) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
            _bars(axis, chosen, lambda r: tables.ratio(found, r), f"CPU, 1 thread, {title}")
            axis.axhline(1, color=GREY, linewidth=0.8)
            axis.set_ylim(bottom=0.1)
        figure.axes[0].set_ylabel("forward + backward\nover one torch cross-entropy")
        lines = {
            label: handle
            for axis in figure.axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines.keys(), ncols=4, loc="outside lower center")
        out.append(_save(figure, folder / "bench-cpu.svg"))
    return out + _scaling(found, "cpu", folder)


def _scaling(found: list[Row], kind: str, folder: Path) -> list[Path]:
    """Time against B, C and M. On a CPU relative to the unit at B = 64, C = 256, one thread."""
    plt = _matplotlib()
    chosen = tables.select(found, kind=kind, experiment="micro", what="both", cache="warm")
    chosen = [r for r in chosen if r["suite"].startswith("scaling") and tables.median(r)]
    if not chosen:
        return []
    scale = 1.0
    if kind == "cpu":
        units = tables.select(chosen, contender=UNIT, suite="scaling-classes", classes=256, threads=1)
        if not units:
            return []
        scale = tables.median(units[0]) or 1.0
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
    for axis, column in zip(axes, ("batch", "classes", "modalities"), strict=True):
        own = tables.select(chosen, suite=f"scaling-{column}")
        for name in tables.names(own):
            for threads, style in ((1, "-"), (2, ":")) if kind == "cpu" else ((None, "-"),):
                line = sorted(
                    (r[column], tables.median(r) / scale)
                    for r in tables.select(own, contender=name, threads=threads)
                )
                label = name + (f", {threads} threads" if threads == 2 else "")
                if line:
                    axis.plot(
                        *zip(*line, strict=True),
                        style,
                        marker="o",
                        markersize=3,
                        color=COLOURS.get(name, GREY),
                        label=label,
                    )
        axis.set_yscale("log")
        axis.set_xscale("linear" if column == "modalities" else "log")
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.set_xlabel(
            {
                "batch": "B (C = 101, M = 2)",
                "classes": "C (B = 64, M = 2)",
                "modalities": "M (B = 64, C = 101)",
            }[column]
        )
    what = (
        "over one torch cross-entropy\nat B = 64, C = 256, 1 thread" if kind == "cpu" else "device time, us"
    )
    axes[0].set_ylabel("forward + backward\n" + what)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return [_save(figure, folder / f"bench-{kind}-scaling.svg")]


def gpu(found: list[Row], folder: Path) -> list[Path]:
    """Device and host time, and the share of the copy bandwidth."""
    plt = _matplotlib()
    base = [
        r
        for r in tables.select(found, kind="cuda", experiment="micro", what="both", cache="cold")
        if "rejected" not in r
    ]
    warm = [
        r
        for r in tables.select(found, kind="cuda", experiment="micro", what="both", cache="warm")
        if "rejected" not in r
    ]
    out = []
    small = tables.select(warm, suite=("paper", "modalities"))
    large = tables.select(base, suite=("large", "large-bf16", "huge"))
    if small:
        figure, axes = plt.subplots(2, 1, figsize=(10, 5.5), sharex=True)
        _bars(
            axes[0], small, lambda r: tables.median(r, "device_us"), f"{small[0]['device']}: device time, us"
        )
        _bars(axes[1], small, lambda r: tables.median(r, "host_us"), "host time, us")
        figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
        out.append(_save(figure, folder / "bench-gpu-small.svg"))
    if large:
        figure, axes = plt.subplots(2, 1, figsize=(10, 5.5), sharex=True)
        title = f"{large[0]['device']}: device time, us, cold caches"
        _bars(axes[0], large, lambda r: tables.median(r, "device_us"), title)
        _bars(
            axes[1],
            large,
            lambda r: 100 * r["floor_share"] if "floor_share" in r else None,
            "floor over time, % of copy bandwidth",
        )
        axes[1].set_yscale("linear")
        figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
        out.append(_save(figure, folder / "bench-gpu-large.svg"))
    return out + _scaling(found, "cuda", folder)


def generated(found: list[Row]) -> dict[str, str]:
    """Markers of docs/performance.md and what belongs between them."""
    warm = dict(kind="cpu", what="both", cache="warm")
    gpu_plots = {
        "small": "Device and host time at the paper's shapes",
        "large": "Device time and share of the copy bandwidth, large logits",
    }
    drawn = [
        f"![{text}](bench-gpu-{name}.svg)"
        for name, text in gpu_plots.items()
        if tables.select(found, kind="cuda", experiment="micro")
    ]
    wide = ("large", "large-bf16", "narrow", "dense")
    return {
        "gpu-plots": "\n".join(drawn),
        "runs": tables.runs(found),
        "cpu-paper": tables.ratios(found, suite="paper", threads=1, **warm),
        "cpu-modalities": tables.ratios(found, suite="modalities", threads=1, **warm),
        "cpu-large": tables.ratios(found, suite=wide, threads=1, **warm),
        "cpu-labels": tables.ratios(found, suite="labels", threads=1, **warm),
        "cpu-two-threads": tables.ratios(found, suite=("paper", *wide), threads=2, **warm),
        "cpu-parts": tables.parts(found, kind="cpu", suite="paper", classes=309, threads=1),
        "cpu-parts-large": tables.parts(found, kind="cpu", suite="large", classes=1000, threads=1),
        "cpu-fits": tables.fits(found, "cpu"),
        "cpu-steps": tables.steps(found, "cpu"),
        "gpu-small": tables.gpu(found, suite=("paper", "modalities")),
        "gpu-large": tables.gpu(found, suite=("large", "large-bf16", "huge")),
        "gpu-fits": tables.fits(found, "cuda"),
        "gpu-steps": tables.steps(found, "cuda"),
    } | linear.generated(found)


def fill(page: str, pieces: dict[str, str]) -> str:
    """The page with the text between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` replaced."""

    def piece(match: re.Match[str]) -> str:
        name = match[1]
        return (
            f"<!-- bench:{name} -->\n{pieces[name]}\n<!-- /bench:{name} -->" if name in pieces else match[0]
        )

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- /bench:\1 -->", piece, page, flags=re.S)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", help="one file of rows instead of benchmarks/results; the page is then left alone"
    )
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder of the plots")
    options = parser.parse_args(arguments)
    files = [Path(options.rows)] if options.rows else sorted(RESULTS.glob("*.jsonl"))
    found = [row for file in files for row in rows.read(file)]
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in cpu(found, folder) + gpu(found, folder):
        print(path)
    if not options.rows:
        page = ROOT / "docs" / "performance.md"
        page.write_text(fill(page.read_text(), generated(found)))
        print(page)


if __name__ == "__main__":
    main()
