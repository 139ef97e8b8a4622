"""A policy: load it on a device, score a rollout, check it against its sampler, save and restore it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minir1 import checkpoint
from minir1.data import by_tokens
from minir1.distributed import computed_in, divided, is_shard, load_target, my_share, rank, sum_of_ranks
from minir1.files import read_json, write_json
from minir1.model import heads, hf
from minir1.model.heads import ScalarModel
from minir1.model.hf_tensors import uncompiled
from minir1.model.lora import adapters, adapters_off, add_adapters, merge, restore_adapters, save_adapters
from minir1.model.moe import Routing, expert_load, idle_share
from minir1.model.shards import fill, gathered, is_sharded
from minir1.model.transformer import Transformer
from minir1.rollout import Rollout
from minir1.tokenizer import Tokenizer

BASE = "base_sha256.json"  # digests of the base, beside adapters


class Source(NamedTuple):
    """Where a policy came from."""

    path: Path
    sha256: dict[str, str]  # of its files, if adapters depend on them


def origin(path: Path, resumed: Path | None) -> Path:
    """The folder to load a policy from; a resumed run needs only its own checkpoint, or the base of its adapters."""
    if resumed is None:
        return checkpoint.resolve(path)
    return hf.base_of(resumed) if (resumed / BASE).exists() else resumed


def load_policy(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    lora_rank: int = 0,
    lora_alpha: float = 32.0,
    recompute: bool = False,
    packed: bool = False,
) -> tuple[Transformer, Tokenizer, Source]:
    """The policy to train, its tokenizer, and where they came from.

    path: a Hugging Face folder, or a folder of checkpoints, whose latest is taken. Adapters in it are merged.
    lora_rank: above 0, all weights are frozen and new adapters are trained. A folder of adapters is then refused
    (ValueError): saved, the new ones would name a base without the old ones.
    recompute: the activations of each block are computed again in the backward pass (Transformer.recompute).
    packed: the frozen weights stay in bitsandbytes' 4 bits (hf.load), so that this is QLoRA. ValueError without
    lora_rank, as such weights are not trained.
    """
    if packed and not lora_rank:
        raise ValueError(f"packed = True with lora_rank = {lora_rank}: weights in 4 bits are not trained, adapters are")
    source = checkpoint.resolve(path)
    model, tokenizer = hf.load(source, *load_target(device, dtype), packed)
    if lora_rank and adapters(model):
        raise ValueError(f"checkpoint = {source} holds adapters: merge and save them first, or train without LoRA")
    model = model if packed else merge(model)
    model.recompute(recompute)
    if lora_rank:
        add_adapters(model, lora_rank, lora_alpha)
    return model, tokenizer, Source(source, checkpoint.digests(source) if lora_rank else {})


def frozen_copy(model: Transformer) -> Transformer:
    """A copy of the policy without gradient, to be its reference."""
    return copy.deepcopy(model).requires_grad_(False)


def reference_of(model: Transformer) -> Transformer:
    """The reference policy: a frozen copy, or the model itself where it has adapters (see `reference_logprobs`)."""
    return model if adapters(model) else frozen_copy(model)


@torch.no_grad()
def logprobs(
    model: Transformer,
    rollout: Rollout,
    microbatch: int,
    *,
    replay: bool = False,
    record: list[Routing] | None = None,
) -> Tensor:
    """log π(x_t | x_<t) of the answers under a model, at the sampler's temperature: fp32 [B, T], without gradient.

    replay: each token goes to the experts that the sampler chose (Rollout.routes). The routing of every MoE layer, in
    each micro-batch, is appended to `record`, if any.
    """
    logp = torch.zeros_like(rollout.logp)
    with gathered(model):
        for rows in my_share(by_tokens(rollout.length.tolist(), microbatch)):
            rows = torch.tensor(rows, device=logp.device)
            batch = rollout.select(rows)
            settings = {"lengths": batch.length, "mask": batch.mask, "temperature": rollout.temperature}
            routings = None if record is None else []  # of its own, as in Transformer._prefill
            part = model.logprob(batch.tokens, **settings, routes=batch.routes if replay else None, record=routings)
            logp[rows, : part.shape[1]] = part
            if record is not None:
                record.extend(routings)
    return sum_of_ranks(logp)


def reference_logprobs(reference: Transformer, rollout: Rollout, microbatch: int) -> Tensor:
    """`logprobs` under the reference policy; a model with adapters is its own reference, without them."""
    with adapters_off(reference):
        return logprobs(reference, rollout, microbatch)


def load_teacher(path: Path, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A teacher, without gradient. path: a Hugging Face folder, or a folder of checkpoints, whose best is taken.

    ValueError if its tokens are not the student's, `tokenizer`.
    """
    model, own = hf.load(checkpoint.resolve(path, prefer="best"), *load_target(device, dtype))
    ours, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (tokenizer, own))
    if differing := {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}:
        raise ValueError(
            f"{path}: the teacher's tokens are not the student's ({len(differing):,} differ, such as "
            f"{min(differing)!r}), and distributions over different tokens cannot be compared: learn from its texts, "
            "with reject_sample.py and without --teacher"
        )
    return merge(model).requires_grad_(False)


