"""memory.py: predicted bytes against allocated ones."""

from dataclasses import replace

import pytest
import torch
from rank_runs import memory_of_steps
from ranks import on_ranks

from minir1 import memory
from minir1.memory import LEARNED, activation_bytes, line, peak, show, step_memory
from minir1.model.config import ModelConfig, dense
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.lora import add_adapters
from minir1.model.transformer import Transformer, on_meta
from minir1.optim import Masters, adamw, muon, split_parameters

SHAPE = {"vocab": 50, "dim": 48, "layers": 3, "heads": 4, "ffn": 126}
LATENT = {"kv_lora": 20, "nope": 8, "rope": 4, "v_dim": 12}
CONFIGS = {
    "gqa": dense(**SHAPE),
    "gqa tied qk_norm": dense(**SHAPE, kv_heads=1, tied=True, qk_norm=True),
    "mla dense": ModelConfig(**SHAPE, **LATENT, q_lora=32, experts=0),
    "mla moe mtp": ModelConfig(**SHAPE, **LATENT, experts=8, expert_ffn=32, mtp_depth=1),
}
every_model = pytest.mark.parametrize("name", CONFIGS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def saved_bytes(model: Transformer) -> int:
    """Bytes that autograd saves in a forward pass over 64 tokens, without weights."""
    storages, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        storages.setdefault(storage.data_ptr(), (storage.nbytes(), x))  # keeps x alive, so that no address is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(torch.zeros(2, 32, dtype=torch.int64))
    return sum(n for pointer, (n, _) in storages.items() if pointer not in weights)


@every_model
@both_dtypes
def test_activations_are_within_5_percent_and_recomputing_saves_all_but_one_block(name, dtype):
    model = Transformer(CONFIGS[name]).to(dtype)
    predicted = activation_bytes(model.config, 64, dtype)
    assert 0.95 < saved_bytes(model) / predicted < 1.05
    model.recompute()
    recomputing, inputs = activation_bytes(model.config, 64, dtype, recompute=True), saved_bytes(model)
    model.recompute(False)
    model.blocks = model.blocks[-1:]  # and the last norm once more
    assert 0.95 < (inputs + saved_bytes(model)) / recomputing < 1.2 and recomputing < 0.6 * predicted


@every_model
@both_dtypes
@pytest.mark.parametrize("by_muon", [False, True])
def test_weights_optimizer_gradients_cache_and_critic_are_exact(name, dtype, by_muon):
    model = Transformer(CONFIGS[name]).to(dtype)
    step = {"microbatch": 256, "rows": 6, "length": 20, "muon": by_muon, "reference": True, "critic": True}
    parts = step_memory(model, **step)
    assert parts == step_memory(on_meta(CONFIGS[name]).to(dtype), **step)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    matrices, rest = split_parameters(model)
    optimizers = [muon(matrices, 0.1), adamw(rest, 0.1)] if by_muon else [adamw(model.parameters(), 0.1)]
    for optimizer in optimizers:
        optimizer.step()
    inner = [getattr(optimizer, "inner", optimizer) for optimizer in optimizers]
    state = [x for optimizer in inner for values in optimizer.state.values() for x in values.values() if x.ndim]
    masters = [x for optimizer in optimizers if isinstance(optimizer, Masters) for x in optimizer.masters]
    assert parts["moments"] == sum(x.nbytes for x in state)
    assert parts["masters"] == sum(x.nbytes for x in masters)
    assert parts["weights"] == parts["reference"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert parts["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert parts["cache"] == sum(layer.nbytes for layer in model.cache(6, 20).layers)
    critic = ScalarModel(model, ValueHead(48))
    bytes_each = 4 + 8 + 4 if dtype == torch.float32 else 2 + 4 + 8 + 4
    assert parts["critic"] == bytes_each * sum(p.numel() for p in critic.parameters())


def test_adapters_train_little():
    model = Transformer(CONFIGS["gqa"])
    full = step_memory(model, microbatch=64)
    adapters = sum(p.numel() for p in add_adapters(model, 2, 4.0))
    parts = step_memory(model, microbatch=64)
    assert parts["moments"] == 8 * adapters and parts["gradients"] == 4 * adapters
    assert parts["weights"] == full["weights"] + 4 * adapters and parts["reference"] == parts["critic"] == 0


MOE = ModelConfig(vocab=63, dim=64, layers=3, heads=4, **LATENT, ffn=256, experts=8, expert_ffn=128)
WIDE = dense(vocab=1023, dim=128, layers=4, heads=4, ffn=510)
ON_TWO = {"gqa": (WIDE, 1024, True), "mla moe": (MOE, 64, False), "seven experts": (replace(MOE, experts=7), 64, False)}


@pytest.fixture(scope="module")
def two_ranks():
    """Name -> what the first of two ranks needs."""
    return dict(zip(ON_TWO, on_ranks(2, memory_of_steps, list(ON_TWO.values()))[0]))


@pytest.mark.parametrize("name", ON_TWO)
def test_on_two_ranks_shards_are_exact_and_the_peak_is_near_what_torch_tracks(two_ranks, name):
    parts, tensors, tracked = two_ranks[name]
    assert {part: parts[part] for part in tensors} == tensors and parts["masters"] == 0
    predicted = sum(parts[part] for part in ("weights", "moments", *LEARNED))
    assert 0.75 < tracked / predicted < 1.1


def test_a_scripts_line_is_of_one_rank(monkeypatch):
    """step_memory takes as many ranks as run, and the line says so."""
    model, shape = on_meta(CONFIGS["gqa"]), {"microbatch": 64, "rows": 8, "length": 16}
    monkeypatch.setattr(memory, "world", lambda: 4)
    parts = step_memory(model, **shape)
    assert parts == step_memory(model, **shape, ranks=4) != step_memory(model, **shape, ranks=1)
    assert line(parts, None).startswith("predicted memory of each of 4 ranks: ")


def test_the_peak_is_that_of_the_larger_phase(capsys):
    parts = dict.fromkeys(step_memory(on_meta(CONFIGS["gqa"]), microbatch=1), 0)
    parts |= {"weights": 2**30, "moments": 2**31, "cache": 2**30, "gradients": 2**29, "activations": 2**28}
    assert peak(parts) == 2**30 + 2**31 + 2**30
    text = line(parts, 7.5)
    assert text.startswith("predicted memory: 4 GiB at the peak (") and text.endswith("7.5 GiB are free")
    show(parts, torch.device("cpu"))
    assert "predicted memory: 4 GiB" in capsys.readouterr().out
    assert "weights 1" in line(parts, None) and line(parts, None).endswith(")")
