"""keep_run.py: a report reads what was kept as it reads the run, and nothing else was kept."""

import pytest
from r1_run import TESTED, build

from experiments.report_run import STAGES, read
from experiments.tools import keep_run


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    build(folder / "run")
    keep_run.main(keep_run.Config(folder / "run", folder / "kept", rows=10))
    return folder / "run", folder / "kept"


def test_a_report_reads_the_same(both):
    whole, kept = map(read, both)
    assert list(kept.stages) == list(whole.stages) == list(STAGES)
    for name, stage in whole.stages.items():
        own = kept.stages[name]
        counted = [[one.seconds, one.trained or 0, one.sampled or 0, one.start] for one in (own, stage)]
        assert counted[0] == pytest.approx(counted[1], rel=1e-4)
        assert own.config["steps"] == stage.config["steps"] if stage.config else not own.config
    assert list(kept.tests) == list(whole.tests) == list(TESTED)
    for name in TESTED:
        assert kept.tests[name] == pytest.approx(whole.tests[name], rel=1e-4)
        for index, answers in kept.answers[name].answers["sampled"].items():
            own = whole.answers[name].answers["sampled"][index]
            assert [(a.text, a.right, a.tokens) for a in answers] == [(a.text, a.right, a.tokens) for a in own]
        assert kept.budget[name] == whole.budget[name]


def test_rows_of_rl_are_kept_and_others_are_thinned(both):
    whole, kept = map(read, both)
    steps = {name: [row["step"] for row in run.stages[name].metrics] for run in (kept,) for name in ("base", "r1-zero")}
    assert steps["r1-zero"] == [row["step"] for row in whole.stages["r1-zero"].metrics]
    assert len(steps["base"]) <= 13 and steps["base"][-1] == whole.stages["base"].metrics[-1]["step"]
    last = kept.stages["r1-zero"].metrics[-1]
    assert last["train/reward"] == pytest.approx(whole.stages["r1-zero"].metrics[-1]["train/reward"], rel=1e-4)


def test_weights_and_other_answers_are_not_kept(both):
    _, kept = both
    names = {path.name for path in kept.rglob("*") if path.is_file()}
    assert names == {"result.json", "config.json", "metrics.jsonl", "answers.jsonl"}
    text = (kept / "test" / "base" / "answers.jsonl").read_text()
    assert '"sampled"' in text and '"forced"' not in text and '"greedy"' not in text


def test_of_large_tests_the_same_problems_are_kept_of_every_stage(both, tmp_path):
    whole, _ = both
    keep_run.main(keep_run.Config(whole, tmp_path / "few", problems=3, answers=1))
    few = read(tmp_path / "few")  # refuses answers to different problems
    for name, saved in few.answers.items():
        assert len(saved.asked) == 3 and all(len(row) == 1 for row in saved.answers["sampled"].values())
        assert few.tests[name] == pytest.approx(read(whole).tests[name], rel=1e-4)


def test_an_old_folder_is_refused(both):
    with pytest.raises(ValueError, match="exists: name a new folder"):
        keep_run.Config(*both)


def test_what_is_damaged_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="holds no result.json: the run has not ended"):
        keep_run.main(keep_run.Config(tmp_path, tmp_path / "kept"))
    build(tmp_path / "run")
    answers = next((tmp_path / "run").rglob("answers.jsonl"))
    for text, said in (("", "line 1: no answers"), (answers.read_text("utf-8") + '{"x": 1}\n', "no answers of an")):
        answers.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            keep_run.main(keep_run.Config(tmp_path / "run", tmp_path / "kept"))
        assert not (tmp_path / "kept").exists()
