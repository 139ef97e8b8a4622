"""rollout.py: the grid of ragged prompts and answers, replayed routes, selecting and joining rows."""

from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from rank_runs import collected
from ranks import on_ranks

from minir1 import rollout as module
from minir1.model.config import ModelConfig, dense
from minir1.model.moe import rerouted, routes_of
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, STOP, Rollout, answers_of, collect, concatenate
from minir1.sample import Sampled, generate

PROMPTS = [[3, 1, 4, 1], [5], [9, 2]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(dense(vocab=16, dim=32, layers=2, heads=4, kv_heads=2, ffn=48, init_std=0.25)).eval()


def by_hand(monkeypatch, prompts, sampled: Sampled, answers: int) -> Rollout:
    """`collect` over a given outcome, without a model."""
    monkeypatch.setattr(module, "generate", lambda model, prompts, **settings: sampled)
    return collect(None, prompts, answers=answers, max_tokens=3, temperature=0.7, stop=0, seed=0)


def test_layout_by_hand(monkeypatch):
    """Three rows of one, three and two answer tokens, EOS = 0 = what padding is filled with."""
    sampled = Sampled(
        tokens=torch.tensor([[0, 0, 0], [7, 8, 0], [6, 7, 0]]),
        logp=torch.tensor([[-1.0, 0, 0], [-2.0, -3.0, -4.0], [-5.0, -6.0, 0]]),
        entropy=torch.tensor([[0.1, 0, 0], [0.2, 0.3, 0.4], [0.5, 0.6, 0]]),
        count=torch.tensor([1, 3, 2]),
        stop=torch.tensor([EOS, EOS, STOP]),
    )
    r = by_hand(monkeypatch, PROMPTS, sampled, answers=1)
    assert r.tokens.tolist() == [[3, 1, 4, 1, 0], [5, 7, 8, 0, 0], [9, 2, 6, 7, 0]]
    assert r.prompt_len.tolist() == [4, 1, 2] and r.length.tolist() == [5, 4, 4]
    assert r.mask.int().tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]
    assert r.logp.tolist() == [[0, 0, 0, 0, -1], [0, -2, -3, -4, 0], [0, 0, -5, -6, 0]]
    torch.testing.assert_close(
        r.entropy, torch.tensor([[0, 0, 0, 0, 0.1], [0, 0.2, 0.3, 0.4, 0], [0, 0, 0.5, 0.6, 0]])
    )
    assert r.stop.tolist() == [EOS, EOS, STOP] and r.group.tolist() == [0, 1, 2]
    assert r.temperature == 0.7 and r.routes is None
    assert answers_of(r) == [[0], [7, 8, 0], [6, 7]]


def test_rows_of_a_prompt_are_adjacent_and_a_long_prompt_widens_the_grid(monkeypatch):
    sampled = Sampled(
        tokens=torch.tensor([[7], [8], [9], [6]]),
        logp=-torch.arange(1.0, 5.0).unsqueeze(1),
        entropy=torch.ones(4, 1),
        count=torch.ones(4, dtype=torch.int64),
        stop=torch.full((4,), BUDGET),
    )
    r = by_hand(monkeypatch, [[1, 2, 3, 4, 5], [1]], sampled, answers=2)
    assert r.tokens.tolist() == [[1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 8], [1, 9, 0, 0, 0, 0], [1, 6, 0, 0, 0, 0]]
    assert r.group.tolist() == [0, 0, 1, 1] and r.mask.sum(1).tolist() == [1, 1, 1, 1]
    assert r.logp.sum(1).tolist() == [-1, -2, -3, -4] and r.logp[2, 1] == -3


