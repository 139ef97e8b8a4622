"""What the figures share: colours, style, and the parts of a panel.

Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minir1.ranks import rank

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6e9ed"
BLUE, ORANGE, GREEN, RED, VIOLET, GREY = "#2f6fb3", "#d9722e", "#2f8f6b", "#c0394b", "#7a5ba8", "#8b95a1"
STYLE = {
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # a $ in the name of a level or a file is no formula
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps a label readable on a line
WIDTH, DPI = 12, 150  # inches and dots: 1,800 pixels


def measured(result: dict) -> dict:
    """The figures that are numbers: null in result.json stands for NaN."""
    return {key: value for key, value in result.items() if value is not None}


def series(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a number under `key`; both [S] float64."""
    pairs = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    return tuple(np.array(pairs, dtype=np.float64).reshape(-1, 2).T)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the `window` values around each, cut off at the ends: [S] -> [S]."""
    reach = window // 2
    return np.array([values[max(0, s - reach) : s + reach + 1].mean() for s in range(len(values))])


def line(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw the measured values in a pale colour and their running mean in a strong one."""
    panel.plot(steps, values, color=colour, lw=0.9, alpha=0.28, zorder=2)
    panel.plot(steps, smooth(values, max(3, len(values) // 12)), color=colour, lw=2.4, zorder=3)


def from_zero(panel: Axes, values: np.ndarray) -> None:
    """An axis from 0 to a round number above the values, in five steps (so that two axes share a grid)."""
    top = 1.02 * max(*values, 0) if len(values) else 0
    step = np.diff(MaxNLocator(5, steps=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)).tick_values(0, top or 0.5))[0]
    panel.set_ylim(min(0, 1.02 * min(values, default=0)), 5 * step)
    panel.set_yticks(step * np.arange(6))


def percent_axis(panel: Axes) -> None:
    """An axis of shares, from 0 % to 100 % in five steps."""
    panel.set_ylim(0, 1)
    panel.set_yticks(np.arange(6) / 5)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def right_axis(panel: Axes, label: str, colour: str) -> Axes:
    """A second axis at the right, without a grid of its own; its label has the colour of its line."""
    right = panel.twinx()
    right.grid(False)
    right.set_ylabel(label, color=colour)
    return right


def wide_figure(height: float = 5.4, top: float = 0.76, columns: int = 1, **layout) -> tuple[Figure, list[Axes]]:
    """(figure of the usual width, its panels side by side); layout: of subplots_adjust."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    panels = list(np.ravel(figure.subplots(1, columns)))
    figure.subplots_adjust(**{"left": 0.075, "right": 0.965, "top": top, "bottom": 0.13, "wspace": 0.3, **layout})
    return figure, panels


def panel_title(panel: Axes, text: str) -> None:
    """A title at the left, with room for the names of lines below it."""
    panel.set_title(text, loc="left", weight="bold", size=14, pad=27)


def caption(panel: Axes, text: str, names: list[tuple[str, str]]) -> None:
    """A title, and below it the names of the lines, each with its colour; without names, "not measured"."""
    panel_title(panel, text)
    if not names:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, color=MUTED, ha="center")
        panel.set_yticks([])
    beside, corner, shift = panel.transAxes, (0, 1), (0, 9)
    for name, colour in names:
        position = {"xycoords": beside, "xytext": shift, "textcoords": "offset points", "va": "bottom"}
        beside = panel.annotate(name, corner, color=colour, **position)
        corner, shift = (1, 0), (16, 0)


def headline(figure: Figure, title: str, note: str) -> None:
    """The title of a figure, and the line under it."""
    left = figure.subplotpars.left
    figure.text(left, 0.955, title, size=19, weight="bold", va="center")
    figure.text(left, 0.908, note, size=13, color=MUTED, va="center")


def tall_headline(figure: Figure, title: str, note: str, left: float = 0.03) -> None:
    """As `headline`, but in inches from the top: for figures whose height depends on the number of rows."""
    height = figure.get_figheight()
    figure.text(left, 1 - 0.4 / height, title, size=19, weight="bold", va="center")
    figure.text(left, 1 - 0.8 / height, note, size=13, color=MUTED, va="center")


def percent(share: float) -> str:
    """0.314 -> 31%"""
    return f"{100 * share:.0f}%"


def write(figure: Figure, path: Path) -> Figure:
    """Save a figure as PNG, making the folder, and return it. Of several ranks the first alone writes."""
    path = Path(path)
    if rank():
        return figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG, for a notebook."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
