"""Figures of a comparison of trainings: final accuracy and learning curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.studies.comparison import START, Config, Method, load
from experiments.studies.comparison_tables import Interval, of, parts, plural, start
from minir1 import figures as fig
from minir1.figures import BLUE, GREEN, GREY, HALO, INK, MUTED, ORANGE, RED, VIOLET, percent, percent_axis, smooth

COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, "#b0892c", "#3b9ab2", "#5b6b7a", "#a0522d", "#c2529b", "#2f6f5e")


# ---- the algorithms --------------------------------------------------------------------------


def algorithms(
    base: Interval,
    ends: dict[str, list[float]],
    intervals: dict[str, Interval],
    curves: dict[str, list[dict]],
    path: Path,
) -> Figure:
    """Left: pass@1 of every method, its interval over seeds, a small dot per seed. Right: a learning curve per method.

    base: pass@1 over problems. ends: label -> pass@1 of each seed; intervals: for labels with enough seeds. curves:
    label -> a dictionary per seed with "tokens" (sampled so far) and "accuracy", [S] each; the first label is drawn in
    grey behind all others.
    """
    colours, first = dict(zip(ends, COLOURS)), next(iter(ends))
    with matplotlib.rc_context(fig.STYLE):
        columns = 2 if len(ends) < 5 else 4
        rows = -(-len(ends) // columns)
        height = max(7.6, 3.2 * rows)
        figure = Figure(figsize=(fig.WIDTH, height), dpi=fig.DPI)
        sides = {"left": 0.13, "right": 0.985, "top": 1 - 1.634 / height, "bottom": 0.684 / height}
        left, right = figure.add_gridspec(1, 2, width_ratios=(1, 1.7), wspace=0.14, **sides)
        far = _ends(figure.add_subplot(left), base, ends, intervals, colours)
        grid = right.subgridspec(rows, columns, hspace=0.32, wspace=0.12)
        most = max(curve["tokens"][-1] for runs in curves.values() for curve in runs) / 1e3
        for number, label in enumerate(ends):
            panel = figure.add_subplot(grid[number // columns, number % columns])
            panel.axhline(base[0], color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
            if label != first:
                _learning_curve(panel, curves[first], GREY, behind=True)
            _learning_curve(panel, curves[label], colours[label])
            panel.set_title(label, loc="left", color=colours[label], size=12, weight="bold")
            percent_axis(panel)
            panel.set_xlim(0, 1.03 * most)
            panel.xaxis.set_major_locator(MaxNLocator(3))
            panel.tick_params(labelsize=10.5, labelleft=number % columns == 0)
        area = right.get_position(figure)
        text = "Training problems solved" + (f" (grey {first}, dashed the start)" if len(ends) > 1 else "")
        figure.text(area.x0, area.y1 + 0.38 / height, text, weight="bold", size=14)
        figure.text(area.x0 + area.width / 2, 0.19 / height, "sampled, thousand tokens", color=MUTED, ha="center")
        fig.headline(figure, *_finding(base, ends, far))
        return fig.write(figure, path)


def _ends(panel: Axes, base: Interval, ends, intervals, colours) -> bool:
    """A row per method, the first on top; the base as a grey band or, if it lies far below, as text: then True."""
    values = [value for runs in ends.values() for value in runs] + [e for one in intervals.values() for e in one[1:]]
    low, high = max(0.0, min(values)), min(1.0, max(values))
    far = base[2] < low - 1.5 * (high - low)
    if not far:
        low, high = min(low, base[1]), max(high, base[2])
        panel.axvspan(*base[1:], color=GREY, alpha=0.25, lw=0)
        panel.axvline(base[0], color=GREY, lw=1.5)
    offset = {"xycoords": ("axes fraction" if far else "data", "axes fraction"), "textcoords": "offset points"}
    text, x = (f"start at {percent(base[0])}, far to the left", 0.0) if far else ("start", base[0])
    panel.annotate(text, (x, 1), xytext=(0, 4), size=10.5, color=MUTED, ha="left" if far else "center", **offset)
    for row, (label, runs) in enumerate(ends.items()):
        colour, mean = colours[label], float(np.mean(runs))
        if label in intervals:
            _, *bar = intervals[label]
            panel.plot(np.clip(bar, 0, 1), [row, row], color=colour, lw=4, alpha=0.4, zorder=2)
        panel.plot(runs, [row + 0.22] * len(runs), "o", color=colour, ms=4, alpha=0.6, mec="none", zorder=3)
        panel.plot(mean, row, "o", color=colour, ms=9, mec="white", mew=1, zorder=4)
        style = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "size": 11, "weight": "bold"}
        panel.annotate(percent(mean), (mean, row), color=colour, path_effects=HALO, zorder=5, **style)
    panel.set_yticks(range(len(ends)), list(ends), color=INK)
    margin = max(0.01, 0.06 * (high - low))
    panel.set(ylim=(len(ends) - 0.4, -0.7), xlim=(low - margin, high + margin))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    panel.grid(True, axis="x")
    panel.grid(False, axis="y")
    panel.set_title("Test problems, pass@1", loc="left", weight="bold", size=14, pad=20)
    return far


def _dots(panel: Axes, beside: Axes, title: str, unit: str, values: dict[str, list[float]], colours) -> None:
    """A row per setting, in the order of `beside`: a small dot per seed, a large one for their mean."""
    for row, (label, seeds) in enumerate(values.items()):
        panel.plot(seeds, [row + 0.22] * len(seeds), "o", color=colours[label], ms=4, alpha=0.6, mec="none")
        panel.plot(np.mean(seeds), row, "o", color=colours[label], ms=9, mec="white", mew=1, zorder=4)
    panel.set(ylim=beside.get_ylim(), xlabel=unit, yticks=[])
    panel.set_xlim(left=0)
    panel.grid(True, axis="x")
    panel.set_title(title, loc="left", weight="bold", size=14, pad=20)


def _learning_curve(panel: Axes, runs: list[dict], colour: str, behind: bool = False) -> None:
    """Running means of training accuracy over sampled tokens: a thin line per seed, a thick one for their mean."""
    curves = [smooth(np.array(run["accuracy"]), 3) for run in runs]
    tokens = [np.array(run["tokens"]) / 1e3 for run in runs]
    if not behind:
        for x, y in zip(tokens, curves):
            panel.plot(x, y, color=colour, lw=0.8, alpha=0.4, zorder=3)
    steps = min(len(x) for x in tokens)
    mean = [np.mean([values[:steps] for values in lines], axis=0) for lines in (tokens, curves)]
    panel.plot(*mean, color=colour, lw=1.6 if behind else 2.4, alpha=0.7 if behind else 1, zorder=2 if behind else 4)


def _finding(base: Interval, ends: dict[str, list[float]], far: bool) -> tuple[str, str]:
    means = {label: float(np.mean(values)) for label, values in ends.items()}
    low, high = min(means.values()), max(means.values())
    fewest, most = (end(len(values) for values in ends.values()) for end in (min, max))
    count = plural(most) if fewest == most else f"{fewest} to {most} seeds"
    note = f"{count}; bars are 95% intervals over seeds, small dots the seeds" + ("" if far else "; grey: the base")
    # No label of a method unless it is the only one: the tables decide from intervals whether there is an order.
    title = "Test pass@1" if len(means) > 1 else f"Test pass@1, {next(iter(means))}"
    end = f"between {percent(low)} and {percent(high)}" if len(means) > 1 else percent(low)
    return f"{title}: {percent(base[0])} → {end}", note


# ---- settings of one algorithm ---------------------------------------------------------------


def settings(
    base: Interval,
    ends,
    intervals,
    curves,
    path: Path,
    panels: dict[str, tuple[str, str]],
    dots: tuple[str, str, dict[str, list[float]]] | None = None,
) -> Figure:
    """Pass@1 of every setting, and for each of `panels` a curve over the steps.

    The arguments are those of `algorithms`; panels: key of a curve -> title, unit; dots: title, unit and label -> the
    final value of each seed, drawn in the rows of the first panel.
    """
    colours = dict(zip(ends, COLOURS))
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, 5.8), dpi=fig.DPI)
        first, *axes = figure.subplots(1, 1 + len(panels) + (dots is not None))
        figure.subplots_adjust(left=0.17, right=0.985, top=0.76, bottom=0.11, wspace=0.3)
        far = _ends(first, base, ends, intervals, colours)
        if dots:
            _dots(axes.pop(0), first, *dots, colours)
        for panel, (key, (title, unit)) in zip(axes, panels.items()):
            tops = [0.0]
            for label, runs in curves.items():
                if (band := _curves(runs, key)) is not None:
                    x = np.arange(1, band.shape[1] + 1)
                    panel.fill_between(x, band.min(0), band.max(0), color=colours[label], alpha=0.15, lw=0)
                    panel.plot(x, band.mean(0), color=colours[label], lw=2.4)
                    tops.append(band.max())
            panel.set_title(title, loc="left", weight="bold", size=14, pad=20)
            panel.set(xlabel="step", ylabel=unit)
            if len(tops) > 1:
                panel.set_xlim(left=1)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if unit == "share":
                percent_axis(panel)
            else:
                fig.from_zero(panel, np.array(tops))
        fig.headline(figure, *_finding(base, ends, far))
        return fig.write(figure, path)


def _curves(runs: list[dict], key: str) -> np.ndarray | None:
    """Running means over three steps of the runs that have the quantity, up to the shortest of them: [seeds, S]."""
    lines = [smooth(np.array(run[key]), 3) for run in runs if key in run]
    return np.stack([line[: min(map(len, lines))] for line in lines]) if lines else None


def draw_settings(
    config: Config,
    methods: dict[str, Method],
    panels: dict[str, tuple[str, str]],
    dots: tuple[str, str, str] | None = None,
) -> None:
    """`settings` of the results so far; dots: title, unit and key of a result."""
    results = load(config.results)
    drawn = parts(results, methods)
    if drawn["ends"] and START in results:
        runs = {method.label: of(results, name).values() for name, method in methods.items() if of(results, name)}
        if dots:
            dots = (*dots[:2], {label: [run[dots[2]] for run in seeds] for label, seeds in runs.items()})
        settings(start(results), **drawn, path=config.figure, panels=panels, dots=dots)


# ---- an over-optimised reward ----------------------------------------------------------------


def overoptimization(curves: dict[str, list[dict]], path: Path) -> Figure:
    """Proxy and gold reward over the steps, a panel per setting; thin lines are seeds.

    curves: label -> a dictionary per seed with "accuracy" (by the rules, gold) and, if the training used a learned
    reward, "proxy" (its score), [S] each. After Gao et al. 2022 (arXiv:2210.10760).
    """
    proxies = [value for runs in curves.values() for run in runs for value in run.get("proxy", ())]
    low, high = min(proxies, default=0.0), max(proxies, default=1.0)
    margin = 0.05 * (high - low) or 0.1
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, 5.8), dpi=fig.DPI)
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        figure.subplots_adjust(left=0.075, right=0.93, top=0.77, bottom=0.11, wspace=0.14)
        for number, (panel, (label, runs)) in enumerate(zip(axes, curves.items())):
            first, last = number == 0, number == len(curves) - 1
            right = panel.twinx()
            right.grid(False)
            _seeds_and_mean(panel, runs, "accuracy", BLUE)
            _seeds_and_mean(right, runs, "proxy", ORANGE)
            percent_axis(panel)
            right.set_ylim(low - margin, high + margin)
            panel.set(xlabel="step", xlim=(1, None), ylabel="gold: right answers" if first else "")
            right.set_ylabel("proxy: score of the learned reward model" if last else "", color=ORANGE)
            panel.yaxis.label.set_color(BLUE)
            panel.tick_params(labelleft=first)
            right.tick_params(labelright=last)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.set_title(label, loc="left", weight="bold", size=14, pad=12)
        fig.headline(figure, *_overoptimized(curves))
        return fig.write(figure, path)


def _seeds_and_mean(panel: Axes, runs: list[dict], key: str, colour: str) -> None:
    if (lines := _curves(runs, key)) is not None:
        x = np.arange(1, lines.shape[1] + 1)
        panel.plot(x, lines.T, color=colour, lw=0.8, alpha=0.4)
        panel.plot(x, lines.mean(0), color=colour, lw=2.4)


def _overoptimized(curves: dict[str, list[dict]]) -> tuple[str, str]:
    label, runs = next(iter(curves.items()))
    last = max(1, len(runs[0]["accuracy"]) // 6)
    note = "first and last sixth of the steps; thin lines are seeds, all are running means over three steps"

    def change(key: str) -> list[float]:
        return [float(np.mean([run[key][part] for run in runs])) for part in (slice(last), slice(-last, None))]

    text = "right answers {} → {}".format(*map(percent, change("accuracy")))
    if all("proxy" in run for run in runs):
        text = "learned reward {:.1f} → {:.1f}, ".format(*change("proxy")) + text
    return f"{label}: {text}", note
