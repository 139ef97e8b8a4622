"""policy.py: sampler and trainer agree, and a saved policy is restored to the bit."""

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch

from minir1 import checkpoint, policy
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.lora import adapters, add_adapters
from minir1.model.moe import MoE
from minir1.model.transformer import Transformer
from minir1.optim import adamw
from minir1.policy import frozen_copy, load_policy, logprobs, on_policy_check, reference_logprobs, reference_of
from minir1.rollout import collect
from minir1.tokenizer import word_level

TOKENIZER = word_level(("User:", "\nAssistant:", "make ", " from "), 20)
TOKENS = {"vocab": 48, "eos": TOKENIZER.eos, "pad": TOKENIZER.pad}
DENSE = dense(dim=32, layers=2, heads=2, kv_heads=1, ffn=64, init_std=0.2, tied=True, **TOKENS)
SIZES = {"nope": 8, "rope": 8, "v_dim": 16, "kv_lora": 16, "ffn": 64, "expert_ffn": 16}
MOE = ModelConfig(dim=32, layers=2, heads=2, experts=4, init_std=0.2, **SIZES, **TOKENS)
CPU = torch.device("cpu")


def build(config=DENSE, seed: int = 0, dtype=torch.float32) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).to(dtype)


def draw(model, answers: int = 8, **settings):
    prompts = [TOKENIZER.encode(f"User:make {n} from 3,4\nAssistant:") for n in (7, 12)]
    settings = {"max_tokens": 12, "stop": TOKENIZER.stops, "seed": 1, **settings}
    return collect(model, prompts, answers=answers, **settings)


# ---- log-probs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampler_whatever_the_micro_batch(config, temperature):
    model = build(config)
    rollout = draw(model, temperature=temperature)
    for microbatch in (1, 60, 10**6):
        logp = logprobs(model, rollout, microbatch)
        assert logp.dtype == torch.float32 and not logp.requires_grad and not logp[~rollout.mask].any()
        torch.testing.assert_close(logp, rollout.logp, atol=1e-4, rtol=0)


def test_replayed_routes_are_those_of_the_sampler():
    model = build(MOE)
    rollout = draw(model, record_routes=True)
    other = replace(rollout, routes=torch.where(rollout.routes < 0, -1, (rollout.routes + 1) % MOE.experts))
    torch.testing.assert_close(logprobs(model, rollout, 99, replay=True), rollout.logp, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs(model, other, 99), rollout.logp, atol=1e-4, rtol=0)
    assert not torch.allclose(logprobs(model, other, 99, replay=True), rollout.logp, atol=1e-3)


def test_the_reference_of_a_model_with_adapters_is_the_model_without_them():
    model = build()
    rollout, before = draw(model), frozen_copy(model)
    for p in add_adapters(model, 4, 8.0):
        torch.nn.init.normal_(p, std=0.5)
    assert torch.equal(reference_logprobs(model, rollout, 99), logprobs(before, rollout, 99))
    assert not torch.allclose(logprobs(model, rollout, 99), rollout.logp, atol=1e-2)
    assert all(module.on for module in adapters(model).values())  # on again
    assert not any(p.requires_grad for p in before.parameters()) and before.embedding is not model.embedding


# ---- the on-policy check -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_unchanged_policy_passes(config, dtype, temperature):
    model = build(config, dtype=dtype)
    rollout = draw(model, temperature=temperature, record_routes=config is MOE)
    metrics = on_policy_check(model, rollout, 200, most=0.02, replay=config is MOE)
    mean, high = metrics["train/ratio_deviation"], metrics["train/ratio_deviation_q99"]
    want = {"train/ratio", "train/ratio_deviation", "train/ratio_deviation_q99"}
    assert metrics.keys() == want | ({"train/idle_experts"} if config is MOE else set())
    assert mean <= high < (1e-4 if dtype == torch.float32 else 0.2) and abs(metrics["train/ratio"] - 1) <= mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["another temperature", "top-p", "another policy"])
def test_samples_of_another_policy_are_refused(dtype, what):
    model = build(dtype=dtype)
    sampling = {"another temperature": {"temperature": 0.8}, "top-p": {"top_p": 0.9}}.get(what, {})
    rollout = replace(draw(model, **sampling), temperature=1.0)
    if what == "another policy":
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
    with pytest.raises(RuntimeError, match="allowed: 0.02 and 0.2.*sampler and trainer do not compute the same policy"):
        on_policy_check(model, rollout, 200, most=0.02)


