"""seed.py: streams are functions of (seed, keys), the same on every machine."""

import random

import numpy as np
import pytest
import torch

from minir1.seed import generator, python_random, seed_everything, stream


def test_seed_everything_repeats_all_three():
    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw() == draw()


def test_streams_repeat_and_differ():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 23), (12, 3), (123,), (-1,), (2**40,)]
    assert len({stream(*key) for key in keys}) == len(keys)
    assert all(0 <= stream(*key) < 2**63 for key in keys)
    first, again, other = (torch.rand(4, generator=generator(3, step)) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert python_random(3, 5).random() == python_random(3, 5).random() != python_random(3, 6).random()


def test_streams_ignore_and_leave_the_global_state():
    seed_everything(0)
    first = torch.rand(3, generator=generator(1, 2))
    after = torch.rand(())
    seed_everything(0)
    assert torch.equal(after, torch.rand(()))
    assert torch.equal(first, torch.rand(3, generator=generator(1, 2)))


def test_the_number_of_a_stream_never_changes():
    # `printf 3,14,15 | b2sum -l 64` prints 206b30b1a1dc2051, little-endian, halved
    assert stream(3, 14, 15) == int.from_bytes(bytes.fromhex("206b30b1a1dc2051"), "little") // 2


def test_keys_must_be_integers():
    with pytest.raises(ValueError, match="1.5"):
        generator(0, 1.5)


def test_neighbouring_streams_are_uncorrelated():
    rows = torch.stack([torch.randn(2000, generator=generator(0, key)) for key in range(20)])
    correlation = torch.corrcoef(rows) - torch.eye(20)
    assert correlation.abs().max() < 0.1  # 4.5 deviations of 1/√2000
