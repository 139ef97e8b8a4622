"""The figure of experiments/budget.py: accuracy against tokens, a panel per checkpoint, and by difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from minir1.figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    ORANGE,
    RED,
    STYLE,
    VIOLET,
    WIDTH,
    caption,
    percent,
    tall_headline,
    write,
)

WAYS = {"limit": ("limit of thinking", BLUE), "wait": ("wait", VIOLET), "majority": ("majority of k", ORANGE),
        "any": ("any of k", GREY)}  # fmt: skip
COLOURS = (GREEN, BLUE, RED, ORANGE, VIOLET)


def draw(results: dict[str, dict], levels: Sequence[str], note: str, path: Path) -> Figure:
    """results: checkpoint -> way -> budget -> point, as `budget.main` returns. Above, all problems; below, by level."""
    shown = [level for level in levels if level in ("easy", "middle", "medium", "hard")] or [*levels][:5]
    rows, columns = (2 if len(shown) > 1 else 1), len(results)
    height = 1.6 + 4.4 * rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        panels = figure.subplots(rows, columns, sharey=True, sharex="row", squeeze=False)
        sides = {"left": 0.075, "right": 0.975, "top": 1 - 1.9 / height, "bottom": 0.6 / height}
        figure.subplots_adjust(**sides, hspace=0.42, wspace=0.08)
        for number, (name, ways) in enumerate(results.items()):
            _ways(panels[0, number], ways)
            caption(panels[0, number], _short(name), [*WAYS.values()])
            if rows == 2:
                _levels(panels[1, number], ways, shown)
        panels[0, 0].set_ylabel("accuracy")
        name, ways = [*results.items()][-1]
        most = max(ways["limit"].values(), key=lambda p: p["tokens"])
        least = min(ways["limit"].values(), key=lambda p: p["tokens"])
        heading = f"{_short(name)}: {percent(least['right'])} with {least['tokens']:.0f} tokens, "
        heading += f"{percent(most['right'])} with {most['tokens']:.0f}"
        tall_headline(figure, heading, note, left=0.075)
        return write(figure, path)


def _short(name: str) -> str:
    """A checkpoint by its run: runs/r1/rl-2/checkpoint -> rl-2."""
    parts = [part for part in Path(name).parts if part != "checkpoint" and not part.startswith("step-")]
    return parts[-1] if parts else name


def _ways(panel: Axes, ways: dict[str, dict[str, dict]]) -> None:
    for way, (_, colour) in WAYS.items():
        points = sorted(ways[way].values(), key=lambda p: p["tokens"])
        tokens = [p["tokens"] for p in points]
        ends = ([p[end] for p in points] for end in ("low", "high"))
        panel.fill_between(tokens, *ends, color=colour, alpha=0.1, lw=0)
        panel.plot(tokens, [p["right"] for p in points], "o-", color=colour, ms=5, lw=1.8)
    _axes(panel)


def _levels(panel: Axes, ways: dict[str, dict[str, dict]], levels: Sequence[str]) -> None:
    """Solid: the limit; dotted: the majority."""
    for level, colour in zip(levels, COLOURS):
        for way, style in (("limit", "o-"), ("majority", "s:")):
            known = [p for p in ways[way].values() if p.get(f"right_{level}") is not None]
            points = sorted(known, key=lambda p: p["tokens"])
            values = [p[f"right_{level}"] for p in points]
            panel.plot([p["tokens"] for p in points], values, style, color=colour, ms=4, lw=1.6)
            if way == "limit" and points:
                panel.annotate(level, (points[-1]["tokens"], values[-1]), (5, 3), textcoords="offset points",
                               color=colour, path_effects=HALO)  # fmt: skip
    _axes(panel)
    caption(panel, "By difficulty", [("solid: limit, dotted: majority", GREY)])


def _axes(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set(xlabel="tokens per problem", ylim=(0, 1))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
