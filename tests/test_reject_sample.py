"""experiments/reject_sample.py: each filter by hand, their order and counts, what is written, a killed run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import kill
from test_gsm8k_run import PUBLISHED, byte_level, made_up
from test_preference_pairs import save_base

from experiments import reject_sample
from minir1 import answer_file, rewards, tasks, templates
from minir1.judge import Answer
from minir1.model import hf
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.tasks import Problem
from minir1.templates import R1_ZERO

TASK = """
from minir1.tasks import Problem, Verdict
def problems(split, data=None):
    return [Problem(f"make {n} from {n},1", "x", language="de" if n > 3 else "en", level=str(n % 2), subject="sums")
            for n in range(1, 7)]
def verify(problem, text):
    return Verdict("wrong" if "33" in text else "right", {})
def rewrite(problem, text):
    if "stuck" in text:
        return None
    return f"<think>{text.removeprefix('<think>')[:9]}</think><answer>{33 if 'spoil' in text else 1}</answer>"
"""
PROBLEMS = [Problem(f"q{p}", "x") for p in range(3)]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TASK)
    return tasks.load(str(path))


@pytest.fixture
def readable(monkeypatch):
    """Functions of the text that a reader can evaluate: shares of the letters z and r, and whether there is a !."""
    monkeypatch.setattr(
        rewards, "language_consistency", lambda text, language: 1 - text.count("z" if language == "en" else "e") / 10
    )
    monkeypatch.setattr(rewards, "repetition", lambda text: text.count("r") / 10)
    monkeypatch.setattr(rewards, "tidiness", lambda text: float("!" in text))


def answer(text: str, **more) -> Answer:
    return Answer(text, more.pop("tokens", 5), more.pop("truncated", False), more.pop("right", True), True, **more)


def select(task, grid, length=None, **settings):
    config = reject_sample.Config(**settings)
    left, removed = reject_sample.select(task, PROBLEMS, grid, config, length or (lambda problem, text: len(text)))
    assert sum(removed.values()) + len(left) == sum(map(len, grid))
    return [(p, a.text) for p, a in left], removed


# ---- the filters -------------------------------------------------------------------------------

STRICT = {"min_language": 0.8, "max_repetition": 0.2, "tidy": True, "max_length": 9, "per_problem": 2}
BAD = {  # filter -> an answer that this one alone removes
    "truncated": answer("a !", truncated=True),
    "unjudged": answer("b !", unjudged=True),
    "wrong": answer("c !", right=False),
    "malformed": replace(answer("d !"), format=False),
    "mixed": answer("zzz !"),
    "repetitive": answer("rrr !"),
    "untidy": answer("e"),
    "too_long": answer("f !", tokens=10),
    "duplicate": answer(" good\n! "),
}


def test_each_filter_removes_its_answer_and_counts_it(task, readable):
    at_the_bounds = answer("zz rr !", tokens=9)
    row = [answer("good !"), *BAD.values(), at_the_bounds]
    left, removed = select(task, [row, [], [BAD["wrong"]]], **STRICT)
    assert left == [(0, "good !"), (0, "zz rr !")]
    assert removed == dict.fromkeys([*BAD, "surplus"], 1) | {"wrong": 2, "surplus": 0}
    assert list(removed) == [*BAD, "surplus"]


def test_an_answer_counts_for_the_first_filter_that_it_fails(task, readable):
    """From the last filter to the first, each fault is added to the same answer."""
    faults = [
        ("too_long", {"tokens": 10}), ("untidy", {"text": "zzz rrr"}), ("repetitive", {"text": "zzz rrr"}),
        ("mixed", {"text": "zzz rrr"}), ("malformed", {"format": False}), ("wrong", {"right": False}),
        ("unjudged", {"unjudged": True}), ("truncated", {"truncated": True}),
    ]  # fmt: skip
    bounds = {"untidy": ("max_repetition", "min_language"), "repetitive": ("min_language",)}
    one = answer("good !")
    for name, fault in faults:
        one = replace(one, **fault)
        settings = {key: value for key, value in STRICT.items() if key not in bounds.get(name, ())}
        assert {key for key, count in select(task, [[one]], **settings)[1].items() if count} == {name}


def test_filters_that_are_off_look_at_nothing(task, monkeypatch):
    for name in ("language_consistency", "repetition", "tidiness"):
        monkeypatch.setattr(rewards, name, None, raising=False)
    row = [answer("good !"), *(BAD[name] for name in ("mixed", "repetitive", "untidy", "too_long", "duplicate"))]
    left, removed = select(task, [row])
    assert len(left) == 5 and removed == {"truncated": 0, "unjudged": 0, "wrong": 0, "malformed": 0, "duplicate": 1}


def test_the_language_is_that_of_the_problem(task, readable):
    problems = [Problem("q", "x", language="en"), Problem("q", "x", language="de")]
    config = reject_sample.Config(min_language=1.0)
    grid = [[answer("e"), answer("z")]] * 2
    left, _ = reject_sample.select(task, problems, grid, config, len)
    assert [(p, a.text) for p, a in left] == [(0, "e"), (1, "z")]


def test_the_functions_of_the_text_are_those_of_the_rewards(task):
    texts = {
        "tidy": "we add 3 and 4\nso 7", "mixed": "we 加 3 和 4\nso 7", "repetitive": "we add " * 20 + "\nso 7",
        "untidy": "we add 3 and 4\nso 8",
    }  # fmt: skip
    row = [answer(f"<think>{text}</think><answer>7</answer>") for text in texts.values()]
    left, removed = select(task, [row], min_language=0.9, max_repetition=0.3, tidy=True)
    assert left == [(0, row[0].text)] and [removed[name] for name in ("mixed", "repetitive", "untidy")] == [1, 1, 1]


def test_duplicates_are_of_one_problem_and_differ_in_white_space_alone(task):
    grid = [[answer(text) for text in ("a b", " a  b\n", "ab", "a\tb", "a b c")], [answer("a b")]]
    assert select(task, grid)[0] == [(0, "a b"), (0, "ab"), (0, "a b c"), (1, "a b")]


def test_the_seed_draws_the_answers_of_each_problem(task):
    row = [answer(f"text {i}") for i in range(8)]
    draws = {seed: select(task, [row, row[:2]], per_problem=3, seed=seed) for seed in range(60)}
    for left, removed in draws.values():
        assert removed["surplus"] == 5 and left[3:] == [(1, "text 0"), (1, "text 1")]
        assert left[:3] == sorted(left[:3])  # in the order of sampling
    assert draws[0] == select(task, [row, row[:2]], per_problem=3, seed=0)
    times = [sum((0, a.text) in left for left, _ in draws.values()) for a in row]
    assert min(times) >= 8  # of 60 draws, 22.5 on average: none is preferred to the others
    alone = select(task, [row], per_problem=3, seed=7)[0]
    assert alone == draws[7][0][:3]  # whatever the answers to other problems are


def test_a_rewritten_answer_is_judged_again_and_filtered_as_it_is_then(task, readable):
    texts = ["<think>good!", "stuck!", "spoil!", "no mark", "good!rrrrrrrr"]
    row = [replace(answer(text, tokens=50), format=False) for text in texts]
    settings = {"rewrite": True, "tidy": True, "max_repetition": 0.3, "max_length": 45}
    asked = []

    def length(problem, text):
        asked.append((problem.prompt, text))
        return 45 if "good" in text else 46

    left, removed = reject_sample.select(task, PROBLEMS, [row], reject_sample.Config(**settings), length)
    assert removed == {
        "truncated": 0, "unjudged": 0, "wrong": 0, "not_rewritten": 1, "wrong_rewritten": 1, "malformed": 0,
        "repetitive": 1, "untidy": 1, "too_long": 0, "duplicate": 0,
    }  # fmt: skip
    ((_, kept),) = left
    assert kept.text == "<think>good!</think><answer>1</answer>" and kept.tokens == 45 and kept.right and kept.format
    assert asked == [("q0", text) for text in (kept.text, "<think>spoil!</think><answer>33</answer>",
                                               "<think>no mark</think><answer>1</answer>",
                                               "<think>good!rrrr</think><answer>1</answer>")]  # fmt: skip


def test_a_text_that_needs_no_rewriting_keeps_its_form_and_tokens(task):
    task = replace(task, rewrite=lambda problem, text: text)
    grid, config = [[answer("a")]], reject_sample.Config(rewrite=True)
    assert reject_sample.select(task, PROBLEMS, grid, config, lambda *_: 9)[0] == [(0, answer("a"))]


# ---- general data ------------------------------------------------------------------------------


def test_general_data_is_mixed_in_by_its_share():
    kept, general = [{"kept": i} for i in range(30)], [{"general": i} for i in range(20)]
    everything = reject_sample.mixed(kept, general, None, seed=0)
    assert everything != kept + general and sorted(map(str, everything)) == sorted(map(str, kept + general))
    quarter = reject_sample.mixed(kept, general, 0.25, seed=0)
    chosen = [line["general"] for line in quarter if "general" in line]
    assert len(chosen) == len(set(chosen)) == 10 and len(quarter) == 40
    assert (
        quarter == reject_sample.mixed(kept, general, 0.25, seed=0) != reject_sample.mixed(kept, general, 0.25, seed=1)
    )
    assert reject_sample.mixed(kept, [], None, seed=0) == kept
    with pytest.raises(ValueError, match="general_share = 0.5: needs 30 general lines beside 30 kept answers, and"):
        reject_sample.mixed(kept, general, 0.5, seed=0)


@pytest.mark.parametrize("line, message", [
    ("{", "line 3 is no JSON"),
    ("[]", "line 3: need an object"),
    ('{"text": "hi"}', "line 3: needs messages, conversations, or prompt and completion or response; got text"),
    ('{"messages": "hi"}', "line 3: messages is str: expected a list of messages"),
    ('{"messages": [{"role": "user", "content": "hi"}]}', "line 3: has no answer of the assistant"),
    ('{"messages": [{"role": "robot", "content": "hi"}]}', "line 3: role = 'robot'"),
])  # fmt: skip
def test_general_data_that_is_no_chat_is_refused_with_its_line(tmp_path, line, message):
    good = {"messages": [{"role": "user", "content": "hi\u2028"}, {"role": "assistant", "content": "yes"}], "more": 1}
    path, other = tmp_path / "chat.jsonl", tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n\n")
    other.write_text(json.dumps(pair := {"prompt": "hi", "response": "yes"}))
    assert reject_sample.read_general([path, other]) == [good, pair]
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=f"chat.jsonl, {message}"):
        reject_sample.read_general([path])


# ---- the script --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained model whose chat template opens <think>."""
    path = save_base(tmp_path_factory.mktemp("base"))
    model, tokenizer = hf.load(path)
    tokenizer.template += "{% if add_generation_prompt %}<think>{% endif %}"
    hf.save(model, tokenizer, path)
    return path


