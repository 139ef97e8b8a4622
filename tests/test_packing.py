"""packing.py: ragged rows as one list, and back."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.model.packing import from_cu_seqlens, packing

CPU = torch.device("cpu")


def test_by_hand():
    layout = packing(3, 4, torch.tensor([2, 0, 3]), CPU)
    assert layout.index.tolist() == [0, 1, 8, 9, 10]
    assert layout.positions().tolist() == [0, 1, 0, 1, 2]
    grid = torch.arange(12).view(3, 4, 1)
    packed = layout.pack(grid)
    assert packed.flatten().tolist() == [0, 1, 8, 9, 10]
    assert layout.pad(packed + 1).flatten().tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 9, 10, 11, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2))
def test_round_trips(lengths, slack):
    columns = max(lengths) + slack
    layout = packing(len(lengths), columns, torch.tensor(lengths), CPU)
    x = torch.randn(len(lengths), columns, 2, 3)
    real = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
    assert torch.equal(layout.pad(layout.pack(x)), x * real[..., None, None])
    packed = torch.randn(sum(lengths), 4)
    assert torch.equal(layout.pack(layout.pad(packed)), packed)
    assert layout.positions().tolist() == [t for n in lengths for t in range(n)]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    laid = from_cu_seqlens(cu, sum(lengths))
    assert laid.columns == max(lengths) and laid.lengths.tolist() == lengths
    assert torch.equal(laid.positions(), layout.positions())


def test_full_rows_need_no_index_and_copy_nothing():
    layout = packing(2, 3, None, CPU)
    x = torch.randn(2, 3, 4)
    assert layout.index is None and layout.lengths.tolist() == [3, 3]
    assert layout.pack(x).data_ptr() == x.data_ptr() and torch.equal(layout.pad(layout.pack(x)), x)
    assert layout.positions().tolist() == [0, 1, 2, 0, 1, 2]


def test_gradients_flow_to_the_real_tokens_alone():
    layout = packing(2, 3, torch.tensor([1, 2]), CPU)
    x = torch.ones(2, 3, 1, requires_grad=True)
    layout.pad(layout.pack(x) * 2).sum().backward()
    assert x.grad.flatten().tolist() == [2, 0, 0, 2, 2, 0]


@pytest.mark.parametrize("lengths", [[2], [2, 2, 2], [[1], [2]]])
def test_one_length_per_row(lengths):
    with pytest.raises(ValueError, match=r"lengths has shape .*, expected \(2,\)"):
        packing(2, 3, torch.tensor(lengths), CPU)


@pytest.mark.parametrize("lengths", [[2, 4], [-1, 2]])
def test_lengths_beyond_the_grid(lengths):
    with pytest.raises(ValueError, match="lengths must lie in 0 to 3, got"):
        packing(2, 3, torch.tensor(lengths), CPU)


@pytest.mark.parametrize("cu", [[0, 3], [1, 5], [0, 4, 3, 5], [0, 6], [0], [5]])
def test_cu_seqlens_must_rise_from_zero_to_the_number_of_tokens(cu):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5, got"):
        from_cu_seqlens(torch.tensor(cu, dtype=torch.int32), 5)
