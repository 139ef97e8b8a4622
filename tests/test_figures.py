"""figures.py: files are written, everything is labelled, and what was not measured is left out."""

import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import demo_figure
from experiments.studies import seeds_figures
from minir1 import figures

KEYS = ["train/accuracy", "train/length", "train/entropy", "train/kl"]
BEHAVIOUR = ["behaviour/tries", "behaviour/said_yes", "behaviour/false_yes"]


def run(steps: int = 40, behaviour: bool = True) -> list[dict]:
    """Everything rises from 0.3; the tries by a tenth a step, `false_yes` hardly."""
    keys = KEYS + BEHAVIOUR * behaviour
    slope = {"behaviour/tries": 0.1, "behaviour/false_yes": 0.001}
    rows = [{"step": s} | {key: 0.3 + slope.get(key, 0.01) * s for key in keys} for s in range(steps)]
    return [row | ({"eval/pass@1": 0.4} if row["step"] % 10 == 0 else {}) for row in rows]


def seed_result(shift: float = 0.0) -> dict:
    means = {"before": 0.34, "after": 0.71, "forced": 0.12, "nothink": 0.18, "search": 0.45}
    result = {f"{name}/pass@1": mean + shift for name, mean in means.items()}
    low = {f"{key}_low": value - 0.02 for key, value in result.items()}
    high = {f"{key}_high": value + 0.02 for key, value in result.items()}
    return result | low | high | {"after/over_search": 0.26, "after/over_search_low": 0.2}


def texts(figure) -> list[str]:
    return [text.get_text() for owner in [figure, *figure.axes] for text in owner.texts]


def size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_r1_zero(tmp_path):
    path = tmp_path / "figures" / "r1_zero.png"
    figure = demo_figure.r1_zero(run(), path, result=seed_result())
    assert size(path)[0] >= 1200
    assert all(axes.get_xlabel() == "RL step" for axes in figure.axes[:4])
    assert all(axes.get_ylabel() for axes in figure.axes) and len(figure.axes) == 6  # two have a right axis
    words = texts(figure)
    assert "Held-out pass@1: 34% → 71% by RL with rule rewards alone" in words
    assert any("69 to 73%" in text and "12%" in text and "baseline: search 45%" in text for text in words)
    assert {"baseline: search", "forced to answer at once", "tries per answer", "said yes", "false yes"} <= set(words)
    assert words.index("said yes") < words.index("false yes")  # the one that changed more comes first
    assert "not measured" not in words


def test_the_strongest_of_several_baselines_is_drawn(tmp_path):
    two = {"guess/pass@1": 0.5, "after/over_guess": 0.2, "other/pass@1": 0.9}  # the last is no baseline
    words = texts(demo_figure.r1_zero(run(), tmp_path / "a.png", result=seed_result() | two))
    assert "baseline: guess" in words and not any("search" in text or "other" in text for text in words)


def test_a_task_without_behaviour_and_baselines_has_three_panels(tmp_path):
    result = {key: value for key, value in seed_result().items() if "search" not in key}
    figure = demo_figure.r1_zero(run(behaviour=False), tmp_path / "a.png", result=result)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:3]]
    assert titles == ["Accuracy", "Length of an answer", "Entropy and drift"] and len(figure.axes) == 4
    assert "not measured" not in texts(figure) and not any("baseline" in text for text in texts(figure))


def test_two_axes_of_a_panel_share_their_grid(tmp_path):
    figure = demo_figure.r1_zero(run(), tmp_path / "a.png")
    for left, right in [(figure.axes[2], figure.axes[4]), (figure.axes[3], figure.axes[5])]:
        heights = [axes.get_yticks() / axes.get_ylim()[1] for axes in (left, right)]
        np.testing.assert_allclose(*heights, atol=1e-12)


@pytest.mark.parametrize("behaviour", [True, False])
def test_no_label_of_an_axis_lies_over_another(tmp_path, behaviour):
    rows = [row | {"train/entropy": 0.11, "train/kl": 0.0011} for row in run(behaviour=behaviour)]  # long tick labels
    figure = demo_figure.r1_zero(rows, tmp_path / "a.png")
    words = [text for axes in figure.axes for text in (axes.yaxis.label, *axes.get_yticklabels()) if text.get_visible()]
    boxes = [text.get_window_extent() for text in words if text.get_text()]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


