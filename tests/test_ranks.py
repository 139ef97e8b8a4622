"""ranks.py: results in order, errors of the rank that failed first, ranks that hang or die."""
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, on_ranks


def ranks_summed(x):
    total = x * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), torch.get_num_threads(), total


def unequal(what):
    """Rank 1 fails in one of three ways, while rank 0 waits for it."""
    if dist.get_rank() == 1:
        if what == "raise":
            raise KeyError("which")
        if what == "die":
            os._exit(7)
        time.sleep(600)
    dist.barrier()


def test_every_rank_returns_and_they_talk():
    results = on_ranks(2, ranks_summed, torch.tensor([1.0, 2.0]))
    assert [result[:2] for result in results] == [(0, 1), (1, 1)]
    assert all(torch.equal(total, torch.tensor([3.0, 6.0])) for _, _, total in results)


@pytest.mark.parametrize("what, error, message", [
    ("raise", KeyError, "which"),
    ("die", RuntimeError, r"died, with their exit codes: \{1: 7\}"),
    ("hang", TimeoutError, "(?s)not all of 2 ranks have returned within 1 s.*rank 0: .*rank 1: .*test_ranks.py"),
])
def test_the_failure_of_a_rank_is_raised_at_once(what, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message) as raised:
        on_ranks(2, unequal, what, timeout=1 if what == "hang" else 60)
    assert time.monotonic() - began < 45
    if what == "raise":
        assert isinstance(raised.value.__cause__, RankError) and "rank 1 of 2" in str(raised.value.__cause__)
