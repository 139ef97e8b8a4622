"""Whole steps on the stand-in device: all tensors are made there, results equal the CPU's, no decode step waits."""

import copy
import dataclasses
from contextlib import ExitStack

import pytest
import standin
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minir1 import device, sample
from minir1.engine import Engine, Request
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.lora import adapters_off, add_adapters
from minir1.model.moe import balance_step, expert_load, sequence_balance_loss
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, ema_update, muon, split_parameters
from minir1.rollout import collect, concatenate
from minir1.sample import stream
from minir1.speculative import speculate
from minir1.tokenizer import word_level

DEVICE = standin.register()
SHAPE = {"vocab": 48, "dim": 32, "layers": 2, "heads": 4, "init_std": 0.25}
MLA = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12}
CONFIGS = {
    "moe": ModelConfig(**SHAPE, **MLA, ffn=48, experts=4, expert_ffn=16, mtp_depth=2),
    "groups": ModelConfig(**SHAPE, **MLA, ffn=48, experts=4, expert_ffn=16, groups=2, score="softmax"),
    "dense": dense(**SHAPE, kv_heads=2, ffn=48, tied=True, softcap=20.0),
}
PROMPTS = [[3, 1, 4], [15, 9, 2, 6, 5, 35, 8], [9]]
SAMPLING = {"answers": 3, "max_tokens": 10, "stop": [5, 11, 40], "seed": 3, "temperature": 1.3}


def pair(name: str) -> tuple[Transformer, Transformer]:
    """The same model on the CPU and on the device."""
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name])
    return model, copy.deepcopy(model).to(DEVICE)


def equal(a, b):
    """Tensors, or dataclasses and lists of them, with the same bits, the second ones on the device."""
    if isinstance(a, torch.Tensor):
        assert b.device.type == "standin" and torch.equal(a, b.cpu())
    else:
        a, b = (x if isinstance(x, (list, tuple)) else list(vars(x).values()) for x in (a, b))
        for x, y in zip(a, b, strict=True):
            equal(x, y) if isinstance(x, torch.Tensor) else None


def test_a_tied_matrix_stays_one():
    _, model = pair("dense")
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling(name):
    model, there = pair(name)
    routes = model.config.experts > 0
    for more in ({}, {"top_k": 9, "top_p": 0.9, "min_tokens": 3}):
        a, b = (collect(m, PROMPTS, record_routes=routes, **SAMPLING | more) for m in (model, there))
        equal(a, b)
    equal(concatenate([a, a.select(torch.tensor([4, 1]))]), concatenate([b, b.select(torch.tensor([4, 1]))]))
    assert [*stream(model, [1, 2], max_tokens=4)] == [*stream(there, [1, 2], max_tokens=4)]
    if model.mtp:
        for a, b in zip(speculate(model, PROMPTS, **SAMPLING), speculate(there, PROMPTS, **SAMPLING)):
            equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_serving(name):
    """Rows that join, with settings of their own and top log-probs, and that leave."""
    model, there = pair(name)
    ways = [(1.3, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 0.9)]
    asked = [Request(p, 4 + 3 * i, *way, (5, 11), i, 2) for i, (p, way) in enumerate(zip(PROMPTS * 2, ways * 2))]
    answers = []
    for one in (model, there):
        with Engine(one, rows=4, slots=40) as engine:
            answers.append([list(answer) for answer in [engine.submit(request) for request in asked]])
    assert [[token.id for token in answer] for answer in answers[0]] == [[t.id for t in a] for a in answers[1]]


