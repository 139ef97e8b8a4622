"""The scripts at toy size, called as a user calls them; runs that are killed and go on to the same bits."""

import copy
import importlib
import json
import os
import pickle
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

from experiments import demo, evaluate, pretrain, r1_zero, rl_common
from experiments.benchmarks import prefill
from experiments.studies import long_context, processes, seeds
from minir1 import checkpoint
from minir1.advantages import group_advantages
from minir1.judge import NO_THINK
from minir1.log import read_metrics
from minir1.losses import clipped_surrogate
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.lora import adapters, adapters_off
from minir1.rollout import BUDGET
from minir1.tasks import countdown
from minir1.tasks.countdown_corpus import Mix

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "experiments"

MOE = ModelConfig(
    dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=4, expert_ffn=16
)
DENSE = dense(dim=32, layers=2, heads=2, kv_heads=1, ffn=64)
# Half of the documents answer at once, the others try once: form differs, so there is something to learn.
MIX = Mix(facts=0, untagged=0, at_once=0.5, at_once_right=1, orderly=0, forgetful=0, patient=0, give_up=1)
BASE = pretrain.Config(
    model=MOE, mix=MIX, steps=120, batch=1024, muon_lr=0.02, adam_lr=0.02, warmup=5, checkpoint_every=60
)
SMALL = replace(BASE, steps=9, batch=512, checkpoint_every=4)
RL = r1_zero.Config(
    steps=9, prompts=4, answers=4, max_tokens=32, min_mixed=0.0, eval_every=4, eval_answers=1, kl=0.01, refresh=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder of pretrain.py: an MoE that knows what an answer looks like."""
    out = tmp_path_factory.mktemp("base")
    pretrain.main(replace(BASE, out=out))
    return out


@pytest.fixture(scope="module")
def dense_base(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense")
    pretrain.main(replace(BASE, model=DENSE, out=out))
    return out


@pytest.fixture(scope="module")
def bases(base, dense_base):
    return {"moe": base / "checkpoint", "dense": dense_base / "checkpoint"}


@pytest.fixture(scope="module")
def whole(bases, tmp_path_factory):
    """Uninterrupted runs of what the tests below kill, made when first asked for."""
    made = {}

    def run(script: str, model: str) -> Path:
        if (script, model) not in made:
            out = tmp_path_factory.mktemp(f"whole-{script}-{model}")
            importlib.import_module(f"experiments.{script}").main(replace(config_of(script, model, bases), out=out))
            made[script, model] = out
        return made[script, model]

    return run


def config_of(script: str, model: str, bases: dict[str, Path]):
    if script == "pretrain":
        return replace(SMALL, model=MOE if model == "moe" else DENSE)
    return replace(RL, checkpoint=bases[model])


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


# ---- the command line --------------------------------------------------------------------------


def command(*words, **more) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, **more)


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
        ("r1_zero", "--answers 1", "answers = 1: a group needs 2"),
        ("r1_zero", "--prompts 0", "prompts = 0: at least 1"),
        ("r1_zero", "--steps 0", "steps = 0: at least 1"),
        ("r1_zero", "--minibatches 0", "minibatches = 0: at least 1"),
        ("r1_zero", "--minibatches 5", "minibatches = 5 must divide prompts = 32"),
        ("r1_zero", "--eval-every 0", "eval_every = 0: at least 1"),
        ("r1_zero", "--temperature 0", "temperature = 0.0: above 0"),
        ("r1_zero", "--max-tokens 3", "max_tokens = 3: the tags of an answer alone need 8"),
        ("r1_zero", "--reduction mean", "per_answer"),
        ("r1_zero", "--rewards 1", "--rewards"),
        ("r1_zero", "--lora-rank -1", "lora_rank = -1 (0 or more)"),
        ("r1_zero", "--follow 2", "follow = 2.0: 0 to 1"),
        ("r1_zero", "--lora-alpha 0", "lora_alpha = 0.0 (above 0)"),
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


# ---- learning: one rollout, many ways to cut it ------------------------------------------------


@pytest.fixture(scope="module")
def sampled(base):
    """A rollout of the toy base, arbitrary advantages, the base, and another model as the reference."""
    model, tokenizer = hf.load(checkpoint.latest(base / "checkpoint"))
    problems = [p for p in countdown.problems("default") if countdown.split(p) == "train"][:4]
    rollout = rl_common.act(model, tokenizer, problems, replace(RL, max_tokens=20), step=1, record_routes=True)
    advantage = torch.randn(16, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.abs().mean()
    assert set(rollout.stop.tolist()) == {0, BUDGET}, "the tests below want both endings"
    return model, reference, rollout, advantage


def step(sampled, *, reference=None, rollout=None, advantage=None, lr=1.0, **changes):
    """`learn` with plain gradient descent: (what was measured, how each parameter moved)."""
    model, other, drawn, given = sampled
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    config = replace(RL, **{"minibatches": 1, "grad_clip": 1e9, **changes})
    advantage = given if advantage is None else advantage
    measured = r1_zero.learn(policy, reference or other, optimizer, rollout or drawn, advantage, config)
    return measured, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())]


def assert_same(moves, others):
    scale = max(move.abs().max() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=2e-5 * scale.item(), rtol=0)


@pytest.mark.parametrize("changes", [{}, {"minibatches": 2}, {"mask_truncated": True}, {"reduction": "token"}], ids=str)
def test_no_result_depends_on_the_microbatch(sampled, changes):
    whole, moves = step(sampled, microbatch=10**6, **changes)
    assert whole["train/kl"] > 0 and whole["train/grad_norm"] > 0
    for microbatch in (1, 100, 300):
        measured, others = step(sampled, microbatch=microbatch, **changes)
        assert_same(others, moves)
        assert measured == pytest.approx(whole, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["per_answer", "token", "fixed"])
def test_the_gradient_is_that_of_the_objective_written_out(sampled, reduction, spread):
    """Without KL the loss is -Σ_it w_i min(r A_i, clip(r) A_i): w_i by hand for every reduction, at ratio 1 and off it.

    The sampler's log-probs are moved by noise of that spread: with 0.4 both clips, 0.1 and 0.3, bind for some token.
    """
    model, _, rollout, advantage = sampled
    noise = spread * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(2))
    rollout = replace(rollout, logp=rollout.logp - noise * rollout.mask)
    more = {"clip_low": 0.1, "clip_high": 0.3, "max_ratio_deviation": 1e9}
    measured, moves = step(sampled, rollout=rollout, reduction=reduction, kl=0.0, **more)
    policy, mask = copy.deepcopy(model), rollout.mask
    logp = policy.logprob(rollout.tokens, lengths=rollout.length, mask=mask)
    lengths = (rollout.length - rollout.prompt_len).float().view(16, 1)
    w = {"per_answer": 1 / (16 * lengths), "token": 1 / lengths.sum(), "fixed": torch.tensor(1 / (16 * RL.max_tokens))}
    r, A = (logp - rollout.logp).exp(), advantage.view(16, 1)
    (w[reduction] * torch.minimum(r * A, r.clamp(0.9, 1.3) * A) * mask).sum().backward()
    assert_same(moves, [p.grad for p in policy.parameters()])
    bounds = [(A > 0) & (r > 1.3) & mask, (A < 0) & (r < 0.9) & mask]
    assert [bool(bound.any()) for bound in bounds] == [spread > 0] * 2
    assert measured["train/clip_fraction"] == pytest.approx((w[reduction] * sum(bounds)).sum().item())


def test_minibatches_are_steps_one_after_the_other(sampled):
    """The second of two sees the policy that the first has made, against the log-probs of the sampler."""
    model, reference, rollout, advantage = sampled
    _, moves = step(sampled, minibatches=2, kl=0.0, reduction="token")
    policy = copy.deepcopy(model)
    for part in torch.arange(16).chunk(2):
        half = rollout.select(part)
        logp = policy.logprob(half.tokens, lengths=half.length, mask=half.mask)
        A = advantage[part].unsqueeze(1).expand_as(logp)
        ((clipped_surrogate(logp, half.logp, A, 0.2, 0.2) * half.mask).sum() / half.mask.sum()).backward()
        with torch.no_grad():
            for p in policy.parameters():
                p -= p.grad
        policy.zero_grad()
    assert_same(moves, [(b - a).detach() for a, b in zip(model.parameters(), policy.parameters())])


def test_epochs_go_over_the_rollout_again(sampled, monkeypatch):
    norms = []
    real = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: norms.append(real(*a, **k)) or norms[-1])
    measured, _ = step(sampled, epochs=3, minibatches=2, lr=0.03)
    assert len(norms) == 6 and measured["train/grad_norm"] == pytest.approx(sum(norms).item() / 6)
    assert measured["train/clip_fraction"] > 0


def test_the_kl_term_pulls_towards_the_reference_alone(sampled):
    model, reference, rollout, _ = sampled
    none = torch.zeros(16)
    measured, moves = step(sampled, reference=model, advantage=none, kl=1.0)
    assert measured["train/kl"] == pytest.approx(0, abs=1e-9) and max(m.abs().max() for m in moves) < 1e-5
    before, moves = step(sampled, advantage=none, kl=0.01)
    assert before["train/kl"] > 1e-4 and max(m.abs().max() for m in moves) > 0
    policy = copy.deepcopy(model)
    with torch.no_grad():
        for p, move in zip(policy.parameters(), moves):
            p += move
    after, _ = step((policy, reference, rollout, none), kl=0.01, max_ratio_deviation=9.0)
    assert after["train/kl"] < before["train/kl"]


def test_masked_truncated_answers_take_no_part(sampled):
    _, _, rollout, advantage = sampled
    cut = rollout.stop == BUDGET
    other = torch.where(cut, advantage + 5, advantage)
    _, moves = step(sampled, mask_truncated=True)
    _, others = step(sampled, mask_truncated=True, advantage=other)
    assert all(torch.equal(a, b) for a, b in zip(moves, others))
    _, counted = step(sampled, advantage=other)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(moves, counted))
    nothing = replace(rollout, stop=torch.full_like(rollout.stop, BUDGET))
    measured, moves = step(sampled, mask_truncated=True, rollout=nothing)
    assert all(move.abs().max() == 0 for move in moves)
    assert measured["train/ratio_deviation_max"] == 0 and measured["train/grad_norm"] == 0


def test_the_first_ratio_is_one_and_a_wrong_sampler_stops_the_run(sampled):
    _, _, rollout, _ = sampled
    measured, _ = step(sampled)
    assert measured["train/ratio_deviation_max"] < 1e-4 and measured["train/clip_fraction"] == 0
    with pytest.raises(RuntimeError, match="sampler and trainer do not compute the same policy"):
        step(sampled, rollout=replace(rollout, logp=rollout.logp - 0.2 * rollout.mask))


def test_routes_that_differ_are_counted_and_replayed_on_demand(sampled):
    """The sampler's routes, and such with other experts for all tokens of half of the answers."""
    _, _, rollout, _ = sampled
    assert (rollout.routes >= 0).any() and step(sampled)[0]["train/route_difference"] == 0
    shifted = torch.where(rollout.routes < 0, -1, (rollout.routes + 1) % MOE.experts)
    half = replace(rollout, routes=torch.where((torch.arange(16) < 8).view(16, 1, 1, 1), shifted, rollout.routes))
    inside = rollout.mask.sum(1) - 1  # the last token has no route
    free, moves = step(sampled, rollout=half)
    assert free["train/route_difference"] == pytest.approx((inside[:8].sum() / inside.sum()).item(), abs=1e-6)
    replayed, others = step(sampled, rollout=half, replay_routes=True, max_ratio_deviation=1e9)
    assert replayed["train/route_difference"] == 0 and replayed["train/ratio_deviation_max"] > 1e-3
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(moves, others))
    assert step(sampled, rollout=half, microbatch=100)[0] == pytest.approx(free, rel=1e-3, abs=1e-5)
    assert "train/route_difference" not in step(sampled, rollout=replace(rollout, routes=None))[0]