@pytest.fixture
def config(base, tmp_path):
    (tmp_path / "toy.py").write_text(TASK)
    return reject_sample.Config(
        checkpoint=base, task=str(tmp_path / "toy.py"), num_generations=6, max_completion_length=100, rewrite=True,
        rows_at_once=12, per_problem=2, out=tmp_path / "out",
    )  # fmt: skip


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "kept.jsonl").read_text().split("\n")[:-1]]


def test_lines_result_and_figure(config, tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    result = reject_sample.main(config)
    rows, task = rows_of(config.out), tasks.load(config.task)
    assert result == json.loads((config.out / "result.json").read_text())
    removed = [value for key, value in result.items() if key.startswith("removed/")]
    assert result["sampled"] == 36 == sum(removed) + result["kept"] and len(rows) == result["lines"] == result["kept"]
    assert min(result[f"removed/{name}"] for name in ("truncated", "wrong", "surplus")) > 0
    problems = task.problems("train")
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    tokenizer = hf.load(config.checkpoint)[1]
    for row in rows:
        problem, (asked, said) = problems[row["index"]], row["messages"]
        assert asked == {"role": "user", "content": problem.prompt} and said["role"] == "assistant"
        assert task.verify(problem, said["content"]).status == "right" and rewards.format_reward(said["content"])
        assert said["content"].startswith(templates.opened(templates.prompt(tokenizer, problem.prompt, "chat")))
        assert (row["task"], row["subject"], row["level"]) == ("toy", "sums", problem.level)
        assert row["language"] == problem.language
    answers = [row["messages"][1]["content"] for row in rows]
    tokens = sum(len(tokenizer.encode(text.removeprefix("<think>"))) + 1 for text in answers)
    assert result["length_kept"] == pytest.approx(tokens / len(rows))
    per_problem = [sum(row["index"] == p for row in rows) for p in range(6)]
    assert max(per_problem) == 2 and result["covered"] == sum(map(bool, per_problem)) / 6
    assert result["kept/language/de"] == sum(per_problem[3:]) == result["kept"] - result["kept/language/en"]
    assert result["kept/level/0"] + result["kept/level/1"] == result["kept/subject/sums"] == result["kept"]
    answers = answer_file.read(config.out / "answers.jsonl").answers["sampled"]
    flat = [a for p in range(6) for a in answers[p]]
    assert result["pass@1"] == pytest.approx(sum(a.right for a in flat) / 36)
    assert result["tokens"] == sum(a.tokens for a in flat) and result["length"] == result["tokens"] / 36
    assert result["rewrite"] is True and result["per_problem"] == 2 and result["max_length"] is None
    assert (config.out / "figures" / "funnel.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "toy, train: 6 problems" in shown and "not rewritten" in shown and "tokens/s" not in shown

    again = reject_sample.main(replace(config, resume=True, general=(tmp_path / "chat.jsonl",)))
    assert again["lines"] == result["kept"] + 1 == result["lines"] + again["general"]
    assert sorted(map(str, rows_of(config.out))) == sorted(map(str, [*rows, chat]))


def test_the_batch_changes_nothing_and_the_seed_does(config, tmp_path):
    reject_sample.main(config)
    for name, changes in {"same": {"rows_at_once": 6}, "other": {"seed": 1}}.items():
        reject_sample.main(replace(config, **changes, out=tmp_path / name))
        same = (tmp_path / name / "kept.jsonl").read_bytes() == (config.out / "kept.jsonl").read_bytes()
        assert same == (name == "same")


def test_a_killed_run_continues_to_the_same_lines(config, tmp_path):
    whole = reject_sample.main(replace(config, out=tmp_path / "whole"))
    kill("reject_sample", config, "minir1.answer_file", "append", 2, tmp_path / "config")
    assert len(answer_file.read(config.out / "answers.jsonl").answers["sampled"]) == 2
    assert not (config.out / "kept.jsonl").exists()
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        reject_sample.main(config)
    again = reject_sample.main(replace(config, resume=True))
    clock = {"seconds": 0, "tokens_per_s": 0}
    assert again | clock == whole | clock
    assert (config.out / "kept.jsonl").read_bytes() == (tmp_path / "whole" / "kept.jsonl").read_bytes()
    with pytest.raises(ValueError, match="sampled with other settings .temperature: 1.0 and 0.5"):
        reject_sample.main(replace(config, resume=True, temperature=0.5))


def test_saved_answers_are_filtered_again_with_other_filters(config, monkeypatch):
    first = reject_sample.main(config)
    monkeypatch.setattr("minir1.judge.collect", None)  # nothing is sampled
    second = reject_sample.main(replace(config, resume=True, per_problem=1))
    assert "tokens_per_s" in first and "tokens_per_s" not in second
    assert (
        second["kept"] == second["covered"] * 6 == first["covered"] * 6 < first["kept"] and second["per_problem"] == 1
    )


def test_where_nothing_is_kept_the_counts_say_why(config, capsys):
    for resume in (False, True):
        with pytest.raises(RuntimeError, match="none of 36 answers was kept: the table says which filter removed them"):
            reject_sample.main(replace(config, max_length=1, resume=resume))
        assert "too long" in capsys.readouterr().out
        assert not (config.out / "result.json").exists() and not (config.out / "kept.jsonl").exists()
    assert reject_sample.main(replace(config, resume=True))["kept"] > 0


@pytest.mark.parametrize("source", ["made up", "published"])
def test_the_files_of_gsm8k(source, tmp_path):
    """With random weights of Qwen2.5's shape, in its own template: what is kept would be right by chance."""
    if source == "published" and not (PUBLISHED / "train.jsonl").is_file():
        pytest.skip("no published data: set MINIR1_GSM8K")
    data = PUBLISHED if source == "published" else made_up(tmp_path)
    torch.manual_seed(0)
    tokenizer = byte_level([R1_ZERO] * 9)
    shape = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "tied": True, "qkv_bias": True}
    hf.save(Transformer(dense(vocab=512, eos=tokenizer.eos, pad=tokenizer.pad, **shape)), tokenizer, tmp_path / "qwen")
    config = reject_sample.Config(
        checkpoint=tmp_path / "qwen", task="gsm8k", data=str(data), template="r1_zero", problems=12,
        num_generations=4, max_completion_length=16, out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="none of 48 answers was kept"):
        reject_sample.main(config)

    path, task = config.out / "answers.jsonl", tasks.load("gsm8k", str(data))
    lines = [json.loads(text) for text in path.read_text().split("\n")[:-1]]
    for record in lines[1:]:  # as if the second answer to each problem were right
        text = f"<think>{record['index']}</think> <answer>{record['reference']}</answer>"
        record["answers"][1] |= {"text": text, "truncated": False, "right": True, "format": True}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reject_sample.main(replace(config, resume=True))["kept"] == 12
    problems = tasks.spread(task.problems("train"), 12)
    for problem, row in zip(problems, rows_of(config.out), strict=True):
        assert row["messages"][0]["content"] == problem.prompt
        assert task.verify(problem, row["messages"][1]["content"]).status == "right"


@pytest.mark.parametrize("options, message", [
    ({"general_share": 0.5}, "general_share = 0.5: give the general data with --general"),
    ({"general_share": 1.0, "general": (Path("x"),)}, "general_share = 1.0: below 1"),
    ({"temperature": 0.0}, "temperature = 0.0: at least 1e-06"),
    ({"min_language": 1.5}, "min_language = 1.5: 0 to 1"),
    ({"per_problem": 0}, "per_problem = 0: at least 1"),
    ({"out": Path(__file__)}, "is a file: choose a folder"),
])  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        reject_sample.Config(**options)


def test_a_language_without_a_script_is_refused_before_the_sampling(config):
    path = Path(config.task)
    path.write_text(path.read_text().replace('"de"', '"xx"'))
    with pytest.raises(ValueError, match="language 'xx': no script is known for it; allowed: en, de"):
        reject_sample.main(replace(config, min_language=0.5))
    assert not config.out.exists() and reject_sample.main(config)["kept/language/xx"] > 0


def test_a_task_that_cannot_rewrite_is_refused_before_anything_is_loaded(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TASK.partition("def rewrite")[0])
    with pytest.raises(ValueError, match="rewrite: task toy has no rewrite.problem, text.; leave the option out"):
        reject_sample.main(reject_sample.Config(task=str(path), rewrite=True, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
