"""The scripts at toy size, called as a user calls them; runs that are killed and go on to the same bits."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from runs import ROOT, assert_equal_bits, assert_same_run, command, kill, result_of, stop
from toys import BASE, DENSE, MOE

from experiments import demo, evaluate, pretrain, r1_zero
from experiments.benchmarks import prefill
from experiments.studies import long_context, processes, seeds
from minir1 import checkpoint
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import ModelConfig

SCRIPTS = ROOT / "experiments"
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
    told = "ValueError: here already holds a run: go on with --resume, or choose another --out"
    assert again.returncode == 1 and again.stderr.splitlines()[-1] == told


@pytest.mark.parametrize(
    "script, line, told",
    [
        ("pretrain", "--steps 0", "steps = 0: at least 1"),
        ("pretrain", "--model.heads 0", "heads = 0"),
        ("pretrain", "--mix.facts 2", "Mix.facts = 2.0"),
        ("pretrain", "--depth 3", "--depth"),
        ("demo", "--rl.answers 1", "answers = 1: a group needs 2"),
        ("demo", "--answer 1", "--answer"),
        ("evaluate", "", "--checkpoint"),
        ("seeds", "--seed 1", "--seed"),
    ],
)
def test_bad_options_are_named(script, line, told, capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(importlib.import_module(f"experiments.{script}").Config, args=line.split())
    assert end.value.code == 2
    shown = "".join(capsys.readouterr())
    assert told in " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())


def test_the_commands_in_the_docstrings_are_understood():
    found = 0
    for path in sorted(SCRIPTS.glob("*.py")):
        script = importlib.import_module(f"experiments.{path.stem}")
        for line in re.findall(r"^ +python -m experiments.(.*)$", script.__doc__, re.M):
            name, *args = shlex.split(line)
            assert name == path.stem
            entry = re.search(r"tyro\.cli\((\w+)", path.read_text(encoding="utf-8"))[1]  # Config, or another
            tyro.cli(getattr(script, entry), args=args)
            found += 1
    assert found >= 6


# ---- pre-training ------------------------------------------------------------------------------


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
    tokenizer = pretrain.build_tokenizer("default")
    rows = next(pretrain.token_batches(SMALL, tokenizer))
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


# ---- killed and resumed ------------------------------------------------------------------------


def test_a_killed_process_resumes_to_the_same_bits(whole, tmp_path):
    config = replace(config_of("moe"), out=tmp_path / "run")
    # Step 7: its gradient is ready, not applied.
    kill("pretrain", config, "torch.nn.utils", "clip_grads_with_norm_", 7, tmp_path / "config")
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 6
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000004"
    pretrain.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole("moe"))


@pytest.mark.parametrize(
    "model, owner, name, count",
    [
        ("dense", "torch.nn.utils", "clip_grads_with_norm_", 3),  # before the first checkpoint
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
    for key, value in seconds.items():  # of the training, not of this look
        assert result_of(out)[key] > 0.5 * value


# ---- evaluation --------------------------------------------------------------------------------


def test_evaluate_measures_a_checkpoint(base, tmp_path, capsys):
    config = evaluate.Config(checkpoint=base / "checkpoint", problems=5, answers=2, max_tokens=24)
    values = evaluate.main(replace(config, out=tmp_path / "new" / "values.json"))
    assert json.loads((tmp_path / "new" / "values.json").read_text()) == values
    for key in ("pass@1", "forced", "search", "search_distinct"):
        assert 0 <= values[f"{key}_low"] <= values[key] <= values[f"{key}_high"] <= 1
    assert {"pass@2", "maj@2", "greedy", "form", "length", "tries", "truncated", "tokens_per_s"} < values.keys()
    shown = capsys.readouterr().out
    assert "pass@1, sampled" in shown and "forced to answer at once" in shown and "test problems" in shown
    again = evaluate.main(config)
    assert {**again, "tokens_per_s": 0} == {**values, "tokens_per_s": 0}
    quick = evaluate.main(replace(config, no_think=True, split="unseen"))
    assert quick["tries"] == 0 and quick["forced"] == quick["pass@1"]
    with pytest.raises(ValueError, match="0 of .* problems in split 'test'"):
        evaluate.main(replace(config, problems=0))
    with pytest.raises(ValueError, match="unknown level 'hard'; allowed: default, wide, four"):
        evaluate.main(replace(config, level="hard"))


# ---- the demonstration, and its seeds ----------------------------------------------------------

DEMO = demo.Config(
    base=replace(BASE, steps=40),
    rl=replace(RL, steps=5, eval_every=2),
    problems=6,
    answers=2,
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


def test_a_killed_demonstration_goes_on_without_training_the_base_again(demonstration, tmp_path, monkeypatch):
    out, result, _ = demonstration
    config = replace(DEMO, out=tmp_path / "run")
    kill("demo", config, "torch.nn.utils", "get_total_norm", 40 + 7, tmp_path / "config")  # step 4 of 5
    assert checkpoint.latest(tmp_path / "run" / "rl" / "checkpoint").name == "step-000002"
    monkeypatch.setattr(pretrain, "loss_backward", None)
    again = demo.main(replace(config, resume=True))
    for part in ("base", "rl"):
        assert_same_run(tmp_path / "run" / part, out / part)
    clock = ("seconds/", "memory/")
    for key in result.keys() | again.keys():
        if not key.startswith(clock) and not key.endswith("tokens_per_s"):
            assert again[key] == result[key], key

    monkeypatch.setattr(r1_zero, "learn", None)  # now all is done: only the test is made again
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


def fake(seed: int, quick: bool) -> dict[str, float]:
    keys = [key for _, key in seeds.KEYS if not key.startswith("nothink/")]
    return {key: 0.1 + 0.02 * seed + 0.001 * n + 0.1 * quick for n, key in enumerate(keys)} | {"seed": seed}


def test_seeds_run_what_is_missing_and_make_the_table(tmp_path, monkeypatch, capsys):
    calls = []

    def stub(words, env=None, **_):
        tyro.cli(demo.Config, args=words[3:])  # demo.py would understand it
        options = dict(zip(words[3::], words[4::]))
        out = Path(options["--out"])
        calls.append(out.name)
        if out.name == "think-2" and "--resume" not in words:  # killed once
            out.mkdir(parents=True)
            return subprocess.CompletedProcess(words, -9)
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(fake(int(options["--seed"]), "--no-think" in words)))
        assert env["OMP_NUM_THREADS"].isdigit() and words[-4:] == ["--problems", "5", "--rl.steps", "2"]
        assert ("--no-think" in words) == ("--base-from" in words) == out.name.startswith("no-think")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(processes.subprocess, "run", stub)
    config = seeds.Config(
        out=tmp_path / "runs",
        results=tmp_path / "docs" / "r1_zero.json",
        figure=tmp_path / "docs" / "seeds.png",
        options="--problems 5 --rl.steps 2",
    )
    with pytest.raises(RuntimeError, match="think-2 failed"):
        seeds.main(config)
    assert calls.count("think-0") == calls.count("think-1") == 1 and not config.results.exists()
    results = seeds.main(config)
    again = ["think-2"]
    assert sorted(calls) == sorted([f"{kind}-{n}" for kind in ("think", "no-think") for n in range(3)] + again)
    assert results[1]["after/pass@1"] == fake(1, False)["after/pass@1"]
    assert results[1]["nothink/pass@1"] == fake(1, True)["after/pass@1"]
    assert json.loads(config.results.read_text()) == {str(seed): result for seed, result in enumerate(results)}
    assert config.figure.exists()
    capsys.readouterr()
    calls.clear()
    assert seeds.main(config) == results and not calls  # all done: nothing is run
    shown = capsys.readouterr().out
    assert "trained to answer at once" in shown and "12.1% [7.1, 17.1]" in shown  # 12.1 ± 4.303·2/√3
    seeds.main(replace(config, seeds=(0, 1)))
    assert "fewer than three seeds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="think-. was run with .*--rl.steps 2', not .*--rl.steps 3'"):
        seeds.main(replace(config, options="--problems 5 --rl.steps 3"))


# ---- long texts --------------------------------------------------------------------------------

LONG = long_context.Config(
    factor=2, dim=32, steps=5, tune_steps=3, batch=256, tune_batch=300, rows=3, cost_lengths=(16, 32),
    checkpoint_every=2,
)  # fmt: skip


@pytest.mark.parametrize("length, pairs", [(16, 2), (64, 8), (131, 5)])
def test_every_question_of_a_long_text_has_its_one_answer(length, pairs):
    tokenizer = long_context.build_tokenizer()
    tokens, part = long_context.texts(tokenizer, 50, length, pairs, torch.Generator().manual_seed(length))
    keys = {tokenizer.id(word) for word in long_context.KEYS}
    body = length - 2 * pairs
    assert tokens.shape == part.shape == (50, length)
    for row, where in zip(tokens.tolist(), part.tolist()):
        assert where[:body] == [-1] * body and sorted(where[body + 1 :: 2]) == list(range(pairs))
        assert sum(token in keys for token in row[:body]) == pairs
        for question in range(body, length, 2):
            place = row[:body].index(row[question])
            assert row[place + 1] == row[question + 1] and where[question] == -1
            bounds = [2 * (n * (body // 2) // pairs) for n in (where[question + 1], where[question + 1] + 1)]
            assert bounds[0] <= place < bounds[1]


def test_accuracy_counts_each_part_apart(monkeypatch):
    """A model that knows the answers of the second part alone."""
    tokenizer = long_context.build_tokenizer()
    tokens, part = long_context.texts(tokenizer, LONG.rows, 64, 8, long_context.generator(0, 64))

    class Knowing:
        def hidden(self, rows):
            return torch.where(part == 1, tokens, 0).roll(-1, 1).unsqueeze(-1)  # at t what stands at t + 1

        def logits(self, hidden):
            return torch.nn.functional.one_hot(hidden.squeeze(-1), 200).float()

    assert long_context.accuracy(Knowing(), tokenizer, 64, LONG) == [0, 1, 0, 0, 0, 0, 0, 0]


def test_long_context_measures_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    result = long_context.main(replace(LONG, out=tmp_path / "whole", results=tmp_path / "all.json", seed=1))
    for kill in (4, 7):  # in the first training, and in a tuning
        config = replace(LONG, out=tmp_path / f"killed-{kill}", seed=1)
        stop(monkeypatch, "long_context", config, "long_context", "clip_gradients", kill)
        long_context.main(replace(config, resume=True))
        for phase in ("trained", "none_tuned", "yarn_tuned"):
            a, b = (checkpoint.latest(out / "checkpoint" / phase) for out in (tmp_path / "whole", config.out))
            assert_equal_bits(checkpoint.load_state(a), checkpoint.load_state(b))
        assert read_metrics(config.out) == read_metrics(tmp_path / "whole")
        measured = [key for key in result if key.split("/")[0] in long_context.figures_long_context.VARIANTS]
        assert [result_of(config.out)[key] for key in measured] == [result[key] for key in measured]
    assert LONG.lengths == [32, 64, 128] and len(measured) == 6 * (3 * 8 + 2)
    shares = [result[f"yarn/{length}/{part}"] for length in (32, 64) for part in range(8)]
    assert result["yarn/inside"] == pytest.approx(sum(shares) / 16)
    assert result["cache/mla/32/mib"] / result["cache/mha/32/mib"] == 80 / 256  # 64 + 16 against 2·4·32
    assert json.loads((tmp_path / "all.json").read_text()) == {"1": json.loads(json.dumps(result))}
    for figure in ("all.png", "all_costs.png", "whole/figures/retrieval.png", "whole/figures/costs.png"):
        assert (tmp_path / figure).exists()
    scaling = hf.load(checkpoint.latest(tmp_path / "whole" / "checkpoint" / "yarn_tuned"))[0].config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original) == ("yarn", 2, 64)


def test_microbatches_do_not_change_a_step_on_long_texts():
    tokenizer, phase, grads = long_context.build_tokenizer(), long_context.phases(LONG)[1], []
    for microbatch in (100_000, 1):
        torch.manual_seed(0)
        model = long_context.Transformer(ModelConfig(vocab=128, dim=32, layers=1, heads=2, experts=0))
        long_context.loss_backward(model, tokenizer, phase, 3, replace(LONG, microbatch=microbatch))
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_prefill_benchmark_at_toy_size(tmp_path):
    found = prefill.main(prefill.Config(lengths=(300,), chunk=128, whole=0, out=tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found and "one_call/300/seconds" not in found
    assert found["cache/300/gib"] == 4 * 300 * 80 * 4 / 2**30  # layers · tokens · (64 + 16) · 4 bytes
    seconds, cpu, peak, cache = prefill.measure((300, None, 4, torch.get_num_threads()))
    assert seconds > 0 and cpu > 0 and 0.1 < peak < 20 and cache == found["cache/300/gib"]


# ---- multi-token prediction --------------------------------------------------------------------


def test_multi_token_prediction_does_not_depend_on_the_microbatch():
    """Its loss, its gradients and the loads of its experts; and the weight λ stands where it should."""
    config = replace(SMALL, model=replace(MOE, mtp_depth=2), mtp_weight=0.5, balance_loss=0.1)
    tokenizer = pretrain.build_tokenizer("default")
    rows = [[5], [6, 7], [5, 6, 7], *next(pretrain.token_batches(config, tokenizer))]  # without some depth, too
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


def test_speculation_is_measured_on_a_base_that_is_made_once(tmp_path, monkeypatch, capsys):
    bench = importlib.import_module("experiments.benchmarks.bench_speculative")
    out = tmp_path / "speculative.json"
    config = bench.Config(
        depths=(1,), pretrain=replace(SMALL, steps=2), base=tmp_path, rows=(2,), problems=4, temperatures=(1.0,),
        max_tokens=8, repeats=1, out=out,
    )
    threads = torch.get_num_threads()
    try:
        found = bench.main(config)
    finally:
        torch.set_num_threads(threads)  # it measures on one
    assert json.loads(out.read_text()) == found
    assert 0 <= found["D=1/rows=2/T=1/accepted_1"] <= 1 <= found["D=1/rows=2/T=1/tokens_a_pass"] <= 2
    assert all(found[f"D=1/rows=2/T=1/{way}_tok_s"] > 0 for way in ("generate", "speculate"))
    metrics = read_metrics(tmp_path / "depth-1")
    assert len(metrics) == 2 and all(row["train/mtp_loss"] > 0 for row in metrics)
    monkeypatch.setattr(pretrain, "main", None)  # the base is there
    assert bench.trained(config, depth=1)[0].config.mtp_depth == 1
    assert "speculation after 2 steps" in capsys.readouterr().out
