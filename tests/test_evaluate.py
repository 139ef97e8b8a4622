"""evaluate.py and compare.py at toy size: saved answers, a killed evaluation, new verdicts, few-shot, comparisons."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import command, kill

from experiments import compare, evaluate, evaluate_table
from experiments.benchmarks import bench_evaluate, verifiers
from minir1 import answer_file, judge, rewards, tasks
from minir1.judge import Answer
from minir1.tasks import Problem

TASK = """
from minir1.tasks import Problem, Verdict
SPLITS = ("train", "test")
NUMBERS = {"train": range(20, 24), "test": range(1, 7)}
def problems(split, data=None):
    return [Problem(f"make {n} from {n},1", "x", level=str(n % 2 + 1), subject="ab"[n % 3 > 0], solution=f"{n}*1")
            for n in NUMBERS[split]]
def verify(problem, text):
    status = "SHORT" if len(text) < 30 else "LONG"
    return Verdict(status, {"accuracy": float(status == "right")}, "no reason")
"""


def write_task(folder, short="right", long="wrong"):
    path = folder / "toy.py"
    path.write_text(TASK.replace("SHORT", short).replace("LONG", long))
    return str(path)


@pytest.fixture
def config(toy_base, tmp_path):
    return evaluate.Config(
        checkpoint=toy_base("moe") / "checkpoint", task=write_task(tmp_path), num_generations=4, k=(1, 2, 4),
        max_completion_length=12, rows_at_once=8, out=tmp_path / "eval",
    )  # fmt: skip


def test_answers_result_and_figure_are_saved(config, capsys):
    values = evaluate.main(config)
    assert json.loads((config.out / "result.json").read_text()) == values
    assert (config.out / "figures" / "levels.png").read_bytes()[:4] == b"\x89PNG"
    settings, answers, asked, _ = answer_file.read(config.out / "answers.jsonl")
    assert settings["dtype"] == "float32"  # the default of this device, not None
    assert settings["temperature"] == 1.0 and len(settings["weights"]["model.safetensors"]) == 64
    assert {kind: len(groups) for kind, groups in answers.items()} == {"sampled": 6, "greedy": 6, "forced": 6}
    assert {len(group) for group in answers["sampled"].values()} == {4} and asked[0] == ("make 1 from 1,1", "x")
    shares = [sum(a.right for a in group) / 4 for group in answers["sampled"].values()]
    assert values["pass@1"] == pytest.approx(sum(shares) / 6)
    for key in ("pass@1", "pass@2", "maj@4", "pass@4", "pass@1_level 1", "pass@1_level 2", "pass@1_a", "pass@1_b"):
        assert 0 <= values[key] <= 1
    shown = capsys.readouterr().out
    assert "level 1" in shown and "pass@2" in shown and "toy, test: 6 problems" in shown


def test_how_readable_the_answers_are_is_measured_by_group_and_shown(config, capsys):
    values = evaluate.main(config)
    saved = answer_file.read(config.out / "answers.jsonl")
    texts = [a.text for p in range(6) for a in saved.answers["sampled"][p]]
    assert values["words"] == pytest.approx(sum(map(rewards.length, texts)) / 24)
    for name in ("language_consistency", "repetition", "tidiness", "reflections", "words"):
        odd, even = (values[f"{name}_level {level}"] for level in "21")  # three problems each
        assert values[name] == pytest.approx((odd + even) / 2)
    shown = capsys.readouterr().out
    assert values["tidiness"] == values["reflections"] == 0  # the corpus knows neither
    for key, (label, _) in evaluate_table.READABLE.items():
        assert shown.count(label) == (key not in ("tidiness", "reflections")), label
    words = next(line for line in shown.splitlines() if evaluate_table.READABLE["words"][0] in line)
    assert words.split()[-1] == f"{values['words']:.1f}"


def test_rows_of_readability():
    keys = {"language_consistency": 0.5, "repetition": 0.1, "tidiness": 0.2, "reflections": 1.0, "words": 9.0}
    values = {"pass@1": 0.5, "length": 9.0, "length_hard": 9.0, "tries": 1.0, **keys}
    values |= {f"{key}_hard": value for key, value in keys.items()}
    rows = evaluate_table.rows(values, {})
    assert rows[-6:] == [
        ("words, numbers and signs of the thinking", "words", "", ".1f"),
        ("words of the thinking in the problem's language", "language_consistency", "", ".1%"),
        ("16-grams of the thinking that occurred before", "repetition", "", ".1%"),
        ("thinking that closes with the answer", "tidiness", "", ".1%"),
        ("reflective words of the thinking", "reflections", "", ".2f"),
        ("tries per answer", "tries", "", ".2f"),
    ]


def test_what_no_answer_has_gets_no_row():
    values = {"pass@1": 0.5, "language_consistency": 0.0, "repetition": 0.0, "tidiness": 0.0, "reflections": 0.0}
    assert [key for _, key, *_ in evaluate_table.rows(values, {})][-2:] == ["language_consistency", "repetition"]
    one = [[Answer("1+2=3</think><answer>3</answer>", 9, False, True, True)]]
    others = {key: values[key] for key in values if key != "language_consistency"}
    assert evaluate_table.applicable(values, one) == others
    foreign = [[Answer("一加二</think><answer>3</answer>", 9, False, True, True)]]
    assert evaluate_table.applicable(values, foreign) == values  # 0 % of its words: that says something


def test_a_row_that_one_column_needs_is_shown(capsys):
    columns = {"before": {"tidiness": 0.25, "unjudged": 0.5}, "after": {"tidiness": 0.0, "unjudged": 0.0}}
    every = {"pass@1": 0.5, "pass@1_formed": 0.5, "greedy": 0.5, "format": 1.0, "truncated": 0.0, "length": 9.0}
    evaluate_table.show("two", {name: every | values for name, values in columns.items()}, {})
    shown = capsys.readouterr().out
    assert "not judged" in shown and next(
        line.split()[-2:] for line in shown.splitlines() if evaluate_table.READABLE["tidiness"][0] in line
    ) == ["25.0%", "0.0%"]


def test_a_count_of_the_task_with_the_name_of_a_measure_is_refused(config, tmp_path):
    text = (tmp_path / "toy.py").read_text()
    (tmp_path / "toy.py").write_text(text + 'def behaviour(problem, text):\n    return {"tidiness": 1, "tries": 2}\n')
    with pytest.raises(ValueError, match="task toy: its behaviour reports tidiness, which names another figure here"):
        evaluate.main(config)


def test_a_killed_evaluation_continues_to_the_same_answers(config, tmp_path):
    whole = evaluate.main(replace(config, out=tmp_path / "whole"))
    kill(
        "evaluate", config, "minir1.answer_file", "append", 3, tmp_path / "config"
    )  # before the third batch is written
    begun = answer_file.read(config.out / "answers.jsonl").answers
    assert 0 < len(begun["sampled"]) < 6 and not (config.out / "result.json").exists()
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        evaluate.main(config)
    again = evaluate.main(replace(config, resume=True))
    assert again | {"tokens_per_s": 0} == whole | {"tokens_per_s": 0}
    files = [answer_file.read(out / "answers.jsonl") for out in (config.out, tmp_path / "whole")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="sampled with other settings .temperature: 1.0 and 0.5"):
        evaluate.main(replace(config, resume=True, temperature=0.5))


def test_rescoring_judges_the_saved_answers_and_samples_nothing(config, tmp_path, monkeypatch):
    values = evaluate.main(config)
    monkeypatch.setattr(evaluate, "sample", None)
    saved = config.out / "answers.jsonl"
    same = evaluate.main(evaluate.Config(rescore=saved, k=(1, 2, 4), out=tmp_path / "same"))
    assert same == {key: value for key, value in values.items() if key != "tokens_per_s"}
    write_task(tmp_path, short="wrong", long="right")  # the verifier changes
    other = evaluate.main(evaluate.Config(rescore=saved, num_generations=4))
    assert other["pass@1"] == pytest.approx(1 - values["pass@1"])
    write_task(tmp_path, short="unjudged", long="unjudged")
    with pytest.raises(RuntimeError, match="none of 24 answers could be judged: no reason"):
        evaluate.main(evaluate.Config(rescore=saved))
    (tmp_path / "toy.py").write_text(TASK.replace("range(1, 7)", "range(2, 8)"))
    with pytest.raises(ValueError, match="other problems: number 0 was 'make 1 from 1,1' and is 'make 2 from 2,1'"):
        evaluate.main(evaluate.Config(rescore=saved))


def test_new_verdicts_are_saved_and_can_be_compared(config, tmp_path):
    old = evaluate.main(config)
    write_task(tmp_path, short="wrong", long="right")
    again = evaluate.Config(rescore=config.out / "answers.jsonl", out=tmp_path / "again")
    new = evaluate.main(again)
    first, second = (answer_file.read(out / "answers.jsonl") for out in (config.out, again.out))
    assert first.settings == second.settings and first.asked == second.asked
    for kind, p in ((kind, p) for kind, groups in first.answers.items() for p in groups):
        for one, other in zip(first.answers[kind][p], second.answers[kind][p]):
            assert one.text == other.text and one.right != other.right
            assert other.scores == {"accuracy": float(other.right)}
    values = compare.main(compare.Config(config.out, again.out))
    assert values["difference"] == pytest.approx(new["pass@1"] - old["pass@1"])
    with pytest.raises(ValueError, match="again holds answers: choose another --out for the new verdicts"):
        evaluate.main(again)


def test_answers_of_one_problem_that_all_raise_do_not_end_a_rescoring(config, tmp_path):
    evaluate.main(config)
    head = "def verify(problem, text):\n"
    raising = TASK.replace(head, f"{head}    1 / (problem.prompt[5] != '3')\n")
    (tmp_path / "toy.py").write_text(raising.replace("SHORT", "right").replace("LONG", "wrong"))
    values = evaluate.main(evaluate.Config(rescore=config.out / "answers.jsonl"))
    assert values["unjudged"] == pytest.approx(1 / 6)


def test_rescoring_refuses_settings_that_the_file_contradicts(config):
    evaluate.main(config)
    for name, value in (("temperature", 0.5), ("problems", 3), ("split", "train")):
        with pytest.raises(ValueError, match=f"rescore: .* has its own {name}: leave the option out"):
            evaluate.main(evaluate.Config(rescore=config.out, **{name: value}))


def test_rescoring_refuses_a_k_above_the_number_of_saved_answers_before_it_judges(config, tmp_path, monkeypatch):
    evaluate.main(config)
    monkeypatch.setattr(evaluate, "judge", lambda *_: pytest.fail("judged"))
    again = evaluate.Config(rescore=config.out / "answers.jsonl", k=(2, 5), out=tmp_path / "again")
    with pytest.raises(ValueError, match=r"k = \(2, 5\): .*answers.jsonl has 4 answers to each problem"):
        evaluate.main(again)
    assert not again.out.exists()


def test_answers_are_saved_where_the_verifier_always_fails(config, tmp_path):
    (tmp_path / "toy.py").write_text(TASK.replace("return Verdict(", "return 1 / 0, Verdict("))
    with pytest.raises(RuntimeError, match="none of 24 answers could be judged: ZeroDivisionError"):
        evaluate.main(config)
    write_task(tmp_path)
    assert 0 <= evaluate.main(evaluate.Config(rescore=config.out))["pass@1"] <= 1


def test_why_answers_were_not_judged_is_shown(config, tmp_path, capsys):
    write_task(tmp_path, long="unjudged")
    values = evaluate.main(replace(config, out=None))
    shown = capsys.readouterr().out
    assert values["pass@1"] == 1.0 and 0 < values["unjudged"] < 1
    assert f"not judged {round(24 * values['unjudged'])} times: no reason" in shown and "not judged " in shown


def test_an_evaluation_that_is_not_complete_is_not_judged_again(config, tmp_path):
    evaluate.main(config)
    path = config.out / "answers.jsonl"
    lines = [
        line for line in path.read_bytes().splitlines(True) if b'"greedy"' not in line or b'"index": 3' not in line
    ]
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="the greedy answers to 1 of 6 problems are missing: --resume first"):
        evaluate.main(evaluate.Config(rescore=path))
    path.write_bytes(b"".join(line for line in lines if b'"greedy"' not in line))
    with pytest.raises(ValueError, match="the greedy answers to 6 of 6 problems are missing: --resume first"):
        evaluate.main(evaluate.Config(rescore=path))
    with pytest.raises(ValueError, match="is not complete: continue that evaluation with --resume"):
        compare.main(compare.Config(config.out, config.out))


def test_examples_are_solved_training_problems_of_the_same_subject(config):
    task = tasks.load(config.task)
    problems = task.problems("test")
    shown = evaluate.examples(task, problems, replace(config, few_shot=2))
    training = task.problems("train")
    assert all(len(shots) == 2 and set(shots) < set(training) for shots in shown)
    assert [p.subject for p in training] == ["b", "a", "b", "b"]  # of subject a there is one, too few
    for problem, shots in zip(problems, shown):
        assert problem.subject == "a" or {shot.subject for shot in shots} == {"b"}
    assert evaluate.examples(task, problems, replace(config, few_shot=2)) == shown
    assert evaluate.examples(task, problems, config) == []
    with pytest.raises(ValueError, match="few_shot = 5: task toy has 4 solved training problems"):
        evaluate.examples(task, problems, replace(config, few_shot=5))
    values = evaluate.main(replace(config, few_shot=1, out=None))
    assert 0 <= values["pass@1"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": (5,), "num_generations": 4, "checkpoint": "x"}, r"k = \(5,\): at most num_generations = 4"),
        ({"k": (0, 2), "checkpoint": "x"}, r"k = \(0, 2\): at least 1"),
        ({}, "give either --checkpoint, or --rescore with the answers"),
        ({"checkpoint": "x", "rescore": "y"}, "give either --checkpoint, or --rescore with the answers"),
        ({"checkpoint": "x", "resume": True}, "resume: name the folder to continue with --out"),
    ({"checkpoint": "x", "out": Path(__file__)}, "is a file: choose a folder"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(evaluate.Config(**options))


def test_a_rescoring_knows_the_number_of_answers_only_from_the_file():
    assert evaluate.Config(rescore=Path("answers.jsonl"), k=(64,)).k == (64,)


def test_the_folder_of_a_training_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training, whose result.json would be lost: choose another"):
        evaluate.Config(checkpoint=Path("x"), out=tmp_path)


def test_from_the_command_line(config):
    done = command("-m", "experiments.evaluate", "--rescore", "nowhere.jsonl")
    assert done.returncode == 2 and "error: there is no file nowhere.jsonl: expected" in done.stderr


# ---- what it costs, and the verifiers ----------------------------------------------------------


def test_the_benchmark_generates_the_answers_of_the_evaluation(config, monkeypatch):
    drawn = {"generation": [], "evaluation": []}
    for module, name in ((bench_evaluate, "generation"), (judge, "evaluation")):
        spy = lambda *a, real=module.collect, n=name, **more: drawn[n].append(real(*a, **more)) or drawn[n][-1]
        monkeypatch.setattr(module, "collect", spy)
    shared = {name: getattr(config, name) for name in ("checkpoint", "task", "num_generations", "rows_at_once")}
    values = bench_evaluate.main(bench_evaluate.Config(**shared, max_completion_length=12, repeats=1))
    assert values["ratio"] == values["seconds/evaluation"] / values["seconds/generation"] > 0
    assert len(drawn["generation"]) == len(drawn["evaluation"]) == 4
    for one, other in zip(*drawn.values()):
        assert one.tokens.tolist() == other.tokens.tolist()


def test_verifiers_on_their_references(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": f"so #### {i // 2}"}) + "\n" for i in range(4))
    )
    config = verifiers.Config(task="gsm8k", data=str(tmp_path / "test.jsonl"), out=tmp_path / "out.json")
    values = verifiers.main(config)
    assert [values[key] for key in ("problems", "solution", "bare", "empty", "unjudged")] == [4, 4, 4, 0, 0]
    assert values["shuffled"] == values["equal"] <= values["pairs"] <= 8
    assert json.loads(config.out.read_text())["gsm8k"] == values
    with pytest.raises(ValueError, match="nowhere holds no problems of task gsm8k"):
        verifiers.measure(replace(config, data="nowhere"))


# ---- two evaluations ---------------------------------------------------------------------------


def test_two_evaluations_are_compared_on_the_same_problems(config, tmp_path, capsys):
    evaluate.main(config)
    itself = compare.main(compare.Config(config.out, config.out, out=tmp_path / "compared.json"))
    assert itself["difference"] == 0 and itself["greedy/p"] == 1.0 and itself["a"] == itself["b"]
    assert "fewer than 20 problems" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared.json").read_text()) == itself
    evaluate.main(replace(config, out=tmp_path / "warm", temperature=0.5))
    with pytest.raises(ValueError, match=r"not sampled alike \(temperature: 1.0 and 0.5\)"):
        compare.main(compare.Config(config.out, tmp_path / "warm" / "answers.jsonl"))
    evaluate.main(replace(config, out=tmp_path / "fewer", problems=5))
    with pytest.raises(ValueError, match=r"not sampled alike \(problems: None and 5\)"):
        compare.main(compare.Config(config.out, tmp_path / "fewer"))


def test_a_comparison_by_hand():
    """Shares 1/2, 1 and 1/2, 0 of two problems that both have judged; greedy: one alone each."""
    right, wrong = Answer("", 1, False, True, True), Answer("", 1, False, False, True)
    unjudged = replace(wrong, unjudged=True)
    a = {
        "sampled": {0: [right, wrong], 1: [right, right], 2: [right] * 2},
        "greedy": {0: [right], 1: [wrong], 2: [right]},
    }
    b = {
        "sampled": {1: [wrong, wrong], 0: [wrong, right], 2: [unjudged] * 2},
        "greedy": {2: [unjudged], 1: [right], 0: [wrong]},
    }
    values = compare.compare(a, b)
    assert values["problems"] == 2 and values["a"] == 0.75 and values["b"] == 0.25 and values["difference"] == -0.5
    assert values["difference_low"] == -1.0 and values["difference_high"] == 0.0
    assert (values["greedy/only_a"], values["greedy/only_b"], values["greedy/p"]) == (1, 1, 1.0)
    with pytest.raises(ValueError, match="no problem has judged answers in both"):
        compare.compare(a, {"sampled": {p: [unjudged] for p in range(3)}, "greedy": {}})


def test_problems_in_another_order_are_not_the_same(config, tmp_path):
    evaluate.main(config)
    lines = (config.out / "answers.jsonl").read_text().splitlines(True)
    (tmp_path / "other.jsonl").write_text("".join(line.replace("make 2 from", "make 9 from") for line in lines))
    with pytest.raises(ValueError, match="not the same problems in the same order: 6 and 6"):
        compare.main(compare.Config(config.out, tmp_path / "other.jsonl"))


def test_in_a_mixture_the_examples_are_of_the_same_task(config, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(TASK.replace("make {n}", "find {n}").replace("(20, 24)", "(20, 22)"))
    mixed = tasks.load(f"{config.task}+{other}")
    problems = mixed.problems("test")
    shown = evaluate.examples(mixed, problems, replace(config, few_shot=2))
    assert {(p.task, s.task) for p, shots in zip(problems, shown) for s in shots} == {("toy",) * 2, ("other",) * 2}
    with pytest.raises(ValueError, match="few_shot = 3: task other has 2 solved training problems"):
        evaluate.examples(mixed, problems, replace(config, few_shot=3))


def test_a_problem_may_be_its_own_example_nowhere():
    train = [Problem(f"q{i}", "", solution="s") for i in range(3)]
    task = tasks.Task("toy", ("train",), lambda split: train, None, None)
    shown = evaluate.examples(task, train, evaluate.Config(checkpoint="x", few_shot=2))
    assert all(problem not in shots for problem, shots in zip(train, shown))
