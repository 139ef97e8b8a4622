"""data.py: every row once, in batches within the budget."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.data import batches, by_tokens, end_to_end, packed, pad_rows, passes


def test_pad_rows():
    grid, lengths = pad_rows([[1, 2], [], (3, 4, 5)])
    assert grid.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]] and lengths.tolist() == [2, 0, 3]
    assert grid.dtype == lengths.dtype == torch.int64
    grid, lengths = pad_rows([])
    assert grid.shape == (0, 0) and lengths.shape == (0,)
    assert pad_rows([[], []])[0].shape == (2, 0)


def test_by_tokens_by_hand():
    assert by_tokens([5, 1, 3, 2, 9], 6) == [[1, 3], [2], [0], [4]]  # 2·2 fits, 3·3 does not; 9 stands alone
    assert by_tokens([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]
    assert by_tokens([], 4) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_by_tokens_keeps_the_budget_and_every_row(lengths, budget):
    groups = by_tokens(lengths, budget)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    longest = [max(lengths[row] for row in group) for group in groups]
    assert longest == sorted(longest)
    for a, b in zip(groups, groups[1:]):  # greedy: the next row would not have fitted
        assert (len(a) + 1) * lengths[b[0]] > budget


def test_rows_end_to_end():
    tokens, cu_seqlens = end_to_end([[1, 2], [], (3, 4, 5)])
    assert tokens.tolist() == [1, 2, 3, 4, 5] and cu_seqlens.tolist() == [0, 2, 2, 5]
    assert (tokens.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert [x.tolist() for x in end_to_end([])] == [[], [0]]


def test_packed_by_hand():
    assert packed([5, 1, 3, 2, 9], 6) == [[1, 3, 2], [0], [4]]  # 1 + 2 + 3 fit, 5 more do not; 9 stands alone
    assert packed([1, 1, 1, 1, 5], 9) == [[0, 1, 2, 3], [4]]  # together they are 9, but padded 25
    assert packed([], 4) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_packed_keeps_both_budgets_and_every_row(lengths, budget):
    groups = packed(lengths, budget)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= budget
        assert len(group) * max(lengths[row] for row in group) <= 2 * sum(lengths[row] for row in group)
    for a, b in zip(groups, groups[1:]):  # greedy: the next row would not have fitted
        more, tokens = lengths[b[0]], sum(lengths[row] for row in a) + lengths[b[0]]
        assert tokens > budget or (len(a) + 1) * more > 2 * tokens


def documents(count, seed=0):
    rng = random.Random(seed)
    return [[i] * rng.randint(1, 30) for i in range(count)]


def test_batches_yields_every_document_once_the_last_pool_too():
    rows = documents(500)
    found = list(batches(iter(rows), budget=128, pool=4, rng=random.Random(1)))
    assert sorted(row[0] for batch in found for row in batch) == list(range(500))
    for batch in found:
        assert len(batch) * max(map(len, batch)) <= 128
    assert [sorted(row[0] for row in batch) for batch in batches(rows[:3], 10**6, 4, random.Random(1))] == [[0, 1, 2]]
    assert list(batches([], 128, 4, random.Random(1))) == []


def test_batches_depends_on_stream_and_rng_alone():
    rows = documents(300)
    first = list(batches(rows, 128, 4, random.Random(1)))
    assert first == list(batches(rows, 128, 4, random.Random(1))) != list(batches(rows, 128, 4, random.Random(2)))


def test_batches_reads_no_more_than_a_pool_ahead():
    """The stream may be endless."""
    read = []

    def stream():
        for i in itertools.count():
            read.append(i)
            yield [i] * 10

    endless = batches(stream(), budget=50, pool=3, rng=random.Random(0))
    next(endless)
    assert len(read) == 15  # 3 · 50 tokens
    got = [next(endless) for _ in range(5)]
    assert len(read) == 30 and all(len(batch) == 5 for batch in got)


def test_little_padding():
    rows = documents(4000)
    found = list(batches(rows, 256, 16, random.Random(1)))
    padded = sum(len(batch) * max(map(len, batch)) for batch in found)
    assert sum(map(len, rows)) / padded > 0.9
    widths = [max(map(len, batch)) for batch in found[:17]]
    assert widths != sorted(widths)  # and yet not from short to long


@pytest.mark.parametrize("budget", [1, 7])
def test_rows_longer_than_the_budget_stand_alone(budget):
    assert [len(batch) for batch in batches([[1] * 8] * 3, budget, 2, random.Random(0))] == [1, 1, 1]


def test_passes_see_everything_once_before_anything_twice():
    stream = list(itertools.islice(passes(10, 4, seed=0), 10))
    assert all(len(batch) == 4 for batch in stream)
    flat = sum(stream, [])
    orders = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders) and len({tuple(order) for order in orders}) == 4
    assert stream == list(itertools.islice(passes(10, 4, seed=0), 10)) != list(itertools.islice(passes(10, 4, 1), 10))
    assert sorted(next(passes(3, 6, seed=0))) == [0, 0, 1, 1, 2, 2]  # a batch may be longer than a pass
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"count = {wrong[0]}, size = {wrong[1]}: at least 1"):
            next(passes(*wrong, seed=0))
