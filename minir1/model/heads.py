"""Value head, and the transformer that ends in one number: a critic or a reward model, with its folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minir1.distributed import rank
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.hf_config import GRANITE, SCALAR, architecture, class_of, to_hf_config
from minir1.model.hf_tensors import to_hf_tensors
from minir1.model.lora import adapters
from minir1.model.packed_linear import packed_layers
from minir1.model.shards import gathered
from minir1.model.transformer import Transformer
from minir1.ops.chunks import no_autocast
from minir1.tokenizer import Tokenizer


class ValueHead(nn.Module):
    """v = h·wᵀ: V of the state whose hidden state is h. w starts at zero, and so does every value.

    >>> ValueHead(32)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] in any dtype -> fp32 [...], fp64 of fp64, also under torch.autocast."""
        # A 16-bit product would round values to three digits, and advantages are differences of values.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with no_autocast(hidden):
            return F.linear(hidden.to(dtype), self.weight.to(dtype)).squeeze(-1)


class SelfCheckHead(nn.Module):
    """e_t = f(h_t, a_t): what the model knows about its own answer after the token a_t, as two logits [..., 2].

    Entry 0: the answer will be right; entry 1: the current try is a solution. f is one hidden layer; the state h_t has
    read a_t. Trained on states without gradient, by the squared error of σ(e_t) (experiments/self_verify.py).

    >>> SelfCheckHead(32)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 2])
    """

    def __init__(self, dim: int, inner: int = 64):
        super().__init__()
        self.norm, self.inner, self.out = nn.RMSNorm(dim), nn.Linear(dim, inner), nn.Linear(inner, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] in any dtype -> logits fp32 [..., 2]."""
        with no_autocast(hidden):
            return self.out(F.silu(self.inner(self.norm(hidden.float()))))


class ScalarModel(nn.Module):
    """A transformer that ends in one number: a separate critic, or a reward model.

    The trunk is changed in place: its language head and MTP modules are removed.
    """

    def __init__(self, trunk: Transformer, head: ValueHead):
        super().__init__()
        if head.weight.shape != (1, trunk.config.dim):
            raise ValueError(f"a head of width {head.weight.shape[-1]} on a trunk of width {trunk.config.dim}")
        trunk.head, trunk.mtp = None, nn.ModuleList()
        trunk.config = replace(trunk.config, tied=False, mtp_depth=0)
        self.trunk, self.head = trunk, head

    @property
    def config(self) -> ModelConfig:
        """That of the trunk."""
        return self.trunk.config

    def values(self, tokens: Tensor, *, lengths: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """value[b, t] = V(x_<t), the value of the state before x_t, from the hidden state of x_{t-1}.

        Arguments as for `Transformer.logprob`. Returns fp32 [B, T], zero where not wanted, in column 0 and at padding.
        """
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask {tuple(mask.shape)}: expected the tokens' shape, {tuple(tokens.shape)}")
        hidden = self.trunk.hidden(tokens, lengths=lengths)
        column = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        wanted = column > 0
        if lengths is not None:
            wanted = wanted & (column < lengths.to(tokens.device).unsqueeze(1))
        if mask is not None:
            wanted = wanted & mask.bool()
        return F.pad(self.head(hidden)[:, :-1], (1, 0)).masked_fill(~wanted, 0.0)

    def score(self, tokens: Tensor, *, lengths: Tensor | None) -> Tensor:
        """One number per row, from the state of its last token. tokens: int64 [B, T], right-padded -> fp32 [B].

        lengths: int64 [B] (None: full rows). ValueError for a row without tokens.
        """
        rows, columns = tokens.shape
        if lengths is None:
            lengths = torch.full((rows,), columns, device=tokens.device)
        if (lengths < 1).any():
            raise ValueError(f"lengths = {lengths.tolist()[:16]}: a row without tokens has no score")
        hidden = self.trunk.hidden(tokens, lengths=lengths)
        last = (lengths - 1).to(hidden.device)
        return self.head(hidden[torch.arange(rows, device=hidden.device), last])


def scalar_class(config: ModelConfig) -> str:
    """The Hugging Face class of a scalar model with this trunk; ValueError where none computes the same."""
    name = architecture(replace(config, tied=False, mtp_depth=0))
    if name == GRANITE:
        raise ValueError(f"{name} has no class for sequence classification in transformers")
    return name.replace("ForCausalLM", SCALAR)


def save(model: ScalarModel, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a folder that transformers opens as …ForSequenceClassification with one label, `score.weight` [1, D].

    transformers reads the number at the last token that is not the padding token. Where padding and end token are the
    same, pad_token_id is therefore None: transformers then takes single rows only, with the same result as here.
    ValueError where no such class computes the same, or the model has adapters or weights in 4 bits.
    """
    if adapters(model) or packed_layers(model):
        raise ValueError("the model has adapters, or weights in 4 bits: lora.merge makes it a plain one")
    config = model.config
    pad = tokenizer.pad if config.pad is None else config.pad
    values = to_hf_config(config) | {
        "architectures": [scalar_class(config)],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "pad_token_id": None if pad in (tokenizer.eos, config.eos) else pad,
    }
    with gathered(model):
        if rank() == 0:
            hf.write(path, _tensors(model), values)
            tokenizer.save(Path(path))


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[ScalarModel, Tokenizer]:
    """Read a folder that `save`, or transformers, wrote. Arguments and errors as for `hf.load`.

    ValueError for a folder with a language model, or with several labels.
    """
    values, _ = hf.describe(path)
    name = class_of(values)
    if not name.endswith(SCALAR):
        name = "model whose config.json names no architecture" if name == "?" else name
        raise ValueError(f"{path} holds a {name}, not a …{SCALAR}: no scalar model; hf.load opens language models")
    tokenizer, config = hf.tokenizer_and_config(path, values | {"architectures": [name.replace(SCALAR, "ForCausalLM")]})
    labels = len(values["id2label"]) if values.get("id2label") else values.get("num_labels", 2)  # transformers' default
    if labels != 1:
        raise ValueError(f"{path} has {labels} labels: a scalar model has 1")
    make = lambda config: ScalarModel(Transformer(config), ValueHead(config.dim))
    return hf.read(path, replace(config, mtp_depth=0), make, _tensors, values, device, dtype), tokenizer


def _tensors(model: ScalarModel) -> dict[str, Tensor]:
    """Their names -> tensors that share the model's memory."""
    return to_hf_tensors(model.trunk) | {"score.weight": model.head.weight}
