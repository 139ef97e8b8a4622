"""How many sampled answers pass each filter, as one figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from minir1.figures import BLUE, DPI, GREEN, GREY, INK, STYLE, WIDTH, percent, tall_headline, write


def draw_funnel(sampled: int, removed: Mapping[str, int], title: str, note: str, path: Path) -> Figure:
    """A bar for all answers, one for what each filter left, in their order, and one for what is kept.

    removed: name of a filter -> answers that it removed, drawn pale beside those that are left. Writes a PNG, returns
    the figure.
    """
    left, bars = sampled, [("sampled", sampled, 0)]
    for name, count in removed.items():
        left -= count
        bars.append((f"− {name.replace('_', ' ')}", left, count))
    bars.append(("kept", left, 0))
    height = 2.0 + 0.42 * len(bars)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        panel = figure.add_axes((0.2, 0.75 / height, 0.75, 1 - 1.85 / height))
        for row, (name, count, lost) in enumerate(bars):
            panel.barh(row, count, height=0.62, color=GREEN if name == "kept" else BLUE)
            panel.barh(row, lost, left=count, height=0.62, color=GREY, alpha=0.35)
            label = f"{count:,}" + (f"  (−{lost:,})" if lost else "")
            panel.text((count + lost) + 0.01 * sampled, row, label, va="center", color=INK)
        panel.set_ylim(len(bars) - 0.5, -0.5)
        panel.set_yticks(range(len(bars)), [name for name, *_ in bars], color=INK)
        panel.set_xlim(0, 1.16 * sampled)
        panel.set_xlabel("answers; pale: removed by this filter")
        heading = f"{title}: {left:,} of {sampled:,} answers kept ({percent(left / sampled)})"
        tall_headline(figure, heading, note)
        return write(figure, path)
