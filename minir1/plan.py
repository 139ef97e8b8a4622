"""Memory, communication, arithmetic and time of a training step on one or many GPUs, predicted from shapes.

It follows what several ranks do (minir1/distributed.py): each of n has an n-th of the weights in fp32, which are their
own masters, of AdamW's moments and of the gradients. FSDP2 gathers the weights of a block in the dtype that computes,
in the forward and again in the backward pass, and sums its gradients in fp32. Where n divides the number of routed
experts, each rank keeps an n-th of them, to which tokens are sent; else they are gathered like the rest. For sampling
and every other pass without gradient a rank gathers the whole model, its experts too, as one copy. Memory is that of
minir1/memory.py.

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
    answers: int = 8  # G, answers per prompt; otherwise 1
    prompt: int = 256  # tokens of a prompt
    completion: int = 1024  # largest number of tokens of an answer, or of a text
    mean: float | None = None  # tokens of an answer or text on average; None: all have the largest number
    microbatch: int = 8192  # most tokens of a forward pass on one rank
    dtype: str = "bfloat16"  # of the weights; the masters are fp32
    lora_rank: int = 0  # r; 0: all weights are trained
    recompute: bool = False
    reference: bool = True  # RL with a KL term
    experts: int | None = None  # e, ranks over which another program divides routed experts, for sampling as well

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.gpus > self.rows // self.answers:
            what = "prompts" if self.kind == "rl" else "rows"
            raise ValueError(f"gpus = {self.gpus}: at most the {self.rows // self.answers} {what} of a step")
        if self.experts is not None and (self.gpus % self.experts or (self.config.experts or 1) % self.experts):
            allowed = f"must divide the {self.gpus} GPUs and the model's {self.config.experts} experts"
            raise ValueError(f"experts = {self.experts}: {allowed}")

    @property
    def divided(self) -> int:
        """Ranks over which the routed experts are divided while the policy is trained; 1: they are not."""
        return self.experts or (self.gpus if memory.divides_experts(self.config, self.gpus) else 1)

    @property
    def rows_here(self) -> int:
        """Rows that one rank samples: those of whole prompts."""
        return -(-self.rows // self.answers // self.gpus) * self.answers

    @property
    def length(self) -> float:
        """Tokens of a row on average."""
        return self.prompt + (self.mean or self.completion)

    @property
    def passes(self) -> int:
        """Micro-batches of a rank in one update; all ranks have as many."""
        return max(1, -(-round(self.rows * self.length) // (self.microbatch * self.gpus)))

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


def trained(job: Job) -> int:
    """Parameters with a gradient."""
    return sum(p.numel() for p in job.model.parameters() if p.requires_grad)


def copied(job: Job) -> int:
    """Parameters of the copy that a rank samples from: all, or without the routed experts of other ranks."""
    dense, routed = parameters(job)
    return dense + routed // (job.experts or 1)


# ---- memory --------------------------------------------------------------------------------------


def memory_parts(job: Job) -> dict[str, int]:
    """Bytes of each part on one GPU, by `memory.step_memory`, whose `peak` says which are there at the same time."""
    sampled = job.kind == "rl"
    shape = {"microbatch": job.microbatch, "recompute": job.recompute, "ranks": job.gpus}
    if sampled:
        shape |= {"rows": job.rows_here * job.gpus, "length": job.prompt + job.completion}
    return memory.step_memory(job.model, **shape, reference=sampled and job.reference and not job.lora_rank)


def copy_bytes(job: Job) -> int:
    """b·N: what every rank needs in addition to its shards whenever it samples, validates or saves; 0 on one GPU."""
    return job.itemsize * sum(parameters(job)) if job.gpus > 1 else 0


def host_bytes(job: Job) -> int:
    """Bytes of a node's own memory while a run starts: every rank reads all weights in fp32 before it keeps its shard,
    4·N, and as much again is copied for the reference. 0 on one GPU, to which weights are read file by file."""
    copies = 1 + (job.kind == "rl" and job.reference and not job.lora_rank)
    return 4 * sum(parameters(job)) * copies * min(job.gpus, job.gpu.node) if job.gpus > 1 else 0


def fits(job: Job) -> bool:
    """Whether the peak is within the usable memory of a GPU."""
    return memory.peak(memory_parts(job)) <= USABLE * job.gpu.memory


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
    """(numbers, ranks, gathers per pass) of what a rank gathers in an update: what lies outside the blocks, the blocks
    without their routed experts, and the rank's share of these.

    Experts divided over e ranks are sharded over the n/e ranks that have the same. A block is gathered again for the
    backward pass; what lies outside stays.
    """
    (dense, routed), other, e = parameters(job), memory.numbers_of_units(job.model, False)[0], job.divided
    return [(other, job.gpus, 1), (dense - other, job.gpus, 2), (routed // e, job.gpus // e, 2)]


def sent(job: Job) -> float:
    """Bytes that a rank sends to experts in a forward pass over its share of the rows: K_r copies of each token's D
    numbers, to the experts and back, in every MoE layer."""
    config = job.config
    numbers = 2 * config.dim * config.experts_per_token * config.moe_layers
    return job.itemsize * numbers * job.rows * job.length / job.gpus if job.divided > 1 else 0.0


def copies(job: Job) -> dict[str, int]:
    """How often a step of RL gathers a whole model: to sample, and to check the first ratio and for the reference."""
    return {"rollout": 1, "reference": 1 + job.reference} if job.kind == "rl" else {}


def traffic(job: Job) -> dict[str, float]:
    """Bytes that one GPU receives in a step of k micro-batches; m ranks share S numbers of b bytes.

    gather     k·b·Σ S·(m-1)/m, as often as `sharded` says
    reduce     k·4·Σ S·(m-1)/m, gradients in fp32
    experts    `sent`·(e-1)/e in the forward and the backward pass, and once more where activations are recomputed
    copy       b·N·(n-1)/n, as often as `copies` says
    """
    size, e = job.itemsize, job.divided
    share = trained(job) / sum(parameters(job))
    received = [(numbers * (ranks - 1) / ranks, times) for numbers, ranks, times in sharded(job)]
    return {
        "gather": job.passes * size * sum(numbers * times for numbers, times in received),
        "reduce": job.passes * 4 * share * sum(numbers for numbers, _ in received),
        "experts": (2 + job.recompute) * sent(job) * (e - 1) / e,
        "copy": sum(copies(job).values()) * size * copied(job) * (job.gpus - 1) / job.gpus,
    }


# ---- seconds -------------------------------------------------------------------------------------


def decode_seconds(job: Job, rows: int, keys: float, rates: dict[str, float] | None = None) -> float:
    """Seconds of one token in each of `rows` rows of a rank that have `keys` tokens: the slower of two.

    Reading the weights and the cache, b·(N_dense + used·N_experts + rows·keys·c), at the memory's bandwidth, where c
    are the cached numbers of a token; and rows·(2N + attention) FLOPs. Of the experts min(1, rows·K_r/E) are used; of
    those that another program divides over e ranks, a rank reads an e-th, for e times as many rows.
    """
    rates = rates or dict.fromkeys(REALISTIC, 1.0)
    dense, routed = parameters(job)
    dense -= 0 if job.config.tied else job.model.embedding.weight.numel()
    e = job.experts or 1
    used = min(1.0, rows * e * job.config.experts_per_token / max(1, job.config.experts))
    numbers = dense + used * routed / e + rows * keys * cache_values(job.config)
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
        result["rollout"] = links["rollout"] + work["prefill"] / rate + answer * step
        result["reference"] = links["reference"] + work["reference"] / rate
    return result


def link_seconds(job: Job) -> dict[str, float]:
    """Seconds of communication at full width: of the update, and of the copies for the rollout and the reference."""
    size, share = job.itemsize, trained(job) / sum(parameters(job))
    gather = [(collective_seconds(job.gpu, ranks, size * numbers), times) for numbers, ranks, times in sharded(job)]
    passes = sum(time * (times + 4 / size * share) for time, times in gather)
    exchange = (2 + job.recompute) * exchange_seconds(job.gpu, job.divided, sent(job))
    copy = collective_seconds(job.gpu, job.gpus, size * copied(job))
    return {"update": job.passes * passes + exchange} | {part: times * copy for part, times in copies(job).items()}


def utilisation(flops: float, gpu: GPU, gpu_hours: float) -> float:
    """Model FLOPs utilisation (MFU): FLOPs / (GPU hours · 3600 s · FLOP/s of a GPU)."""
    return flops / (gpu_hours * 3600 * gpu.flops)
