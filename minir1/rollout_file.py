"""Some rollouts of a training step on disk, with what the update did to each token: for inspect_tokens.py.

A step is one file, `rollouts/step-000120.safetensors` in the folder of the run. It holds the first groups of the step,
B = P·G answers with N tokens in all, end to end, without padding:

    tokens                      int32 [N]   the EOS included
    logp, entropy               fp32 [N]    of the sampler, π_old
    updated_logp                fp32 [N]    of the policy after the last update of the step, π_θ
    advantage, ref_logp, …      fp32 [N]    what the script passes: also values and returns where there is a critic
    clipped                     bool [N]    where the objective has no gradient at π_θ
    experts                     uint8 [N, L_moe, K_r] (int16 for more than 256), that π_θ chooses for the token;
                                where the update replays routes, int16 of the sampler, -1 for the last token
    length                      int32 [B]   tokens of each answer
    prompt_tokens, prompt_length            int32 of the P prompts, in the same way

The header's metadata has problems, rewards, verdicts and the bytes of every token that occurs, as JSON under "minir1":
the file is read without a tokenizer.

Why π_θ: an update begins at the sampler's policy, where every ratio is 1 and nothing is clipped. After the last
mini-batch, π_θ / π_old says how far the step has moved each token, and which of them another epoch would leave alone.

Log-probs are fp32: in 16 bits a log-prob near -8 is rounded by up to 0.016 (bf16) or 0.002 (fp16), more than many
ratios differ from 1. That is 25 bytes per answer token with a reference, 8 more with a critic, and L_moe·K_r.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minir1.data import by_tokens
from minir1.files import parse_json, plain, replace_bytes
from minir1.judge import Answer
from minir1.model.moe import routes_of
from minir1.model.shards import gathered
from minir1.model.transformer import Transformer
from minir1.policy import logprobs
from minir1.ranks import on_first
from minir1.rollout import Rollout
from minir1.tasks import Problem
from minir1.tokenizer import Tokenizer

FOLDER, KEY = "rollouts", "minir1"
ALWAYS = {"tokens", "length", "prompt_tokens", "prompt_length", "logp", "updated_logp", "entropy", "advantage"}
ABOUT = {"step", "temperature", "G", "problems", "answers", "bytes", "special"}


class Stored(NamedTuple):
    """What a file holds."""

    about: dict  # step, temperature, G, problems, answers [P][G], and of each token that occurs: its bytes, special
    tensors: dict[str, Tensor]  # as in the docstring of this module


def stored_steps(steps: int, count: int) -> set[int]:
    """`count` of the steps 1 … steps, evenly spread: the last; the first as well; the middle as well; and so on."""
    count = min(count, steps)
    return {steps - i * (steps - 1) // max(1, count - 1) for i in range(count)}


@torch.no_grad()
def updated(model: Transformer, rollout: Rollout, microbatch: int) -> tuple[Tensor, Tensor | None]:
    """log π of the answers, fp32 [B, T], and the experts of each token, int16 [B, T, L_moe, K_r]; None if dense.

    A rollout with routes replays them, and they are the experts. -1 at padding. Every rank scores all rows.
    """
    if rollout.routes is not None:
        return logprobs(model, rollout, microbatch, replay=True), rollout.routes
    logp, routes = torch.zeros_like(rollout.logp), None
    with gathered(model):
        for rows in by_tokens(rollout.length.tolist(), microbatch):
            rows, record = torch.tensor(rows, device=logp.device), []
            batch = rollout.select(rows)
            settings = {"lengths": batch.length, "mask": batch.mask, "temperature": rollout.temperature}
            part = model.logprob(batch.tokens, **settings, record=record)
            logp[rows, : part.shape[1]] = part
            if record:
                chosen = routes_of(record)  # [N, L_moe, K_r], of all rows end to end
                routes = chosen.new_full((*logp.shape, *chosen.shape[1:]), -1) if routes is None else routes
                for row, experts in zip(rows.tolist(), chosen.split(batch.length.tolist())):
                    routes[row, : len(experts)] = experts
    return logp, routes


def store(
    out: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer,
    rollout: Rollout,
    judged: tuple[Sequence[Problem], list[list[Answer]], Tensor],
    *,
    groups: int,
    microbatch: int,
    clipped: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    **grids: Tensor | None,
) -> Path:
    """Write the first `groups` groups of a rollout after the step's last update; returns the path of the file.

    judged: problems, answers [P][G], rewards fp32 [P, G]. grids: named quantities of the tokens, [B, T], or [B] for one
    number per answer; None is left out. "logp" replaces the sampler's log-probs where π_old is not the sampler.
    clipped(logp, old_logp, advantage): bool [B, T], as `losses.is_clipped`; None for an objective without such a clip.
    The file appears whole or not at all; of several ranks the first writes it.
    """
    few = rollout.select((rollout.group < groups).nonzero().squeeze(1))
    (B, T), G = few.tokens.shape, len(judged[1][0])
    logp, experts = updated(model, few, microbatch)
    sliced = {name: grid[:B] for name, grid in grids.items() if grid is not None}
    sliced = {name: grid[:, :T] if grid.ndim == 2 else grid.unsqueeze(1).expand(B, T) for name, grid in sliced.items()}
    grids = {"logp": few.logp, "entropy": few.entropy, "updated_logp": logp, **sliced}
    tensors = {name: grid[few.mask].float() for name, grid in grids.items()}
    if clipped is not None:
        tensors["clipped"] = clipped(logp, grids["logp"], grids["advantage"])[few.mask]
    if experts is not None:
        chosen = experts[few.mask]
        tensors["experts"] = chosen.to(torch.uint8) if model.config.experts <= 256 and (chosen >= 0).all() else chosen
    prompts = [row[:n] for row, n in zip(few.tokens[::G].tolist(), few.prompt_len[::G].tolist())]
    tensors["tokens"] = few.tokens[few.mask].int()
    tensors["length"] = few.mask.sum(1).int()
    tensors["prompt_tokens"] = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32)
    tensors["prompt_length"] = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    used = torch.cat([tensors["tokens"], tensors["prompt_tokens"]]).unique().tolist()
    about = {"step": step, "temperature": few.temperature, "G": G, **_words(*judged, B // G)}
    about["bytes"] = {token: tokenizer.bytes_of(token).hex() for token in used}
    about["special"] = [t for t in used if tokenizer.control.fullmatch(tokenizer.decode([t]))]
    path = Path(out) / FOLDER / f"step-{step:06d}.safetensors"
    data = save(tensors, {KEY: json.dumps(plain(about), ensure_ascii=False)})

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        replace_bytes(path, data)

    on_first(write)
    return path


def _words(problems: Sequence[Problem], answers: list[list[Answer]], rewards: Tensor, groups: int) -> dict:
    """Problems and verdicts of the first groups."""

    def of(answer: Answer, reward: float) -> dict:
        verdict = "unjudged" if answer.unjudged else "right" if answer.right else "wrong"
        parts = {"truncated": answer.truncated, "format": answer.format, "reason": answer.reason}
        return {"reward": reward, "verdict": verdict, **parts}

    asked = [{"prompt": problem.prompt, "reference": problem.reference} for problem in problems[:groups]]
    return {"problems": asked, "answers": [list(map(of, *pair)) for pair in zip(answers[:groups], rewards.tolist())]}


def steps_of(out: Path) -> list[int]:
    """The steps whose rollouts a run has stored, in order."""
    names = (re.fullmatch(r"step-([0-9]{6,})\.safetensors", path.name) for path in (Path(out) / FOLDER).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def read(out: Path, step: int | None = None) -> Stored:
    """What the run `out` stored at a step; None: at the last of them.

    ValueError if it stored none, or not at this step, naming those that it has; or if the file is damaged.
    """
    present = steps_of(out)
    if not present:
        raise ValueError(f"{out} holds no {FOLDER}/: the RL scripts store some with --store-steps 1 or more")
    if step is not None and step not in present:
        raise ValueError(f"step = {step}: {out} stored rollouts at {', '.join(map(str, present))}")
    path = Path(out) / FOLDER / f"step-{present[-1] if step is None else step:06d}.safetensors"
    try:
        with safe_open(str(path), framework="pt") as file:
            about = parse_json((file.metadata() or {})[KEY])
            stored = Stored(about, {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not written by minir1: {error}") from error
    if lacking := sorted((ALWAYS - stored.tensors.keys()) | (ABOUT - set(about))):
        raise ValueError(f"{path} lacks {', '.join(lacking)}: another version, or another program, has written it")
    return stored
