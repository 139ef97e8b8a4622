"""experiments/reward_model.py at toy size: its gradient written out, its run folder, resumed runs."""

import copy
import json
import math
from dataclasses import replace

import pytest
import standin
import torch
from runs import assert_resumes_by_itself, assert_same_run, plain_metrics, stop
from test_preference_pairs import assert_bad_option, save_base, write_pairs

from experiments import reward_model
from minir1 import checkpoint
from minir1.log import read_metrics
from minir1.model import heads, hf
from minir1.model.config import dense
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.transformer import Transformer
from minir1.preference_data import load, padded

standin.register()  # before the first backward pass of the process


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    small = {"steps": 9, "batch": 6, "warmup": 2, "learning_rate": 1e-2, "eval_every": 4, "microbatch": 400}
    base = save_base(folder / "base")
    return reward_model.Config(checkpoint=base, **write_pairs(folder), out=folder / "run", **small)


@pytest.fixture(scope="module")
def start(config):
    """A reward model whose head is not zero, so that the trunk learns too, and ten pairs."""
    trunk, tokenizer = hf.load(config.checkpoint)
    model = ScalarModel(trunk, ValueHead(trunk.config.dim))
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model, load(config.pairs, tokenizer, 1024)[:10]


def step(start, config, **changes):
    """`learn` by plain gradient descent with rate 1: what was measured, and how each parameter moved."""
    before, pairs = start
    model = copy.deepcopy(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    measured = reward_model.learn(model, optimizer, pairs, replace(config, grad_clip=1e9, **changes))
    return measured, [(b - a).detach() for a, b in zip(before.parameters(), model.parameters())]


def assert_same(moves, others):
    scale = max(move.abs().max().item() for move in others)
    assert scale > 0
    for move, other in zip(moves, others):
        torch.testing.assert_close(move, other, atol=2e-5 * scale, rtol=0)


def test_the_step_is_the_gradient_of_the_loss_written_out(start, config):
    """-1/N Σ log σ(r_c - r_r - m), m half of the scores' difference, each row scored by itself."""
    model, pairs = copy.deepcopy(start[0]), start[1]
    loss = 0.0
    for pair in pairs:
        chosen, rejected = (model.score(torch.tensor([row]), lengths=None) for row in (pair.chosen, pair.rejected))
        loss = loss + (1 + (-(chosen - rejected - 0.5 * pair.score_gap)).exp()).log().squeeze() / len(pairs)
    loss.backward()
    measured, moves = step(start, config, margin=0.5)
    assert measured["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(moves, [torch.zeros_like(p) if p.grad is None else -p.grad for p in model.parameters()])


@pytest.mark.parametrize("changes", [{}, {"margin": 2.0, "label_smoothing": 0.2}], ids=str)
def test_no_result_depends_on_the_microbatch(start, config, changes):
    whole, moves = step(start, config, microbatch=10**6, **changes)
    assert abs(whole["train/gap"]) > 1e-4 and whole["train/grad_norm"] > 0
    for microbatch in (1, 150, 300):
        measured, others = step(start, config, microbatch=microbatch, **changes)
        assert_same(others, moves)
        assert measured == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_margin_and_label_smoothing_reach_the_loss(start, config):
    plain, wide, smooth = (step(start, config, **c)[0] for c in ({}, {"margin": 1.0}, {"label_smoothing": 0.3}))
    assert wide["train/loss"] > plain["train/loss"] and smooth["train/loss"] != plain["train/loss"]
    assert plain["train/gap"] == wide["train/gap"] == smooth["train/gap"]


@pytest.fixture(scope="module")
def whole(config):
    reward_model.main(config)
    return config.out


def test_a_run_is_a_folder_with_accuracy_and_calibration(whole, config):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[0]["train/loss"] == pytest.approx(math.log(2))
    names = ("loss", "gap", "accuracy", "accuracy_low", "accuracy_high", "calibration_error")
    measured = [row for row in rows if {f"eval/{name}" for name in names} <= row.keys()]
    assert [row["step"] for row in measured] == [4, 8, 9]
    result = json.loads((whole / "result.json").read_text())
    assert all(result[key] == value for key, value in measured[-1].items() if key.startswith("eval/"))
    assert result["eval/accuracy"] > 0.95 and result["longer/accuracy"] == 1.0  # as the pairs were written
    count, confidence, right = (
        [result[f"calibration/{b}/{name}"] for b in range(config.bins)] for name in ("count", "confidence", "accuracy")
    )
    assert sum(count) == result["pairs/held_out"] == 80
    error = sum(n / 80 * abs(x - y) for n, x, y in zip(count, confidence, right))
    assert result["eval/calibration_error"] == pytest.approx(error)
    assert (whole / "figures" / "reliability.png").stat().st_size > 10_000


def test_the_checkpoint_is_a_scalar_model_that_prefers_as_measured(whole, config):
    path = checkpoint.latest(whole / "checkpoint")
    model, tokenizer = heads.load(path)
    pairs = load(config.held_out, tokenizer, config.max_length)
    tokens, lengths, _ = padded(pairs)
    chosen, rejected = model.score(tokens, lengths=lengths).chunk(2)
    last = read_metrics(whole)[-1]
    assert (chosen - rejected).mean().item() == pytest.approx(last["eval/gap"], rel=1e-4)
    start = hf.load(config.checkpoint)[0].state_dict()
    biases = {n: p for n, p in model.trunk.state_dict().items() if n.endswith("ffn.bias")}
    assert biases and all(torch.equal(start[name], bias) for name, bias in biases.items())


def test_a_stopped_run_resumes_to_the_same_bits(whole, config, tmp_path, monkeypatch):
    again = replace(config, out=tmp_path / "run")
    stop(monkeypatch, "reward_model", again, "experiments.reward_model", "clip_gradients", 6)
    reward_model.main(replace(again, resume=True))
    assert_same_run(again.out, whole)


def test_a_run_resumes_without_its_base_but_not_from_a_changed_file(whole, config, tmp_path):
    assert_resumes_by_itself(reward_model.main, config, whole, tmp_path)


def test_a_run_of_other_steps_is_not_resumed(whole, config):
    with pytest.raises(ValueError, match="steps = 12: the learning rate follows it"):
        reward_model.main(replace(config, resume=True, steps=12))


def test_a_run_on_another_device_is_that_of_the_cpu(config, tmp_path):
    for device in ("cpu", "standin"):
        reward_model.main(replace(config, steps=2, margin=0.5, device=device, out=tmp_path / device))
    assert plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")
    reward_model.main(replace(config, steps=2, margin=0.5, device="standin", out=tmp_path / "standin", resume=True))


def test_a_reward_model_of_16_bits_has_masters(config, tmp_path):
    reward_model.main(replace(config, dtype="bfloat16", steps=1, margin=0.5, recompute=True, out=tmp_path))
    path = checkpoint.latest(tmp_path / "checkpoint")
    assert next(heads.load(path)[0].parameters()).dtype == torch.bfloat16
    assert {m.dtype for m in checkpoint.load_state(path)["optimizer"]["masters"]} == {torch.float32}


def test_a_model_without_a_class_of_scalar_models_is_refused_before_it_is_trained(config, tmp_path):
    model, tokenizer = hf.load(config.checkpoint)
    granite = dense(vocab=model.config.vocab, dim=16, layers=1, heads=2, qkv_bias=False, residual_scale=0.5)
    hf.save(Transformer(granite), tokenizer, tmp_path / "granite")
    with pytest.raises(ValueError, match="GraniteForCausalLM has no class for sequence classification"):
        reward_model.main(replace(config, checkpoint=tmp_path / "granite", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_margin_needs_scores(config, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(config.pairs.read_text().replace("score_", "points_"))
    with pytest.raises(ValueError, match="margin = 1.0: some pairs have no score_chosen and score_rejected"):
        reward_model.main(replace(config, pairs=plain, margin=1.0, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--margin -1", "margin = -1.0: at least 0"),
        ("--bins 0", "bins = 0: at least 1"),
        ("--label-smoothing 0.5", "label_smoothing = 0.5: 0 to below 0.5"),
        ("--steps 0", "steps = 0: at least 1"),
        ("--beta 1", "--beta"),
    ],
)
def test_bad_options_are_named(line, message, capsys):
    assert_bad_option(reward_model, line, message, capsys)
