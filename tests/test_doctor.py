"""doctor.py: what a run will take, measured by a step that changes nothing; findings before and after."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import doctor, r1_zero
from minir1 import checkpoint, tasks
from minir1.files import write_json
from minir1.model import hf
from minir1.tasks import Problem, Verdict

RL = r1_zero.Config(
    steps=3, prompts=4, num_generations=4, max_completion_length=32, eval_problems=8, eval_answers=1, eval_every=2,
    min_mixed=0.0, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(toy_base):
    return toy_base("dense") / "checkpoint"


def test_before_a_run(base, capsys):
    """It predicts, prints a table, and leaves no file behind; a --prompts above the task's problems is refused."""
    files = sorted(base.rglob("*"))
    rows = doctor.predict(replace(RL, checkpoint=base))
    first, step = rows
    for name in ("pass@1", "pass@4", "mixed_groups", "truncated", "format", "format_chat", "format_plain"):
        assert 0 <= first[f"preflight/{name}"] <= 1
    assert first["preflight/references"] == 1.0 and first["preflight/contradictions"] == 0.0
    assert first["preflight/format"] == first["preflight/format_chat"] > first["preflight/format_plain"]
    assert 0 < first["memory/predicted_gib"] < first["memory/peak_gib"]  # of a whole process
    assert 0 < first["seconds/step"] < first["seconds/run"] < first["seconds/run_at_budget"]
    assert step["train/ratio_deviation"] < 1e-4 and step["step"] == 1 and sorted(base.rglob("*")) == files
    doctor.main(doctor.Config(rl=replace(RL, checkpoint=base)))
    shown = capsys.readouterr().out
    lines = "memory of tensors, predicted", "Python and torch included", "time of 3 steps", "with --template plain"
    assert all(line in shown for line in lines)
    with pytest.raises(ValueError, match="prompts = 100000: the task has"):
        doctor.predict(replace(RL, checkpoint=base, prompts=100_000))


@pytest.mark.parametrize(
    "verdict,advice",
    [("wrong", r"start from a better base or an easier --task \(pass@1 is 0.0%\)"),
     ("right", r"choose a harder --task \(pass@1 is 100.0%\)")],
)  # fmt: skip
def test_what_a_run_would_refuse_is_a_finding(base, tmp_path, capsys, verdict, advice):
    """The doctor says what the run says, of the same answers, whether all are wrong or all are right."""
    code = "from minir1.tasks import Verdict\nfrom minir1.tasks.countdown import problems\n\n"
    code += f"SPLITS = ('train', 'validation')\n\n\ndef verify(problem, text):\n    return Verdict('{verdict}', {{}})\n"
    (tmp_path / "same.py").write_text(code, encoding="utf-8")
    config = replace(RL, checkpoint=base, task=str(tmp_path / "same.py"), min_mixed=0.05, out=tmp_path / "run")
    finding = doctor.main(doctor.Config(rl=config))[0]
    assert finding.name == "no signal" and re.match(advice, finding.advice)
    shown = capsys.readouterr().out
    assert f"no signal: {finding.evidence}\n    {finding.advice}" in shown and "none of the known" not in shown
    with pytest.raises(ValueError) as refused:
        r1_zero.main(config)
    assert str(refused.value).startswith(f"{finding.evidence}: {finding.advice}; ")
    assert "no signal" not in [f.name for f in doctor.main(doctor.Config(rl=replace(config, min_mixed=0.0)))]


def test_the_measured_step_is_the_first_of_the_run(base, tmp_path):
    """The same problems and answers as step 1 of r1_zero.py, which changes nothing by its warm-up of one step; before
    it, those of its preflight."""
    config = replace(RL, checkpoint=base, out=tmp_path / "run", steps=1)
    r1_zero.main(config)
    before, logged = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()][:2]
    first, step = doctor.predict(config)
    for name in ("reward", "accuracy", "length", "truncated", "entropy", "mixed_groups", "ratio_deviation"):
        assert step[f"train/{name}"] == logged[f"train/{name}"], name
    for name in ("pass@1", "pass@4", "mixed_groups", "truncated", "format"):
        assert first[f"preflight/{name}"] == before[f"preflight/{name}"], name


def test_another_template_suits_the_base(base):
    """The base was trained on chats; asked plainly it does not use the tags."""
    model, tokenizer = hf.load(checkpoint.resolve(base))
    task = tasks.load("countdown")
    first = doctor.probed(model, tokenizer, task, task.problems("train")[:16], replace(RL, template="plain"))
    assert first["preflight/format"] == first["preflight/format_plain"]
    names = [finding.name for finding in doctor.diagnose([{"step": 0} | first], {})]
    assert names == ["wrong template"] * (first["preflight/format_chat"] > first["preflight/format_plain"] + 0.5)


def test_seconds_by_hand():
    """3 steps of 10 s; before and after them 16·4 + (1 + 2)·8 = 88 answers of 20 tokens at 100 a second: 17.6 s."""
    step = {"time/rollout_s": 5.0, "time/reference_s": 1.0, "time/judge_s": 1.0, "time/update_s": 3.0}
    step |= {"train/length": 20.0, "perf/rollout_tok_s": 100.0}
    seconds = doctor.seconds(RL, step, train=1000, held_out=8)
    whole = 30 + 17.6
    want = {"seconds/step": 10, "seconds/run": whole, "seconds/run_at_budget": whole * 32 / 20}
    assert seconds == pytest.approx(want)
    window = doctor.seconds(replace(RL, difficulty_window=(0.1, 0.9)), step, train=1000, held_out=8)
    assert window["seconds/run"] == pytest.approx(whole + 800)  # 4 answers to each of 1,000 problems, likewise
    assert [doctor.duration(s) for s in (7.54, 99, 720, 12_240)] == ["7.54 s", "99 s", "12 min", "3.4 h"]


