"""distributed.py: exchanges, micro-batches dealt to ranks, tensors in shards; on two and on three ranks."""

import pytest
import torch
from ranks import on_ranks

from minir1 import distributed
from minir1.distributed import (
    deal,
    divided,
    exchanged,
    is_shard,
    joint_norm,
    local,
    my_share,
    on_first,
    rank,
    sum_of_ranks,
    unread,
    whole,
    world,
)  # fmt: skip

DEALT = {  # micro-batches of the whole batch
    "even": [[0, 1], [2, 3], [4], [5], [6], [7, 8]],
    "one": [[0, 1, 2, 3, 4]],
    "one row": [[0]],
    "two rows": [[0], [1]],
    "four": [[0, 1, 2], [3], [4, 5, 6, 7, 8], [9]],
}


def fails():
    raise KeyError("only rank 0 was asked")


def values():
    """What this rank gets of everything."""
    me, W = rank(), world()
    tensor, matrix = torch.tensor([1.0, 2.0]), torch.arange(10.0).view(5, 2)
    mesh, parts = distributed.mesh("cpu"), divided(matrix)
    distributed.second_group()
    with pytest.raises(KeyError, match="only rank 0 was asked"):
        on_first(fails)
    empty = unread((5, 2), torch.bfloat16, "cpu")
    norm = joint_norm(torch.tensor([3.0, 4.0, 12.0][me]))
    return {
        "first": on_first(lambda: me),
        "exchanged": exchanged("abc"[me]),
        "beside": exchanged(me, in_thread=True),
        "mine": my_share(range(7)),
        "sums": (sum_of_ranks(me + 0.5), sum_of_ranks(tensor * (me + 1)), tensor),
        "deal": {name: deal(parts) for name, parts in DEALT.items()},
        "local": local(parts),
        "is_shard": [is_shard(parts), is_shard(matrix), divided(parts) is parts, is_shard(divided(torch.tensor(1.0)))],
        "whole": [whole(parts), whole(matrix)],
        "unread": (is_shard(empty), empty.shape, empty.dtype, local(empty).shape == local(parts).shape),
        "norm": norm.item(),
        "opening": distributed.load_target(torch.device("meta"), torch.bfloat16),
        "mesh": mesh.size() == W,
    }


def test_in_one_process_all_is_as_it_was():
    x = torch.ones(3)
    assert (world(), rank()) == (1, 0) and on_first(lambda: 5) == 5
    assert exchanged("a") == ["a"] and my_share([1, 2]) == [1, 2]
    assert divided(x) is x and whole(x) is x and local(x) is x and sum_of_ranks(x) is x and joint_norm(x) is x
    assert deal([[0, 1], [2]]) == [([0, 1], 1.0), ([2], 1.0)]
    assert distributed.load_target(torch.device("meta"), torch.bfloat16) == (torch.device("meta"), torch.bfloat16)
    assert not unread((2,), torch.float32, "cpu").any()


@pytest.mark.parametrize("W", [2, 3])
def test_on_several_ranks(W):
    results = on_ranks(W, values)
    matrix = torch.arange(10.0).view(5, 2)
    for me, got in enumerate(results):
        assert got["first"] == 0 and got["exchanged"] == [*"abc"[:W]] and got["beside"] == [*range(W)]
        assert [*got["mine"]] == [*range(7)][me::W]
        number, summed, own = got["sums"]
        assert number == sum(range(W)) + 0.5 * W and own.tolist() == [1.0, 2.0]
        assert summed.tolist() == [W * (W + 1) / 2, W * (W + 1)]
        assert got["is_shard"] == [True, False, True, False]
        assert all(torch.equal(x, matrix) for x in got["whole"])
        assert got["unread"] == (True, (5, 2), torch.bfloat16, True)
        assert got["norm"] == pytest.approx({2: 5.0, 3: 13.0}[W])
        assert got["opening"] == (torch.device("cpu"), torch.float32) and got["mesh"]
    assert torch.equal(torch.cat([got["local"] for got in results]), matrix)
    for name, parts in DEALT.items():
        dealt = [got["deal"][name] for got in results]
        assert len({*map(len, dealt)}) == 1, name
        shares: dict[int, float] = {}
        for rows, share in sum(dealt, []):
            assert share == 1.0 or len(rows) == 1
            for row in rows:
                shares[row] = shares.get(row, 0.0) + share
        assert shares == pytest.approx({row: 1.0 for part in parts for row in part}), name
    assert results[0]["deal"]["one row"] == [([0], 1 / W)]