@pytest.mark.parametrize("stop", [[0, 3], [11, 0]])  # with 0 the EOS is what padding is filled with
def test_the_contract_on_a_model(model, stop):
    settings = {"answers": 6, "max_tokens": 10, "stop": stop, "seed": 1, "temperature": 0.8}
    r = collect(model, PROMPTS, **settings)
    sampled = generate(model, PROMPTS, **settings)
    assert set(r.stop.tolist()) == {EOS, STOP, BUDGET}
    B, T = r.tokens.shape
    assert B == 18 and T == r.length.max()
    shapes = {"tokens", "mask", "logp", "entropy"}
    assert all(getattr(r, name).shape == (B, T) for name in shapes)
    assert r.tokens.dtype == torch.int64 and r.mask.dtype == torch.bool and r.logp.dtype == torch.float32
    for row in range(B):
        prompt, start, end = PROMPTS[row // 6], int(r.prompt_len[row]), int(r.length[row])
        assert r.tokens[row, :start].tolist() == prompt and r.group[row] == row // 6
        assert r.tokens[row, start:end].tolist() == sampled.tokens[row, : end - start].tolist()
        assert r.mask[row].tolist() == [start <= t < end for t in range(T)]
        assert r.logp[row, start:end].tolist() == sampled.logp[row, : end - start].tolist()
        last = r.tokens[row, end - 1].item()
        assert last == {EOS: stop[0], STOP: stop[1]}.get(int(r.stop[row]), last)  # in the mask, with a log-prob
    assert (r.logp[r.mask] < 0).all() and (r.entropy[r.mask] > 0).all()
    for grid in (r.logp, r.entropy):
        assert not grid[~r.mask].any()
    assert not r.tokens[torch.arange(T) >= r.length.unsqueeze(1)].any()
    assert answers_of(r) == [row[:n] for row, n in zip(sampled.tokens.tolist(), sampled.count.tolist())]


def test_the_first_ratio_is_one_and_padding_has_no_effect(model):
    r = collect(model, PROMPTS, answers=6, max_tokens=10, stop=0, seed=1, temperature=0.8)
    with torch.no_grad():
        logp, entropy = model.logprob(r.tokens, lengths=r.length, mask=r.mask, temperature=0.8, entropy=True)
    torch.testing.assert_close(logp, r.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, r.entropy, atol=1e-5, rtol=0)
    padding = torch.arange(r.tokens.shape[1]) >= r.length.unsqueeze(1)
    assert padding.any()
    with torch.no_grad():
        other = model.logprob(r.tokens.masked_fill(padding, 13), lengths=r.length, mask=r.mask, temperature=0.8)
    assert torch.equal(other, logp)


@pytest.fixture(scope="module")
def routed():
    torch.manual_seed(0)
    shape = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "ffn": 48, "expert_ffn": 16}
    return Transformer(ModelConfig(vocab=16, dim=32, layers=3, heads=4, init_std=0.25, **shape)).eval()


@torch.no_grad()
def test_replay_of_recorded_routes_is_the_same_policy(routed):
    """All tokens but the last of each row have routes, and they are those that the policy chooses anyway."""
    settings = {"answers": 6, "max_tokens": 10, "stop": [0, 3], "seed": 1}
    r = collect(routed, PROMPTS, record_routes=True, **settings)
    B, T = r.tokens.shape
    assert r.routes.shape == (B, T, 2, 2) and r.routes.dtype == torch.int16
    known = torch.arange(T) < (r.length - 1).unsqueeze(1)
    assert torch.equal((r.routes >= 0).all(-1).all(-1), known) and (r.routes[~known] == -1).all()
    record, span = [], {"lengths": r.length, "mask": r.mask}
    logp = routed.logprob(r.tokens, routes=r.routes, record=record, **span)
    torch.testing.assert_close(logp, r.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(logp, routed.logprob(r.tokens, **span), atol=1e-6, rtol=0)
    real = torch.arange(T) < r.length.unsqueeze(1)
    assert not rerouted(r.routes[real], routes_of(record))[r.mask[real]].any()
    part = r.select(torch.tensor([4, 1]))
    again = routed.logprob(part.tokens, lengths=part.length, mask=part.mask, routes=part.routes)
    torch.testing.assert_close(again, logp[[4, 1], : part.tokens.shape[1]], atol=1e-6, rtol=0)
    assert collect(routed, PROMPTS, **settings).routes is None


@torch.no_grad()
def test_replay_corrects_the_different_routes_of_a_sampler_in_bf16(routed):
    r = collect(deepcopy(routed).bfloat16(), PROMPTS * 4, answers=8, max_tokens=24, stop=0, seed=1, record_routes=True)
    real, off = torch.arange(r.tokens.shape[1]) < r.length.unsqueeze(1), {}
    for name, routes in (("free", None), ("replayed", r.routes)):
        record = []
        logp = routed.logprob(r.tokens, lengths=r.length, mask=r.mask, record=record, routes=routes)
        off[name] = (logp - r.logp).abs().sum() / r.mask.sum()
        share = rerouted(r.routes[real], routes_of(record))[r.mask[real]].float().mean()
        assert share == 0 if name == "replayed" else 0.001 < share < 0.2
    assert 0 < off["replayed"] < off["free"]


def test_select(model):
    r = collect(model, PROMPTS, answers=6, max_tokens=10, stop=[0, 3], seed=1)
    r = replace(r, routes=torch.arange(r.tokens.numel() * 6, dtype=torch.int16).view(*r.tokens.shape, 3, 2))
    short = int(r.length.argmin())
    rows = torch.tensor([short, 7, short])
    part = r.select(rows)
    T = int(r.length[rows].max())
    for field in fields(Rollout):
        value, whole = getattr(part, field.name), getattr(r, field.name)
        if not isinstance(whole, torch.Tensor):
            assert value == whole
        else:
            assert torch.equal(value, whole[rows] if whole.ndim == 1 else whole[rows, :T])
    assert answers_of(part) == [answers_of(r)[row] for row in rows.tolist()]
    alone = r.select(torch.tensor([short]))
    assert alone.tokens.shape == (1, int(r.length[short])) and alone.mask.sum() == r.mask[short].sum()


def rollout(rows: list[list[int]], prompt_len: list[int], group: list[int], **more) -> Rollout:
    """Log-probs -1, -2, … by column inside the mask, entropies their opposite."""
    length = torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(length.max()))
    start = torch.tensor(prompt_len)
    mask = (columns >= start.unsqueeze(1)) & (columns < length.unsqueeze(1))
    tokens = torch.tensor([row + [0] * (len(columns) - len(row)) for row in rows])
    logp = -(columns + 1.0) * mask
    settings = {"stop": torch.full((len(rows),), EOS), "temperature": 0.7} | more
    return Rollout(tokens, start, length, mask, logp, -logp, group=torch.tensor(group), **settings)


