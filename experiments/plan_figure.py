"""The figure of `experiments.plan`: the memory of one GPU by part, in each phase of a step."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from minir1.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, STYLE, VIOLET, tall_headline, wide_figure, write
from minir1.gpus import GIB
from minir1.memory import LEARNED, SAMPLED, peak
from minir1.plan import USABLE, Job, memory_parts

COLOURS = [(colour, alpha) for alpha in (1.0, 0.5) for colour in (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)]


def phases(job: Job) -> dict[str, tuple[str, ...]]:
    """The phases of a step, each with the parts that are in memory only then."""
    first = "sampling" if job.kind == "rl" else "validation"
    return {first: SAMPLED, "training": LEARNED}


def draw(name: str, job: Job, path: Path) -> Figure:
    """A stacked bar for each phase, against the usable memory."""
    parts, usable = {part: n / GIB for part, n in memory_parts(job).items() if n}, USABLE * job.gpu.memory / GIB
    trains = f"adapters of rank {job.lora_rank} are trained" if job.lora_rank else "all weights are trained"
    need = peak(memory_parts(job)) / GIB
    both = [name for name, own in phases(job).items() if any(part in parts for part in own)]
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, (panel,) = wide_figure(height=4.6, left=0.09, right=0.78, top=0.74, bottom=0.15)
        for row, phase in enumerate(both):
            absent = [part for name, own in phases(job).items() if name != phase for part in own]
            left = 0.0
            for (part, size), (colour, alpha) in zip(parts.items(), COLOURS):
                if part not in absent:
                    style = {"color": colour, "alpha": alpha, "height": 0.6, "edgecolor": "white"}
                    panel.barh(row, size, left=left, label=f"{part}, {size:.2g} GiB", **style)
                    left += size
        panel.axvline(usable, color=INK, lw=1.5, ls=(0, (4, 3)))
        panel.set_yticks(range(len(both)), both)
        panel.set_ylim(len(both) - 0.5, -0.5)
        panel.set_xlabel("GiB of one GPU; dashed: usable")
        handles = {text: handle for handle, text in zip(*panel.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(0.79, 0.45), frameon=False)
        tall_headline(
            figure,
            f"{name} {'fits' if need <= usable else 'does not fit'}: {need:.1f} of {usable:.1f} GiB",
            f"{job.gpus} GPUs, {job.rows} rows in all; {trains}",
            left=0.09,
        )
        return write(figure, path)

