"""all_scenarios.py at toy size: rewards of both kinds by hand, when which problems are asked, resume to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import standin
import torch
from runs import assert_same_run, stop
from test_preference_pairs import assert_bad_option

from experiments import all_scenarios
from minir1 import checkpoint
from minir1.advantages import group_advantages
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.model import heads, hf
from minir1.model.heads import ScalarModel, ValueHead
from minir1.tasks import Problem

ODD = str(Path(__file__).parent / "odd_prompt_task.py")
standin.register()  # before the first backward pass of the process
TALK = """
from minir1.tasks import Problem, Verdict
SPLITS = ("train", "validation")
def problems(split, data):
    first = {"train": 3, "validation": 40}[split]
    return [Problem(f"make {n} from {n},1,1", "", language="de") for n in range(first, first + 8)]
def verify(problem, text):
    if not JUDGED:
        return Verdict("unjudged", {})
    return Verdict("right" if len(text) % 2 else "wrong", {"preference": len(text) % 5 / 4})
"""
TOY = all_scenarios.Config(
    steps=4, preference_steps=2, prompts=4, general_prompts=2, num_generations=4, max_completion_length=24,
    min_mixed=0.0, eval_every=2, eval_problems=4, eval_answers=1, beta=0.01, warmup=0, learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(toy_base, tmp_path_factory):
    """The settings of a toy run: a base, a task of general prompts, a reward model nobody has trained."""
    folder = tmp_path_factory.mktemp("all-scenarios")
    (folder / "talk.py").write_text("JUDGED = True\n" + TALK)
    (folder / "silent.py").write_text("JUDGED = False\n" + TALK)
    base = toy_base("moe") / "checkpoint"
    trunk, tokenizer = hf.load(checkpoint.latest(base))
    model = ScalarModel(trunk, ValueHead(32))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    heads.save(model, tokenizer, folder / "reward")
    return replace(TOY, checkpoint=base, general_task=str(folder / "talk.py"), reward_model=folder / "reward")


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of an uninterrupted run, and the batches that it asked and learned from."""
    out, calls = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("act", "reward", "learn"):
            real = getattr(all_scenarios, name)
            patch.setattr(all_scenarios, name, lambda *args, name=name, real=real: (
                calls.append((name, args, real(*args))) or calls[-1][2]))  # fmt: skip
        all_scenarios.main(replace(toy, out=out))
    return out, calls


# ---- rewards -----------------------------------------------------------------------------------

PROBLEMS = [Problem("p", "", language="en"), Problem("q", "", language="zh")]
CONSISTENT = {("a", "en"): 1.0, ("b", "en"): 0.5, ("a", "zh"): 0.0, ("b", "zh"): 0.25}


def answer(text: str, right: bool, form: bool, **more) -> Answer:
    return Answer(text, 1, False, right, form, **more)


@pytest.fixture
def consistent(monkeypatch):
    monkeypatch.setattr(all_scenarios, "language_consistency", lambda text, language: CONSISTENT[text, language])


def rewarded(answers: list[list[Answer]], config, *scores: torch.Tensor) -> torch.Tensor:
    return all_scenarios.reward(answers, config, all_scenarios.language(PROBLEMS, answers), *scores)


def test_reasoning_is_rewarded_by_the_rules(consistent):
    answers = [[answer("a", True, True), answer("b", False, True)]]
    answers += [[answer("a", False, False), answer("b", True, False)]]
    config = replace(TOY, format_weight=0.1, language_weight=0.4)
    want = torch.tensor([[1.5, 0.3], [0.0, 1.1]])
    torch.testing.assert_close(rewarded(answers, config), want)
    without = all_scenarios.reward(answers, replace(config, accuracy_weight=2.0))
    torch.testing.assert_close(without, torch.tensor([[2.1, 0.1], [0.0, 2.0]]))
    answers[0][1] = answer("b", False, True, unjudged=True)  # neither praised nor blamed: the mean of its group
    torch.testing.assert_close(rewarded(answers, config)[0], torch.tensor([1.5, 1.5]))


def test_general_answers_are_rewarded_by_the_model_in_deviations_and_the_rules(consistent):
    """Scores 0, 2, 4, 6: mean 3, deviation √(20/3). What the task says of the answer has no part in it."""
    unjudged = answer("b", False, True, unjudged=True)
    answers = [[answer("a", True, True), unjudged], [answer("a", False, False), answer("b", True, False)]]
    config, scores = replace(TOY, language_weight=0.4), torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    standard = torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / (20 / 3) ** 0.5
    want = standard + torch.tensor([[0.5, 0.3], [0.0, 0.1]])
    torch.testing.assert_close(rewarded(answers, config, scores), want)
    torch.testing.assert_close(rewarded(answers, config, 100 * scores - 7), want)
    equal = rewarded(answers, config, torch.full((2, 2), 5.0))
    torch.testing.assert_close(equal, want - standard)


# ---- runs --------------------------------------------------------------------------------------


def test_general_prompts_come_in_the_last_steps_alone(toy, whole):
    out, calls = whole
    asked = [[problem.language for problem in args[2]] for name, args, _ in calls if name == "act"]
    assert asked == [["en"] * 4, ["en"] * 4, ["en"] * 2, ["de"] * 2, ["en"] * 2, ["de"] * 2]
    assert all(args[3] == replace(toy, out=out) for name, args, _ in calls if name == "act")
    assert len({args[4] for name, args, _ in calls if name == "act"}) == 6  # noise of its own each
    learned = [args for name, args, _ in calls if name == "learn"]
    assert [len(args[2].length) for args in learned] == [16] * 4
    assert all(args[2].temperature == 0.7 for args in learned)