@pytest.mark.parametrize("missing", [*KEYS, *BEHAVIOUR, "all"])
def test_r1_zero_survives_missing_keys_and_nulls(tmp_path, missing):
    keys = [*KEYS, *BEHAVIOUR, "eval/pass@1"] if missing == "all" else [missing]
    rows = [{key: value for key, value in row.items() if key not in keys} for row in run(12)]
    rows[3] = {key: None if key != "step" else value for key, value in rows[3].items()}
    figure = demo_figure.r1_zero(rows, tmp_path / "a.png", result={"before/pass@1": None, "after/pass@1": 0.5})
    empty = {"all": 3, "train/length": 1}.get(missing, 0)  # the other panels show more than one quantity
    assert texts(figure).count("not measured") == empty


def test_a_behaviour_that_is_null_in_every_row_is_not_measured(tmp_path):
    rows = [{"step": s, "behaviour/tries": None, "train/length": 3.0, "train/entropy": 1.0} for s in range(3)]
    assert texts(demo_figure.r1_zero(rows, tmp_path / "a.png")).count("not measured") == 2  # and no accuracy


@pytest.mark.parametrize("rows", [[], [{"step": 0}], [{"step": 5, "train/length": 0.0, "train/kl": -0.01}]])
def test_r1_zero_with_at_most_one_row(tmp_path, rows):
    demo_figure.r1_zero(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_seeds(tmp_path):
    figure = seeds_figures.seeds([seed_result(shift) for shift in (-0.02, 0, 0.02)], tmp_path / "seeds.png")
    panel = figure.axes[0]
    assert size(tmp_path / "seeds.png")[0] >= 1200 and panel.get_ylabel()
    assert [label.get_text() for label in panel.get_xticklabels()][:2] == ["before RL", "after RL"]
    assert [text.get_text() for text in panel.texts] == ["34%", "71%", "12%", "18%", "45%"]
    assert "Held-out pass@1: +37 points by RL with rule rewards alone" in texts(figure)
    joined = [line for line in panel.lines if len(line.get_xdata()) == 2 and np.ptp(line.get_xdata()) > 0.5]
    np.testing.assert_allclose([line.get_ydata() for line in joined], [[0.32, 0.69], [0.34, 0.71], [0.36, 0.73]])


def test_seeds_leaves_out_what_no_seed_has(tmp_path):
    worse, better = ({"before/pass@1": 0.3, "after/pass@1": after} for after in (0.2, 0.35))
    figure = seeds_figures.seeds([worse, better | {"search/pass@1": None}], tmp_path / "a.png")
    assert len(figure.axes[0].get_xticklabels()) == 2
    assert any("-10 to +5 points" in text for text in texts(figure))
    seeds_figures.seeds([{"after/pass@1": 0.3}], tmp_path / "b.png")
    seeds_figures.seeds([], tmp_path / "c.png")


def test_a_headline_in_inches_is_as_far_from_the_top_of_any_figure():
    for height in (3.0, 8.0):
        figure = Figure(figsize=(12, height))
        figures.tall_headline(figure, "title", "note")
        below = [(1 - text.get_position()[1]) * height for text in figure.texts]
        np.testing.assert_allclose(below, [0.4, 0.8])


def test_smooth():
    np.testing.assert_allclose(figures.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3, 3, 3])
    np.testing.assert_allclose(figures.smooth(np.ones(7), 5), np.ones(7))


def test_figures_need_no_pyplot_and_leave_the_style(tmp_path):
    seeds_figures.seeds([seed_result()], tmp_path / "a.png")
    assert matplotlib.rcParams["axes.grid"] == matplotlib.rcParamsDefault["axes.grid"]
    code = "import sys, minir1.figures; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_figure_for_a_notebook_is_the_png_that_would_be_written(tmp_path):
    figure, (panel,) = figures.wide_figure()
    panel.plot([1, 2])
    figures.write(figure, tmp_path / "a.png")
    assert figures.png(figure) == (tmp_path / "a.png").read_bytes()


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    with matplotlib.rc_context(figures.STYLE):
        figure, (panel,) = figures.wide_figure()
        panel.set_yticks([0, 1], ["$x_$", "a\nb$_{$"])
        panel.annotate("^_$$", (0, 0))
        figures.caption(panel, "$", [("$\\nosuch$", figures.BLUE)])
        figures.headline(figure, "$x_$", "runs/b$_{$")
        figures.write(figure, tmp_path / "a.png")
    assert size(tmp_path / "a.png")[0] >= 1200
