"""fp8.py: dequantised blocks, bounds on the rounding error, and checkpoints in DeepSeek's fp8 format."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minir1.model.config import ModelConfig
from minir1.model.fp8 import SCALE, block_of, dequantize, scale_shape
from minir1.model.hf import load, save
from minir1.model.transformer import Transformer
from minir1.tokenizer import word_level

SHAPES = [(1, 1), (128, 128), (129, 128), (127, 300), (300, 257), (5, 640)]
STATED = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}
TOKENIZER = word_level((), largest_number=24)


LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """q = round(w / s) in e4m3 with s = max |w| / 448 of the block, so that its largest weight is 448.

    weight: any float [rows, columns]. Returns q: float8_e4m3fn [rows, columns], and s: fp32, one number per block; s
    is 1 where a block is zero. With three bits after the leading one, and steps of 2^-9 at the lower end,
    |q·s - w| <= max(|w| / 17, s / 1024), and so at most 1/28 of the block's largest weight.
    """
    scale = weight.new_empty(scale_shape(weight.shape, block), dtype=torch.float32)
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i, rows in enumerate(weight.split(block[0])):
        for j, part in enumerate(rows.float().split(block[1], dim=1)):
            largest = part.abs().max()
            scale[i, j] = torch.where(largest > 0, largest / LARGEST, 1.0)
            part_q = q[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            part_q.copy_((part / scale[i, j]).clamp(-LARGEST, LARGEST))
    return q, scale


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expand(scale, shape, block=(128, 128)):
    """The scale of every weight, by index: [rows, columns]."""
    rows, columns = (torch.arange(n) // size for n, size in zip(shape, block))
    return scale[rows][:, columns]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_the_product_with_the_scale_of_the_block(shape):
    q = (100 * matrix(*shape)).to(torch.float8_e4m3fn)
    scale = matrix(*scale_shape(shape, (128, 128)), seed=1).abs()
    out = dequantize(q, scale, torch.empty(shape))
    assert torch.equal(out, q.float() * expand(scale, shape))
    low = dequantize(q, scale, torch.empty(shape, dtype=torch.bfloat16))
    assert torch.equal(low, out.bfloat16())  # the product in fp32, rounded once


def test_scale_shapes_by_hand():
    assert [scale_shape(shape, (128, 128)) for shape in SHAPES] == [(1, 1), (1, 1), (2, 1), (1, 3), (3, 3), (1, 5)]
    assert scale_shape((576, 7168), (128, 128)) == (5, 56)  # V3's kv_a_proj_with_mqa


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread_of", [1e-6, 1.0, 1e6], ids=str)
def test_round_trip_error_is_bounded(shape, spread_of):
    weight = spread_of * matrix(*shape, seed=2) ** 3  # small and large ones in a block
    q, scale = quantize(weight)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    error = (dequantize(q, scale, torch.empty_like(weight)) - weight).abs()
    each = expand(scale, shape)
    assert (error <= torch.maximum(weight.abs() / 17, each / 1024) * (1 + 1e-5)).all()
    assert (error <= each * 448 / 28 * (1 + 1e-5)).all()
    if weight.numel() > 1000:  # the bounds are tight
        assert error.div(weight.abs())[weight.abs() > each].max() > 0.9 / 17
        assert error.div(each).max() > 0.9 * 16


def test_the_largest_of_a_block_is_448_and_zeros_stay_zero():
    weight = torch.zeros(256, 256)
    weight[:128, 128:] = matrix(128, 128)
    q, scale = quantize(weight)
    assert q.float()[:128, 128:].abs().max() == 448 and torch.equal(scale != 1, weight[::128, ::128] != 0)
    back = dequantize(q, scale, torch.empty_like(weight))
    assert torch.equal(back == 0, q.float() == 0) and back[128:].eq(0).all()


def test_numbers_of_8_bits_come_back_exactly():
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight = q[~q.isnan()].view(2, 127) * 0.25
    q, scale = quantize(weight)
    assert scale.item() == 0.25 and torch.equal(dequantize(q, scale, torch.empty_like(weight)), weight)


def test_other_blocks():
    weight = matrix(50, 70)
    q, scale = quantize(weight, (16, 32))
    assert scale.shape == (4, 3)
    out = dequantize(q, scale, torch.empty_like(weight), (16, 32))
    assert torch.equal(out, q.float() * expand(scale, weight.shape, (16, 32)))


def test_shapes_that_do_not_fit():
    q, scale = quantize(matrix(130, 10))
    with pytest.raises(ValueError, match=r"need scales \(2, 1\).*got scales \(1, 2\)"):
        dequantize(q, scale.T, torch.empty(130, 10))
    with pytest.raises(ValueError, match=r"an output \(10, 130\)"):
        dequantize(q, scale, torch.empty(10, 130))


# ---------------------------------------------------------------- what config.json states


def test_block_of():
    assert block_of({}) is None and block_of({"quantization_config": None}) is None
    assert block_of({"quantization_config": STATED}) == (128, 128)
    assert block_of({"quantization_config": STATED | {"weight_block_size": [64, 32]}}) == (64, 32)


@pytest.mark.parametrize(
    "change,match",
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq' is not supported, only 'fp8'"),
        ({"quant_method": None}, "quant_method = None"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported, only 'e4m3'"),
        ({"weight_block_size": None}, "weight_block_size = None"),
        ({"weight_block_size": [128]}, r"weight_block_size = \[128\]"),
        ({"weight_block_size": [0, 128]}, r"weight_block_size = \[0, 128\]"),
        ({"weight_block_size": [True, 128]}, r"weight_block_size = \[True, 128\]"),
    ],
)
def test_other_quantisation_is_refused_by_name(change, match):
    with pytest.raises(ValueError, match=match):
        block_of({"quantization_config": STATED | change})


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(model, folder, its tensors): bf16, sizes that are no multiples of 128, a MoE in three shards."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab=64, dim=136, layers=2, heads=2, q_lora=20, kv_lora=130, nope=8, rope=4, v_dim=72, ffn=260,
        expert_ffn=132, experts=4, init_std=0.2,
    )
    model, folder = Transformer(config).bfloat16(), tmp_path_factory.mktemp("bf16")
    model.blocks[1].ffn.bias.normal_()
    save(model, TOKENIZER, folder, shard_bytes=500_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return model, folder, {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def packed(tensors):
    """As DeepSeek publishes: projections in fp8 beside their scales; embedding, head, norms and router as they are."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            out[name], out[name + SCALE] = quantize(tensor)
    return out