@pytest.mark.parametrize("name, recompute", [("moe", False), ("groups", True), ("dense", False)])
def test_training(name, recompute):
    """Two steps with replayed routes, a balance loss, MTP, Muon and AdamW, and an EMA reference."""

    def train(model, rollout):
        model.recompute(recompute)
        matrices, rest = split_parameters(model)
        reference, optimizers = copy.deepcopy(model), (muon(matrices, 0.01), adamw(rest, 0.01))
        results, span = [], {"lengths": rollout.length, "mask": rollout.mask}
        for step in range(2):
            record = []
            logp, entropy = model.logprob(rollout.tokens, **span, entropy=True, record=record, routes=rollout.routes)
            loss = -(logp * rollout.mask).sum() / rollout.mask.sum() - 0.1 * entropy.mean()
            loss = loss + sum(sequence_balance_loss(routing, rollout.length) for routing in record)
            loss = loss - sum(x.mean() for x in model.mtp_logprob(rollout.tokens, **span))
            loss.backward()
            clip_gradients(model, 1.0, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for block, routing in zip(model.blocks[1:], record):
                balance_step(block.ffn.bias, expert_load(routing), 0.01)
            ema_update(reference, model, 0.1)
            results += [loss.detach(), logp.detach()]
        return results + [*model.parameters(), *reference.state_dict().values()]

    model, there = pair(name)
    a, b = (collect(m, PROMPTS, record_routes=model.config.experts > 0, **SAMPLING) for m in (model, there))
    equal(train(model, a), train(there, b))


class NoFloat64(TorchDispatchMode):
    """Fails where an operator returns numbers in fp64."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, op
        return result


def test_devices_without_fp64_sample_and_train(monkeypatch):
    """RoPE's angles and the sampling noise are in fp32 there; the distribution is still that of logprob."""
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", ("cpu",))
    rows = torch.arange(20_000)
    noise = sample.uniform(3, rows, rows)
    assert noise.dtype == torch.float32 and 0 <= noise.min() and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.002
    model, _ = pair("moe")
    with NoFloat64():
        rollout = collect(model, PROMPTS, **SAMPLING | {"temperature": 1.0})
        speculate(model, PROMPTS, **SAMPLING)
        logp = model.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask)
        logp.sum().backward()
    torch.testing.assert_close(logp.detach(), rollout.logp, atol=2e-5, rtol=0)


def test_adapters_and_heads():
    model, there = pair("moe")
    rollout = collect(model, PROMPTS, **SAMPLING)
    values = []
    for m in (model, there):
        torch.manual_seed(1)
        tokens, lengths = rollout.tokens.to(m.device), rollout.length.to(m.device)
        trained = add_adapters(m, 4, 8.0)
        head = ValueHead(32).to(m.device)
        logp, value = m.logprob(tokens, lengths=lengths, value=head)
        (logp.sum() + value.sum()).backward()
        critic = ScalarModel(copy.deepcopy(m), ValueHead(32).to(m.device))
        with adapters_off(m):
            off = m.logprob(tokens, lengths=lengths)
        scores = critic.score(tokens, lengths=lengths), critic.values(tokens, lengths=lengths)
        values.append([logp, value, off, *scores, critic.score(tokens, lengths=None), *(p.grad for p in trained)])
    equal(*values)


def test_folders_are_loaded_to_the_device(tmp_path):
    tokenizer = word_level((), largest_number=24)
    for name in ("moe", "dense"):
        config = dataclasses.replace(CONFIGS[name], vocab=tokenizer.size, softcap=None)
        hf.save(Transformer(config).to(DEVICE), tokenizer, tmp_path / name)
        loaded, _ = hf.load(tmp_path / name, DEVICE)
        assert (loaded.head.weight is loaded.embedding.weight) == config.tied
        equal(*([*m.state_dict().values()] for m in (hf.load(tmp_path / name)[0], loaded)))


# ---- waiting for the device --------------------------------------------------------------------

WAITS = (
    "_local_scalar_dense is_nonzero item equal nonzero bincount masked_select unique _unique2 unique_dim "
    "unique_consecutive repeat_interleave.Tensor nonzero_static"
).split()


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU: it reads a number, or the shape of a result depends on one."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, overload = op._schema.name.removeprefix("aten::"), op._overloadname
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or f"{name}.{overload}" in WAITS or by_mask:
            raise AssertionError(f"{op} waits for the device")
        result = op(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            raise AssertionError(f"{op} brings a tensor to the host")
        return result


@pytest.mark.parametrize("name, record_routes", [("moe", False), ("moe", True), ("groups", True), ("dense", False)])
def test_a_decode_step_does_not_wait_for_the_device(name, record_routes, monkeypatch):
    """From the logits of one token to those of the next: all of `generate` but its check at every 8th step."""
    _, model = pair(name)
    guard, calls, choose = NoWaiting(), [], sample.choose

    def counted(*args):  # the first call of a step
        if not calls:
            stack.enter_context(guard)
        calls.append(args)
        return choose(*args)

    monkeypatch.setattr(sample, "choose", counted)
    with ExitStack() as stack, pytest.raises(AssertionError, match="_local_scalar_dense.* waits for the device"):
        settings = {"answers": 3, "max_tokens": 4, "min_tokens": 2, "stop": [5, 11]}
        sample.generate(model, PROMPTS, **settings, record_routes=record_routes)
    assert len(calls) == 4  # all steps are done; then the length of the longest answer is read


def test_the_guard_finds_what_waits():
    x = torch.arange(4.0, device=DEVICE)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: int(x.sum()),
        lambda: bool(x.any()),
        lambda: x.long().bincount(),
        lambda: x.cpu(),
        lambda: torch.repeat_interleave(x.long()),
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="waits|to the host"):
            wait()
