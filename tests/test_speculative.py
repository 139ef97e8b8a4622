"""speculative.py: speculative answers have the distribution of plain sampling, independent of the batch."""

import itertools
import math

import pytest
import torch

from minir1 import speculative
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig, dense
from minir1.model.packing import packing
from minir1.model.transformer import Transformer
from minir1.sample import BUDGET, EOS, STOP, draw, generate, truncate, uniform
from minir1.speculative import ACCEPT, DRAFT, REDRAW, accept_probability, judge, residual, speculate

V = 48
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "init_std": 0.2}
MOE = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "ffn": 48, "experts": 4, "expert_ffn": 16}
PROMPTS = [[3, 1, 4], [15, 9, 2, 6, 5, 35, 8], [9], [7, 9, 3, 2, 3]]
STOPS = [5, 11, 40]
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def build(kind: str, depth: int, **changes) -> Transformer:
    torch.manual_seed(depth)
    shape = {**SHAPE, "mtp_depth": depth, **changes}
    config = ModelConfig(**shape, **MOE) if kind == "mla+moe" else dense(**shape, kv_heads=2, ffn=48)
    return Transformer(config).eval()


@torch.no_grad()
def teach(model: Transformer, noise: float) -> Transformer:
    """Make it a bigram model whose modules agree with it; `noise` on their projection makes them agree less."""
    for block in (*model.blocks, *(module.block for module in model.mtp)):
        block.scale = 1e-30  # nothing is added to the residual stream: h^0_i = RMSNorm(emb(t_i))
    for module in model.mtp:
        projection = noise * torch.randn(module.eh_proj.weight.shape)
        projection[:, : model.config.dim] += torch.eye(model.config.dim)
        module.eh_proj.weight.copy_(projection)  # h^k_i = RMSNorm(emb(t_{i+k}))
    return model


@pytest.fixture(scope="module", params=[("mla+moe", 1), ("mla+moe", 2), ("gqa dense", 3)], ids=str)
def model(request):
    return build(*request.param)


def same(a, b):
    assert torch.equal(a.count, b.count) and torch.equal(a.stop, b.stop)
    for row, n in enumerate(a.count.tolist()):
        assert a.tokens[row, :n].tolist() == b.tokens[row, :n].tolist()
        torch.testing.assert_close(a.logp[row, :n], b.logp[row, :n], **CLOSE)
        torch.testing.assert_close(a.entropy[row, :n], b.entropy[row, :n], **CLOSE)


# ---- one judgement


def some(rows: int, positions: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(rows, positions, size, generator=generator, dtype=torch.float64)).softmax(-1)
    p = p * (torch.rand(p.shape, generator=generator) < 0.7)  # zeros, as after truncation
    p[..., 0] += 1e-3
    return p / p.sum(-1, keepdim=True)


def test_draft_accept_and_redraw_come_to_p():
    """Σ_x q(x) [accept(x) δ_x + (1 - accept(x)) residual] = p, over all x."""
    p, q = some(200, 1, 7, 0), some(200, 1, 7, 1)
    accept = torch.where(q > 0, accept_probability(p, q), 0.0)
    have = q * accept + (q * (1 - accept)).sum(-1, keepdim=True) * residual(p, q)
    torch.testing.assert_close(have, p, atol=1e-12, rtol=0)
    torch.testing.assert_close((q * accept).sum(-1), torch.minimum(p, q).sum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(residual(p, p), p, atol=0, rtol=0)
    torch.testing.assert_close(residual(p, torch.zeros_like(p)), p, atol=1e-15, rtol=0)


def test_residual_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.5, 0.1, 0.2])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.75, 0.0, 0.25, 0.0]))
    torch.testing.assert_close(accept_probability(p, q), torch.tensor([1.0, 0.6, 1.0, 0.0]))