def write(tensors, source, folder, stated=STATED, shards=1):
    """A folder with these tensors, and the rest of `source`."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    names = sorted(tensors)  # dealt out in turn, so that scales are in another file than their weights
    where = {name: f"model-{i % shards}-of-{shards}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
def test_load_dequantises(original, tmp_path, shards):
    model, source, tensors = original
    stored = packed(tensors)
    assert sum(name.endswith(SCALE) for name in stored) > 20
    write(stored, source, tmp_path, shards=shards)
    half, full = load(tmp_path)[0], load(tmp_path, dtype=torch.float32)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    down = "model.layers.1.mlp.experts.2.down_proj.weight"
    scales = expand(stored[down + SCALE], stored[down].shape)
    assert torch.equal(full.blocks[1].ffn.experts.down[2], stored[down].float() * scales)
    assert torch.equal(half.blocks[1].ffn.experts.down[2], full.blocks[1].ffn.experts.down[2].bfloat16())
    assert torch.equal(half.blocks[1].ffn.bias, model.blocks[1].ffn.bias)
    for name, parameter in model.named_parameters():
        error = (full.get_parameter(name) - parameter.float()).abs()
        assert error.max() <= parameter.float().abs().max() / 28 * 1.00001, name
    assert torch.equal(full.embedding.weight, model.embedding.weight.float())
    save(half, TOKENIZER, tmp_path)  # in bf16
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(load(tmp_path)[0].blocks[0].ffn.down.weight, half.blocks[0].ffn.down.weight)


def test_fp8_that_does_not_fit_is_named(original, tmp_path):
    _, source, tensors = original
    stored = packed(tensors)
    attention = "model.layers.0.self_attn."
    del stored[attention + "o_proj.weight" + SCALE]
    stored[attention + "q_a_proj.weight" + SCALE] = torch.ones(9, 9)
    stored["model.norm.weight" + SCALE] = torch.ones(1, 1)  # of a tensor that is not in fp8
    stored["model.layers.0.input_layernorm.weight"] = torch.ones(136).to(torch.float8_e4m3fn)
    write(stored, source, tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    for line in (
        f"missing: {attention}o_proj.weight_scale_inv",
        f"shape of {attention}q_a_proj.weight_scale_inv: (9, 9), expected (1, 2)",
        "surplus: model.norm.weight_scale_inv",
        "dtype of model.layers.0.input_layernorm.weight: F8_E4M3",
    ):
        assert line in str(error.value)


def test_fp8_that_config_json_does_not_state(original, tmp_path):
    _, source, tensors = original
    write(packed(tensors), source, tmp_path, stated=None)
    with pytest.raises(ValueError, match=r"surplus: .*_scale_inv; .*dtype of .*_proj.weight: F8_E4M3"):
        load(tmp_path)
