"""Figures of a run, drawn from its metrics.jsonl and result.json. Each is written to a PNG and returned.

They are made without pyplot, so nothing global changes and no display is needed. What a run did
not measure is left out of the figure.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6e9ed"
BLUE, ORANGE, GREEN, RED, VIOLET, GREY = "#2f6fb3", "#d9722e", "#2f8f6b", "#c0394b", "#7a5ba8", "#8b95a1"
STYLE = {
    "font.size": 12,
    "text.color": INK,
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


# ---- one run ---------------------------------------------------------------------------------


def r1_zero(metrics: list[dict], path: Path, *, result: dict | None = None) -> Figure:
    """What RL did to one run, in four panels over its steps: accuracy, length, checking, entropy.

    Reads from `metrics` (the rows of metrics.jsonl): train/accuracy, eval/pass@1, train/length,
    train/tries, train/said_yes, train/false_yes, train/entropy, train/kl; from `result`:
    before/pass@1, after/pass@1 with _low and _high, forced/pass@1, search/pass@1.
    """
    result = _measured(result or {})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8.2), dpi=DPI)
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.075, right=0.925, top=0.81, bottom=0.075, wspace=0.33, hspace=0.5)
        _accuracy(grid[0, 0], metrics, result)
        _length(grid[0, 1], metrics)
        _checking(grid[1, 0], metrics)
        _entropy(grid[1, 1], metrics)
        for panel in grid.flat:
            panel.set_xlabel("RL step")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.set_xlim(0, max([row["step"] for row in metrics], default=1) or 1)
        _headline(figure, *_finding(result))
        return _write(figure, path)


def _accuracy(panel: Axes, metrics: list[dict], result: dict) -> None:
    words = []
    steps, values = _series(metrics, "train/accuracy")
    if len(steps):
        _line(panel, steps, values, BLUE)
        words.append(("training problems", BLUE))
    steps, values = _series(metrics, "eval/pass@1")
    if len(steps):
        panel.plot(steps, values, "o-", color=ORANGE, lw=1.2, ms=7, mec="white", mew=1.2, zorder=4, clip_on=False)
        words.append(("validation problems", ORANGE))
    lines = [("search/pass@1", "random search"), ("forced/pass@1", "forced to answer at once")]
    heights = sorted((result[key], text) for key, text in lines if key in result)
    for number, (height, text) in enumerate(heights):
        panel.axhline(height, color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
        below = number == 0 and len(heights) > 1 and heights[1][0] - height < 0.09
        offset, side = ((-4, "top"), (4, "bottom"))[not below]
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, offset), "textcoords": "offset points"}
        style = {"ha": "right", "va": side, "color": MUTED, "size": 10.5, "zorder": 5, "path_effects": HALO}
        panel.annotate(text, (1, height), **place, **style)
    panel.set_ylabel("right answers")
    _percent_axis(panel)
    _caption(panel, "Accuracy", words)


def _length(panel: Axes, metrics: list[dict]) -> None:
    steps, values = _series(metrics, "train/length")
    words = []
    if len(steps):
        _line(panel, steps, values, BLUE)
        words.append(("tokens, thinking included", BLUE))
    panel.set_ylabel("tokens")
    _from_zero(panel, values)
    _caption(panel, "Length of an answer", words)


def _checking(panel: Axes, metrics: list[dict]) -> None:
    words = []
    steps, values = _series(metrics, "train/tries")
    if len(steps):
        _line(panel, steps, values, BLUE)
        words.append(("tries per answer", BLUE))
    panel.set_ylabel("tries per answer", color=BLUE)
    _from_zero(panel, values)
    shares = [("train/said_yes", "ends in “yes”", GREEN), ("train/false_yes", "“yes” wrongly", RED)]
    shares = [(*_series(metrics, key), text, colour) for key, text, colour in shares]
    shares = [share for share in shares if len(share[0])]
    if shares:
        right = _right_axis(panel, "share of answers", MUTED)
        _percent_axis(right)
    for steps, values, text, colour in shares:
        _line(right, steps, values, colour)
        words.append((text, colour))
    _caption(panel, "Checking its own tries", words)


def _entropy(panel: Axes, metrics: list[dict]) -> None:
    words = []
    steps, values = _series(metrics, "train/entropy")
    if len(steps):
        _line(panel, steps, values, VIOLET)
        words.append(("entropy per token", VIOLET))
    panel.set_ylabel("entropy, nats", color=VIOLET)
    _from_zero(panel, values)
    steps, values = _series(metrics, "train/kl")
    if len(steps):
        right = _right_axis(panel, "KL, nats", ORANGE)
        _from_zero(right, values)
        _line(right, steps, values, ORANGE)
        words.append(("KL to the reference", ORANGE))
    _caption(panel, "Entropy and drift" if len(steps) else "Entropy", words)


def _finding(result: dict) -> tuple[str, str]:
    """The headline, and the line below it, that `result` supports."""
    before, after = result.get("before/pass@1"), result.get("after/pass@1")
    if before is None or after is None:
        return "R1-Zero: reinforcement learning with rule rewards alone", ""
    title = f"RL with rule rewards alone: {_percent(before)} → {_percent(after)} of held-out problems solved"
    notes = []
    if "after/pass@1_low" in result and "after/pass@1_high" in result:
        low, high = (100 * result[f"after/pass@1_{end}"] for end in ("low", "high"))
        notes.append(f"95% interval {low:.0f} to {high:.0f}%")
    if "forced/pass@1" in result:
        notes.append(f"forced to answer at once, the same weights solve {_percent(result['forced/pass@1'])}")
    if "search/pass@1" in result:
        notes.append(f"random search {_percent(result['search/pass@1'])}")
    return title, "  ·  ".join(notes)


# ---- several seeds ---------------------------------------------------------------------------


def seeds(results: list[dict], path: Path) -> Figure:
    """Held-out pass@1 of every seed before and after RL, its 95% interval, and the controls that were run.

    One result.json a seed in `results`. Columns: before/, after/, forced/, nothink/ and
    search/pass@1, each with _low and _high where there; a column that no seed has is left out.
    """
    results = [_measured(result) for result in results]
    columns = [
        ("before", "before RL", GREY),
        ("after", "after RL", BLUE),
        ("forced", "after RL, forced\nto answer at once", ORANGE),
        ("nothink", "RL without\nthinking", VIOLET),
        ("search", "random search", GREEN),
    ]
    columns = [column for column in columns if any(f"{column[0]}/pass@1" in result for result in results)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.4), dpi=DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.97, top=0.83, bottom=0.14)
        spread = np.linspace(-0.16, 0.16, len(results)) if len(results) > 1 else np.zeros(len(results))
        for result, shift in zip(results, spread):
            if "before/pass@1" in result and "after/pass@1" in result:  # these two are the first columns
                ends = [result["before/pass@1"], result["after/pass@1"]]
                panel.plot([shift, 1 + shift], ends, color=BLUE, lw=1.4, alpha=0.35, zorder=2)
            for x, (name, _, colour) in enumerate(columns):
                _dot(panel, x + shift, result, f"{name}/pass@1", colour)
        for x, (name, _, colour) in enumerate(columns):
            values = [result[f"{name}/pass@1"] for result in results if f"{name}/pass@1" in result]
            style = {"color": colour, "va": "center", "weight": "bold", "size": 16, "path_effects": HALO}
            panel.text(x + spread.max(initial=0) + 0.1, np.mean(values), _percent(np.mean(values)), **style)
        panel.set_xticks(range(len(columns)), [text for _, text, _ in columns], color=INK)
        panel.set_xlim(-0.45, max(1, len(columns)) - 0.4)
        panel.set_ylabel("held-out problems solved (pass@1)")
        _percent_axis(panel)
        panel.tick_params(axis="x", length=0, pad=8)
        _headline(figure, *_seeds_finding(results))
        return _write(figure, path)


def _dot(panel: Axes, x: float, result: dict, key: str, colour: str) -> None:
    if key not in result:
        return
    if f"{key}_low" in result and f"{key}_high" in result:
        panel.plot([x, x], [result[f"{key}_low"], result[f"{key}_high"]], color=colour, lw=3.5, alpha=0.45, zorder=3)
    panel.plot(x, result[key], "o", color=colour, ms=7.5, mec="white", mew=1, zorder=4)


def _seeds_finding(results: list[dict]) -> tuple[str, str]:
    gains = [r["after/pass@1"] - r["before/pass@1"] for r in results if "after/pass@1" in r and "before/pass@1" in r]
    count = f"{len(results)} seed{'s' if len(results) != 1 else ''}"
    note = f"{count}; each dot a seed, its bar the 95% interval over problems, the number the mean of the seeds"
    if not gains:
        return "Held-out accuracy by seed", note
    low, high = 100 * min(gains), 100 * max(gains)
    span = f"{low:+.0f}" if round(low) == round(high) else f"{low:+.0f} to {high:+.0f}"
    return f"RL with rule rewards alone: {span} points of held-out accuracy", note


# ---- the parts -------------------------------------------------------------------------------


def _measured(result: dict) -> dict:
    return {key: value for key, value in result.items() if value is not None}  # null stands for NaN


def _series(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a number under `key`; both [S] float64."""
    pairs = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the `window` values around each, cut off at the ends: [S] -> [S]."""
    reach = window // 2
    return np.array([values[max(0, s - reach) : s + reach + 1].mean() for s in range(len(values))])


def _line(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The measured values pale, their running mean strong."""
    panel.plot(steps, values, color=colour, lw=0.9, alpha=0.28, zorder=2)
    panel.plot(steps, smooth(values, max(3, len(values) // 12)), color=colour, lw=2.4, zorder=3)


def _from_zero(panel: Axes, values: np.ndarray) -> None:
    """An axis from 0 to a round number above the values, in five steps (so that two axes share a grid)."""
    top = 1.02 * max(values, default=0)
    unit = 10.0 ** np.floor(np.log10(top / 5)) if top > 0 else 0.1
    step = unit * min(nice for nice in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if 5 * nice * unit >= top)
    panel.set_ylim(min(0, 1.02 * min(values, default=0)), 5 * step)
    panel.set_yticks(step * np.arange(6))


def _percent_axis(panel: Axes) -> None:
    panel.set_ylim(0, 1)
    panel.set_yticks(np.arange(6) / 5)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _right_axis(panel: Axes, label: str, colour: str) -> Axes:
    right = panel.twinx()
    right.grid(False)
    right.set_ylabel(label, color=colour)
    return right


def _caption(panel: Axes, title: str, words: list[tuple[str, str]]) -> None:
    """A title at the left, and below it the names of the lines in their colours."""
    panel.set_title(title, loc="left", weight="bold", size=14, pad=27)
    if not words:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, color=MUTED, ha="center")
        panel.set_yticks([])
    beside, corner, shift = panel.transAxes, (0, 1), (0, 9)
    for text, colour in words:
        place = {"xycoords": beside, "xytext": shift, "textcoords": "offset points", "va": "bottom"}
        beside = panel.annotate(text, corner, color=colour, **place)
        corner, shift = (1, 0), (16, 0)


def _headline(figure: Figure, title: str, note: str) -> None:
    left = figure.subplotpars.left
    figure.text(left, 0.955, title, size=19, weight="bold", va="center")
    figure.text(left, 0.908, note, size=13, color=MUTED, va="center")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _write(figure: Figure, path: Path) -> Figure:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return figure
