"""Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + s·B A x, and only A and B are trained.

    A: [r, in], drawn as nn.Linear draws its weights      B: [out, r], zero      s = α / r

So a model with new adapters equals the model without them, and switching them off gives the reference policy of
reinforcement learning without a second copy of the weights. Files have PEFT's format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minir1.files import read_json, write_json
from minir1.model.hf_tensors import NAMES, their_module, uncompiled
from minir1.model.moe import Experts, grouped_linear
from minir1.model.packed_linear import PackedLinear, unpack
from minir1.model.transformer import Transformer
from minir1.model.typed import is_a, shown

ATTENTION = ("wq", "wk", "wv", "wo", "wq_a", "wq_b", "wkv_a", "wkv_b")
FEED_FORWARD = ("gate", "up", "down")  # of GQA without experts: see add_adapters
EXPERTS = ("gate_up", "down")  # the stacked matrices of routed experts, all of them where "experts" is a target
TARGETS = (*ATTENTION, *FEED_FORWARD, "experts")
PEFT_ONLY = {  # fields of adapter_config.json and the supported values; the first is the default
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),  # false is the first layer
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base as well
}
PEFT_IGNORED = (  # they change nothing in a trained adapter, or only together with another field
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config lora_dropout "
    "lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config task_type"
)
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # the parameters of EXPERTS


class LoRALinear(nn.Module):
    """A frozen nn.Linear, or layer in 4 bits (QLoRA), and its adapter. x: [..., in] -> [..., out]."""

    def __init__(self, base: nn.Linear | PackedLinear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale, self.on = base, alpha / rank, True
        like = base.like if isinstance(base, PackedLinear) else base.weight
        self.A = nn.Parameter(like.new_empty(rank, base.in_features))
        self.B = nn.Parameter(like.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias + s·B(A x)"""
        y = self.base(x)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.on else y

    @property
    def weight(self) -> Tensor:
        """W + s·BA: [out, in], for what needs the matrix itself (MLA's absorbed decoding) and for merging."""
        return self.base.weight + self.scale * self.B @ self.A if self.on else self.base.weight


class LoRAExperts(nn.Module):
    """The adapter of one stacked matrix [E, out, in]: A and B for each expert."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        experts, out, inner = weight.shape
        self.scale, self.on = alpha / rank, True
        self.A = nn.Parameter(weight.new_empty(experts, rank, inner))
        self.B = nn.Parameter(weight.new_zeros(experts, out, rank))
        nn.init.uniform_(self.A, -(inner**-0.5), inner**-0.5)  # what kaiming_uniform with a = √5 is for one matrix

    def forward(self, x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
        """y + s·B_e(A_e x) for the rows of each expert e. x: [N, in]; y: [N, out]; ends: int32 [E]."""
        if not self.on:
            return y
        return y + self.scale * grouped_linear(grouped_linear(x, self.A, ends), self.B, ends)

    def delta(self) -> Tensor:
        """s·BA: [E, out, in]"""
        return self.scale * torch.bmm(self.B, self.A)


def adapters(model: nn.Module) -> dict[str, LoRALinear | LoRAExperts]:
    """Name in the model -> adapter."""
    return {uncompiled(name): m for name, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAExperts))}


def add_adapters(
    model: Transformer, rank: int, alpha: float, targets: Sequence[str] | None = None
) -> list[nn.Parameter]:
    """Freeze the model and add an adapter to each target; returns the parameters to train.

    targets: names of projections in the blocks (see TARGETS), "experts" for the stacked matrices of routed experts;
    those that this architecture lacks are skipped. None: attention, and experts or feed-forward. ValueError if
    the model has adapters, rank is below 1, a name is unknown, or no target is left; also for gate, up or down in a
    model whose Hugging Face class has experts, even if the model has none: PEFT would take these names for those of
    the routed experts.
    """
    config = model.config
    dense = config.attention == "gqa" and not config.experts
    if targets is None:
        targets = (*ATTENTION, *(FEED_FORWARD if dense else ["experts"] if config.experts else []))
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(f"targets {', '.join(unknown)}: allowed are {', '.join(TARGETS)}")
    if not dense and set(targets) & set(FEED_FORWARD):
        raise ValueError(
            f"targets {', '.join(targets)}: gate, up and down only with attention = 'gqa' and experts = 0, not with "
            f"{config.attention!r} and {config.experts}"
        )
    if not 1 <= rank <= config.dim or not 0 < alpha <= 1e6:
        raise ValueError(f"rank = {rank} (1 to dim = {config.dim}), alpha = {alpha} (above 0, to 1e6)")
    if adapters(model):
        raise ValueError("the model has adapters already: merge them first")
    model.requires_grad_(False)
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if name in targets and isinstance(child, (nn.Linear, PackedLinear)):
                    setattr(module, name, LoRALinear(child, rank, alpha))
            if isinstance(module, Experts) and "experts" in targets:
                for name in EXPERTS:
                    module.adapters[name] = LoRAExperts(getattr(module, name), rank, alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"targets {', '.join(targets)}: the model has none of them")
    return trained


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters off: the base model, for the reference policy."""
    on = [adapter for adapter in adapters(model).values() if adapter.on]
    for adapter in on:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in on:
            adapter.on = True


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Add every adapter to its matrix, W <- W + s·BA, in place; the result is a plain model, all of it trainable.

    Matrices in 4 bits are dequantised, one after the other, with adapters or without: the model grows to its dtype.
    """
    for module in unpack(model).modules():
        if isinstance(module, LoRALinear):
            module.base.weight.add_(module.scale * module.B @ module.A)
        if isinstance(module, Experts):
            for name, adapter in module.adapters.items():
                getattr(module, name).add_(adapter.delta())
    return _without_adapters(model)


def _without_adapters(model: Transformer) -> Transformer:
    """The model without its adapters, all of it trainable."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.base)
        if isinstance(module, Experts):
            module.adapters.clear()
    return model.requires_grad_(True)


