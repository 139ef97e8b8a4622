"""The scripts at toy size, called as a user calls them; killed runs resume to the same bits."""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import standin
import torch
import tyro
from runs import ROOT, assert_same_run, command, kill, plain_metrics, result_of, stop
from toys import BASE, DENSE, MOE

from experiments import demo, evaluate, evaluate_table, pretrain, r1_zero
from experiments.tools.variants import COPIES
from minir1 import checkpoint, tasks
from minir1.judge import Answer
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.rope import RopeScaling
from minir1.tokenizer import word_level

standin.register()  # before the first backward pass of the process
SCRIPTS = ROOT / "experiments"
COUNTDOWN = tasks.load("countdown")
SMALL = replace(BASE, steps=9, batch=512, checkpoint_every=4)
RL = r1_zero.Config(
    steps=9, prompts=4, num_generations=4, max_completion_length=32, min_mixed=0.0, eval_every=4, eval_answers=1,
    beta=0.01, reference_reset=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(toy_base):
    """A run folder of pretrain.py: an MoE that knows what an answer looks like."""
    return toy_base("moe")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of what the tests below kill, made when first asked for."""
    made = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(f"whole-{model}")
            pretrain.main(replace(config_of(model), out=made[model]))
        return made[model]

    return run


def config_of(model: str) -> pretrain.Config:
    return replace(SMALL, model=MOE if model == "moe" else DENSE)


# ---- the command line --------------------------------------------------------------------------


def test_a_base_is_trained_from_the_command_line_in_any_folder(tmp_path):
    shape = "--model.dim 32 --model.layers 2 --model.heads 2 --model.ffn 64 --model.experts 4 --model.expert-ffn 16"
    words = f"-m experiments.pretrain --steps 3 --batch 256 --out here {shape}".split()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3  loss" in done.stdout and "sums" in done.stdout
    assert len(read_metrics(tmp_path / "here")) == 3 and checkpoint.latest(tmp_path / "here" / "checkpoint")
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 2 and not again.stdout
    assert again.stderr == "error: here already holds a run: continue it with --resume, or choose another --out\n"


@pytest.mark.parametrize(
    "script, line, message",
    [
        ("pretrain", "--steps 0", "steps = 0: at least 1"),
        ("pretrain", "--model.heads 0", "heads = 0"),
        ("pretrain", "--depth 3", "--depth"),
        ("pretrain", "--dtype float16", "bfloat16"),
        ("demo", "--rl.num-generations 1", "num_generations = 1: at least 2"),
        ("demo", "--problems 0", "problems = 0: at least 1"),
        ("demo", "--answer 1", "--answer"),
        ("evaluate", "--k 3 --num-generations 2", "k = (3,): at most num_generations = 2"),
        ("evaluate", "--checkpoint a --problems 0", "problems = 0: at least 1"),
        ("evaluate", "--checkpoint a --temperature -1", "temperature = -1.0: 0, or at least 1e-06"),
        ("studies.seeds", "--seed 1", "--seed"),
    ],
)
def test_bad_options_are_named(script, line, message, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(importlib.import_module(f"experiments.{script}").Config, args=line.split())
    assert end.value.code == 2
    shown = "".join(capsys.readouterr())
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())


def test_the_commands_in_the_docstrings_are_understood():
    found = 0
    for path in sorted(SCRIPTS.glob("*.py")):
        script = importlib.import_module(f"experiments.{path.stem}")
        for line in re.findall(r"^ +python -m experiments.(.*)$", script.__doc__, re.M):
            name, *args = shlex.split(line)
            assert name == path.stem
            source = path.read_text(encoding="utf-8")
            entry = re.search(r"cli(?:\.run\(main, |\()(\w+)", source)[1]  # Config, or another
            tyro.cli(getattr(script, entry), args=args)
            found += 1
    assert found >= 6


# ---- pre-training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape,message",
    [
        ({"shared_experts": 0}, "no Hugging Face class for shared_experts = 0"),
        ({"logit_scale": 0.5}, "no Hugging Face class for logit_scale = 0.5"),
        ({"softcap": 30.0}, "no Hugging Face class for softcap = 30.0"),
        ({"rope_scaling": RopeScaling("ntk", 2.0)}, "no Hugging Face class for rope_scaling.kind = 'ntk'"),
        ({"score": "softmax"}, "no Hugging Face class for norm_topk = True"),
        ({"score": "softmax", "norm_topk": False}, "balance_speed = 0.003: 0 with model.score = 'softmax'"),
    ],
)
def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, monkeypatch, shape, message):
    monkeypatch.setattr(pretrain, "loss_backward", None)
    with pytest.raises(ValueError, match=message):
        pretrain.main(replace(SMALL, model=replace(MOE, **shape), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_lacks_a_word_of_the_corpus_is_refused_before_the_training(tmp_path):
    code = (ROOT / "tests" / "talker_task.py").read_text(encoding="utf-8")
    code += """
def documents(seed):
    while True:
        yield "User:largest 3,9\\nAssistant:<think>9</think><answer>9</answer>"


def vocabulary():
    return WORDS, 9
"""
    for name, words in (("lacks", '("User:", "\\nAssistant:")'), ("whole", '("User:", "\\nAssistant:", "largest ")')):
        (tmp_path / f"{name}.py").write_text(code.replace("WORDS", words), encoding="utf-8")
    small = replace(SMALL, model=DENSE, mix={}, steps=1, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"vocabulary\(\) lacks 'largest ' of the document 'User:largest 3,9"):
        pretrain.main(replace(small, task=str(tmp_path / "lacks.py")))
    assert not (tmp_path / "out").exists()
    pretrain.main(replace(small, task=str(tmp_path / "whole.py")))


@pytest.mark.parametrize(
    "corpus, message",
    [
        ("['User:'] * 3000", r"documents\(\) ended after step \d+, before steps = 99"),
        ("itertools.chain(['User:'] * 200, itertools.repeat(''))", r"documents\(\) yields one without text, '<\|endof"),
    ],
)
def test_a_corpus_that_ends_or_has_documents_without_text_is_named(tmp_path, corpus, message):
    code = (ROOT / "tests" / "talker_task.py").read_text(encoding="utf-8") + f"""
import itertools
documents = lambda seed: iter({corpus})
vocabulary = lambda: (("User:",), 9)
"""
    (tmp_path / "short.py").write_text(code, encoding="utf-8")
    config = replace(SMALL, model=DENSE, mix={}, steps=99, checkpoint_every=99, task=str(tmp_path / "short.py"))
    with pytest.raises(ValueError, match=f"^task .*short.py: {message}"):
        pretrain.main(replace(config, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "result.json").exists()


def test_softmax_scores_are_trained_and_saved_without_a_selection_bias(tmp_path):
    shape = replace(MOE, score="softmax", norm_topk=False)
    pretrain.main(replace(SMALL, model=shape, balance_speed=0.0, steps=2, out=tmp_path / "run"))
    assert hf.load(checkpoint.latest(tmp_path / "run/checkpoint"))[0].config.score == "softmax"


def test_pretraining_lowers_the_loss_and_leaves_a_base(base):
    rows = read_metrics(base)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[0]["train/loss"] > 4 and rows[-1]["train/loss"] < 0.4 * rows[0]["train/loss"]
    assert {"train/grad_norm", "train/lr", "train/max_violation", "perf/train_tok_s"} <= rows[0].keys()
    result = result_of(base)
    assert {"skill/sums", "skill/yes", "skill/no", "seconds/pretrain", "memory/peak_gib"} == result.keys()
    assert all(0 <= result[key] <= 1 for key in result if key.startswith("skill/"))
    path = checkpoint.latest(base / "checkpoint")
    model, tokenizer = hf.load(path)
    assert model.config.eos == tokenizer.eos and model.config.vocab % 16 == 0
    assert json.loads((path / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
    assert json.loads((base / "config.json").read_text())["mix"]["give_up"] == 1


def test_pretraining_does_not_depend_on_the_microbatch():
    tokenizer = word_level(*COUNTDOWN.vocabulary())
    rows = next(pretrain.token_batches(SMALL, COUNTDOWN, tokenizer))
    found = []
    for microbatch in (100, 200, 4096):
        torch.manual_seed(0)
        model = pretrain.build_model(SMALL, tokenizer)
        loss, _, loads = pretrain.loss_backward(model, rows, replace(SMALL, microbatch=microbatch))
        found.append((loss, loads, [p.grad for p in model.parameters()]))
    for loss, loads, gradients in found[:2]:
        assert loss == pytest.approx(found[2][0], abs=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(loads, found[2][1]))
        for a, b in zip(gradients, found[2][2]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_pretraining_on_another_device_is_that_on_the_cpu(tmp_path, model):
    config = config_of(model)
    config = replace(config, steps=2, model=replace(config.model, mtp_depth=1) if model == "moe" else config.model)
    skills = [pretrain.main(replace(config, device=device, out=tmp_path / device)) for device in ("cpu", "standin")]
    assert skills[0] == skills[1] and plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")


def test_weights_of_16_bits_are_pretrained_over_masters(whole, tmp_path, monkeypatch):
    config = replace(config_of("moe"), dtype="bfloat16", recompute=True)
    pretrain.main(replace(config, out=tmp_path / "whole"))
    stop(monkeypatch, "pretrain", replace(config, out=tmp_path / "run"), "experiments.pretrain", "balance_step", 6)
    pretrain.main(replace(config, out=tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    state = checkpoint.load_state(checkpoint.latest(tmp_path / "run" / "checkpoint"))
    assert {m.dtype for part in ("muon", "adam") for m in state[part]["masters"]} == {torch.float32}
    losses = [[row["train/loss"] for row in read_metrics(out)] for out in (tmp_path / "run", whole("moe"))]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


# ---- killed and resumed ------------------------------------------------------------------------


def test_a_killed_process_resumes_to_the_same_bits(whole, tmp_path):
    config = replace(config_of("moe"), out=tmp_path / "run")
    # Step 7: its gradient is ready, not applied.
    kill("pretrain", config, "torch", "_foreach_mul_", 7, tmp_path / "config")
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 6
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000004"
    pretrain.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole("moe"))


@pytest.mark.parametrize(
    "model, owner, name, count",
    [
        ("dense", "torch", "_foreach_mul_", 3),  # before the first checkpoint
        ("dense", "minir1.optim:Muon", "step", 6),
        ("dense", "minir1.model.hf", "save", 2),  # amid the second checkpoint
        ("moe", "experiments.pretrain", "balance_step", 6),
        ("moe", "experiments.pretrain", "skills", 1),  # all steps done, no result yet
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, model, owner, name, count):
    config = replace(config_of(model), out=tmp_path / "run")
    stop(monkeypatch, "pretrain", config, owner, name, count)
    pretrain.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole(model))


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole("moe"), tmp_path / "run")
    monkeypatch.setattr(pretrain, "loss_backward", None)
    seconds = {key: value for key, value in result_of(out).items() if key.startswith("seconds/")}
    assert pretrain.main(replace(config_of("moe"), out=out, resume=True))
    assert_same_run(out, whole("moe"))
    for key, value in seconds.items():  # those of the training are kept
        assert result_of(out)[key] > 0.5 * value


# ---- evaluation --------------------------------------------------------------------------------


def test_evaluate_measures_a_checkpoint(base, tmp_path, capsys):
    small = {"problems": 5, "num_generations": 2, "max_completion_length": 24}
    config = evaluate.Config(checkpoint=base / "checkpoint", **small)
    values = evaluate.main(replace(config, out=tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == values
    for key in ("pass@1", "forced", "search", "search_without_repeats"):
        assert 0 <= values[f"{key}_low"] <= values[key] <= values[f"{key}_high"] <= 1
    assert {"pass@2", "maj@2", "greedy", "format", "length", "tries", "truncated", "tokens_per_s"} < values.keys()
    shown = capsys.readouterr().out
    labels = "pass@1, sampled", "forced to answer at once", "countdown, test: 5 problems", "search without repeats"
    assert all(label in shown for label in (*labels, "tries per answer", "repeats, share of tries"))
    again = evaluate.main(replace(config, device="standin"))
    assert {**again, "tokens_per_s": 0} == {**values, "tokens_per_s": 0}
    quick = evaluate.main(replace(config, no_think=True, split="unseen"))
    assert quick["tries"] == 0 and quick["forced"] == quick["pass@1"]
    with pytest.raises(ValueError, match="task countdown has no split 'hard'; it has train, validation, test, unseen"):
        evaluate.main(replace(config, split="hard"))
    with pytest.raises(ValueError, match="task countdown has no variant 'hard'; it has default, wide, four"):
        evaluate.main(replace(config, task="countdown:hard"))


def test_the_table_of_a_task_has_rows_for_what_it_offers():
    """By the keys alone: two groups, a baseline, a count and a rate; and a task with none of them."""
    plain = {"pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6, "pass@4": 0.7, "maj@4": 0.6, "format": 1.0}
    plain |= {"pass@1_formed": 0.5, "length": 9.0, "truncated": 0.0, "unjudged": 0.0, "entropy": 0.1, "greedy": 0.5}
    plain |= {"forced": 0.1}
    labels = [label for label, *_ in evaluate_table.rows(plain, {})]
    assert labels == [
        "pass@1, sampled", "  among well-formed answers", "pass@4", "maj@4", "pass@1, greedy",
        "pass@1, forced to answer at once", "well-formed", "truncated by the budget", "tokens",
    ]  # fmt: skip
    more = {"steps": 2.0, "slips": 0.1, "guess": 0.2, "guess_low": 0.1, "guess_high": 0.3, "over_guess": 0.3}
    groups = ("easy", "very_hard")
    grouped = {f"{key}_{group}": value for group in groups for key, value in (plain | {"steps": 1}).items()}
    rows = evaluate_table.rows(plain | {"unjudged": 0.1} | more | grouped, {"slips": "steps"})
    added = [row for row in rows if row[0] not in labels]
    assert added == [
        ("  easy problems", "pass@1", "_easy", ".1%"),
        ("  very hard problems", "pass@1", "_very_hard", ".1%"),
        ("baseline: guess", "guess", "", ".1%"),
        ("  policy above it", "over_guess", "", ".1%"),
        ("not judged", "unjudged", "", ".1%"),
        ("  easy problems", "length", "_easy", ".1f"),
        ("  very hard problems", "length", "_very_hard", ".1f"),
        ("steps per answer", "steps", "", ".2f"),
        ("slips, share of steps", "slips", "", ".1%"),
    ]


def test_a_cell_of_the_table_shows_the_interval(capsys):
    values = {"pass@1": 0.5, "pass@1_low": 0.25, "pass@1_high": 0.75, "pass@1_hard": 0.1, "length_hard": 3.0}
    values |= {"pass@1_low_hard": 0.0, "pass@1_high_hard": 0.2, "length": 2.0}
    evaluate_table.show("toy", {"test": values}, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "pass@1, sampled 50.0% [25.0, 75.0]".split() in lines and "hard problems 10.0% [0.0, 20.0]".split() in lines
    assert "hard problems 3.0".split() in lines and "well-formed -".split() in lines


# ---- the demonstration ------------------------------------------------------------------------

DEMO = demo.Config(
    base=replace(BASE, steps=40),
    rl=replace(RL, steps=5, eval_every=2),
    problems=6,
    num_generations=2,
    seed=3,
)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(demo.Console, "print", lambda self, text, **_: lines.append(str(text)))
        result = demo.main(replace(DEMO, out=out))
    return out, result, lines


def test_the_demonstration_leaves_a_result_a_figure_and_samples(demonstration):
    out, result, lines = demonstration
    assert result == result_of(out)
    for key in ("before/pass@1", "after/pass@1", "forced/pass@1", "search/pass@1", "before_unseen/pass@1"):
        assert 0 <= result[f"{key}_low"] <= result[key] <= result[f"{key}_high"] <= 1
    assert {"skill/sums", "seconds/pretrain", "seconds/rl", "seconds/test", "seconds/total"} < result.keys()
    assert result["seconds/total"] == pytest.approx(sum(result[f"seconds/{n}"] for n in ("pretrain", "rl", "test")))
    assert 0.1 < result["memory/peak_gib"] < 64 and result["seed"] == 3
    assert all(isinstance(value, (int, float)) for value in result.values())
    assert (out / "figures" / "r1_zero.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    shown = "\n".join(lines)
    for sample in samples:
        assert sample["problem"] in shown and sample["before"] and sample["after"]
    assert shown.count("[dim]before[/dim]") == shown.count("[dim]after[/dim]") == 3
    for part in ("base", "rl"):  # each a run of its own, with the seed of the whole
        assert json.loads((out / part / "config.json").read_text())["seed"] == 3
        assert hf.load(checkpoint.latest(out / part / "checkpoint"))


def test_problems_without_judged_answers_are_not_in_the_gain(tmp_path, monkeypatch):
    right, wrong = Answer("", 1, False, True, True), Answer("", 1, False, False, True)
    measured = iter([[wrong, replace(wrong, unjudged=True), right], [right, right, right]] * 2)

    def measure(model, tokenizer, task, problems, config):
        return {"pass@1": 0.5, "forced": 0.0, "forced_low": 0.0, "forced_high": 0.0}, [[a] for a in next(measured)]

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate_table, "show", lambda *_: None)
    monkeypatch.setattr(demo.hf, "load", lambda *_: (None, None))
    monkeypatch.setattr(demo.checkpoint, "resolve", lambda *_: tmp_path)
    values, _ = demo.final_test(demo.Config(problems=3), r1_zero.Config())
    assert values["gain/pass@1"] == 0.5  # of two problems, one


def test_a_killed_demonstration_resumes_without_training_the_base_again(demonstration, tmp_path, monkeypatch):
    out, result, _ = demonstration
    config = replace(DEMO, out=tmp_path / "run")
    kill("demo", config, "torch", "_foreach_mul_", 40 + 7, tmp_path / "config")  # step 4 of 5
    assert checkpoint.latest(tmp_path / "run" / "rl" / "checkpoint").name == "step-000002"
    monkeypatch.setattr(pretrain, "loss_backward", None)
    again = demo.main(replace(config, resume=True))
    for part in ("base", "rl"):
        assert_same_run(tmp_path / "run" / part, out / part)
    clock = ("seconds/", "memory/")
    for key in result.keys() | again.keys():
        if not key.startswith(clock) and not key.endswith("tokens_per_s"):
            assert again[key] == result[key], key

    monkeypatch.setattr(r1_zero, "learn", None)  # now all is trained: only the test runs again
    again = demo.main(replace(config, resume=True))
    assert again["after/pass@1"] == result["after/pass@1"]
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        demo.main(config)


def test_the_control_starts_from_a_given_base(demonstration, tmp_path):
    out, _, _ = demonstration
    config = replace(DEMO, base_from=out / "base", no_think=True, out=tmp_path / "run", rl=replace(DEMO.rl, steps=2))
    result = demo.main(config)
    assert not (tmp_path / "run" / "base").exists() and "seconds/pretrain" not in result
    assert result["after/tries"] == 0 and result["forced/pass@1"] == result["after/pass@1"]


@pytest.mark.parametrize("changes, message", [
    ({"rl": replace(DEMO.rl, seed=1)}, "--rl.seed: demo.py sets it; use --seed"),
    ({"base": replace(DEMO.base, task="countdown:wide")}, "--base.task: demo.py sets it; use --task"),
    ({"rl": replace(DEMO.rl, eval_split="none")}, "task countdown has no split 'none'"),
    ({"task": "countdown:hard"}, "task countdown has no variant 'hard'"),
    ({"rl": replace(DEMO.rl, prompts=10**6)}, "--rl.prompts 1000000: the task has [0-9]+ training problems"),
    ({"rl": replace(DEMO.rl, template="r1_zero")}, "template 'r1_zero': the tokenizer has no tokens for its words"),
    ({"base": replace(DEMO.base, mix={"none": 1.0})}, "the mix has no none"),
    ({"dense": True}, "does not go with --dense"),
])  # fmt: skip
def test_the_demonstration_refuses_before_it_trains(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        demo.main(replace(DEMO, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


OWN = """from dataclasses import replace
from minir1.tasks import countdown
from minir1.tasks.countdown import *
def problems(split, data, variant):
    listed = countdown.problems(split, data, variant)
    return {changed} if split == {split!r} else listed
"""


@pytest.mark.parametrize("split", ["train", "validation", "test", "unseen"])
@pytest.mark.parametrize("given", [False, True])
def test_the_demonstration_refuses_problems_that_it_could_not_ask(demonstration, tmp_path, monkeypatch, split, given):
    monkeypatch.setattr(demo.pretrain, "main", None)
    monkeypatch.setattr(demo.r1_zero, "main", None)
    config = replace(DEMO, task=str(tmp_path / "own.py"), out=tmp_path / "run")
    config = replace(config, base_from=demonstration[0] / "base") if given else config
    cases = {"[]": f"task own: split '{split}' has no problems"}
    cases["[*listed[:9], replace(listed[9], prompt='make é')]"] = "the tokenizer has no token for 'é' in the prompt"
    for changed, message in cases.items():
        (tmp_path / "own.py").write_text(OWN.format(changed=changed, split=split))
        with pytest.raises(ValueError, match=message):
            demo.main(config)
    assert not config.out.exists()


def test_a_task_without_a_split_to_test_on_is_refused(demonstration, tmp_path):
    path = tmp_path / "two.py"
    path.write_text("def problems(split, data):\n    return []\ndef verify(problem, text):\n    return None\n")
    config = replace(DEMO, task=str(path), base_from=demonstration[0] / "base", out=tmp_path / "run")
    with pytest.raises(ValueError, match="task two has the splits train, test: none is left to test on"):
        demo.main(replace(config, rl=replace(DEMO.rl, eval_split="test")))
    assert not config.out.exists()


# ---- starts that are refused -------------------------------------------------------------------

TRAININGS = ("pretrain", "sft", "r1_zero", "reinforce", "ppo", "dpo", "reward_model")
TRAININGS += tuple(f"variants.{name}" for name in COPIES)


@pytest.mark.parametrize("name", (*TRAININGS, "demo", "studies.long_context"))
def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    script = importlib.import_module(f"experiments.{name}")
    for function in ("pick", "load_policy", "task_of", "build_tokenizer", "sample"):  # whichever of them it has
        monkeypatch.setattr(script, function, None, raising=False)
    monkeypatch.setattr(tasks, "load", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    config = script.Config(out=tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run: continue it with --resume"):
        script.main(config)
    with pytest.raises(ValueError, match=f"{tmp_path} was started with another config"):
        script.main(replace(config, resume=True))
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match="config.json is damaged"):
        script.main(replace(config, resume=True))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json: checkpoint is there"):
        script.main(replace(config, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_refused_start_leaves_nothing_behind(base, tmp_path, name):
    script, out = importlib.import_module(f"experiments.{name}"), tmp_path / "run"
    refused = [({"device": "gpu"}, "device = 'gpu'"), ({"wandb": "on"}, "wandb is 'on'")]
    if name not in ("reward_model", "sft"):
        refused.append(({"task": "chess"}, "unknown task 'chess'"))
    if name == "pretrain":
        refused += [({"mix": {"none": 1.0}}, "the mix has no none"), ({"task": "gsm8k"}, "data|corpus")]
        refused.append(({"dense": True, "model": MOE}, "does not go with --dense"))
    else:
        refused.append(({"checkpoint": tmp_path / "none"}, "none"))
    if name in ("dpo", "reward_model"):
        refused.append(({"pairs": tmp_path / "none.jsonl"}, "none.jsonl"))
    elif name == "sft":
        refused.append(({"data": (tmp_path / "none.jsonl",)}, "there is no file .*none.jsonl"))
    elif name != "pretrain":
        refused += [({"eval_split": "dev"}, "no split 'dev'"), ({"template": "r1_zero"}, "has no tokens for its words")]
        refused += [({"prompts": 10**6}, "prompts = 1000000"), ({"min_mixed": 1.0}, "so there is no signal")]
        refused.append(({"task": str(ROOT / "tests" / "odd_prompt_task.py")}, "no token for 'é' in the prompt"))
    small = {"checkpoint": base / "checkpoint", "prompts": 2, "num_generations": 2, "max_completion_length": 4}
    small |= {"overlong_buffer": 2, "alpha": 1.0}
    small = {key: value for key, value in small.items() if key in script.Config.__dataclass_fields__}
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            script.main(script.Config(**(small | changes), out=out))
        assert not out.exists(), changes


# ---- multi-token prediction --------------------------------------------------------------------


def test_the_loss_of_multi_token_prediction_written_out():
    """The gradient is that of L_main + λ/D · Σ_k L_k, with 1/T of the main loss in each; one row has no second token
    ahead. T counts all predicted tokens of the batch."""
    config = replace(SMALL, model=replace(MOE, mtp_depth=2), mtp_weight=0.3, balance_loss=0.0)
    tokenizer = word_level(*COUNTDOWN.vocabulary())
    rows = [[5, 6, 7, 8, 9, 5, 6], [7, 5], [6, 5, 8, 9]]
    torch.manual_seed(0)
    model = pretrain.build_model(config, tokenizer)
    losses = torch.zeros(3)
    for row in rows:
        losses = losses - torch.stack([logp.sum() for logp in model.mtp_logprob(torch.tensor([row]))])
    losses = losses / (6 + 1 + 3)
    (losses[0] + 0.3 / 2 * (losses[1] + losses[2])).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    main_loss, ahead, _ = pretrain.loss_backward(model, rows, config)
    assert (main_loss, ahead) == pytest.approx((losses[0].item(), losses[1:].mean().item()), rel=1e-5)
    for p, gradient in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_multi_token_prediction_does_not_depend_on_the_microbatch():
    """Its loss, its gradients and the loads of its experts; and the loss is linear in the weight λ."""
    config = replace(SMALL, model=replace(MOE, mtp_depth=2), mtp_weight=0.5, balance_loss=0.1)
    tokenizer = word_level(*COUNTDOWN.vocabulary())
    rows = [[5], [6, 7], [5, 6, 7], *next(pretrain.token_batches(config, COUNTDOWN, tokenizer))]  # some without depth
    found = {}
    for microbatch, weight in ((200, 0.5), (4096, 0.5), (4096, 0.0), (4096, 1.0)):
        torch.manual_seed(0)
        model = pretrain.build_model(config, tokenizer)
        result = pretrain.loss_backward(model, rows, replace(config, microbatch=microbatch, mtp_weight=weight))
        found[microbatch, weight] = (*result, [p.grad for p in model.parameters()])
    (loss, ahead, loads, gradients), whole = found[200, 0.5], found[4096, 0.5]
    assert (loss, ahead) == pytest.approx(whole[:2], abs=1e-5) and loss != ahead > 0
    assert len(loads) == 3 and all(torch.equal(a, b) for a, b in zip(loads, whole[2]))  # one layer, two modules
    for a, b, without, full in zip(gradients, whole[3], found[4096, 0.0][3], found[4096, 1.0][3]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(b, (without + full) / 2, atol=1e-5, rtol=1e-3)  # linear in λ
    logp = model.mtp_logprob(torch.tensor([rows[-1]]))
    alone = pretrain.loss_backward(model, [rows[-1]], config)
    mean = sum(-x.sum().item() for x in logp[1:]) / 2 / (len(rows[-1]) - 1)  # 1/T of the main loss, whatever the depth
    assert alone[1] == pytest.approx(mean, rel=1e-5)
