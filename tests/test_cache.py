"""cache.py: writing, keeping and repeating rows, and the slots that a token may see."""
import pytest
import torch

from minir1.model.cache import Cache
from minir1.model.config import ModelConfig, dense

CONFIGS = [ModelConfig(layers=2, kv_lora=3, rope=2, dim=8), dense(layers=2, dim=8, heads=2, kv_heads=1)]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=["mla", "gqa"])


def filled(config, lengths, slots=6):
    """Row b, slot s of layer l holds the number 100·l + 10·b + s + 1 throughout."""
    cache = Cache(config, len(lengths), slots)
    for layer, values in enumerate(cache.layers):
        for b, n in enumerate(lengths):
            for s in range(n):
                values[b, s] = 100 * layer + 10 * b + s + 1
    cache.advance(torch.tensor(lengths), max(lengths))
    return cache


def rows(cache, layer=0):
    return cache.layers[layer].flatten(2)[..., 0].tolist()


def test_shapes():
    mla, gqa = (Cache(config, 3, 7, dtype=torch.bfloat16) for config in CONFIGS)
    assert [tuple(x.shape) for x in mla.layers] == [(3, 7, 5)] * 2
    assert [tuple(x.shape) for x in gqa.layers] == [(3, 7, 2, 1, 4)] * 2
    assert mla.slots == 7 and mla.used == 0 and mla.length.tolist() == [0, 0, 0]
    assert mla.layers[0].dtype == torch.bfloat16


def test_positions_and_visible_slots_of_ragged_rows():
    cache = filled(CONFIGS[0], [3, 1])
    positions = cache.positions(2)
    assert positions.tolist() == [[3, 4], [1, 2]]
    bias = cache.bias(positions)
    assert bias.shape == (2, 2, 5) and bias.dtype == torch.float32
    assert (bias == 0).sum(-1).tolist() == [[4, 5], [2, 3]]  # itself and all before
    assert (bias[1, 0] == 0).tolist() == [True, True, False, False, False]
    assert set(bias.flatten().tolist()) == {0.0, float("-inf")}


@EACH
def test_write_places_each_row_at_its_own_end(config):
    cache = filled(config, [3, 1])
    entry = torch.full((2, 2, *cache.layers[0].shape[2:]), 77.0)
    in_use = cache.write(0, cache.positions(2), entry)
    assert in_use.shape[1] == 5  # the slots in use, not all six
    assert rows(cache) == [[1, 2, 3, 77, 77, 0], [11, 77, 77, 0, 0, 0]]
    assert rows(cache, 1) == [[101, 102, 103, 0, 0, 0], [111, 0, 0, 0, 0, 0]]  # the other layer is as it was
    cache.advance(torch.tensor([2, 1]), 2)  # the second row had one real token only
    assert cache.length.tolist() == [5, 2] and cache.used == 5
    cache.write(0, cache.positions(1), entry[:, :1] + 1)
    assert rows(cache) == [[1, 2, 3, 77, 77, 78], [11, 77, 78, 0, 0, 0]]  # padding is overwritten


@EACH
def test_keep(config):
    cache = filled(config, [3, 1, 2, 4])
    storage = cache.layers[0].data_ptr()
    cache.keep([1, 3])
    assert rows(cache) == [[11, 0, 0, 0, 0, 0], [31, 32, 33, 34, 0, 0]]
    assert rows(cache, 1)[1][:4] == [131, 132, 133, 134]
    assert cache.length.tolist() == [1, 4] and cache.used == 4
    assert cache.layers[0].data_ptr() == storage  # in place
    cache.keep([1])
    assert rows(cache) == [[31, 32, 33, 34, 0, 0]] and cache.length.tolist() == [4]


@EACH
def test_repeat(config):
    cache = filled(config, [3, 1], slots=3)
    more = cache.repeat(2, slots=5)
    assert rows(more) == [[1, 2, 3, 0, 0]] * 2 + [[11, 0, 0, 0, 0]] * 2
    assert rows(more, 1)[2] == [111, 0, 0, 0, 0]
    assert more.length.tolist() == [3, 3, 1, 1] and more.used == 3 and more.slots == 5
    more.write(0, more.positions(1), torch.full((4, 1, *more.layers[0].shape[2:]), 9.0))
    more.advance(1, 1)
    assert rows(cache) == [[1, 2, 3], [11, 0, 0]] and cache.length.tolist() == [3, 1]  # a copy, not a view
    assert rows(more)[1] == [1, 2, 3, 9, 0] and rows(more)[3] == [11, 9, 0, 0, 0]


def test_used_never_exceeds_the_slots():
    cache = filled(CONFIGS[0], [5, 1])
    cache.advance(torch.tensor([1, 1]), 2)
    assert cache.used == cache.slots == 6


@EACH
def test_a_view_is_the_first_rows_in_the_same_memory(config):
    cache = filled(config, [3, 1, 2])
    view = cache.view([2, 1])
    assert view.length.tolist() == [2, 1] and view.used == 2 and len(view.layers[0]) == 2
    view.write(0, view.positions(1), torch.full((2, 1, *cache.layers[0].shape[2:]), 9.0))
    view.advance(1, 1)
    view.keep([1])
    assert rows(cache) == [[11, 9, 0, 0, 0, 0], [11, 9, 0, 0, 0, 0], [21, 22, 0, 0, 0, 0]]  # row 1 was copied to row 0
    assert view.length.tolist() == [2] and cache.length.tolist() == [3, 1, 2]  # the cache's own lengths stay
    assert cache.view([]).used == 0


@EACH
def test_put_copies_rows_of_another_cache(config):
    cache, other = filled(config, [3, 1, 2]), filled(config, [2, 4], slots=4)
    cache.put([2, 0], other, [1, 1])
    assert rows(cache) == [[11, 12, 13, 14, 0, 0], [11, 0, 0, 0, 0, 0], [11, 12, 13, 14, 0, 0]]
    assert rows(cache, 1)[2] == [111, 112, 113, 114, 0, 0]
    assert cache.length.tolist() == [3, 1, 2]
