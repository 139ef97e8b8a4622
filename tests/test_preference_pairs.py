"""experiments/preference_pairs.py, and the toy base and pairs that the tests of reward_model.py and dpo.py share."""

import json
import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from experiments import preference_pairs
from minir1 import cli
from minir1.judge import Answer
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer
from minir1.preference_data import read_pairs
from minir1.rewards import format_reward
from minir1.tasks import Problem, countdown, spread
from minir1.tokenizer import word_level

SCRIPTS = Path(__file__).parent.parent / "experiments"


def save_base(path: Path) -> Path:
    """An untrained MoE of two layers as a Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = word_level(*countdown.vocabulary())
    sizes = {"nope": 8, "rope": 8, "v_dim": 16, "kv_lora": 16, "ffn": 64, "expert_ffn": 16}
    tokens = {"vocab": -(-tokenizer.size // 16) * 16, "eos": tokenizer.eos, "pad": tokenizer.pad}
    hf.save(Transformer(ModelConfig(dim=32, layers=2, heads=2, experts=4, **sizes, **tokens)), tokenizer, path)
    return path


def write_pairs(folder: Path, problems: int = 40) -> dict[str, Path]:
    """Pairs by hand, `pairs` and `held_out`: a right answer that says yes over a wrong one, of several lengths."""
    paths = {}
    for name, part in (("pairs", "train"), ("held_out", "validation")):
        lines = []
        for i, problem in enumerate(spread(countdown.problems(part), problems)):
            chosen = "<think>" + "1+1=2:3 no\n" * (i % 3) + f"1+2=3:3 yes\n</think><answer>{problem.reference}</answer>"
            for rejected in ("<think>1+2=3:4 no\n</think><answer>1+2</answer>", "1+1"):
                scores = {"score_chosen": 1.1, "score_rejected": 0.1 * (rejected != "1+1")}
                lines.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected} | scores)
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def assert_bad_option(script, line: str, message: str, capsys) -> None:
    """The command line is refused in one line with this message."""
    with pytest.raises(SystemExit) as end, mock.patch("sys.argv", ["script", *line.split()]):
        cli.run(script.main, script.Config)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and message in err and err.count("\n") == 1


# ---- pairing -----------------------------------------------------------------------------------


def answer(text: str, right: bool, **more) -> Answer:
    return Answer(text, 5, more.pop("truncated", False), right, right, **more)


def test_couples_are_right_over_wrong_each_text_once():
    answers = [answer("a", True), answer("a", True), answer("b", False), answer("c", False), answer("b", False)]
    answers += [answer(t, right, truncated=True) for t, right in (("d", False), ("e", True))]
    answers += [answer("f", False, unjudged=True)]
    pairs = preference_pairs.couples(answers, 9, random.Random(0), 0.05)
    assert [(c.text, r.text) for c, r in pairs] == [("a", "b"), ("a", "c")]
    assert preference_pairs.couples(answers[2:], 9, random.Random(0), 0.05) == []  # nothing right is left
    many = [answer(str(i), i % 2 == 0) for i in range(12)]
    drawn = [preference_pairs.couples(many, 5, random.Random(seed), 0.05) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 5
    assert all(c.right and not r.right for c, r in drawn[0])


def test_couples_of_ranked_answers_differ_by_the_gap_whether_they_are_right_or_not():
    """0.8 - 0.75 and 0.35 - 0.3 are a hair below and above 0.05 in floating point."""
    ranked = {"a": (0.8, False), "b": (0.75, True), "c": (0.76, True), "d": (0.3, False), "e": (0.35, False)}
    answers = [answer(text, right, scores={"preference": score}) for text, (score, right) in ranked.items()]
    pairs = preference_pairs.couples(answers, 99, random.Random(0), 0.05)
    assert {c.text + r.text for c, r in pairs} == {"ab", "ad", "ae", "bd", "be", "cd", "ce", "ed"}
    assert preference_pairs.couples(answers, 99, random.Random(0), 0.51) == []
    for chosen, rejected in pairs:
        row = json.loads(preference_pairs.line(Problem("q", "x"), chosen, rejected, 0.1))
        gold = {"score_chosen": ranked[chosen.text][0], "score_rejected": ranked[rejected.text][0]}
        assert row == {"prompt": "q", "chosen": chosen.text, "rejected": rejected.text} | gold


def test_an_answer_without_a_preference_is_compared_by_the_rules():
    plain, preferred = answer("a", True), [answer(text, False, scores={"preference": 0.9}) for text in "bc"]
    pairs = preference_pairs.couples([*preferred, plain], 9, random.Random(0), 0.05)
    assert [(c.text, r.text) for c, r in pairs] == [("a", "b"), ("a", "c")]
    row = json.loads(preference_pairs.line(Problem("q", "x"), *pairs[0], 0.1))
    assert (row["score_chosen"], row["score_rejected"]) == (1.1, 0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def scripted(model, tokenizer, task, problems, *, answers, **sampling):
    """In place of sampled answers: in turn the reference and a wrong answer, judged by the task."""
    grid = []
    for n, problem in enumerate(problems):
        ends = [("yes", problem.reference), ("no", "1+1")]
        texts = [f"<think>{i}=1:2 {ends[i % 2][0]}\n</think><answer>{ends[i % 2][1]}</answer>" for i in range(answers)]
        texts = texts if n % 2 else ["<answer>"] * answers  # every second problem has no right answer
        right = [task.verify(problem, text).status == "right" for text in texts]
        grid.append([Answer(t, 7 + i, False, r, format_reward(t) > 0) for i, (t, r) in enumerate(zip(texts, right))])
    return grid


def test_files_hold_pairs_of_their_split_that_the_rules_agree_with(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preference_pairs, "sample_answers", scripted)
    config = preference_pairs.Config(checkpoint=base, problems=20, num_generations=6, pairs=3, out=tmp_path / "pairs")
    result = preference_pairs.main(config)
    assert result == json.loads((config.out / "result.json").read_text())
    assert result["tokens"] == 2 * 20 * (7 + 8 + 9 + 10 + 11 + 12)  # of both splits, the pairs' and the others'
    known = {p.prompt: p for p in countdown.all_problems()}
    for name, split in (("train", "train"), ("held_out", "validation")):
        pairs = read_pairs(config.out / f"{name}.jsonl")
        assert len(pairs) == result[f"{name}/pairs"] == 30 and result[f"{name}/mixed"] == 0.5
        assert result[f"{name}/pass@1"] == 0.25 and result[f"{name}/problems"] == 20
        for pair in pairs:
            problem = known[pair.messages[0][1]]
            assert countdown.split_of(problem) == split and pair.score_gap == pytest.approx(1.0)
            assert countdown.verify(problem, pair.chosen).status == "right"
            assert countdown.verify(problem, pair.rejected).status == "wrong"
        assert result[f"{name}/format_chosen"] == 1.0 and 0 < result[f"{name}/tokens_chosen"] < 13
    assert "held out" in capsys.readouterr().out
    for resume in (False, True):
        with pytest.raises(ValueError, match="pairs already holds pairs: choose another --out"):
            preference_pairs.main(replace(config, resume=resume))
    before = (config.out / "train.jsonl").read_text()
    (config.out / "result.json").unlink()  # as a run leaves it that was killed between the files
    with pytest.raises(ValueError, match="already holds pairs"):
        preference_pairs.main(config)
    preference_pairs.main(replace(config, resume=True))
    assert (config.out / "train.jsonl").read_text() == before and (config.out / "result.json").exists()


def test_pairs_of_a_task_of_ones_own(base, tmp_path, monkeypatch):
    """A user's file with two splits: the second gives the held-out pairs."""
    path = tmp_path / "sums.py"
    path.write_text(
        "from minir1.tasks import Problem, Verdict\n"
        "def problems(split, data):\n"
        "    return [Problem(f'make {n} from 1,1', str(n)) for n in (range(4) if split == 'train' else range(4, 6))]\n"
        "def verify(problem, text):\n"
        "    right = f'<answer>{problem.reference}<' in text\n"
        "    return Verdict('right' if right else 'wrong', {})\n"
    )
    monkeypatch.setattr(preference_pairs, "sample_answers", scripted)
    config = preference_pairs.Config(checkpoint=base, task=str(path), eval_split="test", out=tmp_path / "pairs")
    result = preference_pairs.main(config)
    assert (result["train/problems"], result["held_out/problems"]) == (4, 2)
    assert {p.messages[0][1] for p in read_pairs(config.out / "held_out.jsonl")} == {"make 5 from 1,1"}
    with pytest.raises(ValueError, match="task sums has no split 'validation'; it has train, test"):
        preference_pairs.main(replace(config, eval_split="validation", out=tmp_path / "others"))