def test_judge_stops_at_the_first_rejection():
    p, q = torch.full((1, 3, 4), 0.25), torch.full((1, 2, 4), 0.25)
    q[0, 0] = torch.tensor([0.5, 0.5, 0.0, 0.0])  # x = 0 is accepted below a noise of 0.5
    p[0, 2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    drafts, draws = torch.tensor([[0, 2]]), torch.tensor([[0.1, 0.3, 0.0]], dtype=torch.float64)

    def outcome(*noise):
        return [x.item() for x in judge(p, q, drafts, torch.tensor([noise], dtype=torch.float64), draws)]

    assert outcome(0.49, 0.99) == [2, 3]  # both are accepted, and a token of p follows
    assert outcome(0.5, 0.0) == [0, 2]  # (p - q)₊ is on 2 and 3
    p[0, 1] = torch.tensor([0.6, 0.2, 0.0, 0.2])
    assert outcome(0.49, 0.0) == [1, 0]  # a token of probability 0 is rejected even at a noise of 0
    assert [x.item() for x in judge(p[:, 2:], q[:, :0], drafts[:, :0], draws[:, :0], draws[:, :1])] == [0, 3]


def test_judged_frequencies_are_those_of_p():
    n = 60_000
    p, q = some(1, 2, 5, 2).expand(n, -1, -1), some(1, 1, 5, 3).expand(n, -1, -1)
    rows = torch.arange(n).unsqueeze(1)
    drafts = draw(q[:, 0].log(), uniform(0, rows, torch.tensor(0)).squeeze(1))[0].unsqueeze(1)
    accepted, token = judge(p, q, drafts, uniform(0, rows, torch.tensor(1)), uniform(0, rows, torch.arange(2, 4)))
    first = torch.where(accepted == 1, drafts[:, 0], token)
    want = p[0, 0]
    counts = first.bincount(minlength=5)
    assert not counts[want == 0].any()
    assert chi_square(counts[want > 0], n * want[want > 0]) < 18.5  # 4 degrees of freedom, 99.9 %
    rate = torch.minimum(p[0, 0], q[0, 0]).sum().item()
    assert accepted.double().mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / n))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return ((counts - expected) ** 2 / expected).sum().item()


# ---- the whole against plain sampling


@pytest.mark.parametrize("settings", [{}, {"stop": STOPS, "min_tokens": 5}, {"stop": STOPS, "check_every": 1}], ids=str)
def test_greedy_is_that_of_generate(model, settings):
    plain = generate(model, PROMPTS, answers=2, max_tokens=24, temperature=0, **settings)
    sampled, drafts = speculate(model, PROMPTS, answers=2, max_tokens=24, temperature=0, **settings)
    same(sampled, plain)
    assert (drafts.forwards < plain.count).all() and (drafts.accepted <= drafts.tried).all()