def test_top_p_lowers_every_ratio_and_a_temperature_does_not():
    """Of samples of q, E[π/q] is the mass of π where q > 0."""
    model = build()
    check = lambda rollout: on_policy_check(model, replace(rollout, temperature=1.0), 999, most=math.inf, rows=64)
    nucleus, warm = check(draw(model, answers=16, top_p=0.9)), check(draw(model, answers=16, temperature=0.8))
    assert 1 - nucleus["train/ratio"] == pytest.approx(nucleus["train/ratio_deviation"], rel=1e-3)
    assert abs(1 - warm["train/ratio"]) < 0.5 * warm["train/ratio_deviation"]


def test_idle_experts_of_the_layer_that_has_most():
    model = build(MOE)
    rollout = draw(model)
    assert on_policy_check(model, rollout, 200)["train/idle_experts"] < 0.5
    layer = [module for module in model.modules() if isinstance(module, MoE)][-1]
    layer.bias[: MOE.experts_per_token] += 100.0
    idle = 1 - MOE.experts_per_token / MOE.experts
    assert on_policy_check(model, rollout, 200, most=math.inf)["train/idle_experts"] == pytest.approx(idle)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_log_prob_of_the_sampler_that_is_not_finite_is_refused(value):
    """In any row, not only in those that are scored; at padding it may be anything."""
    model = build()
    rollout, logp = draw(model), draw(model).logp
    b = int((rollout.mask.sum(1) < rollout.mask.sum(1).max()).nonzero()[-1])
    t = int(rollout.mask[b].nonzero()[-1])
    logp[b, t + 1 :] = value
    want = on_policy_check(model, rollout, 200, rows=1)
    assert on_policy_check(model, replace(rollout, logp=logp), 200, rows=1, most=math.inf) == want
    logp[b, t] = value
    with pytest.raises(RuntimeError, match=f"the sampler's log-prob of token {t} in row {b} is not finite"):
        on_policy_check(model, replace(rollout, logp=logp), 200, rows=1, most=math.inf)


def test_the_deviation_by_hand():
    """Half of the tokens with a ratio of 1.1, then all but a few with a ratio of 1."""
    model = build()
    rollout = draw(model)
    exact = replace(rollout, logp=logprobs(model, rollout, 10**6))
    half = rollout.mask & (torch.arange(rollout.mask.shape[1]) % 2 == 0)
    metrics = on_policy_check(model, replace(exact, logp=exact.logp - math.log(1.1) * half), 10**6, most=0.1)
    share = half.sum().item() / rollout.mask.sum().item()
    assert metrics["train/ratio_deviation"] == pytest.approx(0.1 * share, rel=1e-4)
    assert metrics["train/ratio_deviation_q99"] == pytest.approx(0.1, rel=1e-4)
    few = torch.zeros_like(rollout.mask)
    few[:3] = rollout.mask[:3] & (rollout.mask[:3].cumsum(1) == 1)  # three tokens, more than one per cent
    with pytest.raises(RuntimeError, match="0.5 at the 99 % quantile"):
        on_policy_check(model, replace(exact, logp=exact.logp - math.log(1.5) * few), 10**6, most=0.04)
    one = few & (torch.arange(16) == 0).unsqueeze(1)
    on_policy_check(model, replace(exact, logp=exact.logp - math.log(1.5) * one), 10**6, most=0.04)  # may be rounding


def test_the_check_scores_few_rows_spread_over_the_rollout(monkeypatch):
    model, seen = build(), []
    monkeypatch.setattr(policy, "logprobs", lambda m, part, *a, **k: seen.append(part.group.tolist()) or part.logp)
    on_policy_check(model, draw(model), 99, most=0.02, rows=4)
    on_policy_check(model, draw(model, answers=1), 99, most=0.02)
    assert seen == [[0, 0, 1, 1], [0, 1]]


# ---- folders -----------------------------------------------------------------------------------


