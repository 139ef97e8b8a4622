"""fuzz_configs.py: faults that were found in config.json and adapter_config.json, random cases, and its verdicts."""

from dataclasses import replace

import pytest
import torch

from experiments.tools import fuzz_configs as fuzz
from minir1.model import hf

fuzz.transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return {folder.name: folder for folder in (*fuzz.base_folders(root), *fuzz.adapter_folders(root))}


@pytest.mark.parametrize(
    "name,path,value,outcome",
    [
        ("Qwen2", "original_max_position_embeddings", 32, "equal"),
        ("Qwen2, newer", "original_max_position_embeddings", 32, "equal"),
        ("DeepseekV3, newer", "original_max_position_embeddings", 40, "equal"),
        ("Llama", "original_max_position_embeddings", 40, "equal"),
        ("Llama", "rope_scaling.original_max_position_embeddings", fuzz.ABSENT, "equal"),
        ("Qwen2", "rope_scaling.truncate", None, "refused"),  # the same as false
        ("Qwen3", "is_causal", False, "refused"),
        ("Qwen3", "is_causal", None, "refused"),  # the same as false
        ("DeepseekV3", "rope_interleave", None, "refused"),
        ("DeepseekV3", "n_group", None, "refused"),
        ("DeepseekV2", "topk_method", [], "refused"),
        ("Granite", "sliding_window", 4, "refused"),  # the cache obeys it
        ("Qwen3Moe", "attention_chunk_size", 4, "refused"),
        ("Qwen3Moe", "rope_theta", 0, "refused"),
        ("Granite", "logits_scaling", 0, "refused"),
        ("Llama", "model_type", "granite", "refused"),
        ("Llama", "rms_norm_eps", 1, "equal"),  # they take 1.0 only
        ("Llama", "use_cache", "x", "equal"),  # they refuse what cannot matter
        ("Llama", "some_name", [1], "equal"),
        ("adapters of Qwen2", "alora_invocation_tokens", [1, 2], "refused"),
        ("adapters of Qwen2", "lora_alpha", 4, "equal"),
        ("adapters of Qwen2", "layers_to_transform", 0, "refused"),
        ("adapters of DeepseekV3", "target_parameters", ["foo"], "refused"),
    ],
)
def test_faults_that_were_found(folders, name, path, value, outcome):
    assert fuzz.run(fuzz.Case(folders[name], ((tuple(path.split(".")), value),))) == outcome


def test_an_original_window_that_counts_moves_the_logits(folders):
    """Else `equal` would say nothing."""
    for name in ("Qwen2", "DeepseekV3", "Llama"):
        folder = folders[name]
        values = fuzz.changed(folder.values, [(("original_max_position_embeddings",), 40)])
        try:
            (folder.path / folder.file).write_text(fuzz.json.dumps(values))
            with torch.no_grad():
                assert (hf.load(folder.path)[0](fuzz.X) - folder.logits).abs().max() > 0.01
        finally:
            (folder.path / folder.file).write_text(fuzz.json.dumps(folder.values))


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(folders, seed):
    """`python -m experiments.tools.fuzz_configs` runs all."""
    chosen = fuzz.cases(list(folders.values()), fuzz.Config(cases=40, seed=seed))
    wrong = {str(case): outcome for case in chosen if (outcome := fuzz.run(case)) not in ("refused", "equal")}
    assert not wrong


def test_pairs_follow_where_there_are_more_cases_than_single_changes(folders):
    few = [replace(folders["Qwen2"], fields=[("hidden_act",), ("use_cache",)])]
    single = fuzz.cases(few, fuzz.Config())
    more = fuzz.cases(few, fuzz.Config(cases=len(single) + 5))
    assert [str(case) for case in more[: len(single)]] == [str(case) for case in single]
    assert [len(case.changes) for case in more[len(single) :]] == [2] * 5


def test_other_logits_and_other_exceptions_are_failures(folders, monkeypatch):
    folder = folders["Qwen2"]
    other = replace(folder, theirs=lambda: folder.logits + 1)
    assert fuzz.run(fuzz.Case(other, ((("use_cache",), True),))) == "logits differ by 1"
    failing = replace(folder, theirs=lambda: 1 / 0, logits=folder.logits + 1)
    assert fuzz.run(fuzz.Case(failing, ((("use_cache",), True),))) == "they fail, and the logits moved by 1"
    monkeypatch.setattr(hf, "load", lambda path: {}["x"])
    assert fuzz.run(fuzz.Case(folder, ((("use_cache",), True),))) == "KeyError: 'x'"