def test_a_dense_model_has_no_routes_to_replay(dense_base, tmp_path):
    with pytest.raises(ValueError, match="replay_routes: .* is dense"):
        r1_zero.main(replace(RL, checkpoint=dense_base / "checkpoint", out=tmp_path / "run", replay_routes=True))
    assert not (tmp_path / "run").exists()


def test_the_reward_is_accuracy_and_a_tenth_of_form():
    answers = [[evaluate.Answer("", 1, False, right, form) for right, form in ((True, True), (True, False))]]
    answers += [[evaluate.Answer("", 1, False, right, form) for right, form in ((False, True), (False, False))]]
    rewards = r1_zero.judge(answers, RL)
    torch.testing.assert_close(rewards, torch.tensor([[1.1, 1.0], [0.1, 0.0]]))
    torch.testing.assert_close(r1_zero.judge(answers, replace(RL, form_weight=1.0))[1], torch.tensor([1.0, 0.0]))
    half = torch.full((2,), 0.05 / (0.1 / 2**0.5 + 1e-6))  # (r - mean) / (sample deviation + 1e-6)
    torch.testing.assert_close(group_advantages(rewards)[:, 0], half, rtol=1e-4, atol=0)


# ---- R1-Zero -----------------------------------------------------------------------------------

SHOWN = "reward accuracy form length truncated entropy mixed_groups tries said_yes false_yes arithmetic_error repeats"