def test_greedy_with_modules_that_agree_takes_every_draft():
    for depth in (1, 2, 3):
        model = teach(build("gqa dense", depth), noise=0)
        sampled, drafts = speculate(model, PROMPTS, max_tokens=25, temperature=0)
        same(sampled, generate(model, PROMPTS, max_tokens=25, temperature=0))
        assert drafts.rate == 1 and torch.equal(drafts.accepted, drafts.tried)
        assert drafts.forwards.tolist() == [24 // (depth + 1)] * 4  # and one token from the prompt


@torch.no_grad()
def reference(model, prompt, row, max_tokens, temperature, top_k, top_p, seed):
    """The algorithm for one row, without caches: every p and q from the whole prefix."""
    tokens, depth, accepted, tried, qs = list(prompt), len(model.mtp), 0, 0, []

    def noise(position, what):
        return uniform(seed, torch.tensor([row]), torch.tensor([3 * position + what]))

    def p_of(logits):
        return truncate(logits.view(1, -1) / temperature, top_k, top_p).softmax(-1)

    def model_p(prefix):
        return p_of(model(torch.tensor([prefix]))[0, -1])

    def module_q(prefix, k):  # from the state k tokens earlier
        grid = torch.tensor([prefix])
        layout = packing(1, len(prefix), None, grid.device)
        states = list(model.look_ahead(grid[0], model.hidden(grid)[0], layout))
        return p_of(model.logits(states[k - 1][1][-1]))

    tokens.append(draw(model_p(tokens).log(), noise(len(tokens), REDRAW))[0].item())
    while len(tokens) < len(prompt) + max_tokens:
        drafts, q = [], []
        for k in range(1, depth + 1):
            q.append(module_q(tokens + drafts, k))
            drafts.append(draw(q[-1].log(), noise(len(tokens) + k - 1, DRAFT))[0].item())
        qs.append(torch.stack(q, dim=1))
        for k, x in enumerate(drafts):
            if len(tokens) == len(prompt) + max_tokens:
                break
            p, position = model_p(tokens), len(tokens)
            tried += 1
            if noise(position, ACCEPT).item() < min(1.0, (p[0, x] / q[k][0, x]).item()):
                accepted += 1
                tokens.append(x)
            else:
                tokens.append(draw(residual(p, q[k]).log(), noise(position, REDRAW))[0].item())
                break
        else:
            tokens.append(draw(model_p(tokens).log(), noise(len(tokens), REDRAW))[0].item())
    return tokens[len(prompt) :][:max_tokens], tried, accepted, qs


@pytest.mark.parametrize("kind, depth", [("mla+moe", 1), ("mla+moe", 2), ("gqa dense", 3)])
def test_caches_change_nothing(kind, depth, monkeypatch):
    """Modules that agree with the model half of the time, so that rejections leave stale entries in the caches: tokens,
    accepted drafts and every q are those of the reference."""
    model = teach(build(kind, depth), noise=0.05)
    for block in (*model.blocks, *(module.block for module in model.mtp)):
        block.scale = 0.05
    judged = []
    monkeypatch.setattr(speculative, "judge", lambda p, q, *more: judged.append(q) or judge(p, q, *more))
    settings = {"max_tokens": 12, "temperature": 0.4, "top_k": 12, "top_p": 0.95, "seed": 6}
    sampled, drafts = speculate(model, PROMPTS, check_every=100, **settings)  # no row is dropped
    assert 0.2 < drafts.rate < 0.9
    for row in range(4):
        tokens, tried, accepted, qs = reference(model, PROMPTS[row], row, **settings)
        assert sampled.tokens[row].tolist() == tokens
        assert (drafts.tried[row].sum(), drafts.accepted[row].sum()) == (tried, accepted)
        for have, want in zip(judged[1:], qs):  # the first token has no draft; other rows may be longer
            torch.testing.assert_close(have[row : row + 1], want, atol=1e-4, rtol=0)


def all_answers(model: Transformer, prompt: list[int], length: int, **rule) -> torch.Tensor:
    """The probability of each of V^length answers, by plain probabilities of the model."""
    answers = torch.tensor(list(itertools.product(range(model.config.vocab), repeat=length)))
    rows = torch.cat((torch.tensor([prompt]).expand(len(answers), -1), answers), dim=1)
    with torch.no_grad():
        logits = model(rows)[:, len(prompt) - 1 : -1] / rule["temperature"]
    logp = truncate(logits.flatten(0, 1), rule.get("top_k", 0), rule.get("top_p", 1.0)).log_softmax(-1)
    return logp.view(len(rows), length, -1).gather(-1, answers.unsqueeze(-1)).squeeze(-1).double().sum(1).exp()


WHOLE, CUT = {"temperature": 1.0}, {"temperature": 0.7, "top_k": 4, "top_p": 0.95}


@pytest.mark.parametrize(
    "depth, noise, rule",
    [(1, None, CUT), (1, 0.3, WHOLE), (1, 0.0, WHOLE), (2, None, WHOLE), (2, 0.3, CUT), (2, 0.0, CUT)],
)
def test_the_distribution_is_that_of_the_model(depth, noise, rule):
    """χ² of many answers against the known probabilities of all 6³; the modules disagree, agree in part or fully."""
    model = build("gqa dense", depth, vocab=6, dim=16, init_std=0.3)
    if noise is not None:
        model = teach(model, noise)
    n, length = 12_000, 3
    sampled, drafts = speculate(model, [[1, 3]], answers=n, max_tokens=length, seed=8, **rule)
    p = all_answers(model, [1, 3], length, **rule)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    index = (sampled.tokens * 6 ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = index.bincount(minlength=len(p)).double()
    assert not counts[p == 0].any()
    common = n * p >= 5  # the rest as one
    counts, expected = ([x[common], x[~common].sum().view(1)] for x in (counts, n * p))
    expected = torch.cat(expected)
    free = int((expected > 0).sum()) - 1
    bound = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3  # 99.9 % (Wilson and Hilferty 1931)
    assert chi_square(torch.cat(counts)[expected > 0], expected[expected > 0]) < bound
    if noise == 0:
        assert drafts.rate == pytest.approx(1, abs=1e-4)  # q = p but for rounding
    else:
        assert 0.1 < drafts.rate < 0.98


def test_fp64_models_speculate():
    model = build("gqa dense", 1, vocab=6, dim=16).double()
    sampled, _ = speculate(model, [[1, 3]], max_tokens=5, temperature=0)
    assert sampled.logp.dtype == torch.float64
    assert sampled.tokens.tolist() == generate(model, [[1, 3]], max_tokens=5, temperature=0).tokens.tolist()


def test_the_acceptance_rate_is_the_common_mass():
    """With two tokens, one draft a row is tried: E[accepted] = Σ_a p(a) Σ_x min(p(x | a), q(x | a))."""
    model = build("gqa dense", 1, vocab=6, dim=16, init_std=0.3)
    n, prompt = 20_000, [1, 3]
    _, drafts = speculate(model, [prompt], answers=n, max_tokens=2, seed=1)
    assert torch.equal(drafts.tried, torch.ones(n, 1, dtype=torch.int64))
    rows = torch.tensor([[*prompt, a] for a in range(6)])
    with torch.no_grad():
        p = model(rows).softmax(-1)
        common = torch.stack(
            [
                torch.minimum(
                    p[a, -1],
                    torch.stack(
                        [
                            model.mtp_logprob(torch.cat((rows[a], torch.tensor([x]))).view(1, -1))[1][0, -1]
                            for x in range(6)
                        ]
                    ).exp(),
                ).sum()
                for a in range(6)
            ]
        )
    want = (p[0, 1] * common).sum().item()
    assert drafts.rate == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / n))
    assert 0.2 < want < 0.95


# ---- rows and batches


