"""The figure of `experiments.count`: total and active parameters of models."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from minir1.figures import BLUE, DPI, GREY, HALO, INK, ORANGE, STYLE, WIDTH, headline, write


def sizes(counts: dict[str, dict], path: Path, finding: tuple[str, str] | None = None) -> Figure:
    """Active against total parameters, both on logarithmic axes; dense models lie on the diagonal.

    counts: name -> "total" and "active_with_embedding", as minir1.model.count makes them. Models whose points would
    overlap share a label. finding: title and the line under it; None: those of the largest model with experts.
    """
    points = _grouped([(one["total"], one["active_with_embedding"], name) for name, one in counts.items()])
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(WIDTH, 8), dpi=DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.085, right=0.97, top=0.85, bottom=0.085)
        low, high = (math.log10(end(point[0] for point in points)) for end in (min, max))
        ends = (10 ** (low - 0.9), 10 ** (high + 0.75))
        panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        panel.plot(ends, ends, color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
        sparse = [point for point in points if _sparse(point)]
        for point in points:
            _size(panel, point, sparse)
        for axis, label in ((panel.xaxis, "parameters in all"), (panel.yaxis, "parameters that a token uses")):
            axis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
            axis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_label_text(label)
        headline(figure, *(finding or _sizes_finding(points)))
        return write(figure, path)


def _sparse(point: tuple[float, float, str]) -> bool:
    return point[1] < 0.98 * point[0]


def _size(panel: Axes, point: tuple[float, float, str], sparse: list[tuple[float, float, str]]) -> None:
    """One dot: a dense model's label to its left, a sparse one's below, with the way down from the diagonal."""
    total, active, name = point
    colour = ORANGE if point in sparse else BLUE
    panel.plot(total, active, "o", color=colour, ms=8, mec="white", mew=1, zorder=4)
    style = {"textcoords": "offset points", "size": 11, "color": INK, "path_effects": HALO, "zorder": 5}
    if point not in sparse:
        panel.annotate(name, (total, active), xytext=(-9, 1), ha="right", va="center", **style)
        return
    panel.plot([total, total], [active, total], color=ORANGE, lw=1.6, alpha=0.45, zorder=2)
    text = f"{name}\n{short(active)} of {short(total)}: {active / total:.1%}"
    nearest = min((math.log10(other[0] / total) for other in sparse if other != point), key=abs, default=9)
    side = "left" if -1 < nearest < 0 else "center"
    lower = -35 if 0 < nearest < 1 else -9  # below the label of a neighbour at the right
    panel.annotate(text, (total, active), xytext=(0, lower), ha=side, va="top", **style)


def _grouped(points: list[tuple[float, float, str]], near: float = 0.09) -> list[tuple[float, float, str]]:
    """Points whose logarithms differ by less than `near` in both directions become their geometric mean."""
    groups: list[list[tuple[float, float, str]]] = []
    for point in sorted(points):
        first = groups[-1][0] if groups else None
        if first and all(abs(math.log10(a / b)) < near for a, b in zip(point[:2], first[:2])):
            groups[-1].append(point)
        else:
            groups.append([point])

    def mean(values) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    return [
        (mean([p[0] for p in group]), mean([p[1] for p in group]), " · ".join(p[2] for p in group)) for group in groups
    ]


def _sizes_finding(points: list[tuple[float, float, str]]) -> tuple[str, str]:
    note = "dense models lie on the diagonal; the drop below it is what routing to a few experts spares each token"
    sparse = [point for point in points if _sparse(point)]
    if not sparse:
        return "Dense models use every parameter for every token", note
    total, active, name = max(sparse)
    return f"{name}: a token uses {short(active)} of {short(total)} parameters", note


def short(number: float) -> str:
    """671B, 37.6B, 1.4M, 10"""
    for size, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"