def test_advantages_are_relative_to_the_own_group(whole):
    calls = whole[1]
    last = [(args, result) for name, args, result in calls if name != "act"][-3:]
    rewards, general = (result for _, result in last[:2])
    advantage = last[2][0][3]
    want = torch.cat([group_advantages(rewards), group_advantages(general)])
    assert torch.equal(advantage, want.flatten()) and (general != general[:, :1]).any()
    scores = last[1][0][3]
    rollout = last[2][0][2]
    assert scores.shape == (2, 4) and rollout.group.tolist() == [n for n in range(4) for _ in range(4)]


def test_what_is_logged(toy, whole):
    out, calls = whole
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    of_general = {f"train/general{name}" for name in ("", "_preference", "_format", "_length")} | {"train/reward_model"}
    assert [of_general <= row.keys() for row in rows] == [False, False, False, True, True]
    assert not any(of_general & row.keys() for row in rows[:3])
    evals = {"eval/pass@1", "eval/general", "eval/general_preference", "eval/general_length"}
    assert [evals <= row.keys() for row in rows] == [True, False, True, False, True]
    assert all("train/language_consistency" in row and row["train/kl"] >= 0 for row in rows[1:])
    rewarded = [result for name, _, result in calls if name == "reward"]
    parts = [rewarded[0:1], rewarded[1:2], rewarded[2:4], rewarded[4:6]]
    for row, part in zip(rows[1:], parts):
        assert row["train/reward"] == pytest.approx(part[0].mean().item())  # of reasoning
    scores = [args[3].mean().item() for name, args, _ in calls if name == "reward" and len(args) == 4]
    assert [row["train/reward_model"] for row in rows[3:]] == scores
    reasoning = [args[0] for name, args, _ in calls if name == "reward" and len(args) == 3]
    for row, answers in zip(rows[1:], reasoning):
        flat = [a for group in answers for a in group]
        assert row["train/accuracy"] == sum(a.right for a in flat) / len(flat)
    trained = [args[2] for name, args, _ in calls if name == "learn"]
    assert [row["train/sampled_tokens"] for row in rows[1:]] == [int(rollout.mask.sum()) for rollout in trained]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2] * 4 + [4] * 4


def test_the_last_checkpoint_is_the_result(whole):
    folder = whole[0] / "checkpoint"
    assert checkpoint.best(folder) is None and checkpoint.resolve(folder, "best").name == "step-000004"


def test_general_prompts_without_a_verifier_are_learned_from(toy, tmp_path):
    """Their reward is the model's: nothing is replaced by a mean, and no figure is made up."""
    silent = str(Path(toy.general_task).with_name("silent.py"))
    config = replace(toy, general_task=silent, out=tmp_path, steps=1, preference_steps=1, language_weight=0.0)
    all_scenarios.main(config)
    first, row = read_metrics(tmp_path)
    assert "eval/general" not in first and "train/general" not in row and "train/general_preference" not in row
    assert "train/reward_model" in row and "eval/general_length" in first and row["train/grad_norm"] > 0
    assert "train/language_consistency" not in row and row["train/unjudged"] == 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["right"] in (True, False) for s in samples] == [True] * 2 + [False] * 2
    assert [s["right"] for s in samples[2:]] == [None] * 2


@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_run_resumes_to_the_same_bits(toy, whole, tmp_path, monkeypatch, count):
    config = replace(toy, out=tmp_path / "run")
    stop(monkeypatch, "all_scenarios", config, "experiments.all_scenarios", "learn", count)
    all_scenarios.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole[0])


def test_a_run_on_another_device_is_that_of_the_cpu(toy, tmp_path):
    for device in ("cpu", "standin"):
        config = replace(toy, device=device, steps=2, preference_steps=1, out=tmp_path / device)
        all_scenarios.main(config)
    assert_same_run(tmp_path / "cpu", tmp_path / "standin")


def test_a_run_resumes_with_its_own_number_of_steps(toy, tmp_path, monkeypatch):
    config = replace(toy, out=tmp_path / "run")
    stop(monkeypatch, "all_scenarios", config, "experiments.all_scenarios", "learn", 3)
    before = (config.out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="steps = 6: the last ones differ, so this run resumes with 4 only"):
        all_scenarios.main(replace(config, resume=True, steps=6))
    assert (config.out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general_task": "chess"}, "unknown task 'chess'"),
        ({"prompts": 20, "general_prompts": 9}, "general_prompts = 9: the task has 8 to train on"),
        ({"language_weight": 0.1, "general_task": "unknown.py"}, "language 'xx': no script is known for it"),
        ({"prompts": 100000}, "prompts = 100000: the task has"),
        ({"reward_model": Path("nowhere")}, "nowhere is no folder"),
        ({"task": ODD}, "no token for 'é' in the prompt"),
        ({"general_task": ODD}, "no token for 'é' in the prompt"),
    ],
)
def test_a_refused_start_leaves_nothing_behind(toy, tmp_path, monkeypatch, changes, message):
    spoken = Path(toy.general_task).read_text().replace('"de"', '"xx"')
    (tmp_path / "unknown.py").write_text(spoken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        all_scenarios.main(replace(toy, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--preference-steps 0", "preference_steps = 0: 1 to 40, the steps"),
        ("--preference-steps 41", "preference_steps = 41: 1 to 40, the steps"),
        ("--general-prompts 32", "general_prompts = 32: 1 to 31, below prompts"),
        ("--general-prompts 0", "general_prompts = 0: 1 to 31, below prompts"),
        ("--language-weight -1", "language_weight = -1.0: at least 0"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(all_scenarios, line, message, capsys)
