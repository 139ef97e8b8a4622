"""mtp.py: module k reads the token k ahead and nothing later, rows are independent of each other, and it learns."""

import pytest
import torch

from minir1.model.config import ModelConfig, dense
from minir1.model.packing import packing
from minir1.model.transformer import Transformer
from minir1.optim import Muon, split_parameters

V, DEPTH = 24, 2
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "ffn": 48, "init_std": 0.2, "mtp_depth": DEPTH}
MLA = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "dense_layers": 1, "experts": 4, "expert_ffn": 16}
CONFIGS = {
    "mla moe": ModelConfig(**SHAPE, **MLA),
    "mla dense": ModelConfig(**SHAPE, **MLA | {"experts": 0}),
    "gqa moe": ModelConfig(**SHAPE, attention="gqa", experts=4, expert_ffn=16, embedding_scale=2.0, softcap=5.0),
    "gqa dense": dense(**SHAPE, tied=True),
}
LENGTHS = torch.tensor([9, 2, 1, 6, 3])
TOKENS = torch.randint(0, V, (5, 9), generator=torch.Generator().manual_seed(1))
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def build(name: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIGS[name])


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


def states(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """h^0 … h^D of full rows, each [B, T - k, D], the modules chained as in the paper's figure."""
    chain = [model.hidden(tokens)]
    for k, module in enumerate(model.mtp, start=1):
        rows = packing(len(tokens), tokens.shape[1] - k, None, tokens.device)
        embedded, before = model.embed(tokens[:, k:]), chain[-1][:, :-1]  # t_{i+k} beside h^{k-1}_i
        out, _ = module(rows.pack(embedded), rows.pack(before), model.freqs_cis(rows.positions()), rows)
        chain.append(rows.pad(out))
    return chain


@torch.no_grad()
def test_a_module_against_the_equations(model):
    """h'_i = W_eh [RMSNorm(emb) ; RMSNorm(h)], the embedding first, and h^k = RMSNorm(Block(h')), norms written out."""
    module, rows = model.mtp[0], packing(2, 5, None, TOKENS.device)
    for norm in (module.enorm, module.hnorm, module.norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    embedded, hidden = torch.randn(2, 10, model.config.dim)
    normed = lambda norm, x: norm.weight * x / (x.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    D, W = model.config.dim, module.eh_proj.weight
    combined = normed(module.enorm, embedded) @ W[:, :D].T + normed(module.hnorm, hidden) @ W[:, D:].T
    freqs_cis = model.freqs_cis(rows.positions())
    want, _ = module.block(combined, freqs_cis, rows)
    torch.testing.assert_close(module(embedded, hidden, freqs_cis, rows)[0], normed(module.norm, want), **CLOSE)


@torch.no_grad()
def test_the_log_probs_are_those_of_the_chained_modules(model):
    have = model.mtp_logprob(TOKENS)
    assert len(have) == 1 + DEPTH
    torch.testing.assert_close(have[0], model.logprob(TOKENS), **CLOSE)
    for k, hidden in enumerate(states(model, TOKENS)):
        logp = model.logits(hidden[:, :-1]).log_softmax(-1)  # from h^k_i …
        want = logp.gather(-1, TOKENS[:, k + 1 :, None]).squeeze(-1)  # … for t_{i+k+1}
        torch.testing.assert_close(have[k][:, k + 1 :], want, **CLOSE)
        assert not have[k][:, : k + 1].any() and (have[k][:, k + 1 :] < 0).all()


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 3, 5, 8])
def test_a_state_depends_on_its_token_and_on_none_after(model, changed):
    """h^k_i depends on t_0 … t_{i+k}, the last included, and on nothing later."""
    tokens = TOKENS[:1]
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % V
    for k, (a, b) in enumerate(zip(states(model, tokens), states(model, other))):
        moved = (a - b).abs().amax(-1)[0]
        reads = torch.arange(len(moved)) + k >= changed
        assert (moved[reads] > 1e-4).all() and (moved[~reads] < 1e-5).all(), k
    before, after = model.mtp_logprob(tokens), model.mtp_logprob(other)
    for k, (a, b) in enumerate(zip(before, after)):
        different = torch.arange(9) >= max(changed, k + 1)  # the token itself, and what is predicted from it
        assert (((a - b).abs() > 1e-5)[0] == different).all(), k


@torch.no_grad()
def test_rows_are_independent_of_padding_and_of_the_batch(model):
    have = model.mtp_logprob(TOKENS, lengths=LENGTHS)
    real = torch.arange(9) < LENGTHS.unsqueeze(1)
    other = model.mtp_logprob(torch.where(real, TOKENS, 7), lengths=LENGTHS)
    for k in range(DEPTH + 1):
        assert torch.equal(have[k], other[k])
        assert ((have[k] != 0) == (real & (torch.arange(9) > k))).all()  # rows of one token and of two among them
        for row, n in enumerate(LENGTHS.tolist()):
            alone = model.mtp_logprob(TOKENS[row : row + 1, :n])[k]
            torch.testing.assert_close(have[k][row : row + 1, :n], alone, **CLOSE)


@torch.no_grad()
def test_a_mask_chooses_what_is_scored(model):
    whole = model.mtp_logprob(TOKENS, lengths=LENGTHS)
    mask = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    for all_of_them, some in zip(whole, model.mtp_logprob(TOKENS, lengths=LENGTHS, mask=mask)):
        torch.testing.assert_close(some, all_of_them * mask, **CLOSE)
    with pytest.raises(ValueError, match="expected"):
        model.mtp_logprob(TOKENS, mask=mask[:, 1:])


@torch.no_grad()
def test_without_modules_it_is_the_model_alone():
    model = Transformer(ModelConfig(**SHAPE | {"mtp_depth": 0}, **MLA))
    (have,) = model.mtp_logprob(TOKENS, lengths=LENGTHS)
    assert torch.equal(have, model.logprob(TOKENS, lengths=LENGTHS))


def test_gradients_reach_the_module_and_the_trunk(model):
    (-model.mtp_logprob(TOKENS, lengths=LENGTHS)[DEPTH].sum()).backward()
    for name, p in model.named_parameters():
        last = name.startswith(f"mtp.{DEPTH - 1}.")
        # The second layer's experts are left out: some may have no token.
        if last or name.startswith(("embedding", "head", "blocks.0", "mtp.0.eh_proj", "mtp.0.enorm", "norm")):
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_routing_of_the_modules_is_recorded_last():
    model, record = build("mla moe"), []
    model.mtp_logprob(TOKENS, lengths=LENGTHS, record=record)
    tokens = [int(LENGTHS.sum()), int((LENGTHS - 1).sum()), int((LENGTHS - 2).clamp(min=0).sum())]
    assert [len(routing.chosen) for routing in record] == tokens  # one MoE layer, then one per module


def test_the_modules_learn_a_period(model):
    matrices, rest = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"mtp.0.eh_proj.weight", "mtp.1.block.attention.wo.weight"} <= {names[id(p)] for p in matrices}
    optimizers = Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(15):
        tokens = (torch.randint(0, 7, (8, 1), generator=generator) + torch.arange(12)) % 7
        ahead = torch.stack([-x[:, 1 + k :].mean() for k, x in enumerate(model.mtp_logprob(tokens))])
        ahead.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(ahead.detach())
    assert (losses[-1] < 0.5 * losses[0]).all(), (losses[0], losses[-1])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_a_cache_gives_the_same_states(model, lengths):
    """A prefill of all but the last tokens, then those in one pass over the cache."""
    rows = len(TOKENS)
    n = torch.full((rows,), 9) if lengths is None else lengths
    cache = model.cache(rows, 24, mtp=True)
    layout = packing(rows, 9, lengths, TOKENS.device)
    first = layout.pack(model.hidden(TOKENS, lengths=lengths, cache=cache))
    assert len(list(model.look_ahead(layout.pack(TOKENS), first, layout, cache))) == DEPTH
    more = torch.randint(0, V, (rows, 4), generator=torch.Generator().manual_seed(4))
    whole = [torch.cat((TOKENS[row, : n[row]], more[row])).unsqueeze(0) for row in range(rows)]
    wanted = [states(model, tokens) for tokens in whole]
    positions = (n - 1).unsqueeze(1) + torch.arange(4)  # of module 1, which has n - 1 entries
    before = torch.stack([wanted[row][0][0, n[row] - 1 : n[row] + 3] for row in range(rows)])
    out = model.mtp[0].decode(
        model.embed(more), before, model.freqs_cis(positions), cache, positions, cache.bias(positions)
    )
    for row in range(rows):
        torch.testing.assert_close(out[row], wanted[row][1][0, n[row] - 1 :], **CLOSE)


@pytest.mark.parametrize("depth", [1, 2])
def test_rows_of_one_token_have_gradients_of_zero(depth):
    """No module has a token to work on there."""
    model = Transformer(dense(vocab=31, dim=32, layers=1, heads=2, kv_heads=1, ffn=16, mtp_depth=depth))
    scores = model.mtp_logprob(torch.tensor([[1], [2]]), lengths=torch.tensor([1, 1]))
    sum(x.sum() for x in scores).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
