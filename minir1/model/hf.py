"""Hugging Face folders in and out: config.json, model.safetensors, tokenizer files.

MLA with sigmoid scores is DeepseekV3ForCausalLM (a dense one has first_k_dense_replace = layers); dense GQA with biased
projections is Qwen2ForCausalLM, without bias LlamaForCausalLM. Nothing but safetensors is read.

AutoTokenizer of transformers 5 opens every Qwen2 folder as Qwen2Tokenizer, which keeps vocabulary and merges and puts
Qwen's own splitting in place of tokenizer.json's: there, PreTrainedTokenizerFast.from_pretrained is what opens another
tokenizer as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minir1.model.hf_config import from_hf_config, to_hf_config
from minir1.model.hf_tensors import to_hf_tensors
from minir1.model.transformer import Transformer
from minir1.tokenizer import Tokenizer


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a folder that transformers opens as it is. ValueError where no Hugging Face class computes the same."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = to_hf_config(model.config) | {"torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    (path / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in to_hf_tensors(model).items()}
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(path)


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """Read a folder of one of the supported architectures.

    dtype: of the weights; None keeps what is stored. Raises ValueError naming what is missing, damaged, surplus or of
    another shape, and when the tokenizer has tokens that the model has not.
    """
    path = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise ValueError(f"{path} holds no {name}: not a checkpoint folder")
    model = Transformer(from_hf_config(json.loads((path / "config.json").read_text()))).to(device)
    wanted = to_hf_tensors(model)
    try:
        with safe_open(str(path / "model.safetensors"), framework="pt") as file, torch.no_grad():
            held = set(file.keys())
            wrong = [f"missing: {name}" for name in sorted(set(wanted) - held)]
            wrong += [f"surplus: {name}" for name in sorted(held - set(wanted))]
            for name in sorted(held & set(wanted)):
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(wanted[name].shape):
                    wrong.append(f"shape of {name}: {shape}, expected {tuple(wanted[name].shape)}")
            if len(wrong) > 8:
                wrong[8:] = [f"and {len(wrong) - 8} more"]
            if wrong:
                raise ValueError(f"{path / 'model.safetensors'} does not fit its config.json: {'; '.join(wrong)}")
            stored = torch.float32
            for name, place in wanted.items():
                tensor = file.get_tensor(name)
                stored = tensor.dtype if tensor.ndim > 1 else stored
                place.copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged: {error}") from error
    tokenizer = Tokenizer.load(path)
    if tokenizer.size > model.config.vocab:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.size} tokens, the model only {model.config.vocab}")
    return model.to(dtype or stored), tokenizer
