"""studies/long_tail.py: the simulator by hand and against closed forms; a study at toy size."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.studies import long_tail
from experiments.studies.long_tail import balanced, dealt, lost, refill, running, wait

FLAT = lambda rows: np.array([0.0] + [1.0] * rows)  # a step takes as long, however many rows run
LINEAR = lambda rows: np.arange(rows + 1.0)  # a row costs the same in any step


def test_rows_that_run_by_hand():
    assert running(np.array([0, 0, 2]), np.array([2, 4, 1])).tolist() == [2, 2, 2, 1]
    lengths = np.array([1, 3, 2, 2, 5])
    assert wait(lengths, 2).tolist() == [2, 1, 1, 2, 2, 1, 1, 1, 1, 1]  # 1 and 3, 2 and 2, 5
    assert refill(lengths, 2).tolist() == [2, 2, 2, 2, 2, 1, 1, 1]  # at step 3 both rows are free, for 2 and 5
    assert wait(np.array([4]), 8).tolist() == refill(np.array([4]), 8).tolist() == [1, 1, 1, 1]


def test_lost_time_by_hand():
    lengths = np.array([1, 1, 1, 4])
    assert lost([wait(lengths, 4)], FLAT(4)) == pytest.approx(1 - 7 / 16)
    assert lost([wait(lengths, 4)], LINEAR(4)) == pytest.approx(0)  # rows that have ended are dropped, and cost nothing
    half = np.array([0, 2.0, 2.5, 3.0, 3.5])  # 1.5 s and half a second per row
    assert lost([wait(lengths, 4)], half) == pytest.approx(1 - 7 / 4 * 3.5 / (3.5 + 3 * 2.0))
    assert lost([refill(np.array([3, 1, 1, 1]), 2)], FLAT(2)) == 0
    two = [wait(np.array([2, 2]), 2), wait(np.array([6, 6]), 2)]
    assert lost(two, FLAT(2)) == pytest.approx(1 - 8 / 12)  # the first waits for the second


def test_geometric_lengths_lose_what_the_closed_form_says():
    """P(l > t) = q^t, so E max of R is Σ_t 1 - (1 - q^t)^R; a batch takes its longest answer."""
    q, rows, rng = 0.98, 32, np.random.default_rng(0)
    t = np.arange(5000)
    longest = (1 - (1 - q**t) ** rows).sum()
    lengths = rng.geometric(1 - q, size=rows * 4000)
    measured = lost([wait(lengths, rows)], FLAT(rows))
    assert measured == pytest.approx(1 - 1 / (1 - q) / longest, abs=0.004)
    assert lost([refill(lengths, rows)], FLAT(rows)) < 0.01


def test_refilling_keeps_the_bounds_of_list_scheduling():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths, rows = rng.integers(1, 50, size=rng.integers(1, 60)), int(rng.integers(1, 10))
        steps, least = len(refill(lengths, rows)), max(-(-lengths.sum() // rows), lengths.max())
        assert least <= steps <= (2 - 1 / rows) * least and steps <= len(wait(lengths, rows))
        for way in (wait, refill):
            assert way(lengths, rows).sum() == lengths.sum() and way(lengths, rows).max() <= rows


@pytest.mark.parametrize("assign", [dealt, balanced])
def test_every_prompt_goes_to_one_rank(assign):
    for prompts, ranks in ((12, 4), (13, 4), (5, 5), (64, 7)):
        parts = assign(np.random.default_rng(prompts).random(prompts), ranks)
        assert sorted(np.concatenate(parts).tolist()) == list(range(prompts)) and len(parts) == ranks
        assert max(map(len, parts)) <= -(-prompts // ranks)


def test_balancing_pairs_long_with_short():
    expected = np.array([9.0, 8.0, 2.0, 1.0])
    assert sorted(sorted(part.tolist()) for part in balanced(expected, 2)) == [[0, 3], [1, 2]]
    assert [part.tolist() for part in dealt(expected, 2)] == [[0, 1], [2, 3]]


def test_a_study_at_toy_size(toy_base, tmp_path, monkeypatch, capsys):
    base = toy_base() / "checkpoint"
    monkeypatch.setattr(long_tail, "GPUS", (1, 2))
    config = long_tail.Config(
        before=base, after=base, problems=4, num_generations=4, max_completion_length=12, answers=256, repeats=2,
        model="minir1", device="cpu", results=tmp_path / "a.json", figure=tmp_path / "a.png",
    )  # fmt: skip
    results = long_tail.main(config)
    assert len(results["before/lengths"]) == 4 and results["before/mean"] == results["after/mean"] > 0
    for when in ("before", "after"):
        for n in long_tail.ROWS:
            assert -1e-9 <= results[f"{when}/rows/{n}/refill"] <= results[f"{when}/rows/{n}/wait"] + 1e-9 < 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "rows at once, one GPU" in capsys.readouterr().out
    monkeypatch.setattr(long_tail, "measure", lambda *_: pytest.fail("measured again"))
    assert long_tail.main(config) == results == json.loads((tmp_path / "a.json").read_text())
    longer = long_tail.main(replace(config, stretch=40))
    assert longer["after/mean"] == results["after/mean"]