def test_a_run_of_r1_zero_is_a_folder_with_all_that_must_be_shown(whole):
    out = whole("r1_zero", "moe")
    first, *rows = read_metrics(out)
    assert first["step"] == 0 and {"preflight/pass@1", "preflight/pass@4", "preflight/mixed_groups"} < first.keys()
    assert [row["step"] for row in rows] == list(range(1, 10))
    wanted = {f"train/{name}" for name in SHOWN.split()} | {
        *("train/kl", "train/clip_fraction", "train/grad_norm", "train/ratio_deviation", "train/ratio_deviation_max"),
        "train/route_difference",
        *("time/rollout_s", "time/judge_s", "time/update_s", "perf/rollout_tok_s", "perf/update_tok_s"),
    }
    for row in rows:
        assert wanted <= row.keys() and all(isinstance(row[key], (int, float)) for key in wanted)
        assert row["train/reward"] == pytest.approx(row["train/accuracy"] + 0.1 * row["train/form"], abs=1e-6)
        assert row["train/ratio_deviation_max"] < 1e-3
    evals = {"eval/pass@1", "eval/pass@1_low", "eval/pass@1_high", "eval/form", "eval/length", "eval/truncated"}
    assert [row["step"] for row in read_metrics(out) if evals <= row.keys()] == [0, 4, 8, 9]
    # There was something to learn, or the tests of a resumed run would compare nothing with nothing.
    assert sum(row["train/mixed_groups"] > 0 and row["train/grad_norm"] > 0 for row in rows) >= 5
    assert any(row["train/kl"] > 0 for row in rows)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4] * 4 + [8] * 4 + [9] * 4
    assert all(s["problem"].startswith("make ") and s["text"] and s["right"] in (True, False) for s in samples)
    assert {"seconds/rl", "memory/peak_gib"} == result_of(out).keys()
    folder = out / "checkpoint"
    assert checkpoint.latest(folder).name == "step-000009" and checkpoint.best(folder)
    scores = {row["step"]: row["eval/pass@1"] for row in rows if "eval/pass@1" in row}
    assert scores[int(checkpoint.best(folder).name[5:])] == max(scores.values())
    hf.load(checkpoint.best(folder))


