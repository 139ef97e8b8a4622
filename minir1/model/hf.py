"""Hugging Face folders in and out: config.json, safetensors in one file or in shards, tokenizer files.

hf_config.py translates config.json, hf_tensors.py the names of tensors. Only safetensors files are read, one tensor at
a time, straight into the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minir1.files import read_json, write_json
from minir1.model.config import ModelConfig
from minir1.model.fp8 import SCALE, block_of, dequantize, scale_shape
from minir1.model.hf_config import SCALAR, class_of, from_hf_config, to_hf_config
from minir1.model.hf_tensors import EMBEDDING, copy_of, to_hf_tensors, with_mtp_of
from minir1.model.lora import adapters, load_adapters
from minir1.model.transformer import Transformer
from minir1.model.typed import is_a, shown
from minir1.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = "F8_E4M3"
MANY = 2**18  # a size that is allowed without a tensor that has it, so that the missing tensor is named
SHOWN = 4  # names of each kind in an error


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path, shard_bytes: int = 5 * 2**30) -> None:
    """Write a folder that transformers opens as it is.

    Weights of more than `shard_bytes` are divided into files of at most that size (a larger tensor has its own file)
    with an index. Weights of an earlier save are deleted when all new files are written. ValueError where no Hugging
    Face class computes the same, or the model has adapters.
    """
    if adapters(model):
        raise ValueError("the model has adapters: lora.merge folds them in, lora.save_adapters writes them alone")
    config = to_hf_config(model.config)
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


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """Read a folder of one of the supported architectures, or of adapters (lora.py) together with their base.

    dtype: of the weights; None means that of the stored embedding (bf16 where it is fp8). Block-quantised fp8 weights
    are dequantised. Memory: the weights once, plus one tensor. ValueError names what is missing, damaged, surplus or of
    another shape; ValueError too if the tokenizer has more tokens than the model.
    """
    path = Path(path)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        model, tokenizer = load(base_of(path), device, dtype)
        load_adapters(model, path)
        return model, tokenizer
    values, generation = describe(path)
    name = class_of(values)
    if name.endswith(SCALAR):
        raise ValueError(f"{path} holds a {name}, no language model: minir1.model.heads.load opens scalar models")
    tokenizer, config = tokenizer_and_config(path, values)
    tokenizer.generation = generation
    return read(path, config, Transformer, to_hf_tensors, values, device, dtype), tokenizer


def describe(path: str | Path) -> tuple[dict, dict]:
    """config.json, completed by the special tokens of generation_config.json, and generation_config.json."""
    path = Path(path)
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


def read(path, config: ModelConfig, make: Callable, tensors_of: Callable, values: dict, device, dtype) -> nn.Module:
    """Read a folder's weights into the model that `make` builds on the meta device; the rest as for `load`.

    make: configuration -> model; tensors_of: model -> their names and tensors that share the model's memory.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, DTYPES.values()))}, or None")
    path, block = Path(path), block_of(values)
    stored = _headers(_files(path))
    _check_sizes(path, config, stored)
    with torch.device("meta"):
        model = make(with_mtp_of(config, stored))
    tensors = tensors_of(model)
    copies = {name: original for name in stored if (original := copy_of(name, model.config)) in tensors}
    wrong = _misfits(tensors, {name: tensor for name, tensor in stored.items() if name not in copies}, block)
    if wrong:
        file = path / (WEIGHTS if (path / WEIGHTS).exists() else INDEX)
        raise ValueError(f"{file} does not fit its config.json: {'; '.join(wrong)}")
    model = _allocate(model, device, dtype or DTYPES.get(stored[EMBEDDING].dtype, torch.bfloat16))
    tensors = tensors_of(model)
    _fill(tensors, stored, block)
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


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it


def _files(path: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        if pickles:
            raise ValueError(
                f"{path} holds no {WEIGHTS}, only {pickles[0]}: a pickle may run any code, so none is read; convert "
                "it with safetensors.torch.save_file"
            )
        raise ValueError(f"{path} holds no {WEIGHTS} and no {INDEX}")
    where = read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path / INDEX} has no weight_map")
    names = sorted(set(map(str, where.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path / INDEX} names {name!r}: must be a .safetensors file beside it")
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise ValueError(f"{path / INDEX} names shards that are not there: {_some(absent)}")
    return [path / name for name in names]


def _open(file: Path):
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _headers(files: list[Path]) -> dict[str, Stored]:
    """The tensors in the files, by name."""
    stored: dict[str, Stored] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():
                if name.endswith("rotary_emb.inv_freq"):  # of old Llama files: config.json counts, as in transformers
                    continue
                if name in stored:
                    raise ValueError(f"{name} is in two shards, {stored[name].file.name} and {file.name}")
                part = opened.get_slice(name)
                stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    return stored


def _misfits(wanted: dict[str, Tensor], stored: dict[str, Stored], block) -> list[str]:
    """The differences between the stored tensors and the wanted ones, at most SHOWN of each kind by name."""
    shapes, packed = {name: tuple(tensor.shape) for name, tensor in wanted.items()}, set()
    if block:
        packed = {name for name in wanted if name in stored and stored[name].dtype == FP8 and len(shapes[name]) == 2}
        shapes |= {name + SCALE: scale_shape(shapes[name], block) for name in packed}
    missing = [f"missing: {name}" for name in shapes if name not in stored]
    surplus = [f"surplus: {name}" for name in stored if name not in shapes]
    misshapen, mistyped = [], []
    for name in shapes.keys() & stored.keys():
        _, shape, dtype = stored[name]
        if shape != shapes[name]:
            misshapen.append(f"shape of {name}: {shape}, expected {shapes[name]}")
        if dtype not in DTYPES and name not in packed:
            mistyped.append(f"dtype of {name}: {dtype}, supported are {', '.join(DTYPES)}, and {FP8} with scales")
    return [_some(sorted(kind), "; ") for kind in (missing, surplus, misshapen, mistyped) if kind]


def _some(names: list[str], between: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join(names[:SHOWN] + more)


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


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], stored: dict[str, Stored], block: tuple[int, int] | None) -> None:
    """Copy every stored tensor into the model's, one file after another."""
    for file in sorted({stored[name].file for name in tensors}):
        with _open(file) as opened:
            for name in (name for name in tensors if stored[name].file == file):
                tensor, target = opened.get_tensor(name), tensors[name]
                if block and stored[name].dtype == FP8:
                    with _open(stored[name + SCALE].file) as shard:  # may be another one
                        scale = shard.get_tensor(name + SCALE)
                    dequantize(tensor.to(target.device), scale.to(target.device), target, block)
                else:
                    target.copy_(tensor)


def _repeats(stored: Stored, name: str, original: Tensor) -> bool:
    """Whether a stored tensor is equal to one of the model, in its dtype; compared in parts, which need less memory."""
    with _open(stored.file) as opened:
        copy = opened.get_tensor(name)
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
