"""Hugging Face folders in and out: config.json, safetensors in one file or in shards, tokenizer files.

hf_config.py translates config.json, hf_tensors.py the names of tensors. Only safetensors files are read, one tensor at
a time, straight into the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minir1.distributed import rank
from minir1.files import read_json, write_json
from minir1.model import four_bit, fp8
from minir1.model.config import ModelConfig
from minir1.model.four_bit import PARTS, STATE, Layout, is_four_bit, layout_of, packed_of, stored_as
from minir1.model.fp8 import SCALE, block_of, scale_shape
from minir1.model.hf_config import SCALAR, class_of, from_hf_config, to_hf_config
from minir1.model.hf_files import INDEX, WEIGHTS, Stored, files_of, headers, refuse_gguf, some, tensors_in
from minir1.model.hf_tensors import EMBEDDING, copy_of, their_module, to_hf_tensors, with_mtp_of
from minir1.model.lora import adapters, load_adapters
from minir1.model.packed_linear import PackedLinear, packed_layers
from minir1.model.shards import gathered
from minir1.model.transformer import Transformer
from minir1.model.typed import is_a, shown
from minir1.tokenizer import Tokenizer

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = "F8_E4M3"
MANY = 2**18  # a size that is allowed without a tensor that has it, so that the missing tensor is named


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path, shard_bytes: int = 5 * 2**30) -> None:
    """Write a folder that transformers opens as it is.

    Weights of more than `shard_bytes` are divided into files of at most that size (a larger tensor has its own file)
    with an index. Weights of an earlier save are deleted when all new files are written. ValueError where no Hugging
    Face class computes the same, or the model has adapters or weights in 4 bits. Of a model in shards every rank
    gathers the weights, in the dtype of the computation, and rank 0 writes them.
    """
    if adapters(model):
        raise ValueError("the model has adapters: lora.merge folds them in, lora.save_adapters writes them alone")
    if packed_layers(model):
        raise ValueError("the model's weights are in 4 bits, which are not written: lora.merge dequantises them")
    config = to_hf_config(model.config)
    with gathered(model):
        if rank() == 0:
            write(path, to_hf_tensors(model), config, shard_bytes)
            write_json(Path(path) / "generation_config.json", _generation(config, tokenizer.generation))
            tokenizer.save(path)


def write(path: str | Path, tensors: dict[str, Tensor], config: dict, shard_bytes: int = 5 * 2**30) -> None:
    """Write config.json and the named tensors, in one file or in shards, as `save` describes."""
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes = {shard_bytes}: must be positive")
    path, dtype = Path(path), str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    path.mkdir(parents=True, exist_ok=True)
    files = _shards(tensors, shard_bytes)
    for file, names in files.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(shard, str(path / f"{file}.part"), metadata={"format": "pt"})
        del shard
    for old in [*path.glob(WEIGHTS), *path.glob("model-*-of-*.safetensors"), *path.glob(INDEX)]:
        old.unlink()
    for file in files:
        os.replace(path / f"{file}.part", path / file)
    if len(files) > 1:
        counts = {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        where = {name: file for file, names in files.items() for name in names}
        write_json(path / INDEX, {"metadata": counts, "weight_map": dict(sorted(where.items()))})
    write_json(path / "config.json", config | {"torch_dtype": dtype})


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, packed: bool = False
) -> tuple[Transformer, Tokenizer]:
    """Read a folder of one of the supported architectures, or of adapters (lora.py) together with their base.

    dtype: of the weights; None means that of the stored embedding (bf16 where it is fp8). Block-quantised fp8 weights
    are dequantised, and so are those in bitsandbytes' 4 bits (four_bit.py), unless `packed`: the matrices of the blocks
    then stay in 4 bits and are dequantised for each product, with equal results. Embedding, head, norms and what the
    folder has in 16 bits are as usual. Dense models with grouped-query attention only; such weights are not trained,
    but adapters on them are (QLoRA). Memory: the weights once, plus one tensor. ValueError names what is missing,
    damaged, surplus or of another shape; ValueError too if the tokenizer has more tokens than the model.
    """
    path = Path(path)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        model, tokenizer = load(base_of(path), device, dtype, packed)
        load_adapters(model, path)
        return model, tokenizer
    values, generation = describe(path)
    name = class_of(values)
    if name.endswith(SCALAR):
        raise ValueError(f"{path} holds a {name}, no language model: minir1.model.heads.load opens scalar models")
    tokenizer, config = tokenizer_and_config(path, values)
    tokenizer.generation = generation
    return read(path, config, Transformer, to_hf_tensors, values, device, dtype, packed), tokenizer


def describe(path: str | Path) -> tuple[dict, dict]:
    """config.json, completed by the special tokens of generation_config.json, and generation_config.json."""
    path = Path(path)
    if not (path / "config.json").exists():
        refuse_gguf(path)
    values, generation = read_json(path / "config.json", "not a checkpoint folder"), {}
    if (path / "generation_config.json").exists():
        generation = read_json(path / "generation_config.json")
    for key in ENDS:
        stated = generation.get(key)
        if not all(is_a(token, "int | None") for token in (stated if isinstance(stated, list) else [stated])):
            raise ValueError(f"{path / 'generation_config.json'}: {key} = {shown(stated)}: must be a token, or several")
    return values | {key: generation.get(key) for key in ENDS if values.get(key) is None}, generation


def tokenizer_and_config(path: str | Path, values: dict) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and configuration of a folder with the config.json `values`, checked against each other."""
    config, tokenizer = from_hf_config(values), Tokenizer.load(path)
    if tokenizer.size > config.vocab:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.size} tokens, the model only {config.vocab}")
    return tokenizer, config