@pytest.mark.parametrize("refresh, follow", [(0, 0.0), (2, 0.0), (0, 1.0)])
def test_the_policy_becomes_the_reference(base, tmp_path, refresh, follow):
    more = {"refresh": refresh, "follow": follow, "out": tmp_path}
    config = replace(RL, checkpoint=base / "checkpoint", steps=2, eval_every=2, **more)
    r1_zero.main(config)
    path = checkpoint.latest(tmp_path / "checkpoint")
    reference = checkpoint.load_state(path)["reference"]
    policy, start = (hf.load(p)[0].state_dict() for p in (path, checkpoint.latest(base / "checkpoint")))
    moved = [name for name in policy if not torch.equal(policy[name], start[name])]
    assert moved and not any(name.endswith("ffn.bias") for name in moved)  # the balance is frozen in RL
    expected = policy if refresh or follow else start
    assert reference.keys() == expected.keys()
    assert all(torch.equal(reference[name], expected[name]) for name in expected)


def test_options_reach_the_run(base, tmp_path):
    """Every flag that changes the algorithm, in one run; the control's answers all begin with an empty thinking."""
    more = {"minibatches": 4, "epochs": 2, "reduction": "fixed", "mask_truncated": True, "temperature": 0.7, "kl": 0.0}
    more |= {"no_think": True, "replay_routes": True}
    config = replace(RL, checkpoint=base / "checkpoint", steps=2, eval_every=1, max_tokens=10, **more)
    last = r1_zero.main(replace(config, out=tmp_path))
    assert "eval/pass@1" in last and "train/kl" not in last and last["train/tries"] == 0 and last["train/length"] <= 10
    texts = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 8 and all(text.startswith(NO_THINK) for text in texts)
    assert any(text.endswith("</answer>") for text in texts)


