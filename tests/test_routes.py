"""experiments/studies/routes.py at toy size, and its table."""

import json
from dataclasses import replace

import pytest
import torch

from experiments import pretrain
from experiments.studies import routes
from experiments.tools import doc_blocks
from minir1 import tasks
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.tokenizer import word_level

TINY = ModelConfig(
    dim=32, layers=3, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=8, expert_ffn=16, init_std=0.2
)


@pytest.fixture
def toy(tmp_path):
    tokenizer = word_level(*tasks.load("countdown").vocabulary())
    torch.manual_seed(0)
    hf.save(pretrain.build_model(pretrain.Config(model=TINY), tokenizer), tokenizer, tmp_path / "base")
    sizes = {"seeds": (0, 4), "prompts": 4, "num_generations": 4, "max_completion_length": 24}
    paths = {"checkpoint": tmp_path / "base", "results": tmp_path / "docs" / "routes.json"}
    return routes.Config(**sizes, **paths, num_minibatches=4, after=(1, 3), learning_rate=0.01, device="cpu")


def test_the_measurement_at_toy_size(toy, monkeypatch, capsys):
    """The untrained base is never right, so the rewards are replaced by some that change the policy."""
    monkeypatch.setattr(routes.r1_zero, "reward", lambda answers, config: torch.arange(16.0).view(4, 4))
    results = routes.main(toy)
    assert results == json.loads(toy.results.read_text()) and "replayed" in capsys.readouterr().out
    assert set(results) == {"0", "4"}
    for one in results.values():
        assert set(one) == {"fp32/0", "bf16/0", "fp32/1", "fp32/3"}
        for result in one.values():  # a token counts if one of its two pairs does
            assert 0 <= result["pairs"] <= result["tokens"] <= 2 * result["pairs"] + 1e-9 <= 2
        same, half, after = one["fp32/0"], one["bf16/0"], one["fp32/3"]
        assert same["pairs"] == 0 and same["largest/free"] < 1e-4 and same["largest/replayed"] < 1e-4
        assert 0 < half["pairs"] < 0.2 and half["mean/replayed"] < half["mean/free"]
        assert after["pairs"] > half["pairs"] and after["mean/replayed"] > half["mean/replayed"]


def test_more_updates_than_there_are_minibatches_are_refused():
    with pytest.raises(ValueError, match=r"after = \(1, 8\): 1 to num_minibatches - 1 = 7 updates"):
        replace(routes.Config(), after=(1, 8))


def test_the_table():
    """50 ± t·s/√n = 50 ± 4.303·1/√3; a | within a cell would break the page's table."""
    one = {"pairs": 0.5, "tokens": 0.75, "mean/free": 0.002, "mean/replayed": 0.001}
    one |= {"largest/free": 0.3, "largest/replayed": 0.2}
    results = {}
    for n, shift in enumerate((-0.01, 0.0, 0.01)):
        shifted = one | {"pairs": 0.5 + shift, "largest/free": 0.3 + shift}
        results[str(n)] = {"bf16/0": shifted, "fp32/12": one, "fp32/0": one}
    lines = routes.rows(results)
    assert [line[0] for line in lines] == ["fp32, 0", "bf16, 0", "fp32, 12"]
    assert lines[1] == [
        "bf16, 0", "50.000% [47.516, 52.484]", "75.000% [75.000, 75.000]", "2.00e-03", "1.00e-03", "3.1e-01", "2.0e-01"
    ]
    assert routes.rows({"0": results["1"]})[0][1] == "50.000%"
    page = doc_blocks.routed(results).splitlines()
    assert page[3].startswith("| bf16, 0 | 50.000% [47.516, 52.484] |") and {line.count("|") for line in page} == {8}
