"""Times of minir1, transformers and TRL at equal work with the same weights: rollouts, a GRPO step, a decode step.

    python -m experiments.benchmarks.peers --out docs/results/peers.json
    python -m experiments.benchmarks.peers --parts rollout qwen

- rollout: as many tokens in as many rows, by `collect` and by `transformers.generate`, default and dense model.
- grpo: a GRPO step of the dense model with TRL's GRPOTrainer: answers, rewards of their texts, the reference's forward
  pass, one optimizer step. TRL gets settings that suit a CPU: small forward passes (--trl-batch), no activations
  computed again, fused AdamW, answers generated all at once, and one optimizer step on them, so that it needs no pass
  for the old log-probs. Like TRL, ours leaves out `on_policy_check`.
- qwen: a decode step of Qwen2.5-0.5B's shape with random weights, against transformers with its growing (dynamic) and
  its preallocated (static) cache.

All answers have the full length: the rows that minir1 would drop once they have ended are no advantage here. The
variants run in turns on all threads. Seconds are medians by the clock; a ratio is the median over the rounds of theirs
divided by ours, above 1 where minir1 is faster. TRL is in the extra [bench].
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from experiments import r1_zero
from experiments.benchmarks.bench_timing import Timings, timed
from minir1 import cli, tasks
from minir1.advantages import group_advantages
from minir1.files import write_json
from minir1.log import table
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.presets import qwen2
from minir1.model.transformer import Transformer
from minir1.optim import adamw
from minir1.policy import frozen_copy, reference_logprobs
from minir1.rollout import answers_of, collect
from minir1.settings import at_least, new_file
from minir1.templates import encode, prompt
from minir1.tokenizer import Tokenizer, word_level

CPU = torch.device("cpu")
QWEN = qwen2(151_936, 896, 24, 14, 2, 4864, tied=True, rope_theta=1_000_000.0)  # Qwen2.5-0.5B


@dataclass(frozen=True)
class Config:
    """Comparison on the CPU."""

    parts: tuple[Literal["rollout", "grpo", "qwen"], ...] = ("rollout", "grpo", "qwen")
    prompts: int = 32  # P
    num_generations: int = 16  # G
    prompt_tokens: int = 11
    max_completion_length: tuple[int, ...] = (72, 160)  # of the rollouts; the GRPO step has the first
    trl_batch: int = 32  # answers in a forward pass of TRL
    qwen: ModelConfig = field(default_factory=lambda: QWEN)  # shape of the decode step
    qwen_rows: int = 8
    qwen_prompt: int = 32  # tokens in the cache before the first step
    repeats: int = 5  # rollouts and GRPO steps
    decode_steps: int = 30
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "prompts", "prompt_tokens", "max_completion_length", "qwen_rows", "qwen_prompt", "repeats")
        at_least(self, 1, "decode_steps", "trl_batch")
        at_least(self, 2, "num_generations")
        if not self.parts:
            raise ValueError("parts = (): at least one of rollout, grpo, qwen")
        new_file(self, "out")


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> Timings:
    """Seconds by the clock of every run, called in turn, A B A B …, after one warm-up round."""
    rounds = [{name: timed(run, CPU)[1] for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [one[name] for one in rounds[1:]] for name in runs}


def opened(model: Transformer, tokenizer: Tokenizer, folder: str):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    hf.save(model, tokenizer, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=model.embedding.weight.dtype).eval()


def rollouts(config: Config) -> Iterator[tuple[str, Timings]]:
    """(case, times) of every model and length."""
    for kind, shape in (("MLA + MoE", ModelConfig(vocab=128)), ("dense", dense(vocab=128))):
        model = Transformer(shape)
        with tempfile.TemporaryDirectory() as folder:
            theirs = opened(model, word_level((), 100), folder)
        theirs.generation_config.eos_token_id = None  # no answer ends early
        prompts = [[1 + i % 40] * config.prompt_tokens for i in range(config.prompts)]
        rows = torch.tensor(prompts).repeat_interleave(config.num_generations, dim=0)
        inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        for tokens in config.max_completion_length:
            ours = {"answers": config.num_generations, "max_tokens": tokens, "stop": [], "seed": 0}
            sampling = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": tokens}
            runs = {"ours": lambda: collect(model, prompts, **ours)}
            runs["transformers"] = lambda: theirs.generate(**inputs, **sampling)
            yield f"rollout, {kind}, {len(rows)} × {tokens} tokens", alternate(runs, config.repeats)


def rewarded(completions: list[str], **_) -> list[float]:
    """A reward that costs next to nothing and differs within a group."""
    return [len(text) % 7 / 7 for text in completions]


def our_step(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], config: Config) -> Callable[[], dict]:
    """A call that makes one step of r1_zero.py without its check, in one mini-batch."""
    tokens, groups = config.max_completion_length[0], config.num_generations
    reference, optimizer, seeds = frozen_copy(model), adamw(model.parameters(), 1e-5), itertools.count()
    settings = r1_zero.Config(num_minibatches=1, beta=0.001)
    sampling = {"answers": groups, "max_tokens": tokens, "min_tokens": tokens, "stop": tokenizer.stops}

    def call():
        rollout = collect(model, prompts, **sampling, seed=next(seeds))
        rewards = torch.tensor(rewarded([tokenizer.decode(answer) for answer in answers_of(rollout)]))
        advantage = group_advantages(rewards.view(-1, groups)).flatten()
        ref_logp = reference_logprobs(reference, rollout, settings.microbatch)
        return r1_zero.learn(model, optimizer, rollout, advantage, ref_logp, settings, 1)

    return call


def grpo(config: Config) -> Iterator[tuple[str, Timings]]:
    """(case, times) of a GRPO step: ours runs between the steps of TRL's training."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = tasks.load("countdown")
    tokenizer, problems = word_level(*task.vocabulary()), task.problems("train")[: config.prompts]
    model = Transformer(dense(vocab=-(-tokenizer.size // 16) * 16, eos=tokenizer.eos, pad=tokenizer.pad))
    step = our_step(model, tokenizer, encode(tokenizer, problems, "chat"), config)
    times: Timings = {"ours": [], "TRL": []}

    class Turns(TrainerCallback):
        """Times each step of TRL, generation included, and runs ours after it."""

        def on_step_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            times["TRL"].append(time.perf_counter() - self.began)
            times["ours"].append(timed(step, CPU)[1])

    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, tokenizer, folder)
        rows, tokens = config.prompts * config.num_generations, config.max_completion_length[0]
        batch = math.gcd(rows, config.trl_batch)
        settings = GRPOConfig(
            output_dir=f"{folder}/trl", max_steps=config.repeats + 1, num_generations=config.num_generations,
            per_device_train_batch_size=batch, gradient_accumulation_steps=rows // batch, max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens}, beta=0.001, learning_rate=1e-5, loss_type="grpo",
            activation_checkpointing=False, use_cpu=True, bf16=False, report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt(tokenizer, p.prompt, "chat")} for p in problems])
        trainer = GRPOTrainer(folder, rewarded, settings, train_dataset=data, callbacks=[Turns()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    yield f"GRPO step, dense, {rows} × {tokens} tokens", {name: seconds[1:] for name, seconds in times.items()}


@torch.no_grad()
def decoding(config: Config) -> Iterator[tuple[str, Timings]]:
    """(case, times) of one decode step, logits included, in fp32 and bf16."""
    from transformers import DynamicCache, StaticCache

    slots = config.qwen_prompt + config.decode_steps + 1
    prompts = torch.randint(config.qwen.vocab, (config.qwen_rows, config.qwen_prompt))
    new = prompts[:, :1]
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(config.qwen).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            theirs = opened(model, word_level((), 1), folder)
        matrix, cache = model.head_matrix(), model.cache(config.qwen_rows, slots)
        model.prefill(prompts, cache=cache)
        runs = {"ours": lambda: model.logits(model.hidden(new, cache=cache)[:, 0], matrix)}
        caches = {"dynamic": DynamicCache(config=theirs.config)}
        caches["static"] = StaticCache(config=theirs.config, max_cache_len=slots)
        for name, past in caches.items():
            theirs(prompts, past_key_values=past)
            runs[f"transformers, {name} cache"] = partial(theirs, new, past_key_values=past)
        kind = str(dtype).removeprefix("torch.")
        yield f"decode step, Qwen2.5-0.5B, {config.qwen_rows} rows, {kind}", alternate(runs, config.decode_steps)


PARTS = {"rollout": rollouts, "grpo": grpo, "qwen": decoding}


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write the figures: CASE/NAME/seconds, and CASE/NAME/ratio of the others."""
    torch.manual_seed(0)
    result, rows = {}, []
    for part in config.parts:
        for case, times in PARTS[part](config):
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            result |= {f"{case}/{name}/seconds": median for name, median in medians.items()}
            for name in [name for name in times if name != "ours"]:
                ratio = statistics.median(b / a for a, b in zip(times["ours"], times[name]))
                result[f"{case}/{name}/ratio"] = ratio
                rows.append([case, name, f"{medians['ours']:.4g} s", f"{medians[name]:.4g} s", f"{ratio:.2f}"])
    table(f"equal work, {torch.get_num_threads()} threads", ["", "against", "ours", "theirs", "theirs / ours"], rows)
    if config.out:
        write_json(config.out, result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
