"""The pipeline: what follows which, what is repeated, and a toy run from the base to the report."""

import json
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

from experiments import all_scenarios, preference_pairs, pretrain, r1, r1_zero, reject_sample, reward_model, sft
from experiments.studies import r1_figures, r1_seeds
from experiments.tools.fuzz_commands import SMALL
from minir1.files import write_json
from minir1.log import open_run, read_metrics

TOY = f"{Path(__file__).parent / 'r1_toy_task.py'}"


def test_every_file_that_a_stage_reads_was_made_by_an_earlier_one():
    config = r1.Config(out=Path("r"), ablation=True)
    made: set[str] = set()
    for name, stage in r1.stages(config).items():
        assert stage.settings.out == Path("r") / name
        for field, value in vars(stage.settings).items():
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path) and field != "out":
                    assert path.relative_to("r").parts[0] in made, (name, field)
        made.add(name)


def test_the_order_is_that_of_the_paper_and_both_fine_tunings_start_from_the_base():
    every = r1.stages(r1.Config(out=Path("r")))
    trained = [name for name in every if not name.startswith(("test/", "general/"))]
    assert trained == [
        "base", "r1-zero", "cold-start", "sft-1", "rl-1", "general-data", "rejection", "sft-2", "pairs", "reward-model",
        "rl-2",
    ]  # fmt: skip
    starts = {name: stage.settings.checkpoint.parent.name for name, stage in every.items() if name != "base"}
    assert [starts[name] for name in trained[1:]] == [
        "base", "r1-zero", "base", "sft-1", "base", "rl-1", "base", "sft-2", "sft-2", "sft-2",
    ]  # fmt: skip
    rl_1, plain = (r1.stages(r1.Config(ablation=True))[name].settings for name in ("rl-1", r1.PLAIN))
    assert replace(plain, language_weight=rl_1.language_weight, out=rl_1.out) == rl_1 and plain.language_weight == 0