def read(
    path, config: ModelConfig, make: Callable, tensors_of: Callable, values: dict, device, dtype, packed: bool = False
) -> nn.Module:
    """Read a folder's weights into the model that `make` builds on the meta device; the rest as for `load`.

    make: configuration -> model; tensors_of: model -> their names and tensors that share the model's memory.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, DTYPES.values()))}, or None")
    path, in_four_bits = Path(path), is_four_bit(values)
    block = None if in_four_bits else block_of(values)
    stored = headers(files_of(path))
    _check_sizes(path, config, stored)
    layouts = _layouts(stored) if in_four_bits else {}
    if in_four_bits and not layouts:
        raise ValueError(f"{path}: config.json states bitsandbytes' 4 bits, but none of the weights are stored so")
    if packed and not (layouts and config.attention == "gqa" and not config.experts):
        kind = class_of(values) + ("" if layouts else ", not in 4 bits")
        raise ValueError(
            f"{path} holds a {kind}: packed = True is for weights in bitsandbytes' 4 bits of dense models with "
            "grouped-query attention (Llama, Qwen, Granite)"
        )
    with torch.device("meta"):
        model = make(with_mtp_of(config, stored))
    tensors = tensors_of(model)
    copies = {name: original for name in stored if (original := copy_of(name, model.config)) in tensors}
    wrong = _misfits(tensors, {name: tensor for name, tensor in stored.items() if name not in copies}, block, layouts)
    if wrong:
        file = path / (WEIGHTS if (path / WEIGHTS).exists() else INDEX)
        raise ValueError(f"{file} does not fit its config.json: {'; '.join(wrong)}")
    layers = _pack(model, layouts) if packed else {}
    model = _allocate(model, device, dtype or DTYPES.get(stored[EMBEDDING].dtype, torch.bfloat16))
    tensors = tensors_of(model)
    _fill(tensors | layers, stored, block, layouts)
    for name, original in copies.items():
        if not _repeats(stored[name], name, tensors[original]):
            raise ValueError(f"{stored[name].file}: {name} differs from {original}, which the model has in its place")
    return model


def _check_sizes(path: Path, config: ModelConfig, stored: dict[str, Stored]) -> None:
    """ValueError for a model far larger than its weights, before it is built, which could take hours."""
    largest = max((n for tensor in stored.values() for n in tensor.shape), default=0)
    if max(config.layers, config.moe_layers * config.experts) > len(stored):
        parts = f"{config.layers} layers, {config.moe_layers} of them with {config.experts} experts"
        raise ValueError(f"{path}: config.json has {parts}, the weights are only {len(stored)} tensors")
    sizes = [config.vocab, config.dim, config.heads, config.kv_heads, config.head_size, config.ffn, config.expert_ffn]
    sizes += [config.shared_experts, config.q_lora or 0, config.kv_lora, config.nope, config.rope, config.v_dim]
    if max(sizes) > max(largest, MANY):
        raise ValueError(f"{path}: config.json has a size of {max(sizes)}, the largest of the weights is {largest}")


def base_of(adapters: Path) -> Path:
    """The folder of the model that the adapters were trained on."""
    base = read_json(adapters / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not os.path.isfile(os.path.join(base, "config.json")):
        raise ValueError(f"{adapters}: base_model_name_or_path = {shown(base)} is no folder with a config.json")
    return Path(base)


def _layouts(stored: dict[str, Stored]) -> dict[str, Layout]:
    """Name of a matrix in bitsandbytes' 4 bits -> how it is stored."""
    states = [name for name in stored if STATE in name]
    return {name.split(STATE)[0]: layout_of(name, state) for name, state in tensors_in(stored, states)}


