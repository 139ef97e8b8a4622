"""experiments/studies/long_context.py at toy size."""

import json
from dataclasses import replace

import pytest
import torch
from runs import assert_equal_bits, result_of, stop

from experiments.studies import long_context
from minir1 import checkpoint
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import ModelConfig

LONG = long_context.Config(
    factor=2, dim=32, steps=5, tune_steps=3, batch=256, tune_batch=300, rows=3, cost_lengths=(16, 32),
    checkpoint_every=2, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("length, pairs", [(16, 2), (64, 8), (131, 5)])
def test_every_question_of_a_long_text_has_its_one_answer(length, pairs):
    tokenizer = long_context.build_tokenizer()
    tokens, part = long_context.texts(tokenizer, 50, length, pairs, torch.Generator().manual_seed(length))
    keys = {tokenizer.id(word) for word in long_context.KEYS}
    body = length - 2 * pairs
    assert tokens.shape == part.shape == (50, length)
    for row, where in zip(tokens.tolist(), part.tolist()):
        assert where[:body] == [-1] * body and sorted(where[body + 1 :: 2]) == list(range(pairs))
        assert sum(token in keys for token in row[:body]) == pairs
        for question in range(body, length, 2):
            position = row[:body].index(row[question])
            assert row[position + 1] == row[question + 1] and where[question] == -1
            low, high = (2 * (n * (body // 2) // pairs) for n in (where[question + 1], where[question + 1] + 1))
            assert low <= position < high


def test_accuracy_counts_each_part_by_itself():
    """A model that knows only the answers of the second part."""
    tokenizer = long_context.build_tokenizer()
    tokens, part = long_context.texts(tokenizer, LONG.rows, 64, 8, long_context.generator(0, 64))

    class Knowing:
        device = torch.device("cpu")

        def hidden(self, rows):
            return torch.where(part == 1, tokens, 0).roll(-1, 1).unsqueeze(-1)  # at t the token at t + 1

        def logits(self, hidden):
            return torch.nn.functional.one_hot(hidden.squeeze(-1), 200).float()

    assert long_context.accuracy(Knowing(), tokenizer, 64, LONG) == [0, 1, 0, 0, 0, 0, 0, 0]


def test_a_killed_run_measures_the_same_to_the_bit(tmp_path, monkeypatch):
    result = long_context.main(replace(LONG, out=tmp_path / "whole", results=tmp_path / "all.json", seed=1))
    for kill in (4, 7):  # in the first training, and in a tuning
        config = replace(LONG, out=tmp_path / f"killed-{kill}", seed=1)
        stop(monkeypatch, "studies.long_context", config, "experiments.studies.long_context", "clip_gradients", kill)
        long_context.main(replace(config, resume=True))
        for phase in ("trained", "none_tuned", "yarn_tuned"):
            a, b = (checkpoint.latest(out / "checkpoint" / phase) for out in (tmp_path / "whole", config.out))
            assert_equal_bits(checkpoint.load_state(a), checkpoint.load_state(b))
        assert read_metrics(config.out) == read_metrics(tmp_path / "whole")
        measured = [key for key in result if key.split("/")[0] in long_context.figures.VARIANTS]
        assert [result_of(config.out)[key] for key in measured] == [result[key] for key in measured]
    assert LONG.lengths == [32, 64, 128] and len(measured) == 6 * (3 * 8 + 2)
    shares = [result[f"yarn/{length}/{part}"] for length in (32, 64) for part in range(8)]
    assert result["yarn/inside"] == pytest.approx(sum(shares) / 16)
    assert result["cache/mla/32/mib"] / result["cache/mha/32/mib"] == 80 / 256  # 64 + 16 against 2·4·32
    assert json.loads((tmp_path / "all.json").read_text()) == {"1": json.loads(json.dumps(result))}
    for figure in ("all.png", "all_costs.png", "whole/figures/retrieval.png", "whole/figures/costs.png"):
        assert (tmp_path / figure).exists()
    scaling = hf.load(checkpoint.latest(tmp_path / "whole" / "checkpoint" / "yarn_tuned"))[0].config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original) == ("yarn", 2, 64)


def test_microbatches_do_not_change_a_step_on_long_texts():
    tokenizer, phase, grads = long_context.build_tokenizer(), long_context.phases(LONG)[1], []
    for microbatch in (100_000, 1):
        torch.manual_seed(0)
        model = long_context.Transformer(ModelConfig(vocab=128, dim=32, layers=1, heads=2, experts=0))
        long_context.loss_backward(model, tokenizer, phase, 3, replace(LONG, microbatch=microbatch))
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
