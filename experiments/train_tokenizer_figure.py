"""The figure of tokenizers: bytes per token by kind of text, and tokens of a number by its digits."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minir1.figures import BLUE, DPI, GREEN, GREY, ORANGE, STYLE, VIOLET, WIDTH, caption, from_zero, headline, write

COLOURS = (BLUE, ORANGE, GREEN, VIOLET, GREY)


def draw(report: dict, path: Path) -> Figure:
    """report: as train_tokenizer.py writes it. Writes a PNG."""
    each = list(report["tokenizers"].items())
    names = [(name, COLOURS[i % len(COLOURS)]) for i, (name, _) in enumerate(each)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6), dpi=DPI)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.subplots_adjust(left=0.06, right=0.975, top=0.72, bottom=0.11, wspace=0.16)
        kinds = [kind for kind in report["kinds"] if any(f"{kind}/bytes_per_token" in one for _, one in each)]
        _bars(left, kinds, each, names)
        _numbers(right, each, names)
        headline(figure, *_finding(kinds, each))
        return write(figure, path)


def _bars(panel: Axes, kinds: list[str], each: list[tuple[str, dict]], names: list[tuple[str, str]]) -> None:
    caption(panel, "Bytes per token", names if kinds else [])
    width = 0.8 / len(each)
    for i, ((_, one), (_, colour)) in enumerate(zip(each, names)):
        values = [one.get(f"{kind}/bytes_per_token", 0) for kind in kinds]
        places = np.arange(len(kinds)) + width * (i + 0.5) - 0.4
        for bar in panel.bar(places, values, 0.9 * width, color=colour):
            middle, height = bar.get_x() + bar.get_width() / 2, bar.get_height()
            panel.text(middle, height, f"{height:.2f}", ha="center", va="bottom", size=10)
    from_zero(panel, [1.05 * one.get(f"{kind}/bytes_per_token", 0) for kind in kinds for _, one in each])
    panel.set_xticks(range(len(kinds)), kinds)


def _numbers(panel: Axes, each: list[tuple[str, dict]], names: list[tuple[str, str]]) -> None:
    caption(panel, "Tokens of a number", [("on average over random ones", GREY)])
    curves: dict[tuple, list[str]] = {}  # (digits, tokens) of each number -> the colours of those who share it
    for (_, one), (_, colour) in zip(each, names):
        points = tuple((int(key.split("/")[1]), value) for key, value in one.items() if key.startswith("digits/"))
        curves.setdefault(points, []).append(colour)
    for points, colours in curves.items():
        for i, colour in enumerate(colours):  # lines that coincide are seen in turn
            style = {"ls": (2.0 * i, (2.0, 2.0 * (len(colours) - 1))), "dash_capstyle": "butt"} if colours[1:] else {}
            panel.plot(*zip(*points), color=colour, lw=3, zorder=3, **style)
    values = [tokens for points in curves for _, tokens in points]
    from_zero(panel, values)
    panel.set(xlabel="digits")


def _finding(kinds: list[str], each: list[tuple[str, dict]]) -> tuple[str, str]:
    """Title and the line under it: the first kind of text, this tokenizer and the best of the others."""
    note = "more bytes per token: fewer tokens for the same text; numbers become tokens by the digit policy"
    if not kinds:
        return "Tokens of a number", note
    key = f"{kinds[0]}/bytes_per_token"
    title = f"{kinds[0][:1].upper()}{kinds[0][1:]}: {each[0][1][key]:.2f} bytes per token"
    if others := [(one[key], name) for name, one in each[1:]]:
        title += f", at most {max(others)[0]:.2f} by the others"
    return title, note
