"""experiments/studies/seeds.py: runs only what is missing; its table."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from experiments import demo
from experiments.studies import processes, seeds


def fake(seed: int, quick: bool) -> dict[str, float]:
    keys = [key for _, key in seeds.KEYS if not key.startswith("nothink/")]
    return {key: 0.1 + 0.02 * seed + 0.001 * n + 0.1 * quick for n, key in enumerate(keys)} | {"seed": seed}


def test_seeds_run_what_is_missing_and_make_the_table(tmp_path, monkeypatch, capsys):
    calls = []

    def stub(words, env=None, **_):
        tyro.cli(demo.Config, args=words[3:])  # demo.py would understand it
        options = dict(zip(words[3::], words[4::]))
        out = Path(options["--out"])
        calls.append(out.name)
        if out.name == "think-2" and "--resume" not in words:  # killed once
            out.mkdir(parents=True)
            return subprocess.CompletedProcess(words, -9)
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(fake(int(options["--seed"]), "--no-think" in words)))
        assert env["OMP_NUM_THREADS"].isdigit() and words[-4:] == ["--problems", "5", "--rl.steps", "2"]
        assert ("--no-think" in words) == ("--base-from" in words) == out.name.startswith("no-think")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(processes.subprocess, "run", stub)
    config = seeds.Config(
        out=tmp_path / "runs",
        results=tmp_path / "docs" / "r1_zero.json",
        figure=tmp_path / "docs" / "seeds.png",
        options="--problems 5 --rl.steps 2",
    )
    with pytest.raises(RuntimeError, match="think-2 failed"):
        seeds.main(config)
    assert calls.count("think-0") == calls.count("think-1") == 1 and not config.results.exists()
    results = seeds.main(config)
    again = ["think-2"]
    assert sorted(calls) == sorted([f"{kind}-{n}" for kind in ("think", "no-think") for n in range(3)] + again)
    assert results[1]["after/pass@1"] == fake(1, False)["after/pass@1"]
    assert results[1]["nothink/pass@1"] == fake(1, True)["after/pass@1"]
    assert json.loads(config.results.read_text()) == {str(seed): result for seed, result in enumerate(results)}
    assert config.figure.exists()
    capsys.readouterr()
    calls.clear()
    assert seeds.main(config) == results and not calls  # all done: nothing is run
    shown = capsys.readouterr().out
    assert "trained to answer at once" in shown and "12.1% [7.1, 17.1]" in shown  # 12.1 ± 4.303·2/√3
    seeds.main(replace(config, seeds=(0, 1)))
    assert "fewer than three seeds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="think-. was run with .*--rl.steps 2', not .*--rl.steps 3'"):
        seeds.main(replace(config, options="--problems 5 --rl.steps 3"))
