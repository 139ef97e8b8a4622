"""Memory, communication, arithmetic and time of a training step on one or many GPUs, predicted from shapes.

Assumed is fully sharded data parallelism (FSDP2, block by block): each of n ranks holds an n-th of the fp32 masters,
of AdamW's moments and of the gradients, gathers the weights of a block in bf16 when it computes it, in the forward and
again in the backward pass, and reduces its gradients in fp32. Routed experts may be divided over e ranks, to which
tokens are sent. For sampling the policy is gathered once per rollout as a copy in bf16 (of the experts, a rank's own).
One GPU needs none of this, and its parts are those of minir1/memory.py.

Seconds are a lower bound, with every unit at the data sheet's rate and all answers of equal length; communication is
hidden behind arithmetic. `REALISTIC` are the shares of those rates that good programs reach, and nothing is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from minir1 import memory
from minir1.device import DTYPES
from minir1.gpus import GPU, collective_seconds, exchange_seconds
from minir1.model.config import ModelConfig
from minir1.model.count import attention_flops, cache_values, decode_flops, forward_flops, matrix_flops
from minir1.model.lora import add_adapters
from minir1.model.transformer import Transformer, on_meta

USABLE = 0.92  # of a GPU's memory: the rest is the driver's, the communication library's, or fragments
REALISTIC = {"compute": 0.4, "memory": 0.6, "links": 0.6}  # 0.4 is what follows from V3's pre-training
OPTIMIZER_BYTES = 30  # per trained number: masters, moments and gradients read, masters, moments and weights written
KINDS = ("rl", "sft", "pretrain")


@dataclass(frozen=True)
class Job:
    """One training step. In RL a row is a prompt and its answer; otherwise `prompt` is 0, and a row is a text."""

    config: ModelConfig
    gpu: GPU
    gpus: int = 1  # n
    kind: str = "rl"  # KINDS
    rows: int = 256  # B: in RL all answers of a step, P·G
    answers: int = 8  # G, answers per prompt
    prompt: int = 256  # tokens of a prompt
    completion: int = 1024  # largest number of tokens of an answer, or of a text
    mean: float | None = None  # tokens of an answer or text on average; None: all have the largest number
    microbatch: int = 8192  # most tokens of a forward pass on one rank
    dtype: str = "bfloat16"  # of the weights; the masters are fp32
    lora_rank: int = 0  # r; 0: all weights are trained
    recompute: bool = False
    reference: bool = True  # RL with a KL term
    experts: int = 1  # e, ranks over which the routed experts are divided

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.gpus > self.rows:
            raise ValueError(f"gpus = {self.gpus}: at most the {self.rows} rows of a step")
        if self.experts > 1 and (self.gpus % self.experts or (self.config.experts or 1) % self.experts):
            allowed = f"must divide the {self.gpus} GPUs and the model's {self.config.experts} experts"
            raise ValueError(f"experts = {self.experts}: {allowed}")

    @property
    def rows_here(self) -> int:
        """Rows of one rank."""
        return -(-self.rows // self.gpus)

    @property
    def length(self) -> float:
        """Tokens of a row on average."""
        return self.prompt + (self.mean or self.completion)

    @property
    def passes(self) -> int:
        """Forward passes of a rank over its rows."""
        return max(1, -(-round(self.rows_here * self.length) // self.microbatch))

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, activation or cached number."""
        return DTYPES[self.dtype].itemsize

    @property
    def model(self) -> Transformer:
        """The model, on the meta device."""
        return _on_meta(self.config, self.dtype, self.lora_rank)


@cache
def _on_meta(config: ModelConfig, dtype: str, lora_rank: int) -> Transformer:
    model = on_meta(config)
    if lora_rank:
        add_adapters(model, lora_rank, 2.0 * lora_rank)
    return model.to(DTYPES[dtype])


# ---- parameters ----------------------------------------------------------------------------------


def parameters(job: Job) -> tuple[int, int]:
    """Parameters outside the routed experts, and in them: of the whole model, adapters included."""
    sizes = [(p.numel(), ".experts." in name) for name, p in job.model.named_parameters()]
    routed = sum(n for n, inside in sizes if inside)
    return sum(n for n, _ in sizes) - routed, routed


def outside(job: Job) -> int:
    """Parameters that lie in no block: embedding, head and the last norm."""
    named = job.model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(("blocks.", "mtp.")))


