"""model/shards.py: what each of two ranks keeps of a model, and where a gradient that is not finite began."""

import gc
import warnings

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from minir1.distributed import local, rank, world
from minir1.losses import nll
from minir1.model.config import dense
from minir1.model.shards import shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients

SHAPE = dense(vocab=512, dim=256, layers=4, heads=4, kv_heads=2, ffn=1024)


def alive() -> int:
    """Bytes of the floating-point tensors that Python holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [local(x) for x in gc.get_objects() if isinstance(x, Tensor)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in found if x.is_floating_point()}
    return sum(storages.values())


def one_step() -> tuple[int, int, int]:
    """Bytes of weights, gradients and moments after a step of AdamW; the most in a pass or the step; parameters."""
    torch.manual_seed(0)
    model, before = Transformer(SHAPE), alive()
    before -= sum(p.nbytes for p in model.parameters())  # tensors of others
    shard(torch.device("cpu"), torch.float32, model)
    optimizer = adamw(model.parameters(), 1e-3)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(alive()))
        block.register_full_backward_hook(lambda *_: seen.append(alive()))
    tokens = torch.randint(SHAPE.vocab, (2, 9), generator=torch.Generator().manual_seed(rank()))
    nll(model.logprob(tokens, lengths=torch.tensor([9, 9]))).mean().backward()
    seen.append(alive())
    optimizer.step()
    seen.append(alive())
    parameters = list(model.parameters())
    state = [x for p in parameters for x in (p, p.grad, *optimizer.state[p].values())]
    kept = sum(local(x).nbytes for x in state)
    return kept, max(seen) - before, sum(p.numel() for p in parameters)


def test_a_rank_needs_half_of_the_memory_of_one_process():
    kept, peak, number = one_step()
    assert number > 3e6 and kept == pytest.approx(16 * number, rel=1e-3) and 1 <= peak / kept < 1.2
    for share, most, same in on_ranks(2, one_step):
        assert same == number
        assert 0.5 <= share / kept < 0.51
        assert most / peak <= 0.6


def not_finite(where: str) -> str:
    """The error of clip_gradients where rank 1 has a NaN."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    shard(torch.device("cpu"), torch.float32, model)
    if where == "weight" and rank() == world() - 1:
        local(model.blocks[2].ffn.down.weight.data)[0, 0] = torch.nan
    loss = nll(model.logprob(torch.ones(2, 9, dtype=torch.long), lengths=torch.tensor([9, 9]))).mean()
    (loss * (torch.nan if where == "loss" and rank() == world() - 1 else 1)).backward()
    with pytest.raises(RuntimeError) as error:
        clip_gradients(model, 1.0, 7)
    return str(error.value)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_the_rank_where_a_nan_began_is_named(where):
    began = {"loss": "in its own loss or backward pass", "weight": "in its part of blocks.2.ffn.down.weight"}
    for message in on_ranks(2, not_finite, where):
        assert message.startswith("step 7: the gradient of ")
        assert message.endswith(f" is not finite, first on rank 1, {began[where]}")
    assert "rank" not in not_finite("loss")  # one process