def test_a_row_is_independent_of_the_batch(model):
    settings = {"max_tokens": 20, "stop": STOPS, "seed": 3, "temperature": 0.8}
    whole, drafts = speculate(model, PROMPTS, answers=3, **settings)
    assert len(set(whole.count.tolist())) >= 4
    for row in (0, 2, 4, 7, 9):
        alone, mine = speculate(model, [PROMPTS[row // 3]], rows=torch.tensor([row]), **settings)
        assert alone.tokens[0].tolist() == whole.tokens[row, : whole.count[row]].tolist()
        assert torch.equal(mine.accepted[0], drafts.accepted[row]) and torch.equal(mine.tried[0], drafts.tried[row])
    assert whole.tokens[0].tolist() != whole.tokens[1].tolist()


def test_dropping_finished_rows_changes_nothing(model, monkeypatch):
    sizes, keep = [], Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda cache, rows: sizes.append(len(rows)) or keep(cache, rows))
    settings = {"answers": 5, "max_tokens": 30, "stop": STOPS, "seed": 4}
    never, _ = speculate(model, PROMPTS, check_every=1000, **settings)
    assert sizes == []
    always, _ = speculate(model, PROMPTS, check_every=1, **settings)
    assert len(sizes) >= 3
    same(always, never)
    unbounded, _ = speculate(model, PROMPTS, check_every=2**62, **settings)  # the cache has no slots beyond the budget
    same(unbounded, never)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_and_entropy_are_those_of_the_model(model, temperature):
    sampled, _ = speculate(model, PROMPTS, answers=3, max_tokens=16, stop=STOPS, seed=5, temperature=temperature)
    for row, n in enumerate(sampled.count.tolist()):
        prompt = PROMPTS[row // 3]
        tokens = torch.tensor([prompt + sampled.tokens[row, :n].tolist()])
        with torch.no_grad():
            logp, entropy = model.logprob(tokens, temperature=temperature, entropy=True)
        torch.testing.assert_close(sampled.logp[row, :n], logp[0, len(prompt) :], **CLOSE)
        torch.testing.assert_close(sampled.entropy[row, :n], entropy[0, len(prompt) :], **CLOSE)
        assert not any(x[row, n:].any() for x in (sampled.tokens, sampled.logp, sampled.entropy))


def test_stop_codes_budget_and_min_tokens(model):
    stops = [5, 11, 40, 17, 29]
    sampled, drafts = speculate(model, PROMPTS, answers=12, max_tokens=20, min_tokens=3, stop=stops, seed=7)
    assert set(sampled.stop.tolist()) == {EOS, STOP, BUDGET}
    for tokens, n, why in zip(sampled.tokens.tolist(), sampled.count.tolist(), sampled.stop.tolist()):
        assert n >= 4 and not set(tokens[: n - 1]) & set(stops)
        if why == BUDGET:
            assert n == 20 and tokens[n - 1] not in stops
        else:
            assert tokens[n - 1] in stops and (tokens[n - 1] == stops[0]) == (why == EOS)
    # Each pass gives a row at least one token, and every accepted draft one more.
    most = 1 + drafts.forwards + drafts.accepted.sum(1)
    assert ((most == sampled.count) | (most == sampled.count + 1)).all()  # the last accepted draft may have ended it
    for max_tokens in (1, 2, 3):
        short, _ = speculate(model, PROMPTS, answers=12, max_tokens=max_tokens, seed=7)
        assert short.tokens.shape == (48, max_tokens) and short.count.tolist() == [max_tokens] * 48


def test_modules_of_nan_only_lose_their_drafts():
    """A draft from no distribution is always rejected, so the answers stay the model's."""
    model = build("gqa dense", 2)
    with torch.no_grad():
        model.mtp[0].eh_proj.weight[0, 0] = math.nan
    for temperature in (0.0, 0.8):
        sampled, drafts = speculate(model, PROMPTS, answers=3, max_tokens=12, temperature=temperature)
        assert sampled.logp.isfinite().all() and sampled.count.tolist() == [12] * 12
        assert temperature == 0 or drafts.rate == 0
    same(
        speculate(model, PROMPTS, max_tokens=12, temperature=0)[0],
        generate(model, PROMPTS, max_tokens=12, temperature=0),
    )


def test_wrong_input():
    plain = Transformer(dense(**SHAPE, kv_heads=2, ffn=48))
    with pytest.raises(ValueError, match="mtp_depth = 0"):
        speculate(plain, PROMPTS, max_tokens=4)
    model = build("gqa dense", 1)
    with pytest.raises(ValueError, match="top_p = 0.0"):
        speculate(model, PROMPTS, max_tokens=4, top_p=0.0)
    with pytest.raises(ValueError, match=r"rows torch.int64 \(3,\): must be int64 \[4\]"):
        speculate(model, PROMPTS, max_tokens=4, rows=torch.arange(3))
