"""four_bit.py, packed_linear.py: bitsandbytes' numbers to the bit, the published format by hand, QLoRA, refusals."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import standin
import torch
import transformers
from runs import assert_same_run, plain_metrics, stop
from safetensors.torch import load_file, save_file
from test_preference_pairs import save_base
from test_sft import write_dialogues

from experiments import sft
from minir1 import checkpoint, policy
from minir1.losses import nll
from minir1.memory import step_memory
from minir1.model import four_bit, heads, hf
from minir1.model.config import ModelConfig, dense
from minir1.model.four_bit import BOOKS, STATE, Layout, code_book, dequantize, is_four_bit, layout_of, packed_of
from minir1.model.lora import adapters, adapters_off, add_adapters, merge, restore_adapters, save_adapters
from minir1.model.packed_linear import PackedLinear, packed_layers
from minir1.model.presets import PRESETS
from minir1.model.transformer import Transformer, on_meta
from minir1.sample import generate
from minir1.tokenizer import word_level

transformers.utils.logging.disable_progress_bar()
standin.register()  # before the first backward pass of the process
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")

TOKENIZER = word_level((), largest_number=24)
SHAPE = {"vocab": 64, "dim": 128, "layers": 2, "heads": 4, "ffn": 200, "init_std": 0.1}  # blocks go across rows of 200
CONFIGS = {
    "llama": dense(**SHAPE, qkv_bias=False),
    "qwen2": dense(**SHAPE, tied=True),
    "qwen3": dense(**SHAPE, qkv_bias=False, qk_norm=True, head_dim=40),
    "granite": dense(**SHAPE, qkv_bias=False, residual_scale=0.4, logit_scale=0.3),
}
MLA = ModelConfig(**SHAPE, kv_lora=64, nope=32, rope=32, v_dim=32, experts=0)
X = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(5))
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def matrix(*shape, dtype=torch.float32, seed=0):
    """Small and large numbers in one block."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3 / 9).to(dtype)


