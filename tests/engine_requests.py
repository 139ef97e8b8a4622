"""A toy model for the tests of engine.py, requests to it, and what each should be answered."""

import random

import pytest
import torch

from minir1.engine import Engine, Request
from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.sample import generate

V = 48
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "init_std": 0.25}
MOE = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "ffn": 48, "experts": 4, "expert_ffn": 16}
STOPS = (5, 11, 40)


def build(kind: str, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, **MOE) if kind == "mla+moe" else dense(**SHAPE, kv_heads=2, ffn=48)
    return Transformer(config).to(dtype).eval()


def requests_of(count: int, seed: int = 0) -> list[Request]:
    """Different prompts, budgets and settings; a few prompts occur twice."""
    rng = random.Random(seed)
    ways = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 9, 0.6), (2.0, 100, 0.99), (0.0, 3, 0.5)]
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    return [
        Request(prompts[number // 2 * 2 if number % 8 < 2 else number], rng.randint(1, 24), *rng.choice(ways), STOPS,
                rng.randrange(2**63), rng.choice([0, 0, 3]), rng.choice([0, 0, 5]))
        for number in range(count)
    ]  # fmt: skip


def alone(model, request: Request):
    """(tokens, log-probs, why) of `sample.generate` for this request by itself."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "stop", "seed")
    rows = torch.tensor([request.row])
    sampled = generate(model, [request.prompt], rows=rows, **{name: getattr(request, name) for name in names})
    return sampled.tokens[0].tolist(), sampled.logp[0].tolist(), int(sampled.stop[0])


def read(answer):
    tokens = list(answer)
    return [token.id for token in tokens], [token.logp for token in tokens], answer.why


def check(model, request, answer):
    tokens, logp, why = read(answer)
    expected = alone(model, request)
    assert tokens == expected[0] and why == expected[2]
    assert logp == pytest.approx(expected[1], abs=1e-6)  # RoPE and router are fp32


def queued(engine: Engine, requests: list[Request]) -> list:
    """The answers of requests that are all there when the engine opens."""
    engine._open = True
    return [engine.submit(request) for request in requests]