def test_a_base_without_signal_stops_the_run_with_advice(dense_base, tmp_path):
    config = replace(RL, checkpoint=dense_base / "checkpoint", min_mixed=0.9, out=tmp_path / "run")
    with pytest.raises(ValueError, match="of the groups hold both right and wrong.*start from a better base.*--level"):
        r1_zero.main(config)
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not config.out.exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(whole, bases):
    out = whole("r1_zero", "moe")
    before = (out / "metrics.jsonl").read_bytes()
    config = replace(config_of("r1_zero", "moe", bases), out=out)
    with pytest.raises(ValueError, match="already holds a run: go on with --resume"):
        r1_zero.main(config)
    with pytest.raises(ValueError, match="another config.*kl: 0.01 then, 0.5 now.*choose another --out"):
        r1_zero.main(replace(config, kl=0.5, resume=True))
    assert (out / "metrics.jsonl").read_bytes() == before


def spoil(path: Path, what: str) -> None:
    """Damage one thing in a checkpoint folder."""
    if what == "weights missing":
        (path / "model.safetensors").unlink()
    elif what == "weights cut short":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "tokenizer missing":
        (path / "tokenizer.json").unlink()
    elif what == "vocabulary too large":
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab |= {f"extra{n}": len(vocab) + n for n in range(100)}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif what == "other shape":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 16}))


@pytest.mark.parametrize(
    "what, told",
    [
        ("nothing there", "holds no config.json: not a checkpoint folder"),
        ("weights missing", "holds no model.safetensors"),
        ("weights cut short", "model.safetensors is damaged"),
        ("tokenizer missing", "holds no tokenizer.json"),
        ("vocabulary too large", r"the tokenizer has \d+ tokens, the model only \d+"),
        ("other shape", "model.safetensors does not fit its config.json"),
    ],
)
def test_a_base_that_is_none_is_named(base, tmp_path, what, told):
    path = tmp_path / "step-000001"
    if what != "nothing there":
        path = shutil.copytree(checkpoint.latest(base / "checkpoint"), path)
        spoil(path, what)
    with pytest.raises(ValueError, match=told) as error:
        r1_zero.main(replace(RL, checkpoint=path, out=tmp_path / "run"))
    assert str(path) in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=told):
        evaluate.main(evaluate.Config(checkpoint=path, problems=2, answers=2, max_tokens=8))


def test_a_damaged_checkpoint_is_not_resumed_from(whole, bases, tmp_path):
    out = shutil.copytree(whole("r1_zero", "moe"), tmp_path / "run")
    config = replace(config_of("r1_zero", "moe", bases), out=out, resume=True, steps=12)
    state = checkpoint.latest(out / "checkpoint") / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(state))} cannot be read, it is cut short or damaged"):
        r1_zero.main(config)
    (out / "checkpoint" / "latest").write_text("step-000077\n")
    with pytest.raises(ValueError, match="latest names 'step-000077', which is no checkpoint"):
        r1_zero.main(config)


# ---- killed and resumed ------------------------------------------------------------------------

LETHAL = """
import importlib, os, pickle, pkgutil, signal, sys
script, config, owner, name, count = sys.argv[1:]
script, holder, calls = importlib.import_module(f"experiments.{script}"), pkgutil.resolve_name(owner), 0
real = getattr(holder, name)
def lethal(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(holder, name, lethal)
script.main(pickle.load(open(config, "rb")))
"""


