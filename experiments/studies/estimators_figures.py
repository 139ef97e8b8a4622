"""The figure of the estimators in expectation: bias of scale and direction, noise, and the gradients of KL terms."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minir1.figures import BLUE, DPI, GREEN, GREY, HALO, INK, MUTED, ORANGE, STYLE, VIOLET, WIDTH, write

ZERO = 1e-9  # below it a bias is rounding
NOTE = "exact, on policy, every answer listed: green is ∇J itself, blue a multiple of it, orange another direction"
Moments = dict[str, dict]  # label -> scale, direction, bias, deviation; for KL terms also to_steps, to_reverse_steps


def estimators(gradients: Moments, kl: Moments, path: Path) -> Figure:
    """A row per estimator: bias of direction, noise of one answer; below, how far KL terms are from three gradients.

    A green row has no bias, a blue one only another scale, an orange one another direction. A value of None (a zero
    gradient has no direction) is drawn as "-".
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, 11.4), dpi=DPI)
        figure.subplots_adjust(left=0.195, right=0.98, top=0.875, bottom=0.055)
        top, bottom = figure.add_gridspec(2, 1, height_ratios=(len(gradients), 1.25 * len(kl)), hspace=0.28)
        bias, noise = (figure.add_subplot(part) for part in top.subgridspec(1, 2, wspace=0.1))
        colours = [_colour(moments) for moments in gradients.values()]
        _rows(bias, gradients, "direction", colours, "{:.0%}", scales=True)
        _rows(noise, gradients, "deviation", colours, "{:.1f}")
        bias.set_title("Bias of direction", loc="left", weight="bold", size=14, pad=12)
        noise.set_title("Noise to signal of one answer", loc="left", weight="bold", size=14, pad=12)
        bias.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bias.tick_params(axis="y", pad=9)
        bias.set_yticks(range(len(gradients)), list(gradients), color=INK)
        noise.set_yticks(range(len(gradients)), [])
        _kl(figure.add_subplot(bottom), kl)
        along = f"{len(colours) - colours.count(ORANGE)} of {len(gradients)}"
        title = f"Expected direction of policy-gradient estimators: that of ∇J for {along}"
        figure.text(0.02, 0.967, title, size=19, weight="bold", va="center")
        figure.text(0.02, 0.937, NOTE, size=13, color=MUTED, va="center")
        return write(figure, path)


def _colour(moments: dict) -> str:
    if moments["direction"] is None or moments["direction"] > ZERO:
        return ORANGE
    return GREEN if moments["bias"] < ZERO else BLUE


def _rows(panel: Axes, moments: Moments, key: str, colours: list[str], form: str, scales: bool = False) -> None:
    """A bar and a number per row, the first on top."""
    values = [one[key] for one in moments.values()]
    most = max((value for value in values if value is not None), default=0.0) or 1.0
    for row, (one, value, colour) in enumerate(zip(moments.values(), values, colours)):
        x = 0 if value is None or value < ZERO else value
        panel.plot([0, x], [row, row], color=colour, lw=6, alpha=0.35, zorder=2)
        panel.plot(x, row, "o", color=colour, ms=9, mec="white", mew=1, zorder=3, clip_on=False)
        text = "-" if value is None else form.format(x) if x else "0"
        text = "under 1%" if text == "0%" else text
        if scales and abs(one["scale"] - 1) > ZERO:
            text += f"   step × {one['scale']:.2f}"
        offset = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "size": 11}
        panel.annotate(text, (x, row), color=colour, path_effects=HALO, **offset)
    panel.set(ylim=(len(values) - 0.4, -0.6), xlim=(0, 1.5 * most))
    panel.xaxis.set_major_locator(MaxNLocator(5))


def _kl(panel: Axes, moments: Moments) -> None:
    """How far the expected gradient of a KL term is from three gradients: three dots per row."""
    targets = (
        ("bias", "∇KL(π‖π_ref) of the whole answer", GREEN),
        ("to_steps", "Σ ∇KL(π‖π_ref) of each step", BLUE),
        ("to_reverse_steps", "Σ ∇KL(π_ref‖π) of each step", VIOLET),
    )
    for row, one in enumerate(moments.values()):
        for key, _, colour in targets:
            x, size, layer = (0, 13, 4) if one[key] < ZERO else (one[key], 8, 3)
            panel.plot(x, row, "o", color=colour, ms=size, mec="white", mew=1.2, zorder=layer, clip_on=False)
        if all(abs(one[key] - 1) < ZERO for key, *_ in targets):
            offset = {"xytext": (-12, 0), "textcoords": "offset points", "va": "center", "ha": "right", "size": 11}
            panel.annotate("no gradient at all, only noise", (1, row), color=MUTED, path_effects=HALO, **offset)
    panel.axvline(0, color=GREY, lw=1)
    panel.spines["left"].set_visible(False)
    panel.set_yticks(range(len(moments)), list(moments), color=INK)
    most = max(one[key] for one in moments.values() for key, *_ in targets)
    panel.set(ylim=(len(moments) - 0.4, -0.6), xlim=(-0.02 * most, 1.06 * most))
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_title("KL: how far the expected gradient is from that of", loc="left", weight="bold", size=14, pad=27)
    beside, corner, shift = panel.transAxes, (0, 1), (0, 9)
    for _, text, colour in targets:
        style = {"xycoords": beside, "xytext": shift, "textcoords": "offset points", "va": "bottom"}
        beside = panel.annotate(text, corner, color=colour, **style)
        corner, shift = (1, 0), (16, 0)