# ---- PEFT's folder: adapter_config.json and adapter_model.safetensors ---------------------------


def _their_name(ours: str) -> str:
    """`blocks.0.attention.wq` -> `model.layers.0.self_attn.q_proj`; the experts' matrices by their module."""
    _, layer, inner = ours.split(".", 2)
    if inner.startswith("ffn.experts.adapters."):
        # PEFT nests one wrapper per parameter; the first one, gate_up, is inside.
        inside = ".base_layer" if inner.endswith("gate_up") else ""
        return f"model.layers.{layer}.mlp.experts{inside}"
    return their_module(ours)


def _peft_views(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names -> views of the adapters, axes in PEFT's order: for E experts A [E, r, in] and B [out, r, E]."""
    views = {}
    for ours, adapter in adapters(model).items():
        a, b = adapter.A.detach(), adapter.B.detach()
        prefix = f"base_model.model.{_their_name(ours)}"
        views |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b.movedim(0, -1) if b.ndim == 3 else b}
    return views


def _peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names -> tensors in PEFT's shapes, two-dimensional: for E experts A is [E·r, in] and B [out, r·E]."""
    return {n: x.flatten(0, -2) if ".lora_A." in n else x.flatten(1) for n, x in _peft_views(model).items()}


def save_adapters(model: Transformer, path: str | Path, base: str | Path) -> None:
    """Write the adapters alone, as `peft.PeftModel.from_pretrained` opens them. base: the folder of the model itself.

    ValueError if there are none.
    """
    named = adapters(model)
    if not named:
        raise ValueError("the model has no adapters to save")
    path, first = Path(path), next(iter(named.values()))
    rank = first.A.shape[-2]
    linear = {_their_name(name).rsplit(".", 1)[1] for name, m in named.items() if isinstance(m, LoRALinear)}
    stacked = any(isinstance(m, LoRAExperts) for m in named.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(linear),
        "target_parameters": list(STACKED) if stacked else None,
        "inference_mode": True,
    }
    write_json(path / "adapter_config.json", config)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _peft_tensors(model).items()}
    save_file(tensors, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})


def load_adapters(model: Transformer, path: str | Path) -> list[nn.Parameter]:
    """Add the adapters of a folder that `save_adapters`, or PEFT, wrote to a plain model; returns what to train.

    ValueError names what is missing, surplus, of another shape, or not supported.
    """
    path = Path(path)
    config = read_json(path / "adapter_config.json", "not a folder of adapters")
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{path} holds no adapter_model.safetensors")
    trained = add_adapters(model, config["r"], config["lora_alpha"], _targets(config, path))
    try:
        restore_adapters(model, path)
    except ValueError:
        _without_adapters(model)  # new ones had changed nothing
        raise
    return trained


@torch.no_grad()
def restore_adapters(model: Transformer, path: str | Path) -> None:
    """Copy the adapters of a folder into those that the model has. ValueError as for `load_adapters`."""
    path = Path(path)
    try:
        stored = load_file(str(path / "adapter_model.safetensors"))
    except SafetensorError as error:
        raise ValueError(f"{path / 'adapter_model.safetensors'} is damaged: {error}") from error
    wanted = _peft_tensors(model)
    wrong = [f"missing: {name}" for name in sorted(wanted.keys() - stored.keys())]
    wrong += [f"surplus: {name}" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name].shape != wanted[name].shape:
            wrong.append(f"shape of {name}: {tuple(stored[name].shape)}, expected {tuple(wanted[name].shape)}")
    if wrong:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:8])}")
    for name, view in _peft_views(model).items():
        view.copy_(stored[name].view(view.shape))


def _targets(config: dict, path: Path) -> list[str]:
    """The targets, in our names, of an adapter_config.json; ValueError for a field that asks for more than is here. One
    that is neither read nor ignored has to be empty: it could change the result, as one of a later PEFT could."""
    for field, allowed in PEFT_ONLY.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {field} = {shown(config[field])} is not supported, only {allowed[0]!r}")
    read = {"r": "int", "lora_alpha": "float", "target_modules": "list | None", "target_parameters": "list | None"}
    for field, kind in read.items():
        value = config.get(field)
        if not is_a(value, kind) or isinstance(value, list) and not all(isinstance(name, str) for name in value):
            raise ValueError(f"{path}: {field} = {shown(value)}: must be {kind.replace('list', 'a list of names')}")
    for field in config.keys() - {*PEFT_ONLY, *read, *PEFT_IGNORED.split()}:
        value = config[field]
        if not (value is None or value is False or value == []):
            raise ValueError(f"{path}: {field} = {shown(value)} is not supported, only null, false and []")
    ours = {theirs.split(".")[-1]: name.split(".")[-1] for name, theirs in NAMES.items()}
    theirs = {name.split(".")[-1] for name in config.get("target_modules") or ()}
    unknown = sorted(name for name in theirs if ours.get(name) not in TARGETS)
    if unknown:
        raise ValueError(f"{path}: target_modules {', '.join(unknown)} are not supported")
    parameters = config.get("target_parameters") or []
    if parameters and sorted(parameters) != sorted(STACKED):
        raise ValueError(f"{path}: target_parameters = {shown(parameters)} is not supported, only {', '.join(STACKED)}")
    return [ours[name] for name in theirs] + (["experts"] if parameters else [])