def test_options_from_a_config_json(tmp_path):
    config = replace(RL, checkpoint=Path("a/b"), difficulty_window=(0.1, 0.9), dtype="float32")
    write_json(tmp_path / "config.json", {**vars(config), "overlong_buffer": 4})
    assert doctor.options_of(tmp_path / "config.json") == config
    write_json(tmp_path / "config.json", {"steps": 3})
    with pytest.raises(ValueError, match="not the config.json of a training"):
        doctor.options_of(tmp_path / "config.json")
    wrong = {"prompts": 4.0, "beta": "much", "data": 5, "reduction": "nope", "checkpoint": None}
    wrong |= {"difficulty_window": [0.1]}
    for name, value in wrong.items():
        write_json(tmp_path / "config.json", {"checkpoint": "x", name: value})
        with pytest.raises(ValueError, match=rf"config.json: {name} = {re.escape(repr(value))}: "):
            doctor.options_of(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {"checkpoint": "x", "num_generations": 1})  # ppo.py's are not compared
    with pytest.raises(ValueError, match="config.json, with the limits of r1_zero.py: num_generations = 1: at least 2"):
        doctor.options_of(tmp_path / "config.json")


def test_after_a_run(tmp_path, capsys):
    """A verifier that errs is named, with evidence and advice; without that the run is not accused."""
    write_json(tmp_path / "config.json", {"beta": 0.001, "num_generations": 8})
    for share, said in ((0.5, "verifier errs: in 50% of the groups"), (0.0, "none of the known failures")):
        row = {"step": 1, "train/contradictions": share}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        findings = doctor.main(doctor.Config(run=tmp_path))
        assert len(findings) == (share > 0) and said in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty/metrics.jsonl does not exist"):
        doctor.main(doctor.Config(run=tmp_path / "empty"))
    with pytest.raises(ValueError, match="run = .*none does not exist: the folder of a run, or a config.json"):
        doctor.main(doctor.Config(run=tmp_path / "none"))


def test_the_folder_of_the_demonstration_stands_for_its_last_run(tmp_path, capsys):
    """Of a pipeline a stage must be named; a config.json in a folder that does not exist is said to be so."""
    for name in ("base", "rl"):
        write_json(tmp_path / "demo" / name / "config.json", {"beta": 0.001, "num_generations": 8})
        row = {"step": 1, "train/contradictions": float(name == "rl")}
        (tmp_path / "demo" / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (finding,) = doctor.main(doctor.Config(run=tmp_path / "demo"))
    assert finding.name == "verifier errs"
    (tmp_path / "demo" / "rl").rename(tmp_path / "demo" / "rl-1")
    with pytest.raises(ValueError, match=r"demo is the folder of several runs: .* such as .*/rl-1 \(base, rl-1\)$"):
        doctor.main(doctor.Config(run=tmp_path / "demo"))
    with pytest.raises(ValueError, match=f"^{tmp_path}/none holds no config.json, as there is no such folder$"):
        doctor.options_of(tmp_path / "none" / "config.json")


def test_what_was_not_looked_at_is_said(tmp_path, capsys):
    """Too few steps, another kind of training; options beside a run, which would be ignored, and values of other types
    are refused."""
    write_json(tmp_path / "config.json", {"beta": 0.001, "num_generations": 8})
    for name, steps, said in (("train/accuracy", 7, "there for 7 steps"), ("train/loss", 30, "there for 0 steps"),
                              ("train/accuracy", 8, "")):  # fmt: skip
        rows = [json.dumps({"step": t, name: 0.5}) for t in range(1, steps + 1)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        doctor.main(doctor.Config(run=tmp_path))
        shown = capsys.readouterr().out
        assert said in shown and ("the course of a run shows from 8 on" in shown) == bool(said)
    write_json(tmp_path / "config.json", {"difficulty_window": [0.2, 0.8]})  # the accuracy of the validation counts
    doctor.main(doctor.Config(run=tmp_path))
    assert "eval/pass@1 is there for 0 steps: what goes wrong" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its options are those of its config.json"):
        doctor.main(doctor.Config(run=tmp_path, rl=RL))
    write_json(tmp_path / "config.json", {"num_generations": 1, "beta": "much"})
    rows = [json.dumps({"step": t, "train/accuracy": 0.5, "train/grad_norm": 0.0}) for t in range(9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="a metric or an option has a value of the wrong type"):
        doctor.main(doctor.Config(run=tmp_path))
    write_json(tmp_path / "config.json", {})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/accuracy": "high"}) + "\n")
    with pytest.raises(ValueError, match="a metric or an option has a value of the wrong type"):
        doctor.main(doctor.Config(run=tmp_path))


def test_which_references_count():
    """Not those without text, those not judged, and those of a task in a mixture of which none is accepted."""
    words = "right wrong unjudged".split()
    task = SimpleNamespace(verify=lambda problem, text: Verdict(next(w for w in words if f">{w}" in text), {}))

    def share(*references: str) -> dict[str, float]:
        return doctor.accepted(task, [Problem(r, r.partition(":")[0], task=r.partition(":")[2]) for r in references])

    assert share("right", "right", "wrong", "", "unjudged") == {"references": 2 / 3}
    assert share("right:a", "right:a", "wrong:b", "wrong:b") == {"references": 1.0}
    assert share("wrong:a", "wrong:b") == {"references": 0.0} and share("unjudged", "") == {}
