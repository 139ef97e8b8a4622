"""experiments/studies/preferences.py: the chain at toy size, and its table."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_preference_pairs import save_base, scripted

from experiments import dpo, preference_pairs, reward_model
from experiments.studies import preferences
from minir1 import checkpoint
from minir1.model import heads, hf
from minir1.tasks import countdown
from minir1.tokenizer import word_level

TOKENIZER = word_level(*countdown.vocabulary())


def test_the_chain_runs_once_and_seeds_can_be_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preference_pairs, "sample_answers", scripted)
    short = {"steps": 2, "batch": 4, "eval_every": 2, "microbatch": 1000}
    config = preferences.Config(
        checkpoint=save_base(tmp_path / "base"),
        out=tmp_path / "run",
        results=tmp_path / "results" / "preference.json",
        pairs=preference_pairs.Config(problems=8, num_generations=4, pairs=2),
        reward=reward_model.Config(**short),
        dpo=dpo.Config(max_completion_length=8, eval_answers=1, eval_problems=20, **short),
        device="cpu",
    )
    results = preferences.main(config)
    assert json.loads(config.results.read_text()) == results and list(results) == ["0"]
    assert results["0"]["probe/pairs"] == results["0"]["pairs/held_out/pairs"] == 8
    assert all((config.results.parent / f"preference_{name}.png").exists() for name in ("reliability", "dpo"))
    heads.load(checkpoint.latest(config.out / "reward-0" / "checkpoint"))
    hf.load(checkpoint.latest(config.out / "dpo-0" / "checkpoint"))
    assert "agrees with held-out pairs" in capsys.readouterr().out

    def once(done):
        assert done.seed == 1, "the first seed is done"
        return {"seed": done.seed}

    for script in (preference_pairs, reward_model, dpo):
        monkeypatch.setattr(script, "main", once)
    with pytest.raises(FileNotFoundError):  # nothing was written for the second seed by `once`
        preferences.main(replace(config, seeds=(0, 1)))


def test_the_probe_swaps_only_the_last_verdict(tmp_path, monkeypatch):
    """A reward that counts yes: right as it is, a draw when the wrong answer also says yes."""
    path, yes = tmp_path / "a.jsonl", TOKENIZER.id(" yes\n")
    two = {"chosen": "<think>1+1=2:2 yes\n</think>", "rejected": "<think>1+1=2:3 no\n1+2=3:2 no\n</think>"}
    path.write_text("".join(json.dumps({"prompt": f"make {n} from 1,1", **two}) + "\n" for n in (2, 3)))

    class Counts:
        trunk = SimpleNamespace(device="cpu")

        def score(self, tokens, lengths):
            return (tokens == yes).sum(1).float()

    monkeypatch.setattr(preferences.heads, "load", lambda *where: (Counts(), TOKENIZER))
    values = preferences.probe(tmp_path, path, preferences.Config(device="cpu"))
    assert [values[f"probe/{name}"] for name in ("pairs", "as_it_is/accuracy", "swapped/accuracy")] == [2, 1, 0.5]
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert preferences.probe(tmp_path, path, preferences.Config(device="cpu")) == {"probe/pairs": 0}


def test_the_table_gives_intervals_over_problems_and_a_mean_from_three_seeds():
    one = {key: 0.5 for _, key, _ in preferences.KEYS} | {"dpo/after/pass@1": 0.8}
    one |= {"dpo/after/pass@1_low": 0.7, "dpo/after/pass@1_high": 0.9}
    lines = {line[0]: line[1:] for line in preferences.rows({"0": one})}
    assert lines["after DPO: validation pass@1"] == ["80.0% [70.0, 90.0]"] and len(lines) == len(preferences.KEYS)
    assert lines["log π of the other, after"] == ["0.50"] and preferences.head({"0": one}) == ["", "seed 0"]
    results = {str(seed): one | {"dpo/after/pass@1": 0.8 + 0.02 * (seed - 1)} for seed in range(3)}
    lines = {line[0]: line[1:] for line in preferences.rows(results)}
    assert lines["after DPO: validation pass@1"][-1] == "80.0% [75.0, 85.0]"  # ± 4.303·2/√3
    assert len(preferences.head(results)) == len(lines["after DPO: validation pass@1"]) + 1 == 5
