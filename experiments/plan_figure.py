"""The figure of `experiments.plan`: the memory of one GPU by part, in each phase of a step."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from minir1.figures import BLUE, GREEN, GREY, HALO, INK, ORANGE, RED, STYLE, VIOLET, headline, wide_figure, write
from minir1.gpus import GIB
from minir1.memory import LEARNED, SAMPLED
from minir1.plan import USABLE, Job, memory_parts, peak

COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)


def draw(name: str, job: Job, path: Path) -> Figure:
    """Two stacked bars, sampling and training, against the usable memory."""
    parts, usable = memory_parts(job), USABLE * job.gpu.memory / GIB
    only = {"sampling": (*LEARNED, "gathered"), "training": (*SAMPLED, "copy")}  # parts that the phase does not have
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, (panel,) = wide_figure(height=4.2, left=0.1, top=0.78)
        colours = {part: COLOURS[i % len(COLOURS)] for i, part in enumerate(p for p in parts if parts[p])}
        for row, (phase, absent) in enumerate(only.items()):
            left = 0.0
            for part in (p for p in parts if parts[p] and p not in absent):
                width = parts[part] / GIB
                panel.barh(row, width, left=left, color=colours[part], height=0.6, edgecolor="white")
                if width > 0.045 * max(usable, peak(parts) / GIB):
                    style = {"ha": "center", "va": "center", "size": 10, "color": INK, "path_effects": HALO}
                    panel.text(left + width / 2, row, f"{part}\n{width:.1f}", **style)
                left += width
        panel.axvline(usable, color=INK, lw=1.5, ls=(0, (4, 3)))
        panel.set_yticks(range(len(only)), only)
        panel.invert_yaxis()
        panel.set_xlabel("GiB of one GPU; dashed: usable")
        enough = "fits" if peak(parts) / GIB <= usable else "does not fit"
        note = f"{job.gpus} GPUs, {job.rows} rows; peak {peak(parts) / GIB:.1f} GiB of {usable:.1f}"
        headline(figure, f"{name} {enough}", note)
        return write(figure, path)