def largest_block(job: Job) -> int:
    """Parameters of the largest block that one rank gathers: of the routed experts, an e-th."""
    return max(
        sum(p.numel() // (job.experts if ".experts." in name else 1) for name, p in block.named_parameters())
        for block in job.model.blocks
    )


def trained(job: Job) -> int:
    """Parameters with a gradient."""
    return sum(p.numel() for p in job.model.parameters() if p.requires_grad)


def copied(job: Job) -> int:
    """Parameters of the copy that a rank samples from: all but the routed experts of other ranks."""
    dense, routed = parameters(job)
    return dense + routed // job.experts


# ---- memory --------------------------------------------------------------------------------------


def memory_parts(job: Job) -> dict[str, int]:
    """Bytes of each part on one GPU; `peak` says which of them are there at the same time.

    On one GPU those of `memory.step_memory`. On n, masters (4N), moments (8N), gradients (4N), frozen weights and the
    reference (of b bytes per number) are divided by n, and two parts are added: copy, b·(N_dense + N_experts/e), while
    answers are sampled; gathered while the policy is trained, of which there are at most two blocks and what lies
    outside all blocks (embedding and head) in b bytes, and the gradients of one block in b and, reduced, in 4 bytes.
    """
    sampled = job.kind == "rl"
    shape = {"microbatch": job.microbatch, "recompute": job.recompute}
    shape |= {"rows": job.rows_here if sampled else 0, "length": job.prompt + job.completion if sampled else 0}
    reference = sampled and job.reference and not job.lora_rank
    parts = memory.step_memory(job.model, **shape, reference=reference) | {"copy": 0, "gathered": 0}
    if job.gpus == 1:
        return parts
    n, size, numbers = job.gpus, job.itemsize, trained(job)
    everything, block = sum(parameters(job)), largest_block(job)
    parts["weights"] = size * (everything - numbers) // n  # the masters are what a rank holds of the others
    parts["masters"] = 4 * numbers // n
    for name in ("moments", "gradients", "reference"):
        parts[name] //= n
    parts["copy"] = size * copied(job) if sampled else 0
    parts["gathered"] = size * (2 * block + outside(job)) + (size + 4) * (0 if job.lora_rank else block)
    return parts


def peak(parts: dict[str, int]) -> int:
    """Bytes of the larger of the two phases, sampling and training."""
    phases = {"cache": parts["cache"] + parts["copy"], "activations": parts["activations"] + parts["gathered"]}
    return memory.peak({name: n for name, n in parts.items() if name not in ("copy", "gathered")} | phases)


def fits(job: Job) -> bool:
    """Whether the peak is within the usable memory of a GPU."""
    return peak(memory_parts(job)) <= USABLE * job.gpu.memory


# ---- arithmetic and communication of a step ------------------------------------------------------


def flops(job: Job) -> dict[str, float]:
    """FLOPs of all ranks together: those of `count` per token, times the tokens.

    A backward pass is two forward passes; with adapters one, as frozen weights need no gradient of their own, and with
    recompute one more. Left out are the optimizer and the check of the first ratio, of at most 32 rows.
    """
    tokens, (model, length) = job.rows * job.length, (job.model, job.length)
    forward = tokens * forward_flops(model, (length + 1) / 2)
    parts = {"forward": forward, "backward": forward * (1 if job.lora_rank else 2)}
    parts["recomputed"] = forward if job.recompute else 0.0
    if job.kind == "rl":
        parts["reference"] = forward if job.reference else 0.0
        parts["prefill"] = job.rows / job.answers * job.prompt * forward_flops(model, (job.prompt + 1) / 2)
        parts["decode"] = job.rows * (length - job.prompt) * decode_flops(model, round((job.prompt + length) / 2))
    return parts


def sharded(job: Job) -> list[tuple[int, int, int]]:
    """(numbers, ranks, gathers per pass) of what a rank gathers: what lies outside the blocks, the blocks without their
    routed experts, and the rank's share of these.

    Experts divided over e ranks are sharded over the n/e ranks that hold the same. A block is gathered again for the
    backward pass; what lies outside stays.
    """
    (dense, routed), other, e = parameters(job), outside(job), job.experts
    return [(other, job.gpus, 1), (dense - other, job.gpus, 2), (routed // e, job.gpus // e, 2)]


def sent(job: Job) -> float:
    """Bytes that a rank sends to experts in a forward pass over all its rows: K_r copies of each token's D numbers, to
    the experts and back, in every MoE layer."""
    config = job.config
    numbers = 2 * config.dim * config.experts_per_token * config.moe_layers
    return job.itemsize * numbers * job.rows_here * job.length if job.experts > 1 else 0.0


def exchanges(job: Job) -> dict[str, int]:
    """Passes that send tokens to experts: the backward pass sends as much as a forward pass."""
    return {"update": 2 + job.recompute, "reference": int(job.kind == "rl" and job.reference)}


def traffic(job: Job) -> dict[str, float]:
    """Bytes that one GPU receives in a step of k passes over micro-batches; m ranks share S numbers of b bytes.

    gather     k·b·Σ S·(m-1)/m, as often as `sharded` says, for the forward and the backward pass; and once for the
               reference
    reduce     k·4·Σ S·(m-1)/m, gradients in fp32
    experts    `sent`·(e-1)/e in each of `exchanges`
    copy       b·(N_dense + N_experts/e)·(n-1)/n, once per rollout
    """
    size, sampled = job.itemsize, job.kind == "rl"
    share = trained(job) / sum(parameters(job))
    received = [(numbers * (ranks - 1) / ranks, times) for numbers, ranks, times in sharded(job)]
    once = sum(numbers for numbers, _ in received)
    gathered = sum(numbers * times for numbers, times in received) + once * (sampled and job.reference)
    return {
        "gather": job.passes * size * gathered,
        "reduce": job.passes * 4 * once * share,
        "experts": sum(exchanges(job).values()) * sent(job) * (job.experts - 1) / job.experts,
        "copy": size * copied(job) * (job.gpus - 1) / job.gpus if sampled else 0.0,
    }


# ---- seconds -------------------------------------------------------------------------------------


def decode_seconds(job: Job, rows: int, keys: float, rates: dict[str, float] | None = None) -> float:
    """Seconds of one token in each of `rows` rows of a rank that have `keys` tokens: the slower of two.

    Reading the weights and the cache, b·(N_dense + used·N_experts/e + rows·keys·c), at the memory's bandwidth, where c
    are the cached numbers of a token; and rows·(2N + attention) FLOPs. Of the experts min(1, rows·e·K_r/E) are used.
    """
    rates = rates or dict.fromkeys(REALISTIC, 1.0)
    dense, routed = parameters(job)
    dense -= 0 if job.config.tied else job.model.embedding.weight.numel()
    used = min(1.0, rows * job.experts * job.config.experts_per_token / max(1, job.config.experts))
    numbers = dense + used * routed / job.experts + rows * keys * cache_values(job.config)
    work = rows * (matrix_flops(job.model) + attention_flops(job.config, job.config.layers, keys, absorbed=True))
    read, done = job.itemsize * numbers / job.gpu.bandwidth, work / job.gpu.flops
    return max(read / rates["memory"], done / rates["compute"])


def seconds(job: Job, realistic: bool = False) -> dict[str, float]:
    """Seconds of rollout, reference and update: a lower bound, or what is realistic (see the head of this file)."""
    rates = REALISTIC if realistic else dict.fromkeys(REALISTIC, 1.0)
    work, rate = flops(job), job.gpus * job.gpu.flops * rates["compute"]
    links = {name: time / rates["links"] for name, time in link_seconds(job).items()}
    both = (lambda a, b: a + b) if realistic else max  # nothing is hidden, or all that can be
    reads = job.gpu.bandwidth * rates["memory"]
    done = (work["forward"] + work["backward"] + work["recomputed"]) / rate
    updated = OPTIMIZER_BYTES * trained(job) / job.gpus / reads
    result = {"update": both(done, links["update"]) + updated}
    if job.kind == "rl":
        answer = job.length - job.prompt
        step = decode_seconds(job, job.rows_here, job.prompt + answer / 2, rates)
        result["rollout"] = links["copy"] + work["prefill"] / rate + answer * step
        result["reference"] = both(work["reference"] / rate, links["reference"])
    return result


def link_seconds(job: Job) -> dict[str, float]:
    """Seconds of communication at full width: of the update, of the reference, and of the copy for sampling."""
    size, share, passes = job.itemsize, trained(job) / sum(parameters(job)), exchanges(job)
    gather = [(collective_seconds(job.gpu, ranks, size * numbers), times) for numbers, ranks, times in sharded(job)]
    exchange = exchange_seconds(job.gpu, job.experts, sent(job))
    once = sum(time for time, _ in gather)
    update = sum(time * times for time, times in gather) + once * 4 / size * share
    return {
        "update": job.passes * update + passes["update"] * exchange,
        "reference": (job.passes * once if passes["reference"] else 0.0) + passes["reference"] * exchange,
        "copy": collective_seconds(job.gpu, job.gpus, size * copied(job)),
    }


def utilisation(flops: float, gpu: GPU, gpu_hours: float) -> float:
    """Model FLOPs utilisation (MFU): FLOPs / (GPU hours · 3600 s · FLOP/s of a GPU)."""
    return flops / (gpu_hours * 3600 * gpu.flops)