def step(model, optimizer, rollout) -> None:
    """One step of gradient descent on the negative log-probs."""
    (-model.logprob(rollout.tokens, lengths=rollout.length, mask=rollout.mask).sum() / 99).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.fixture
def base(tmp_path):
    """A folder with one checkpoint, step 3."""
    checkpoint.save(tmp_path / "base", 3, lambda path: hf.save(build(), TOKENIZER, path), {"step": 3})
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_is_restored_to_the_bit(base, tmp_path, dtype, rank):
    """Weights or adapters, optimizer with masters and reference: the next step of both has the same bits."""

    def opened():
        torch.manual_seed(0)
        model, tokenizer, source = load_policy(base, CPU, dtype, lora_rank=rank, lora_alpha=8.0)
        reference, optimizer = reference_of(model), adamw(model.parameters(), 1e-2)
        assert (reference is model) == (rank > 0)
        return model, tokenizer, source, {"optimizer": optimizer} | ({} if rank else {"reference": reference})

    model, tokenizer, source, parts = opened()
    assert source.path == base / "step-000003" and model.embedding.weight.dtype == dtype
    assert bool(source.sha256) == (rank > 0)
    rollout = draw(model)
    step(model, parts["optimizer"], rollout)
    state = {"step": 7} | {name: part.state_dict() for name, part in parts.items()}
    path = checkpoint.save(tmp_path / "run", 7, lambda path: policy.save(model, tokenizer, path, source), state)
    assert (path / "adapter_model.safetensors").exists() == (rank > 0) != (path / "model.safetensors").exists()

    again, _, _, others = opened()
    assert policy.restore(path, again, others) == {"step": 7}
    for _ in range(2):
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
            assert torch.equal(a, b), name
        step(model, parts["optimizer"], rollout)
        step(again, others["optimizer"], rollout)
    if not rank:
        states = (parts["reference"].state_dict(), others["reference"].state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def compiled(model: Transformer, way: str):
    """The model compiled as a whole, in place, or block by block; the last two are the same object."""
    if way == "whole":
        return torch.compile(model, backend="eager")
    for i, block in enumerate(model.blocks):
        if way == "in place":
            block.compile(backend="eager")
        if way == "blocks":
            model.blocks[i] = torch.compile(block, backend="eager")
    if way == "in place":
        model.compile(backend="eager")
    return model


@pytest.mark.parametrize("way", ["whole", "in place", "blocks"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_a_compiled_policy_is_saved_and_restored_as_a_plain_one(config, rank, way, tmp_path):
    """torch.compile puts `_orig_mod.` into names: files have the same bytes as without."""
    hf.save(build(config), TOKENIZER, tmp_path / "base")
    model, tokenizer, source = load_policy(tmp_path / "base", CPU, torch.float32, lora_rank=rank)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # the base of adapters stays as it is saved
                p += 0.01 * torch.randn_like(p)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write = lambda path: policy.save(model, tokenizer, path, source)
    plain = checkpoint.save(tmp_path / "plain", 1, write, {"step": 1})
    model = compiled(model, way)
    path = checkpoint.save(tmp_path / "compiled", 1, write, {"step": 1})
    for file in plain.iterdir():
        if file.name != checkpoint.STATE:
            assert (path / file.name).read_bytes() == file.read_bytes(), file.name
    again, _, _ = load_policy(tmp_path / "base", CPU, torch.float32, lora_rank=rank)
    again = compiled(again, way)
    assert policy.restore(path, again, {}) == {"step": 1}
    if rank:
        state = {name: t for name, t in state.items() if name.endswith((".A", ".B"))}
    have = {name.replace("_orig_mod.", ""): tensor for name, tensor in again.state_dict().items()}
    assert state and all(torch.equal(have[name], tensor) for name, tensor in state.items())
    assert config is MOE or way == "in place" or "_orig_mod" in "".join(again.state_dict())


def test_a_compiled_policy_that_has_run_is_saved(tmp_path):
    model = build()
    logp = logprobs(model, draw(model), 99)
    whole = torch.compile(model, backend="eager")
    rollout = draw(whole)
    torch.testing.assert_close(logprobs(whole, rollout, 99), logp)
    torch.testing.assert_close(whole(rollout.tokens), model(rollout.tokens))  # the call is what is compiled
    hf.save(whole, TOKENIZER, tmp_path)
    torch.testing.assert_close(logprobs(hf.load(tmp_path)[0], rollout, 99), logp)


@pytest.fixture
def saved(base, tmp_path):
    """saved(rank): a checkpoint of a policy with adapters of that rank, or of all weights, and what restores it."""

    def make(rank: int):
        model, tokenizer, source = load_policy(base, CPU, torch.float32, lora_rank=rank)
        write = lambda path: policy.save(model, tokenizer, path, source)
        return checkpoint.save(tmp_path / "run", 7, write, {"step": 7}), model

    return make


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_run_needs_the_base_only_for_its_adapters(base, saved, rank):
    path, model = saved(rank)
    assert policy.origin(base, None) == base / "step-000003"
    assert policy.origin(base, path) == (base.resolve() / "step-000003" if rank else path)
    shutil.rmtree(base)
    if rank:
        with pytest.raises(ValueError, match="base_model_name_or_path = .* is no folder with a config.json"):
            policy.origin(base, path)
    else:
        again, _, source = load_policy(policy.origin(base, path), CPU, torch.float32)
        assert policy.restore(path, again, {}) == {"step": 7} and source == (path, {})
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("rank, file", [
    (0, "model.safetensors"), (0, "tokenizer.json"), (0, "config.json"), (4, "adapter_model.safetensors"),
])  # fmt: skip
def test_a_flipped_byte_is_not_resumed_from(saved, rank, file):
    path, model = saved(rank)
    flip(path / file, b": 32" if file == "config.json" else b"")
    with pytest.raises(ValueError, match=f"^{path / file} has changed since the run saved its digest"):
        policy.restore(path, model, {})


def test_a_flipped_byte_in_a_shard_is_not_resumed_from(base, tmp_path):
    model, tokenizer, _ = load_policy(base, CPU, torch.float32)
    write = lambda path: hf.save(model, tokenizer, path, shard_bytes=4096)
    path = checkpoint.save(tmp_path / "run", 7, write, {"step": 7})
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 3
    policy.restore(path, model, {})
    flip(shards[1])
    with pytest.raises(ValueError, match=f"^{shards[1]} has changed since"):
        policy.restore(path, model, {})


@pytest.mark.parametrize("state", [{"step": 7}, [7], {"optimizer": {}}])
def test_the_state_of_another_training_is_refused(saved, state):
    path, model = saved(0)
    torch.save(state, path / checkpoint.STATE)
    with pytest.raises(ValueError, match=f"^{path / checkpoint.STATE} is not of this training: .* step, optimizer$"):
        policy.restore(path, model, {"optimizer": torch.optim.SGD(model.parameters(), 0.1)})


def test_adapters_are_not_resumed_on_another_base(base, saved):
    path, model = saved(4)
    assert policy.restore(path, model, {}) == {"step": 7}
    weights = base.resolve() / "step-000003" / "model.safetensors"
    flip(weights)
    with pytest.raises(ValueError, match=f"^{weights} has changed since the run saved its digest: put the old file"):
        policy.restore(path, model, {})


def flip(file, after: bytes = b"") -> None:
    """Change the last byte of a file but one, or the byte before the end of a text in it."""
    data = bytearray(file.read_bytes())
    data[data.index(after) + len(after) - 1 if after else -2] ^= 1
    file.write_bytes(data)


def test_training_starts_from_merged_adapters_or_refuses_more(base, tmp_path):
    model, tokenizer, source = load_policy(base, CPU, torch.float32, lora_rank=4, recompute=True)
    assert all(block.recompute for block in model.blocks)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    policy.save(model, tokenizer, tmp_path / "adapters", source)
    merged, _, path = load_policy(tmp_path / "adapters", CPU, torch.float32)
    assert path == (tmp_path / "adapters", {}) and not adapters(merged)
    assert not any(block.recompute for block in merged.blocks)
    assert all(p.requires_grad for p in merged.parameters())
    rollout = draw(copy.deepcopy(model))
    torch.testing.assert_close(logprobs(merged, rollout, 99), logprobs(model, rollout, 99), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="adapters holds adapters: merge and save them first, or train without LoRA"):
        load_policy(tmp_path / "adapters", CPU, torch.float32, lora_rank=4)