def test_answers_that_could_not_be_judged_count_in_no_accuracy(base, tmp_path, monkeypatch):
    """Of each problem's answers one is right, one wrong, two unknown; without the wrong one there is no pair."""
    answers = [answer("a", True), answer("b", False), *(answer(text, False, unjudged=True) for text in "cd")]
    config = preference_pairs.Config(checkpoint=base, problems=5, out=tmp_path / "pairs")
    monkeypatch.setattr(preference_pairs, "sample_answers", lambda *args, **more: [answers] * 5)
    assert preference_pairs.main(config)["train/pass@1"] == 0.5
    monkeypatch.setattr(preference_pairs, "sample_answers", lambda *args, **more: [answers[:1] + answers[2:]] * 5)
    said = "^5 of 15 answers to train problems are right, .*; 10 could not be judged: no reason given$"
    with pytest.raises(ValueError, match=said):
        preference_pairs.main(replace(config, out=tmp_path / "none"))


def test_scores_that_are_no_numbers_are_named_where_they_leave_no_pairs(base, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from minir1.tasks import Verdict, countdown\n"
        "def problems(split, data):\n    return countdown.problems(split)\n"
        "def verify(problem, text):\n    return Verdict('right', {'preference': 'good'})\n"
    )
    small = {"problems": 3, "num_generations": 2, "max_completion_length": 8, "eval_split": "test"}
    config = preference_pairs.Config(checkpoint=base, task=str(path), **small, out=tmp_path / "pairs")
    with pytest.raises(ValueError, match="; 6 could not be judged: .*task own: verify returns scores = "):
        preference_pairs.main(config)


