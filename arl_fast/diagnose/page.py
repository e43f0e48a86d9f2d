"""A diagnosis as one HTML page with drawings in it (SVG), which needs no other file."""

from __future__ import annotations

from html import escape

from ..ladder import Difference, Results
from ..ladder.results import T_975
from ..plots import COLOURS, INK
from .verdict import Verdict

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2328; background: #fff; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
.advice { border-left: 4px solid #2da44e; padding: .6rem 1rem; background: #f3f8f4; font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; }
tr.chosen td { background: #f3f8f4; font-weight: 600; }
svg { width: 100%; height: auto; }
p.how { color: #59636e; font-size: .9rem; }
"""
WIDTH, LEFT, ROW = 720, 190, 30  # of the drawings, their margin for names, a line's height


def page(results: Results, verdict: Verdict, method: str) -> str:
    """The whole page; ``method`` says how it was found out."""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Does this model need ARL?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>Does this model need ARL?</h1>
<p class="advice">Recommendation: {escape(verdict.advice)}.</p>
<ul>{reasons}</ul>
<h2>Held-out accuracy of all modalities together, minus joint training's</h2>
{_differences({results.title(name): d for name, d in verdict.differences.items()})}
<h2>Held-out accuracy of each branch</h2>
{_branches(results)}
<h2>Numbers</h2>
{_table(results, verdict)}
<p class="how">{escape(method)}</p>
</body></html>
"""


def _table(results: Results, verdict: Verdict) -> str:
    heads = [
        "held out, %",
        "rate",
        "together",
        "minus joint",
        "macro F1",
        *(f"{m} alone" for m in results.modalities),
    ]
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in heads) + "</tr>"]
    for name in results.chosen:
        d = verdict.differences.get(name)
        means = [
            results.values(name),
            results.values(name, what="macro_f1"),
            *(results.values(name, m) for m in results.modalities),
        ]
        together, f1, *own = (f"{100 * v.mean():.1f} ± {100 * v.std():.1f}" for v in means)
        delta = "" if d is None else f"{100 * d.mean:+.1f} ± {100 * d.error:.1f}"
        cells = [results.title(name), f"{results.rate(name):g}", together, delta, f1, *own]
        mark = ' class="chosen"' if name == verdict.recommendation else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _differences(differences: dict[str, Difference]) -> str:
    """Means with their 95 % intervals around the line of no difference, in points."""

    def half(d: Difference) -> float:
        return 100 * d.error * (T_975[d.pairs - 2] if d.pairs - 2 < len(T_975) else 1.98)

    span = max([1.0, *(abs(100 * d.mean) + half(d) for d in differences.values())]) * 1.05

    def x(points: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (points + span) / (2 * span)

    height = ROW * len(differences) + 34
    parts = [_line(x(0), 4, x(0), height - 26, INK, "4 3")]
    for i, (title, d) in enumerate(differences.items()):
        y, middle, reach = ROW * i + 20, 100 * d.mean, half(d)
        colour = COLOURS[2] if d.clear and d.mean > 0 else COLOURS[1] if d.clear else INK
        parts += [_text(0, y + 5, title), _line(x(middle - reach), y, x(middle + reach), y, colour)]
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{y}" r="5" fill="{colour}"/>')
    ticks = [-span / 1.05, 0.0, span / 1.05]
    parts += [_text(x(tick), height - 6, f"{tick:+.1f}" if tick else "0", "middle") for tick in ticks]
    parts.append(_text(0, height - 6, "points; bars: 95 %"))
    return _svg(height, "Differences to joint training with their 95 % intervals", parts)


def _branches(results: Results) -> str:
    """A line for each rung, a dot for each branch, 0 to 100 %."""
    names = ["fused", *results.modalities]
    colours = {
        name: INK if name == "fused" else COLOURS[(i - 1) % len(COLOURS)] for i, name in enumerate(names)
    }

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * share

    height = ROW * (len(results.chosen) + 1) + 34
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts += [
            _line(x(tick), ROW, x(tick), height - 26, "#d8dee4"),
            _text(x(tick), height - 6, f"{100 * tick:.0f} %", "middle"),
        ]
    at = LEFT
    for name in names:
        label = "all together" if name == "fused" else f"{name} alone"
        parts += [f'<circle cx="{at}" cy="12" r="5" fill="{colours[name]}"/>', _text(at + 10, 17, label)]
        at += 40 + 8 * len(label)
    for i, method in enumerate(results.chosen):
        y = ROW * (i + 1) + 16
        parts.append(_text(0, y + 5, results.title(method)))
        values = [float(results.values(method, name).mean()) for name in names]
        parts.append(_line(x(min(values)), y, x(max(values)), y, "#d8dee4"))
        for name, value in zip(names, values, strict=True):
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5" fill="{colours[name]}"/>')
    return _svg(height, "Held-out accuracy of each branch", parts)


def _svg(height: float, label: str, parts: list[str]) -> str:
    font = 'font-family="system-ui, sans-serif" font-size="14"'
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" {font}>'
    return head + "".join(parts) + "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" stroke="{colour}" stroke-width="2"{dashed}/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="#1f2328">{escape(text)}</text>'