def _misfits(wanted: dict[str, Tensor], stored: dict[str, Stored], block, layouts: dict[str, Layout]) -> list[str]:
    """The differences between the stored tensors and the wanted ones, at most SHOWN of each kind by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    misshapen, mistyped, only = [], [], {}  # only: the dtype of those that have no choice of DTYPES
    if block:
        only = {n: FP8 for n in wanted if n in stored and stored[n].dtype == FP8 and len(shapes[n]) == 2}
        shapes |= {name + SCALE: scale_shape(shapes[name], block) for name in only}
    for name in layouts.keys() & wanted.keys() & stored.keys():
        if layouts[name].shape != shapes[name]:
            misshapen.append(f"shape of {name}: {layouts[name].shape} in 4 bits, expected {shapes[name]}")
        for part, (shape, dtype) in stored_as(name, layouts[name], stored[name].dtype).items():
            shapes[part], only[part] = shape, dtype
        state = name + STATE + layouts[name].kind
        shapes[state], only[state] = stored[state].shape if state in stored else (), "U8"
    missing = [f"missing: {name}" for name in shapes if name not in stored]
    surplus = [f"surplus: {name}" for name in stored if name not in shapes]
    for name in shapes.keys() & stored.keys():
        _, shape, dtype = stored[name]
        if shape != shapes[name]:
            misshapen.append(f"shape of {name}: {shape}, expected {shapes[name]}")
        if dtype != only.get(name, dtype if dtype in DTYPES else None):
            which = only.get(name) or f"one of {', '.join(DTYPES)}, or {FP8} with scales"
            mistyped.append(f"dtype of {name}: {dtype}, expected {which}")
    return [some(sorted(kind), "; ") for kind in (missing, surplus, misshapen, mistyped) if kind]


def _allocate(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Allocate a model that is on the meta device. Weights are undefined; the selection bias is zero, because
    checkpoints with softmax scores have none."""
    model = model.to(dtype)
    if model.config.tied:  # allocated once: `Transformer._apply` ties it again
        model.head.weight = None
    # As `to_empty`, whose `empty_like` of a meta tensor imports 500 modules (33 MiB).
    model = model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _pack(model: Transformer, layouts: dict[str, Layout]) -> dict[str, PackedLinear]:
    """Replace the layers of the blocks whose matrices are in 4 bits. Their name of the matrix -> the new layer."""
    layers = {}
    for ours, layer in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(layer, nn.Linear) and (name := f"{their_module(ours)}.weight") in layouts:
            layers[name] = PackedLinear(layer, layouts[name])
            model.set_submodule(ours, layers[name])
    return layers


@torch.no_grad()
def _fill(targets: dict[str, Tensor | PackedLinear], stored: dict[str, Stored], block, layouts) -> None:
    """Copy every stored tensor into the model's, one file after another."""
    for name, tensor in tensors_in(stored, targets):
        target = targets[name]
        if name in layouts:
            others = [name + part for part in PARTS[1:] if name + part in stored]  # may be in other shards
            packed = packed_of({name: tensor} | dict(tensors_in(stored, others)), name, layouts[name])
            if isinstance(target, PackedLinear):
                target.fill(packed)
            else:
                four_bit.dequantize(packed.to(target.device), layouts[name], target)
        elif block and stored[name].dtype == FP8:
            ((_, scale),) = tensors_in(stored, [name + SCALE])  # may be in another shard
            fp8.dequantize(tensor.to(target.device), scale.to(target.device), target, block)
        else:
            target.copy_(tensor)


def _repeats(stored: Stored, name: str, original: Tensor) -> bool:
    """Whether a stored tensor is equal to one of the model, in its dtype; compared in parts, which need less memory."""
    ((_, copy),) = tensors_in({name: stored}, [name])
    same = copy.shape == original.shape
    return same and all(torch.equal(a.to(b), b) for a, b in zip(copy.split(4096), original.split(4096)))


def _shards(tensors: dict[str, Tensor], limit: int) -> dict[str, list[str]]:
    """File name -> the names of its tensors, in the model's order; a file over `limit` bytes holds one tensor."""
    parts: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        if not parts or tensor.nbytes > free:
            parts.append([])
            free = limit
        parts[-1].append(name)
        free -= tensor.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts, start=1)}


def _generation(config: dict, loaded: dict) -> dict:
    """generation_config.json: that of the loaded folder with the special tokens of config.json.

    A list of end tokens stays if the model's is among them.
    """
    ends = {key: config[key] for key in ENDS if config.get(key) is not None}
    several = loaded.get("eos_token_id")
    if isinstance(several, list) and ends.get("eos_token_id") in several:
        ends["eos_token_id"] = several
    return loaded | ends