def test_a_base_that_is_never_right_makes_no_pairs(base, tmp_path):
    """With answers that an untrained model really samples."""
    small = {"problems": 3, "num_generations": 2, "max_completion_length": 8}
    config = preference_pairs.Config(checkpoint=base, **small, out=tmp_path / "pairs")
    with pytest.raises(ValueError, match="0 of 6 answers to train problems are right, and no problem has both kinds"):
        preference_pairs.main(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--num-generations 1", "num_generations = 1: at least 2"),
        ("--pairs 0", "pairs = 0: at least 1"),
        ("--template r1", "chat"),
        ("--temperature 0", "temperature = 0.0: at least 1e-06"),
        ("--min-gap 0", "min_gap = 0.0: above 0"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(preference_pairs, line, message, capsys)


def test_pairs_of_a_task_that_ranks_answers(base, tmp_path):
    """No answer is right; the rule prefers short ones, and what it prefers is the gold reward of the file."""
    path = tmp_path / "short.py"
    path.write_text(
        "from minir1.tasks import Problem, Verdict\n"
        "SPLITS = ('train', 'test')\n"
        "def problems(split, data):\n"
        "    return [Problem(f'make {n} from 1,1', '') for n in range(3)]\n"
        "def verify(problem, text):\n"
        "    return Verdict('wrong', {'preference': -len(text) / 100})\n"
    )
    config = preference_pairs.Config(
        checkpoint=base, task=str(path), eval_split="test", num_generations=6, max_completion_length=100, pairs=99,
        min_gap=0.2, out=tmp_path / "pairs",
    )  # fmt: skip
    result = preference_pairs.main(config)
    pairs = read_pairs(config.out / "train.jsonl")
    assert result["train/pairs"] == len(pairs) > 3 and result["train/pass@1"] == 0
    for pair in pairs:
        assert pair.score_gap == pytest.approx((len(pair.rejected) - len(pair.chosen)) / 100) and pair.score_gap > 0.199
    with pytest.raises(ValueError, match="no problem has both kinds, or preferences that differ by 99.0"):
        preference_pairs.main(replace(config, min_gap=99.0, out=tmp_path / "none"))