def kill(script: str, config, owner: str, name: str, count: int, scratch: Path) -> None:
    """Run a script in a process that gets SIGKILL when it calls owner.name for the count-th time."""
    scratch.write_bytes(pickle.dumps(config))
    done = command("-c", LETHAL, script, scratch, owner, name, count)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


class Killed(BaseException):
    """Stands for SIGKILL where a new process would take too long."""


def stop(monkeypatch, script: str, config, owner: str, name: str, count: int) -> None:
    """As `kill`, by an exception that nothing catches, in this process."""
    calls, holder = 0, pkgutil.resolve_name(owner)
    real = getattr(holder, name)

    def lethal(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(holder, name, lethal)
        importlib.import_module(f"experiments.{script}").main(config)


def assert_equal_bits(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds":
                assert_equal_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b)):
            assert_equal_bits(x, y, f"{where}/{n}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """All metrics but time/ and perf/, samples, checkpoints, optimizers and results are equal to the bit."""

    def plain(row):
        return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}

    rows, others = ([plain(row) for row in read_metrics(out)] for out in (a, b))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others):
        assert row == other
    if (a / "samples.jsonl").exists():
        assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    names = [sorted(path.name for path in (out / "checkpoint").iterdir()) for out in (a, b)]
    assert names[0] == names[1]
    for pointer in (checkpoint.latest, checkpoint.best):
        x, y = pointer(a / "checkpoint"), pointer(b / "checkpoint")
        assert (x and x.name) == (y and y.name)
        if x:
            for file in ("model.safetensors", "config.json", "tokenizer.json"):
                assert (x / file).read_bytes() == (y / file).read_bytes()
            assert_equal_bits(checkpoint.load_state(x), checkpoint.load_state(y))
    clock = ("seconds/", "memory/")
    results = [{k: v for k, v in result_of(out).items() if not k.startswith(clock)} for out in (a, b)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "script, model, owner, name, count",
    [
        ("pretrain", "moe", "torch.nn.utils", "get_total_norm", 7),  # step 7, its gradient ready, not applied
        ("r1_zero", "moe", "torch.nn.utils", "get_total_norm", 14),  # step 7, the second of its mini-batches
    ],
)
def test_a_killed_process_goes_on_to_the_same_bits(whole, bases, tmp_path, script, model, owner, name, count):
    config = replace(config_of(script, model, bases), out=tmp_path / "run")
    kill(script, config, owner, name, count, tmp_path / "config")
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 6
    assert checkpoint.latest(tmp_path / "run" / "checkpoint").name == "step-000004"
    importlib.import_module(f"experiments.{script}").main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole(script, model))


@pytest.mark.parametrize(
    "script, model, owner, name, count",
    [
        ("pretrain", "dense", "torch.nn.utils", "get_total_norm", 3),  # before the first checkpoint
        ("pretrain", "dense", "minir1.optim:Muon", "step", 6),
        ("pretrain", "dense", "minir1.model.hf", "save", 2),  # amid the second checkpoint
        ("pretrain", "moe", "experiments.pretrain", "balance_step", 6),
        ("pretrain", "moe", "experiments.pretrain", "skills", 1),  # all steps done, no result yet
        ("r1_zero", "dense", "experiments.rl_common", "preflight", 1),
        ("r1_zero", "dense", "experiments.r1_zero", "learn", 6),
        ("r1_zero", "dense", "experiments.rl_common", "validate", 3),  # amid the last step before the second checkpoint
        ("r1_zero", "dense", "minir1.checkpoint", "replace_text", 2),  # between the two pointers
        ("r1_zero", "dense", "minir1.checkpoint", "_delete_old", 2),  # checkpoint 8 stands, 4 too
        ("r1_zero", "moe", "minir1.log:Run", "log", 9),  # step 8 learned, not logged
        ("r1_zero", "moe", "minir1.log:Run", "result", 1),  # all steps done, no result yet
    ],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    whole, bases, tmp_path, monkeypatch, script, model, owner, name, count
):
    config = replace(config_of(script, model, bases), out=tmp_path / "run")
    stop(monkeypatch, script, config, owner, name, count)
    importlib.import_module(f"experiments.{script}").main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole(script, model))


def test_a_run_stopped_twice_goes_on_and_a_longer_one_too(whole, bases, tmp_path, monkeypatch):
    config = replace(config_of("r1_zero", "dense", bases), out=tmp_path / "run")
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    stop(monkeypatch, "r1_zero", replace(config, resume=True), "experiments.r1_zero", "learn", 5)
    r1_zero.main(replace(config, resume=True))
    assert_same_run(tmp_path / "run", whole("r1_zero", "dense"))
    r1_zero.main(replace(config, resume=True, steps=12, microbatch=64))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(13))


def test_adapters_alone_are_trained_saved_and_resumed(bases, tmp_path, monkeypatch):
    config = replace(RL, checkpoint=bases["moe"], lora_rank=4, refresh=0, lr=1e-3, out=tmp_path / "run")
    loaded = []
    monkeypatch.setattr(r1_zero.hf, "load", lambda *a, real=hf.load, **k: loaded.append(a) or real(*a, **k))
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    assert len(loaded) == 1  # no second copy for the reference
    r1_zero.main(replace(config, resume=True))
    whole = replace(config, out=tmp_path / "whole")
    r1_zero.main(whole)
    folders = [checkpoint.latest(c.out / "checkpoint") for c in (config, whole)]
    assert [sorted(p.name for p in f.iterdir() if "adapter" in p.name or "model" in p.name) for f in folders] == 2 * [
        ["adapter_config.json", "adapter_model.safetensors"]
    ]
    file = "adapter_model.safetensors"
    assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    model, tokenizer = hf.load(folders[0])
    base, _ = hf.load(checkpoint.latest(bases["moe"]))
    x = torch.tensor([tokenizer.encode("User:make 12 from 3,4,5")])
    assert not torch.equal(model(x), base(x))
    with adapters_off(model):
        assert torch.equal(model(x), base(x))
    rows = read_metrics(config.out)
    assert any(row.get("train/kl", 0) > 0 for row in rows)
    plain = {"answers": 1, "problems": 4, "max_tokens": 32}
    assert 0 <= evaluate.main(evaluate.Config(checkpoint=config.out / "checkpoint", **plain))["pass@1"] <= 1


def test_training_goes_on_from_a_folder_of_adapters_as_a_whole_model(bases, tmp_path):
    """Its own folder must not name the adapters as its base, or nobody could open it."""
    first = replace(RL, checkpoint=bases["moe"], lora_rank=4, refresh=0, steps=1, out=tmp_path / "first")
    r1_zero.main(first)
    second = replace(first, checkpoint=first.out / "checkpoint", lora_rank=0, out=tmp_path / "second")
    r1_zero.main(second)
    model, _ = hf.load(checkpoint.latest(second.out / "checkpoint"))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="is made of adapters: merge and save them first"):
        r1_zero.main(replace(second, lora_rank=4, out=tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_a_reference_without_adapters_is_not_refreshed():
    with pytest.raises(ValueError, match="refresh, follow: with lora_rank the reference is the model without adapters"):
        replace(RL, lora_rank=4)


def test_a_resumed_run_knows_the_best_so_far(bases, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.2, 0.4])  # of the start, and at steps 4, 8, 9
    monkeypatch.setattr(rl_common, "validate", lambda *_: {"eval/pass@1": next(scores)})
    config = replace(config_of("r1_zero", "dense", bases), out=tmp_path / "run")
    stop(monkeypatch, "r1_zero", config, "experiments.r1_zero", "learn", 6)
    last = r1_zero.main(replace(config, resume=True))
    assert last["eval/pass@1"] == 0.4 and checkpoint.best(tmp_path / "run" / "checkpoint").name == "step-000004"


@pytest.mark.parametrize("script", ["pretrain", "r1_zero"])
def test_resuming_a_finished_run_changes_nothing(whole, bases, tmp_path, monkeypatch, script):
    out = shutil.copytree(whole(script, "moe"), tmp_path / "run")
    monkeypatch.setattr(pretrain, "loss_backward", None)
    monkeypatch.setattr(r1_zero, "learn", None)
    seconds = {key: value for key, value in result_of(out).items() if key.startswith("seconds/")}
    again = replace(config_of(script, "moe", bases), out=out, resume=True)
    assert importlib.import_module(f"experiments.{script}").main(again)
    assert_same_run(out, whole(script, "moe"))
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