def test_all_stages_share_seed_device_and_budget():
    config = r1.Config(seed=5, device="cpu", dtype="float32", task="countdown", general_task="world:talk")
    for name, stage in r1.stages(config).items():
        own = stage.settings
        assert (own.seed, own.device, own.dtype) == (5, "cpu", "float32")
        assert getattr(own, "max_completion_length", 320) == 320
        general = name in ("general-data", "pairs") or name.startswith("general/")
        assert getattr(own, "task", "countdown") == ("world:talk" if general else "countdown")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": r1_zero.Config(seed=1)}, "--zero.seed: r1.py sets it"),
        ({"rl_2": all_scenarios.Config(general_task="x.py")}, "--rl-2.general-task: r1.py sets it"),
        ({"sft_1": sft.Config(checkpoint=Path("a"))}, "--sft-1.checkpoint: r1.py sets it"),
        ({"sft_2": sft.Config(data=(Path("a"),))}, "--sft-2.data: r1.py sets it"),
        ({"reward_model": reward_model.Config(pairs=Path("a"))}, "--reward-model.pairs: r1.py sets it"),
        ({"reward_model": reward_model.Config(held_out=Path("a"))}, "--reward-model.held-out: r1.py sets it"),
        ({"rl_1": r1_zero.Config(max_completion_length=8)}, "--rl-1.max-completion-length: r1.py sets it"),
        ({"task": "no"}, "unknown task 'no'"),
        ({"general_task": "world:quiet"}, "has no variant 'quiet'"),
        ({"task": "countdown"}, "stage cold-start: task countdown has no rewrite.*: add --cold-start.no-rewrite"),
        ({"task": "countdown", "cold_start": reject_sample.Config()}, "the tokenizer has no token for 'tell ' in the"),
        ({"zero": r1_zero.Config(prompts=9999)}, "stage r1-zero: 9999 prompts of task world, which has [0-9]+ "),
        ({"rl_2": all_scenarios.Config(prompts=200, general_prompts=150)}, "stage rl-2: 150 prompts of task world:ta"),
        ({"rl_1": r1_zero.Config(eval_split="dev")}, "task world has no split 'dev'"),
        ({"pairs": preference_pairs.Config(eval_split="dev")}, "task world:talk has no split 'dev'"),
        ({"zero": r1_zero.Config(template="r1_zero")}, "template 'r1_zero': the tokenizer has no tokens for its words"),
    ],
)
def test_what_the_pipeline_sets_and_unknown_tasks_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        r1.main(replace(r1.Config(out=tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_task_of_which_a_stage_could_ask_nothing_is_refused_before_anything_is_written(tmp_path):
    toy = Path(TOY).read_text().replace("def problems(", "def listed(")
    cases = {"[] if split == 'test' else listed(split, data, variant)": "task own: split 'test' has no problems",
             "9 * [Problem('say 1', '1', language='xx')]": "language 'xx': no script is known for it"}  # fmt: skip
    config = replace(CONFIG, task=f"{tmp_path / 'own.py'}", out=tmp_path / "run")
    for value, message in cases.items():
        (tmp_path / "own.py").write_text(f"{toy}\ndef problems(split, data, variant): return {value}\n")
        with pytest.raises(ValueError, match=message):
            r1.main(config)
    assert not config.out.exists()


def test_finished_stages_are_not_repeated_others_resume_and_their_seconds_are_kept(tmp_path, capsys):
    called = []

    def stage(name, done, seconds=0.0):
        out = tmp_path / name
        finish = lambda: (out.mkdir(), (out / "result.json").write_text(json.dumps({"seconds/sft": seconds})))
        if done:
            finish()
        return r1.Stage(lambda own: (called.append(name), finish()), sft.Config(out=out))

    run = open_run(tmp_path, r1.Config()).start()
    r1.run_stages({"base": stage("base", True), "sft-1": stage("sft-1", False, seconds=900.0)}, run)
    run.close()
    assert all(stage.settings.resume for stage in r1.stages(r1.Config()).values())
    assert called == ["sft-1"] and "stage 1 of 2, base: done before" in capsys.readouterr().out
    assert r1.seconds_of(tmp_path) == {"sft-1": 900.0}  # most of them before a kill


def finished(out: Path, *names: str, **result) -> dict[str, r1.Stage]:
    """The stages of a run in which these are done."""
    every = r1.stages(r1.Config(out=out))
    for name in names:
        own = every[name].settings
        write_json(own.out / "result.json", result)
        if hasattr(own, "steps"):
            write_json(own.out / "config.json", {"steps": own.steps})
    return every


def test_a_stage_made_from_one_that_has_to_run_again_is_refused(tmp_path):
    r1.refuse_stale(finished(tmp_path / "a", "base", "r1-zero", "cold-start"))  # killed in the fourth
    with pytest.raises(ValueError, match="stage r1-zero was made from base, which is not there .* delete .*r1-zero"):
        r1.refuse_stale(finished(tmp_path / "b", "r1-zero", "cold-start"))
    with pytest.raises(ValueError, match="stage sft-1 was made from cold-start"):
        r1.refuse_stale(finished(tmp_path / "c", "base", "r1-zero", "sft-1"))
    tests = [f"test/{name}" for name in r1.TESTED]
    every = finished(tmp_path / "d", *(name for name in r1.stages(r1.Config()) if name != "test/base"), *tests[1:])
    r1.refuse_stale(every)  # nothing reads a test
    with pytest.raises(ValueError, match="stage rl-2 was made from reward-model"):
        (tmp_path / "d" / "reward-model" / "result.json").unlink()
        r1.refuse_stale(every)


def test_other_steps_for_a_stage_that_is_done_are_refused_and_nothing_is_overwritten(tmp_path):
    config = r1.Config(out=tmp_path / "run", resume=True)
    open_run(config.out, config).start().close()
    before = (config.out / "config.json").read_bytes()
    finished(config.out, "base", "r1-zero")
    with pytest.raises(ValueError, match="stage r1-zero is done with steps = 60, not 30"):
        r1.main(replace(config, zero=replace(config.zero, steps=30)))
    assert (config.out / "config.json").read_bytes() == before


def test_the_time_that_is_left_is_scaled_by_the_stages_that_ran():
    usual = r1.USUAL
    assert r1.time_left(["base", "sft-1", "test/base"], "base", {}) == 0
    twice = r1.time_left(["base", "sft-1", "test/base"], "sft-1", {"base": 2 * usual["base"]})
    assert twice == pytest.approx(2 * (usual["sft-1"] + usual["test"]))
    assert {name.partition("/")[0] for name in r1.stages(r1.Config(ablation=True))} == usual.keys()


ROLLOUTS = {"steps": 2, "prompts": 4, "num_generations": 4, "eval_problems": 4,
            "eval_answers": 1, "min_mixed": 0.0}  # fmt: skip
SAMPLED = {"problems": 8, "num_generations": 8}
CONFIG = r1.Config(
    task=TOY,
    general_task=f"{TOY}:talk",
    base=pretrain.Config(model=SMALL, steps=120, batch=1024),
    zero=r1_zero.Config(**ROLLOUTS),
    cold_start=reject_sample.Config(**SAMPLED, rewrite=True, tidy=True),
    sft_1=sft.Config(epochs=1, batch=4, held_out=0.2),
    rl_1=r1_zero.Config(**ROLLOUTS, language_weight=0.2, epsilon_low=10.0, epsilon_high=10.0),
    general_data=reject_sample.Config(**SAMPLED),
    rejection=reject_sample.Config(**SAMPLED, per_problem=1),
    sft_2=sft.Config(epochs=1, batch=4, held_out=0.2),
    pairs=preference_pairs.Config(**SAMPLED),
    reward_model=reward_model.Config(steps=2, batch=4),
    rl_2=all_scenarios.Config(**ROLLOUTS, preference_steps=1, general_prompts=2),
    max_completion_length=12,
    problems=4,
    num_generations=2,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    out = tmp_path_factory.mktemp("r1") / "run"
    return out, r1.main(replace(CONFIG, out=out, ablation=True))


def test_a_toy_run_leaves_a_result_and_a_report(pipeline):
    out, result = pipeline
    for name in [*r1.TESTED, r1.PLAIN]:
        assert 0 <= result[f"{name}/pass@1_low"] <= result[f"{name}/pass@1"] <= result[f"{name}/pass@1_high"] <= 1
        assert name == r1.PLAIN or 0 <= result[f"{name}/general/preference"] <= 1
    stages = sum(result[f"seconds/{name}"] for name in r1.stages(replace(CONFIG, ablation=True)))
    assert result["seconds/total"] == pytest.approx(stages)
    assert json.loads((out / "result.json").read_text()) == result
    page = (out / "report.html").read_text()
    assert "R1-Zero" in page and (out / "report.md").exists() and list((out / "figures").glob("*.png"))
    assert "train/language_consistency" in read_metrics(out / "rl-1")[-1]
    assert "train/language_consistency" not in read_metrics(out / r1.PLAIN)[-1]
    assert "train/reward_model" in read_metrics(out / "rl-2")[-1]


def test_a_second_call_repeats_no_stage_and_a_run_without_resume_is_refused(pipeline, monkeypatch):
    out, result = pipeline
    for module in (pretrain, r1_zero, reject_sample, sft, preference_pairs, reward_model, all_scenarios):
        monkeypatch.setattr(module, "main", lambda settings: pytest.fail("a finished stage was repeated"))
    again = r1.main(replace(CONFIG, out=out, ablation=True, resume=True))
    assert again.pop("memory/peak_gib") >= result["memory/peak_gib"]
    assert again == {key: value for key, value in result.items() if key != "memory/peak_gib"}
    with pytest.raises(ValueError, match="already holds a run"):
        r1.main(replace(CONFIG, out=out, ablation=True))


def test_every_stage_has_its_settings_on_the_command_line():
    named = {name for name, value in vars(r1.Config()).items() if is_dataclass(value)}
    assert named == {
        "base", "zero", "cold_start", "sft_1", "rl_1", "general_data", "rejection", "sft_2", "pairs", "reward_model",
        "rl_2",
    }  # fmt: skip


# ---- over seeds ------------------------------------------------------------------------------


def test_the_figures_of_a_run_over_seeds(pipeline, tmp_path):
    out, result = pipeline
    values = r1_seeds.figures(out)
    for name in r1_seeds.TESTED:
        assert values[f"{name}/pass@1"] == result[f"{name}/pass@1"]
    assert values["r1-zero/over_r1-zero"] == values["rl-1/over_rl-1"] == 0.0
    assert values["rl-2/preference"] == result["rl-2/general/preference"] and f"{r1.PLAIN}/preference" not in values
    table = {row[0]: row[1:] for row in r1_seeds.rows([values, values, values])}
    column = list(r1_seeds.TESTED).index("rl-2")
    assert table["tokens"][column].startswith(f"{values['rl-2/length']:.1f} [")
    assert table["general prompts, preference"][-1] == "-"
    assert table["minus RL 1, in points, paired"][list(r1_seeds.TESTED).index("rl-1")] == "-"
    r1_figures.seeds([values, values], r1_seeds.TESTED, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_finding_is_made_of_the_means():
    one = {"base/pass@1": 0.2, "r1-zero/pass@1": 0.6, "rl-2/pass@1": 0.7, "rl-2/over_r1-zero": 0.1}
    one |= {"r1-zero/language_consistency": 0.6, "rl-2/language_consistency": 0.99}
    one |= {"r1-zero/repetition": 0.1, "rl-2/repetition": 0.04, "r1-zero/tidiness": 0.4, "rl-2/tidiness": 0.9}
    other = {key: value + 0.02 for key, value in one.items()}
    text = r1_seeds.finding([one, other])
    assert "the base solves 21.0%, R1-Zero 61.0% and the final model 71.0%, +11.0 points more than R1-Zero" in text
    assert "(the mean of 2 seeds). From R1-Zero to the end: language consistency 61.0% → 100.0%, " in text
    assert text.endswith("repetition 11.0% → 5.0%, thinking that closes with the answer 41.0% → 91.0%.")


def test_the_cost_sums_tests_and_shows_shares():
    seconds = {"base": 30.0, "test/base": 5.0, "general/base": 5.0, "total": 40.0}
    text = r1_seeds.cost({f"seconds/{name}": value for name, value in seconds.items()} | {"demo": 16.0})
    rows = ["| base | 30 | 75% |", "| tests | 10 | 25% |", "| **all** | **40** |  |"]
    rows += ["| `make demo`, before it | 16 |  |"]
    assert text.splitlines()[2:] == rows