def load_reward_model(path: Path, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> ScalarModel:
    """A learned reward (experiments/reward_model.py), without gradient. path: its folder, or that of its checkpoints.

    ValueError if its tokenizer is not the policy's, `tokenizer`.
    """
    model, own_tokenizer = heads.load(checkpoint.resolve(path), device, dtype)
    if own_tokenizer.backend.to_str() != tokenizer.backend.to_str():
        raise ValueError(f"{path}: the reward model's tokenizer is not that of the policy")
    return model.requires_grad_(False)


@torch.no_grad()
def learned_rewards(reward_model: ScalarModel, rollout: Rollout, microbatch: int) -> Tensor:
    """The learned reward of each row, prompt and answer: fp32 [B], on the CPU."""
    result = torch.zeros(len(rollout.length))
    with gathered(reward_model):
        for rows in my_share(by_tokens(rollout.length.tolist(), microbatch)):
            batch = rollout.select(torch.tensor(rows, device=rollout.length.device))
            result[rows] = reward_model.score(batch.tokens, lengths=batch.length).cpu()
    return sum_of_ranks(result)


def on_policy_check(
    model: Transformer,
    rollout: Rollout,
    microbatch: int,
    *,
    most: float | None = None,
    rows: int = 32,
    replay: bool = False,
) -> dict[str, float]:
    """How far r_t = π_θ(x_t | x_<t) / π_sampler(x_t | x_<t) is from 1 before the first update on a rollout.

    The mean and the 99 % quantile of |r_t - 1| over the tokens of at most `rows` answers, spread over the rollout: both
    are 0, but for rounding, if sampler and trainer compute the same policy. The maximum says little: rounding to
    bfloat16 alone moved it by 0.4. RuntimeError if the mean is above `most`, or the quantile above 10 · `most`:
    no objective is right for samples of another policy. None: 0.001, far above the rounding of fp32 and below what
    top-p = 0.9 does; 0.05 for 16-bit weights, whose rounding reaches 0.025. RuntimeError also for NaN or ∞ in logp.

    Also the mean of r_t, which is below 1 if the sampler left tokens out; and of a model with experts the largest share
    of idle ones in a layer (`moe.idle_share`).
    """
    bad = (rollout.mask & ~rollout.logp.isfinite()).nonzero().tolist()
    if bad:
        raise RuntimeError(f"the sampler's log-prob of token {bad[0][1]} in row {bad[0][0]} is not finite")
    if most is None:
        most = 0.05 if computed_in(model.embedding.weight).itemsize < 4 else 0.001
    B = len(rollout.length)
    part = rollout.select(torch.arange(min(rows, B), device=rollout.length.device) * B // min(rows, B))
    record: list[Routing] = []
    ratio = (logprobs(model, part, microbatch, replay=replay, record=record) - part.logp).exp()
    ratio = ratio[part.mask].cpu().double()  # Apple's GPUs have no float64
    deviation = (ratio - 1).abs()
    mean, high = deviation.mean().item(), deviation.sort().values[int(0.99 * (len(deviation) - 1))].item()
    if not (mean <= most and high <= 10 * most):
        raise RuntimeError(
            f"before the first update |ratio - 1| is {mean:.2g} on average and {high:.2g} at the 99 % quantile "
            f"(allowed: {most:g} and {10 * most:g}): sampler and trainer do not compute the same policy"
        )
    metrics = {"train/ratio": ratio.mean().item(), "train/ratio_deviation": mean, "train/ratio_deviation_q99": high}
    if layers := model.config.moe_layers:
        loads = torch.zeros(layers, model.config.experts, dtype=torch.int64, device=model.device)
        for index, routing in enumerate(record):
            loads[index % layers] += expert_load(routing)
        metrics["train/idle_experts"] = max(map(idle_share, sum_of_ranks(loads)))
    return metrics


def save(model: Transformer, tokenizer: Tokenizer, path: Path, source: Source) -> None:
    """The whole model, or its adapters alone with path and digests of their base, `source`; hf.load opens both."""
    if adapters(model):
        with gathered(model):
            if rank() == 0:
                save_adapters(model, path, source.path.resolve())
                write_json(path / BASE, source.sha256)
    else:
        hf.save(model, tokenizer, path)


def restore(path: Path, model: Transformer, parts: dict) -> dict:
    """Put a checkpoint back: its weights into the model, and its state of each of `parts` (optimizers, a reference).

    Returns the rest of training_state.pt, such as step and seconds. ValueError if a file, or the base, has changed.
    """
    weights = load_target(model.device, model.embedding.weight.dtype)
    state = checkpoint.load_state(path, model.device)
    if not isinstance(state, dict) or not {"step", *parts} <= state.keys():
        raise ValueError(f"{path / checkpoint.STATE} is not of this training: it must hold step, {', '.join(parts)}")
    checkpoint.verify(path, state.pop("sha256", {}))
    if (path / BASE).exists():
        checkpoint.verify(hf.base_of(path), read_json(path / BASE))
    if adapters(model):
        with gathered(model):
            restore_adapters(model, path)
            trained = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        fill(model, trained)  # what is written into gathered weights is lost
    else:
        names = {uncompiled(name): name for name in model.state_dict()}
        stored = hf.load(path, *weights)[0].state_dict()
        fill(model, {names.get(name, name): tensor for name, tensor in stored.items()})
    for name, part in parts.items():
        put_back(part, state.pop(name))
    return state


def put_back(part, saved: dict) -> None:
    """Load the state of a module or an optimizer; what one process saved is divided, if the part is."""
    if isinstance(part, torch.nn.Module) and is_sharded(part):
        if missing := part.state_dict().keys() - saved.keys():
            raise ValueError(f"the saved state lacks {', '.join(sorted(missing)[:3])}")
        fill(part, saved)
        return
    groups = getattr(part, "param_groups", [])
    in_shards = any(is_shard(p) for group in groups for p in group["params"])
    part.load_state_dict(tree_map_only(Tensor, divided, saved) if in_shards else saved)