def test_concatenate_by_hand():
    """The groups 7, 3, 7 become 1, 0, 1 by rank, and the 3, 3 of the second rollout become 2, 2."""
    a = rollout([[1, 2], [3, 4, 5], [6, 7]], [1, 2, 1], [7, 3, 7])
    b = rollout([[8, 9, 1, 2], [3, 4]], [2, 1], [3, 3], stop=torch.tensor([BUDGET, STOP]))
    r = concatenate([a, b])
    assert r.tokens.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 0, 0], [8, 9, 1, 2], [3, 4, 0, 0]]
    assert r.length.tolist() == [2, 3, 2, 4, 2] and r.prompt_len.tolist() == [1, 2, 1, 2, 1]
    assert r.mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert r.mask.dtype == torch.bool and r.tokens.dtype == torch.int64
    assert r.logp.tolist() == [[0, -2, 0, 0], [0, 0, -3, 0], [0, -2, 0, 0], [0, 0, -3, -4], [0, -2, 0, 0]]
    assert torch.equal(r.entropy, -r.logp)
    assert r.group.tolist() == [1, 0, 1, 2, 2]
    assert r.stop.tolist() == [EOS, EOS, EOS, BUDGET, STOP] and r.temperature == 0.7 and r.routes is None


def test_concatenate_keeps_routes_where_all_have_them():
    routes = torch.arange(12, dtype=torch.int16)
    a = rollout([[1, 2]], [1], [0], routes=routes.view(1, 2, 3, 2))
    b = rollout([[3, 4, 5]], [1], [0], routes=torch.ones(1, 3, 3, 2, dtype=torch.int16))
    r = concatenate([a, b])
    assert r.routes.shape == (2, 3, 3, 2) and r.routes.dtype == torch.int16
    assert torch.equal(r.routes[0, :2].flatten(), routes) and (r.routes[0, 2] == -1).all()  # padding has no route
    assert (r.routes[1] == 1).all()
    assert concatenate([a, replace(b, routes=None)]).routes is None


def test_concatenating_the_groups_of_a_rollout_gives_it_back(model):
    r = collect(model, PROMPTS, answers=6, max_tokens=10, stop=[0, 3], seed=1)
    again = concatenate([r.select((r.group == group).nonzero().squeeze(1)) for group in range(3)])
    for field in fields(Rollout):
        have, want = getattr(again, field.name), getattr(r, field.name)
        assert torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want


def test_concatenate_refuses_other_policies_and_nothing():
    a = rollout([[1, 2]], [1], [0])
    with pytest.raises(ValueError, match=r"temperatures \[0.7, 1.0\] of 2 rollouts"):
        concatenate([a, replace(a, temperature=1.0)])
    with pytest.raises(ValueError, match=r"temperatures \[\] of 0 rollouts"):
        concatenate([])


def test_row_ids_make_a_part_of_a_batch(model):
    settings = {"answers": 2, "max_tokens": 8, "stop": 0, "seed": 1}
    whole = collect(model, PROMPTS, **settings)
    part = collect(model, PROMPTS[1:], rows=torch.arange(2, 6), **settings)
    assert answers_of(part) == answers_of(whole)[2:] and part.group.tolist() == [0, 0, 1, 1]


def test_a_rank_without_a_prompt_still_gathers_the_weights():
    """Two prompts over three ranks; the rows are those of one process."""
    prompts = [[1, 2, 3], [4, 5]]
    for tokens in on_ranks(3, collected, prompts, timeout=60):
        assert torch.equal(tokens, collected(prompts))