def by_hand(weight, kind: str, nested: bool, block: int = 64) -> dict[str, torch.Tensor]:
    """The tensors of a matrix in the published format; what their names end in -> tensor."""
    flat = weight.float().flatten()
    scale = torch.stack([part.abs().max() for part in flat.split(block)])
    state = {"quant_type": kind, "blocksize": block, "dtype": str(weight.dtype)[6:], "shape": list(weight.shape)}
    parts = {"": None, ".absmax": scale, ".quant_map": torch.tensor(BOOKS[kind])}
    if nested:
        mean, d = scale.mean(), torch.linspace(-1, 1, 256)
        t = torch.stack([part.abs().max() for part in (scale - mean).split(256)])
        t_each = t[torch.arange(len(scale)) // 256]
        p = ((scale - mean) / t_each - d.unsqueeze(1)).abs().argmin(0)
        parts |= {".absmax": p.to(torch.uint8), ".nested_absmax": t, ".nested_quant_map": d}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean.item()}
        scale = d[p] * t_each + mean
    q = (flat / scale[torch.arange(len(flat)) // block] - torch.tensor(BOOKS[kind]).unsqueeze(1)).abs().argmin(0)
    q = torch.nn.functional.pad(q, (0, len(q) % 2))
    parts[""] = (q[::2] * 16 + q[1::2]).to(torch.uint8).unsqueeze(1)
    return parts | {STATE + kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def opened(parts: dict[str, torch.Tensor]) -> tuple[four_bit.Packed, Layout]:
    """The parts as the loader reads them."""
    state = next(name for name in parts if STATE in name)
    layout = layout_of(state, parts[state])
    return packed_of(parts, "", layout), layout


def one_by_one(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix by the equations, every number from its own indices: fp32, [n]."""
    state = json.loads(bytes(next(t for name, t in parts.items() if STATE in name).tolist()))
    scale, i = parts[".absmax"], torch.arange(math.prod(state["shape"]))
    if "nested_offset" in state:
        j = torch.arange(len(scale))
        scale = parts[".nested_quant_map"][scale.long()] * parts[".nested_absmax"][j // 256] + state["nested_offset"]
    byte = parts[""].flatten().long()[i // 2]
    q = torch.where(i % 2 == 0, byte // 16, byte % 16)
    return torch.tensor(BOOKS[state["quant_type"]])[q] * scale[i // state["blocksize"]]


# ---------------------------------------------------------------- numbers


def test_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA, section 3 and appendix E: eight up to zero and nine from zero on, divided by the largest."""
    edge = 1 - (1 / 32 + 1 / 30) / 2  # its probability
    side = lambda n: torch.special.ndtri(torch.linspace(edge, 0.5, n, dtype=torch.float64))
    quantiles = torch.cat((-side(8), side(9)[:-1].flip(0))) / side(9)[0]
    torch.testing.assert_close(torch.tensor(BOOKS["nf4"]).double(), quantiles, rtol=0, atol=3e-7)


def test_fp4_are_floats_of_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    for i, value in enumerate(BOOKS["fp4"]):
        e, m = i >> 1 & 3, i & 1
        size = m / 192 if e == 0 else (1 + m / 2) * 2 ** (4 - e) / 12
        assert value == pytest.approx(-size if i & 8 else size, rel=1e-12)
    assert max(BOOKS["fp4"]) == 1 and sorted(BOOKS["nf4"]) == list(BOOKS["nf4"])


def test_two_bytes_and_two_scales_by_hand():
    """High half first; the second block has a scale of its own, and of the last byte only the high half counts."""
    layout = Layout("nf4", (1, 3), torch.float32, 2, None, 0.0)
    data = torch.tensor([[0x0F], [0x8A]], dtype=torch.uint8)
    packed = four_bit.Packed(data, torch.tensor([2.0, 10.0]), code_book("nf4"), None, None)
    out = dequantize(packed, layout, torch.empty(1, 3))
    assert torch.equal(out, torch.tensor([[-2.0, 2.0, 10 * 0.07958029955625534]]))
    nested = packed._replace(
        absmax=torch.tensor([3, 255], dtype=torch.uint8),
        nested_absmax=torch.tensor([4.0]),
        nested_book=torch.arange(256) / 256,
    )
    layout = layout._replace(nested_block=256, offset=1.0)
    scales = torch.tensor([4 * 3 / 256 + 1, 4 * 255 / 256 + 1])
    assert torch.equal(four_bit.scales(nested, layout), scales)
    want = [-scales[0], scales[0], scales[1] * code_book("nf4")[8]]
    assert torch.equal(dequantize(nested, layout, torch.empty(1, 3)), torch.tensor([want]))


SHAPES = [(64, 128), (33, 50), (5, 33), (3, 1000), (1, 64), (7, 80), (70, 1024)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_follows_the_equations(monkeypatch, kind, nested, shape):
    """Every number by itself, in chunks that end in the middle of a row, in the stated dtype before any other."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = by_hand(weight := matrix(*shape, dtype=dtype), kind, nested)
        packed, layout = opened(parts)
        exact = one_by_one(parts).view(shape)
        assert (exact - weight.float()).abs().max() < 0.4 * weight.float().abs().max()
        monkeypatch.setattr(four_bit, "CHUNK", 256)
        for other in (dtype, torch.float64):
            out = dequantize(packed, layout, torch.full(shape, math.nan, dtype=other))
            assert torch.equal(out, exact.to(dtype).to(other))
        monkeypatch.undo()
        assert torch.equal(dequantize(packed, layout, torch.empty(shape)), exact.to(dtype).float())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_equals_bitsandbytes_to_the_bit(kind, nested, shape):
    from bitsandbytes import functional as theirs

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        data, state = theirs.quantize_4bit(
            matrix(*shape, dtype=dtype), blocksize=64, compress_statistics=nested, quant_type=kind
        )
        assert torch.equal(state.code, code_book(kind))
        parts = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()} | {"": data}
        want = their_own(data, state)
        assert want.dtype == dtype and torch.equal(dequantize(*opened(parts), torch.empty_like(want)), want)


def their_own(data, state):
    """bitsandbytes' dequantisation of a matrix.

    On a CPU with AVX-512, bitsandbytes 0.50 takes the scales of other blocks in rows of a multiple of 16 numbers that
    is none of the block. As one row, the same bytes have the right ones.
    """
    from bitsandbytes import functional as theirs

    shape, state = state.shape, copy.copy(state)
    if shape[1] % 64 and shape[1] % 16 == 0:
        state.shape = torch.Size((1, math.prod(shape)))
    return theirs.dequantize_4bit(data, state).view(shape)


# ---------------------------------------------------------------- folders


def plain(folder, config, dtype=torch.bfloat16):
    """A folder of a random model in 16 bits."""
    torch.manual_seed(0)
    model = Transformer(config)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    hf.save(model.to(dtype), TOKENIZER, folder)
    return folder


def quantised(source, folder, kind="nf4", nested=True, skip=(), shards=1, **stated):
    """A copy of a folder whose projections, but those with a name in `skip`, are in 4 bits, written by hand."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and not any(s in name for s in skip)]:
        tensors |= {name + part: tensor for part, tensor in by_hand(tensors.pop(name), kind, nested).items()}
    put(folder, tensors, shards)
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False} | stated
    alter(folder, quantization_config=method)
    return folder


def put(folder, tensors, shards=1):
    """Replace the tensors of a folder, dealt out in turn to several files."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def alter(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(name): the folder of a model in 16 bits, by the names of CONFIGS."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = plain(tmp_path_factory.mktemp(name), CONFIGS[name])
        return made[name]

    return make


@pytest.fixture(scope="module", params=["llama", "qwen2", "granite"])
def folder(request, source, tmp_path_factory):
    """In NF4 with nested scales, in three shards; one matrix in 16 bits."""
    path = tmp_path_factory.mktemp("nf4") / request.param
    return quantised(source(request.param), path, skip=("layers.1.mlp.down",), shards=3)


CASES = {
    "llama": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "qwen2": {"bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "up_proj"]},
    "qwen3": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["k_proj"]},
    "granite": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module", params=CASES)
def theirs(request, source, tmp_path_factory):
    """(name, transformers' model in 4 bits, the folder that it wrote)"""
    folder = tmp_path_factory.mktemp(request.param)
    setting = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **CASES[request.param]
    )
    how = {"quantization_config": setting, "dtype": torch.bfloat16}
    transformers.AutoModelForCausalLM.from_pretrained(source(request.param), **how).save_pretrained(folder)
    TOKENIZER.save(folder)
    return request.param, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), folder


def their_weights(model) -> dict[str, torch.Tensor]:
    """bitsandbytes' own dequantisation of every matrix that is in 4 bits."""
    import bitsandbytes as bnb

    found = {name: part.weight for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}
    return {f"{name}.weight": their_own(weight.data, weight.quant_state) for name, weight in found.items()}


@needs_bitsandbytes
@torch.no_grad()
def test_folders_of_transformers_have_its_weights_to_the_bit(theirs):
    name, other, folder = theirs
    weights, skipped = their_weights(other), CASES[name].get("llm_int8_skip_modules", [])
    model, _ = hf.load(folder)
    ours, before = hf.to_hf_tensors(model), load_file(folder / "model.safetensors")
    in_blocks = weights.keys() - {"lm_head.weight"}
    assert len(in_blocks) == 14 - 2 * sum(part.endswith("_proj") for part in skipped)
    assert ("lm_head.weight" in weights) == (name == "qwen3")  # a list of modules to skip replaces the default one
    for tensor_name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights.get(tensor_name, before[tensor_name])), tensor_name
    full = hf.to_hf_tensors(hf.load(folder, dtype=torch.float32)[0])
    assert all(torch.equal(full[name], tensor.float()) for name, tensor in ours.items())
    packed, _ = hf.load(folder, packed=True)
    for layer in packed_layers(packed).values():
        assert layer.data.dtype == torch.uint8 and layer.weight.dtype == torch.bfloat16
    assert len(packed_layers(packed)) == len(in_blocks)
    assert all(torch.equal(t, ours[n]) for n, t in hf.to_hf_tensors(merge(packed)).items())
    if name != "qwen3":  # which has rows of 160: see `their_own`
        want = other.dequantize()(X).logits.float()
        torch.testing.assert_close(hf.load(folder)[0](X), want, rtol=0, atol=0.15)  # in bf16, of standard deviation 1


# ---------------------------------------------------------------- packed


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_has_the_logits_of_the_dequantised_model_to_the_bit(folder, dtype):
    model, packed = hf.load(folder, dtype=dtype)[0], hf.load(folder, dtype=dtype, packed=True)[0]
    assert len(packed_layers(packed)) == 13 and not packed_layers(model)
    assert torch.equal(packed(X), model(X)) and packed(X).std() > 0.1
    assert torch.equal(packed.logprob(X), model.logprob(X))
    for a, b in zip((model, packed), (packed, model)):  # the tokens of one, one at a time over the cache of the other
        tokens = generate(a, X[:, :4].tolist(), max_tokens=6, temperature=0).tokens
        cache = b.cache(3, 10)
        steps = [b.hidden(tokens[:, :4], cache=cache)]
        steps += [b.hidden(tokens[:, t : t + 1], cache=cache) for t in range(4, 10)]
        close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
        torch.testing.assert_close(torch.cat(steps, 1), b.hidden(tokens), **close)
        assert b is model or cache.fused == {0: [None, None], 1: [None, None]}  # no dequantised copies in the cache
    moved = packed.to(torch.float64).to(dtype)  # no way round rounds the scales
    assert torch.equal(moved(X), model(X))
    assert all(layer.absmax.dtype == torch.uint8 for layer in packed_layers(moved).values())


@pytest.mark.parametrize("nested", [False, True])
def test_bits_per_weight(source, tmp_path, nested):
    model, _ = hf.load(quantised(source("llama"), tmp_path / "4", nested=nested), packed=True)
    for layer in packed_layers(model).values():
        n = math.prod(layer.layout.shape)
        blocks = -(-n // 64)
        want = n / 2 + 64 + (blocks + 4 * -(-blocks // 256) + 1024 if nested else 4 * blocks)
        assert sum(buffer.nbytes for buffer in layer.buffers()) == want and not list(layer.parameters())
    parts = step_memory(model, microbatch=64)
    assert parts["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert parts["dequantised"] == 2 * 200 * 128


def test_the_memory_that_the_page_states():
    """The table of docs/checkpoints.md, from shapes."""
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (r1-distill-\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.M)
    assert len(rows) == 4
    for name, *stated in rows:
        sizes = []
        for nested in (None, 256):
            model = on_meta(PRESETS[name]).bfloat16()
            sizes[:1] = [sum(p.nbytes for p in model.parameters())]
            for at, layer in list(model.blocks.named_modules(prefix="blocks")):
                if isinstance(layer, torch.nn.Linear):
                    layout = Layout("nf4", tuple(layer.weight.shape), torch.bfloat16, 64, nested, 0.0)
                    model.set_submodule(at, PackedLinear(layer, layout))
            sizes.insert(1, sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
        assert [f"{size / 2**30:.2f}" for size in sizes] == stated


def test_scales_in_fp32_are_not_rounded_with_the_model(tmp_path):
    folder = plain(tmp_path / "32", CONFIGS["llama"], torch.float32)
    model, _ = hf.load(quantised(folder, tmp_path / "4", nested=False), packed=True)
    layer = model.blocks[0].attention.wq
    w, scale = layer.weight, layer.absmax.clone()
    assert model.to(torch.bfloat16).embedding.weight.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.absmax, scale) and torch.equal(layer.weight, w.bfloat16())
    assert torch.equal(copy.deepcopy(model).to(torch.float32).blocks[0].attention.wq.weight, w)
    assert not torch.equal(scale.bfloat16().float(), scale)


# ---------------------------------------------------------------- QLoRA


def adapted(model, std=0.05):
    torch.manual_seed(1)
    for p in add_adapters(model, 4, 8.0):
        p.data.normal_(std=std)
    return model


def test_gradients_reach_the_adapters_and_are_those_over_dequantised_weights(folder):
    model, packed = adapted(hf.load(folder)[0]), adapted(hf.load(folder, packed=True)[0])
    before = {name: tensor.clone() for name, tensor in packed.named_buffers()}
    assert len(adapters(packed)) == 14
    for recompute in (False, True):
        packed.recompute(recompute)
        for each in (model, packed):
            each.zero_grad()
            nll(each.logprob(X)).mean().backward()
        for name, p in packed.named_parameters():
            assert (p.grad is None) == (not name.endswith((".A", ".B")))
            assert p.grad is None or torch.equal(p.grad, model.get_parameter(name).grad) and p.grad.any()
    torch.optim.SGD([p for p in packed.parameters() if p.requires_grad], 1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.named_buffers())


def test_no_dequantised_matrix_is_kept_for_the_backward_pass(folder):
    packed = adapted(hf.load(folder, packed=True)[0])
    kept, weights = [], {p.untyped_storage().data_ptr() for p in packed.parameters()}
    keep = lambda x: x if x.untyped_storage().data_ptr() in weights else kept.append(x) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = nll(packed.logprob(X)).mean()
    shapes = {layer.layout.shape for layer in packed_layers(packed).values()}
    assert len(kept) > 50 and len(shapes) == 4
    assert not {tuple(x.shape) for x in kept} & {shape[::step] for shape in shapes for step in (1, -1)}
    loss.backward()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(nll(packed.logprob(X)).mean(), packed.blocks[0].attention.wq.A, create_graph=True)


@torch.no_grad()
def test_merged_adapters_are_those_over_dequantised_weights(folder, tmp_path):
    """In the model's dtype, with the layers that have no adapter; and transformers opens what is then saved."""
    packed, tokenizer = hf.load(folder, packed=True)
    with pytest.raises(ValueError, match="weights are in 4 bits, which are not written: lora.merge"):
        hf.save(packed, tokenizer, tmp_path)
    want = merge(adapted(hf.load(folder)[0]))
    for targets in (None, ["wq"]):
        if targets:
            want, packed = hf.load(folder)[0], hf.load(folder, packed=True)[0]
        have = merge(adapted(packed) if targets is None else packed)
        assert not packed_layers(have) and not adapters(have) and all(p.requires_grad for p in have.parameters())
        assert have.state_dict().keys() == want.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(have.state_dict().values(), want.state_dict().values()))
    hf.save(have, tokenizer, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(other(X).logits, have.float()(X), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_folder_of_adapters_opens_on_packed_weights(folder, tmp_path):
    model = adapted(hf.load(folder, packed=True)[0])
    save_adapters(model, tmp_path, folder)
    again = hf.load(tmp_path, packed=True)[0]
    assert len(packed_layers(again)) == 13 and torch.equal(again(X), model(X))
    assert torch.equal(hf.load(tmp_path)[0](X), model(X))
    with adapters_off(again):
        assert torch.equal(again(X), hf.load(folder)[0](X)) and not torch.equal(again(X), model(X))
    other = hf.load(folder, packed=True)[0]
    add_adapters(other, 4, 8.0)
    restore_adapters(other, tmp_path)
    assert torch.equal(other(X), model(X))


@needs_bitsandbytes
@pytest.mark.parametrize("theirs", ["llama", "qwen2"], indirect=True)
@torch.no_grad()
def test_peft_opens_the_adapters_on_the_weights_of_transformers(theirs, tmp_path):
    import peft

    _, _, folder = theirs
    model = adapted(hf.load(folder, packed=True)[0])
    save_adapters(model, tmp_path, folder)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    other = peft.PeftModel.from_pretrained(other.dequantize(), tmp_path)
    torch.testing.assert_close(other(X).logits.float(), model(X), rtol=0, atol=0.2)


def test_a_qlora_policy_is_saved_and_restored_to_the_bit(folder, tmp_path):
    def open_policy():
        torch.manual_seed(0)
        return policy.load_policy(folder, torch.device("cpu"), torch.bfloat16, lora_rank=4, packed=True)

    model, tokenizer, origin = open_policy()
    for adapter in adapters(model).values():
        adapter.B.data.normal_(std=0.1)
    write = lambda path: policy.save(model, tokenizer, path, origin)
    path = checkpoint.save(tmp_path / "run", 7, write, {"step": 7})
    assert not list(path.glob("model*.safetensors")) and policy.origin(tmp_path, path) == folder.resolve()
    again, _, _ = open_policy()
    assert policy.restore(path, again, {}) == {"step": 7}
    assert len(packed_layers(again)) == 13 and torch.equal(again(X), model(X))
    with pytest.raises(ValueError, match="packed = True with lora_rank = 0: weights in 4 bits are not trained"):
        policy.load_policy(folder, torch.device("cpu"), torch.bfloat16, packed=True)


def test_sft_trains_on_packed_weights_as_on_dequantised_ones(tmp_path, monkeypatch):
    """The adapters have the same bits, also after a kill, and on another device."""
    tokenizer = hf.load(save_base(tmp_path / "moe"))[1]
    config = dense(**SHAPE | {"vocab": tokenizer.size + 16}, eos=tokenizer.eos, pad=tokenizer.pad)
    hf.save(Transformer(config), tokenizer, tmp_path / "32")
    config = sft.Config(
        checkpoint=quantised(tmp_path / "32", tmp_path / "4"), data=(write_dialogues(tmp_path / "d.jsonl", 8),),
        batch=4, steps=4, eval_every=2, lora_rank=4, held_out=0.2, device="cpu", out=tmp_path / "dequantised",
    )  # fmt: skip
    result = sft.main(config)
    assert result["after/loss"] < result["before/loss"]
    packed = replace(config, packed=True, out=tmp_path / "packed")
    stop(monkeypatch, "sft", packed, "experiments.sft", "clip_gradients", 4)
    assert sft.main(replace(packed, resume=True)) == result
    assert_same_run(packed.out, config.out)
    sft.main(replace(packed, device="standin", out=tmp_path / "standin"))
    assert plain_metrics(tmp_path / "standin") == plain_metrics(config.out)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "compressed-tensors", "mxfp4", "gguf", None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_other_formats_are_refused_by_name(source, tmp_path, method, packed):
    shutil.copytree(source("llama"), tmp_path / "x")
    alter(tmp_path / "x", quantization_config={"quant_method": method, "bits": 4})
    message = f"quant_method = {method!r} is not supported, only 'fp8', and 'bitsandbytes' in 4 bits"
    with pytest.raises(ValueError, match=f"^quantization_config: {message}$"):
        hf.load(tmp_path / "x", packed=packed)


@pytest.mark.parametrize("change", [
    {"load_in_8bit": True}, {"load_in_4bit": False}, {"load_in_4bit": None}, {"load_in_4bit": 1},
    {"load_in_8bit": True, "load_in_4bit": False},
])  # fmt: skip
def test_8_bits_of_bitsandbytes_are_refused(source, tmp_path, change):
    folder = quantised(source("llama"), tmp_path / "x", **change)
    with pytest.raises(ValueError, match="^quantization_config: bitsandbytes with load_in_4bit = .* only its 4 bits$"):
        hf.load(folder)


def test_what_states_4_bits():
    assert not is_four_bit({}) and not is_four_bit({"quantization_config": None})
    assert not is_four_bit({"quantization_config": {"quant_method": "fp8"}})
    assert is_four_bit({"quantization_config": {"load_in_4bit": True}})  # as written before there was a quant_method
    with pytest.raises(ValueError, match="load_in_8bit = True"):
        is_four_bit({"quantization_config": {"load_in_8bit": True}})


def test_gguf_is_refused_by_name(source, tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-q4.gguf"):
        with pytest.raises(ValueError, match=r"model-q4\.gguf: GGUF is not supported, only safetensors files"):
            hf.load(path)
    shutil.copy(source("llama") / "config.json", tmp_path)
    shutil.copy(source("llama") / "tokenizer.json", tmp_path)
    shutil.copy(source("llama") / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="GGUF is not supported"):
        hf.load(tmp_path)


def test_packed_needs_4_bits_and_a_dense_model_of_grouped_query_attention(source, tmp_path):
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM, not in 4 bits: packed = True is for"):
        hf.load(source("llama"), packed=True)
    folder = quantised(plain(tmp_path / "16", MLA), tmp_path / "4", skip=["kv_b_proj"])
    model, _ = hf.load(folder)
    before, after = hf.load(tmp_path / "16")[0], dict(model.named_parameters())
    for name, p in before.named_parameters():
        assert (after[name] - p).abs().max() < 0.3 * p.abs().max()
        assert torch.equal(after[name], p) == (p.ndim < 2 or "wkv_b" in name or "blocks" not in name or "wkv_a" in name)
    with pytest.raises(ValueError, match="holds a DeepseekV3ForCausalLM: packed = True is for .*Llama, Qwen, Granite"):
        hf.load(folder, packed=True)
    with pytest.raises(ValueError, match="packed = True with lora_rank = 0"):
        sft.Config(packed=True)


@torch.no_grad()
def test_scalar_models_open_dequantised_and_are_not_written_packed(source, folder, tmp_path):
    model = heads.ScalarModel(hf.load(source("llama"))[0], heads.ValueHead(128).bfloat16())
    heads.save(model, TOKENIZER, tmp_path / "16")
    opened, _ = heads.load(quantised(tmp_path / "16", tmp_path / "4"))
    want = quantised(source("llama"), tmp_path / "lm")
    for name, p in hf.load(want)[0].blocks.named_parameters():
        assert torch.equal(opened.trunk.blocks.get_parameter(name), p)
    trunk, tokenizer = hf.load(folder, packed=True)
    model = heads.ScalarModel(trunk, heads.ValueHead(128))
    with pytest.raises(ValueError, match="or weights in 4 bits: lora.merge"):
        heads.save(model, tokenizer, tmp_path)


def test_what_does_not_fit_is_named(source, tmp_path):
    folder = quantised(source("llama"), tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    of_other_shape = by_hand(matrix(128, 200), "nf4", True)
    wrong = dict(tensors) | {UP + part: tensor for part, tensor in of_other_shape.items()}
    del wrong[DOWN + ".nested_absmax"]
    wrong[DOWN + ".absmax"] = torch.ones(400)
    wrong["model.norm.weight.absmax"] = torch.ones(2)
    wrong["lm_head.weight"] = torch.ones(64, 128, dtype=torch.uint8)
    put(folder, wrong)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    for line in (
        f"missing: {DOWN}.nested_absmax",
        "surplus: model.norm.weight.absmax",
        f"shape of {UP}: (128, 200) in 4 bits, expected (200, 128)",
        f"dtype of {DOWN}.absmax: F32, expected U8",
        "dtype of lm_head.weight: U8, expected one of F64",
    ):
        assert line in str(error.value)
    put(folder, tensors | {UP + ".quant_map": torch.linspace(-1, 1, 16)})
    with pytest.raises(ValueError, match=f"^{UP}.quant_map = .*: not the code book of nf4$"):
        hf.load(folder)
    put(folder, tensors | {UP: tensors[UP].long()})
    with pytest.raises(ValueError, match=f"dtype of {UP}: I64, expected U8"):
        hf.load(folder)
    put(folder, load_file(source("llama") / "model.safetensors"))
    with pytest.raises(ValueError, match="states bitsandbytes' 4 bits, but none of the weights are stored so"):
        hf.load(folder)
    put(folder, tensors)
    alter(folder, quantization_config=None)
    with pytest.raises(ValueError, match="surplus: .*absmax.*dtype of .*_proj.weight: U8"):
        hf.load(folder)


@pytest.mark.parametrize("change", [
    {"quant_type": "af4"}, {"quant_type": None}, {"blocksize": 0}, {"blocksize": 63}, {"blocksize": 64.0},
    {"dtype": "float64"}, {"dtype": None}, {"shape": [200]}, {"shape": [200, -128]}, {"shape": [None, 128]},
    {"shape": None}, {"nested_dtype": "float16"}, {"nested_offset": None}, {"nested_blocksize": 0}, {"of_later": 1},
    {"nested_offset": math.nan}, {"shape": [True, 128]},
])  # fmt: skip
def test_layouts_that_are_not_supported(change):
    parts = by_hand(matrix(200, 128), "nf4", True)
    name = STATE + "nf4"
    stated = json.loads(bytes(parts[name].tolist()))
    assert layout_of(name, parts[name]) == Layout("nf4", (200, 128), torch.float32, 64, 256, stated["nested_offset"])
    with pytest.raises(ValueError, match=r"nf4 = \{.* is not supported: need quant_type nf4 or fp4"):
        layout_of(name, torch.tensor(list(json.dumps(stated | change).encode()), dtype=torch.uint8))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 9999])
def test_layouts_that_are_damaged(text):
    with pytest.raises(ValueError, match="X.quant_state.* is (damaged|not supported)"):
        layout_of("X.quant_state", torch.tensor(list(text), dtype=torch.uint8))
    with pytest.raises(ValueError, match="X.quant_state is damaged"):
        layout_of("X.quant_state", torch.rand(4))
