"""The figures of experiments/report.py: one PNG each, with a title that says what is measured, then the finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator, PercentFormatter

from experiments.report_model_figures import context, parameters, window
from experiments.report_run import Pipeline
from experiments.report_training_figures import loss_and_reward, rl_reward, sft_loss, timeline
from minir1.figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    INK,
    ORANGE,
    RED,
    STYLE,
    VIOLET,
    WIDTH,
    caption,
    from_zero,
    headline,
    panel_title,
    percent,
    percent_axis,
    tall_headline,
    wide_figure,
    write,
)
from minir1.model.config import ModelConfig

FLAWS = {  # label -> colour, key, whether the flaw is one minus the value
    "language consistency below 1": (RED, "language_consistency", True), "repeated": (ORANGE, "repetition", False),
    "untidy": (VIOLET, "tidiness", True), "malformed": (BLUE, "format", True), "truncated": (GREY, "truncated", False),
}  # fmt: skip
BEHAVIOUR = {  # key -> label; hardly a try is without a check, so that tries would be the same curve again
    "checks": "Explicit checks per answer", "corrections": "Failed checks, corrected",
    "false_yes": "Checks that wrongly say yes", "reflections": "Reflective words per answer",
}  # fmt: skip
SHARES = ("corrections", "false_yes")
LEVELS = {"easy": GREEN, "middle": BLUE, "medium": BLUE, "hard": RED}


def draw(
    run: Pipeline,
    groups: tuple[list[str], list[str]],
    model: ModelConfig | None,
    seconds: dict[int, float],
    folder: Path,
) -> dict[str, Path]:
    """All figures that the run has values for, name -> PNG. groups: difficulties, kinds.

    model: the shape of the last checkpoint; seconds: of decoding a token, by context length.
    """
    makers = {
        "scores": lambda path: scores(run, groups, path),
        "flaws": lambda path: flaws(run, path),
        "behaviour": lambda path: behaviour(run, groups[0], path),
        "sft_loss": lambda path: sft_loss(run, path),
        "rl_reward": lambda path: rl_reward(run, path),
        "loss_and_reward": lambda path: loss_and_reward(run, path),
        "timeline": lambda path: timeline(run, path),
        "budget": lambda path: budget(run, path),
        "parameters": lambda path: parameters(model, path),
        "window": lambda path: window(run, model, path),
        "context": lambda path: context(model, seconds, path),
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)  # of an earlier report, with other stages
            if make(path):
                drawn[name] = path
    return drawn


# ---- what the stages give ----------------------------------------------------------------------


def scores(run: Pipeline, groups: tuple[list[str], list[str]], path: Path) -> Figure | None:
    """Accuracy of the base, R1-Zero and the final stage: bars by difficulty and kind, with 95 % intervals."""
    names = list(dict.fromkeys(name for name in ("base", "r1-zero", run.final) if name in run.tests))
    if not names:
        return None
    labels = ["", *groups[0], *groups[1]]
    figure, (panel,) = wide_figure()
    width = 0.8 / len(names)
    for n, (name, colour) in enumerate(zip(names, (GREY, BLUE, ORANGE))):
        for x, label in enumerate(labels):
            suffix = f"_{label}" if label else ""
            value, low, high = (run.tests[name].get(f"pass@1{end}{suffix}") for end in ("", "_low", "_high"))
            if value is None:
                continue
            at = x + (n - (len(names) - 1) / 2) * width
            panel.bar(at, value, 0.92 * width, color=colour, zorder=2)
            if None not in (low, high):
                panel.plot([at, at], [low, high], color=INK, lw=1.3, alpha=0.7, zorder=3)
            inside = value > 0.08
            style = {"size": 9, "color": "white" if inside else INK, "zorder": 4, "ha": "center"}
            style["path_effects"] = [withStroke(linewidth=2, foreground=colour)] if inside else HALO
            panel.annotate(f"{100 * value:.0f}", (at, 0), xytext=(0, 3), textcoords="offset points", **style)
    for edge in [0.5] + ([0.5 + len(groups[0])] if all(groups) else []):
        panel.axvline(edge, color=GREY, lw=0.8, ls=(0, (3, 4)))
    panel.set_xticks(range(len(labels)), ["all problems", *labels[1:]], color=INK)
    panel.set_ylabel("right answers")
    percent_axis(panel)
    caption(panel, "pass@1 on test problems, 95 % intervals", _legend(run, names, (GREY, BLUE, ORANGE)))
    known = [run.tests[name]["pass@1"] for name in names if "pass@1" in run.tests[name]]
    title = " → ".join(map(percent, known))
    headline(figure, f"Accuracy by difficulty and kind: {title}", "problems that no stage was trained on")
    return write(figure, path)


def _legend(run: Pipeline, names: Sequence[str], colours: Sequence[str]) -> list[tuple[str, str]]:
    return [(run.label(name), colour) for name, colour in zip(names, colours)]


def _stage_axis(panel: Axes, run: Pipeline, size: float = 12) -> None:
    panel.set_xticks(range(len(run.tests)), [run.label(name) for name in run.tests], color=INK, size=size)
    panel.set_xlim(-0.3, len(run.tests) - 0.7)


def _over_stages(run: Pipeline, key: str, inverted: bool = False) -> tuple[list[int], list[float]]:
    measured = [(x, values[key]) for x, values in enumerate(run.tests.values()) if key in values]
    return [x for x, _ in measured], [1 - value if inverted else value for _, value in measured]


def flaws(run: Pipeline, path: Path) -> Figure | None:
    """Shares of what is wrong with the answers of each stage."""
    lines = {label: _over_stages(run, key, inverted) for label, (_, key, inverted) in FLAWS.items()}
    lines = {label: pair for label, pair in lines.items() if pair[0]}
    if not lines:
        return None
    figure, (panel,) = wide_figure()
    for label, (x, values) in lines.items():
        colour = FLAWS[label][0]
        panel.plot(x, values, "o-", color=colour, lw=2.2, ms=7, mec="white", mew=1.2, zorder=3, clip_on=False)
    _stage_axis(panel, run)
    panel.set_ylabel("share")
    from_zero(panel, np.concatenate([values for _, values in lines.values()]))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    caption(panel, "Means over the answers to test problems", [(label, FLAWS[label][0]) for label in lines])
    change = [1 - flaw for flaw in lines.get("language consistency below 1", ([], []))[1]]
    title = f": language consistency {change[0]:.3f} → {change[-1]:.3f}" if len(change) > 1 else ""
    headline(figure, f"Flaws by stage{title}", "lower is better; thinking without a word has language consistency 0")
    return write(figure, path)


def behaviour(run: Pipeline, levels: list[str], path: Path) -> Figure | None:
    """Counts of what the thinking does, by stage and difficulty."""
    keys = [key for key in BEHAVIOUR if _over_stages(run, key)[0]]
    if not keys:
        return None
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(WIDTH, 1.6 + 3.7 * rows), dpi=DPI)
    panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    top = 1 - 1.75 / (1.6 + 3.7 * rows)
    figure.subplots_adjust(left=0.06, right=0.98, top=top, bottom=0.13 / rows + 0.02, wspace=0.25, hspace=0.62)
    lines = {level: LEVELS[level] for level in levels} or {"": BLUE}
    for panel, key in zip(panels, keys):
        drawn = []
        for level, colour in lines.items():
            x, values = _over_stages(run, f"{key}_{level}" if level else key)
            panel.plot(x, values, "o-", color=colour, lw=2, ms=6, mec="white", mew=1, zorder=3, clip_on=False)
            drawn += values
        _stage_axis(panel, run, 9)
        panel.tick_params(axis="x", rotation=25)
        if key in SHARES:
            percent_axis(panel)
        else:
            from_zero(panel, np.array(drawn))
        if levels:
            caption(panel, BEHAVIOUR[key], list(lines.items()))
        else:
            panel_title(panel, BEHAVIOUR[key])
        panel.title.set_size(12)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    checks = _over_stages(run, "checks")[1]
    title = f": {checks[0]:.1f} → {checks[-1]:.1f} checks per answer" if len(checks) > 1 else ""
    note = "means over the answers to test problems"
    tall_headline(figure, f"Behaviour by stage and difficulty{title}", note, left=0.06)
    return write(figure, path)


def budget(run: Pipeline, path: Path) -> Figure | None:
    """Accuracy against the token budget of an answer, of each stage for which it was measured."""
    curves = {}
    for name, values in run.budget.items():
        keys = {int(key.split("/")[1]): value for key, value in values.items() if _is_budget(key)}
        curves |= {name: dict(sorted(keys.items()))} if keys else {}
    if not curves:
        return None
    figure, (panel,) = wide_figure()
    colours = (GREY, BLUE, GREEN, VIOLET, RED, ORANGE)[-len(curves) :] if len(curves) > 1 else (BLUE,)
    for (name, points), colour in zip(curves.items(), colours):
        ends = [[run.budget[name].get(f"budget/{at}/pass@1_{end}") for at in points] for end in ("low", "high")]
        if None not in ends[0] + ends[1]:
            panel.fill_between(list(points), *ends, color=colour, alpha=0.15, lw=0)
        panel.plot(*zip(*points.items()), "o-", color=colour, lw=2.2, ms=7, mec="white", mew=1.2, clip_on=False)
    every = sorted({at for points in curves.values() for at in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(every, [f"{at:,}" for at in every])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="token budget of an answer", ylabel="right answers")
    percent_axis(panel)
    caption(
        panel, "pass@1 on test problems, of answers that end within the budget", _legend(run, list(curves), colours)
    )
    points = curves[list(curves)[-1]]
    few, many = min(points), max(points)
    title = f"{percent(points[few])} → {percent(points[many])} from {few} to {many:,} tokens"
    note = f"{run.label(list(curves)[-1])}; only an answer that ends within the budget is right"
    headline(figure, f"Accuracy against the budget: {title}", note)
    return write(figure, path)


def _is_budget(key: str) -> bool:
    parts = key.split("/")
    return len(parts) == 3 and parts[1].isdigit() and parts[2] == "pass@1"
