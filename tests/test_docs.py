"""README.md and docs/ say what was measured, name what exists, and give commands that work."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from experiments.studies import seeds
from experiments.tools import doc_blocks, render_docs
from minir1 import sample
from minir1.model import hf
from minir1.tokenizer import train_bpe

ROOT = Path(__file__).parent.parent

DOCUMENTS = render_docs.documents(ROOT)
MEASURED = any((ROOT / "docs" / "results").glob("*.json"))  # before the first results there is nothing to compare
FOLDERS = ("minir1/", "kernels/", "experiments/", "tests/", "notebooks/", "docs/", ".ci/")
names = {"argvalues": DOCUMENTS, "ids": [path.name for path in DOCUMENTS]}


# ---- these documents ---------------------------------------------------------------------------


@pytest.mark.skipif(not MEASURED, reason="docs/results holds nothing yet")
def test_blocks_equal_the_results():
    render_docs.main(render_docs.Config(check=True))


@pytest.mark.parametrize("path", **names)
def test_blocks_are_well_formed(path):
    render_docs.spans(path.read_text(encoding="utf-8"), path.name)


def paths_named(path: Path) -> set[Path]:
    """Files that a document links to, and paths into the repository that it writes as code."""
    text = path.read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", link)}
    code = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split() if word.startswith(FOLDERS)}
    code |= {word for line in commands(text) for word in line if word.startswith(FOLDERS)}
    found = {path.parent / link for link in links} | {ROOT / word for word in code if not re.search("[…*<]", word)}
    results = ROOT / "docs" / "results"
    return {file for file in found if MEASURED or results not in file.resolve().parents}


def commands(text: str) -> list[list[str]]:
    """The words of every command in the ``` blocks that starts with python."""
    fenced = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in fenced.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"python3? ", line)]
    return [line for line in found if line[1:2] == ["-m"] and line[2].startswith("experiments.")]


@pytest.mark.parametrize("path", **names)
def test_every_path_named_exists(path):
    missing = sorted(str(file) for file in paths_named(path) if not file.exists())
    assert not missing


@pytest.mark.parametrize("path", **names)
def test_every_command_is_understood(path):
    for _, _, script, *args in commands(path.read_text(encoding="utf-8")):
        file = ROOT / (script.replace(".", "/") + ".py")
        assert file.is_file(), f"{path.name} runs {script}, which does not exist"
        args = [sys.executable if word == "/usr/bin/chromium" else word for word in args]  # not every machine has it
        if config := getattr(importlib.import_module(script), "Config", None):
            tyro.cli(config, args=args)


@pytest.mark.parametrize("path", **names)
def test_every_make_target_exists(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    used = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)(?:`|$)", path.read_text(encoding="utf-8"), re.M))
    assert used <= targets


def test_the_loop_that_streams_prints_the_text(monkeypatch, capsys):
    """docs/checkpoints.md, "Reading", as it stands there, with a toy in place of the checkpoint."""
    (code,) = re.findall(r"```python\n(.*?stream.*?)```", (ROOT / "docs" / "checkpoints.md").read_text("utf-8"), re.S)
    tokenizer = train_bpe(["What is 17 · 23? 你好 🤖 "] * 9, 300)
    words = tokenizer.encode("Once upon a time 你好 👨‍👩‍👧, 🤖.") + [tokenizer.eos]
    monkeypatch.setattr(hf, "load", lambda path, device, dtype: ("model", tokenizer))
    monkeypatch.setattr(sample, "stream", lambda model, prompt, max_tokens, temperature, stop: iter(words))
    exec(code, {})
    assert capsys.readouterr().out == "Once upon a time 你好 👨‍👩‍👧, 🤖."


# ---- the renderer ------------------------------------------------------------------------------


def result(shift: float, **more) -> dict[str, float]:
    keys = {"before/pass@1": 0.30, "after/pass@1": 0.80, "forced/pass@1": 0.10, "search/pass@1": 0.5}
    return {key: value + shift for key, value in keys.items()} | {"seconds/rl": 1.0, **more}


RESULTS = {str(seed): result(0.02 * (seed - 1), **{"nothink/pass@1": 0.25}) for seed in range(3)}
README = "# A\n<!-- begin: headline -->\nold\n<!-- end -->\ntext\n"


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "r1_zero.json").write_text(json.dumps(RESULTS))
    (tmp_path / "README.md").write_text(README)
    page = "B\n<!-- begin: r1_zero -->\n<!-- end -->\nC\n<!-- begin: headline --><!-- end -->"
    (tmp_path / "docs" / "r1_zero.md").write_text(page)
    (tmp_path / "docs" / "log.md").write_text("nothing generated\n")
    return tmp_path


def config(tree, check=False):
    return render_docs.Config(root=tree, check=check)


def test_blocks_are_written_once_and_then_agree(tree, capsys):
    written = ["README.md: headline", "docs/r1_zero.md: r1_zero", "docs/r1_zero.md: headline"]
    assert render_docs.main(config(tree)) == written
    text = (tree / "README.md").read_text()
    assert text.startswith("# A\n<!-- begin: headline -->\n**") and text.endswith("\n<!-- end -->\ntext\n")
    # 80 ± t·s/√n = 80 ± 4.303·2/√3
    assert "30.0% → 80.0% [75.0, 85.0] of problems never seen" in text and "the mean of 3 seeds" in text
    assert "the same weights solve 10.0%" in text and "solves 25.0%." in text and "old" not in text
    table = (tree / "docs" / "r1_zero.md").read_text().splitlines()
    assert table[:2] == ["B", "<!-- begin: r1_zero -->"]
    assert table[2:4] == ["|  | seed 0 | seed 1 | seed 2 | mean, 95 % |", "| --- | ---: | ---: | ---: | ---: |"]
    assert table[4] == "| before | 28.0% | 30.0% | 32.0% | 30.0% [25.0, 35.0] |"
    assert "| trained to answer at once | 25.0% | 25.0% | 25.0% | 25.0% [25.0, 25.0] |" in table
    assert len(table) == 4 + 5 + 5  # head, the five keys that are there, end and what follows
    before = [path.read_bytes() for path in sorted(tree.rglob("*.md"))]
    assert render_docs.main(config(tree)) == render_docs.main(config(tree, check=True)) == []
    assert [path.read_bytes() for path in sorted(tree.rglob("*.md"))] == before
    assert "all blocks agree" in capsys.readouterr().out


def test_check_names_file_and_block_and_writes_nothing(tree):
    render_docs.main(config(tree))
    changed = (tree / "README.md").read_text().replace("80.0%", "81.0%")
    (tree / "README.md").write_text(changed)
    with pytest.raises(ValueError, match=r"differ from docs/results: README.md: headline; run python"):
        render_docs.main(config(tree, check=True))
    assert (tree / "README.md").read_text() == changed
    more = RESULTS | {"3": result(0, **{"nothink/pass@1": 0})}
    (tree / "docs" / "results" / "r1_zero.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match="README.md: headline, docs/r1_zero.md: r1_zero, docs/r1_zero.md: headline"):
        render_docs.main(config(tree, check=True))


def test_missing_results_are_named_only_where_they_are_used(tree):
    (tree / "docs" / "results" / "r1_zero.json").unlink()
    for check in (False, True):
        with pytest.raises(ValueError, match="r1_zero.json does not exist, and block 'headline' is made from it"):
            render_docs.main(config(tree, check))
    (tree / "README.md").write_text("no block\n")
    (tree / "docs" / "r1_zero.md").unlink()
    assert render_docs.main(config(tree, check=True)) == []
    (tree / "README.md").write_text(README)
    (tree / "docs" / "results" / "r1_zero.json").write_text('{"0": {"before/pass@1": 0.5}}')
    with pytest.raises(ValueError, match="r1_zero.json lacks 'after/pass@1', which block 'headline' needs"):
        render_docs.main(config(tree))


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- begin: nonsense -->\n<!-- end -->", "unknown block 'nonsense'; known are files, r1_zero, headline"),
        ("<!-- begin: headline -->\n", "block 'headline' has no <!-- end -->"),
        ("<!-- end -->\n", "<!-- end --> is out of place"),
        ("<!-- begin: headline -->\n<!-- begin: r1_zero -->\n<!-- end -->", "<!-- begin: r1_zero --> is out of place"),
    ],
)
def test_marks_that_do_not_pair_are_named(tree, text, message):
    (tree / "README.md").write_text(text)
    with pytest.raises(ValueError) as error:
        render_docs.main(config(tree))
    assert message in str(error.value) and "README.md" in str(error.value)


def test_fewer_seeds_claim_no_interval():
    one = doc_blocks.headline({"0": result(0)})
    assert "30.0% → 80.0% of problems" in one and "one seed" in one and one.endswith("solve 10.0%.")
    assert "| after | 80.0% | 81.0% | - |" in doc_blocks.r1_zero({"0": result(0), "1": result(0.01)})


def test_the_table_has_the_rows_of_seeds():
    full = {key: 0.5 for _, key in seeds.KEYS}
    lines = doc_blocks.r1_zero({"0": full, "1": full, "2": full}).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [label for label, _ in seeds.KEYS]


def test_the_table_of_speculation():
    one = {"accepted_1": 0.8, "accepted_2": 0.5, "tokens_a_pass": 2.2}
    one |= {"generate_tok_s": 1000.0, "speculate_tok_s": 1250.0}
    found = {"steps": 300} | {f"D=2/rows=64/T=0/{key}": value for key, value in one.items()}
    lines = doc_blocks.speculative(found).splitlines()
    assert lines[2:] == ["| 2 | 64 | 0 | 80.0%, 50.0% | 2.20 | 1,000 | 1,250 | 1.25 times |"]
    assert {line.count("|") for line in lines} == {9}


def test_it_runs_from_the_command_line(tree):
    words = [sys.executable, "-m", "experiments.tools.render_docs", "--root", str(tree), "--check"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: differ from docs/results: README.md: headline")


def test_long_context_has_a_row_a_variant():
    names = doc_blocks.VARIANTS
    one = {f"{name}/{length}/{part}": 0.4 + 0.1 * part for name in names for length in (9, 64, 512) for part in (0, 1)}
    one |= {f"{name}/{side}": share for name in names for side, share in (("inside", 1.0), ("outside", 0.8))}
    other, third = (dict(one, **{"yarn/outside": share}) for share in (0.78, 0.82))
    lines = doc_blocks.long_context({"0": one, "1": other, "2": third}).splitlines()
    assert lines[0] == "|  | within the window | beyond it | 512 tokens |" and len(lines) == 2 + len(names)
    assert "| YaRN | 100.0% [100.0, 100.0] | 80.0% [75.0, 85.0] | 45.0% [45.0, 45.0] |" in lines  # ± 4.303·2/√3
    assert doc_blocks.long_context({"0": one}).splitlines()[2] == "| as trained | 100.0% | 80.0% | 45.0% |"


def test_prefill_leaves_open_what_was_not_read_in_one_call():
    found = {"cache/8192/gib": 0.01, "cache/16384/gib": 0.02}
    for way, length, seconds in (("one_call", 8192, 4.0), ("chunks", 8192, 5.0), ("chunks", 16384, 20.0)):
        found |= {f"{way}/{length}/seconds": 9.0, f"{way}/{length}/cpu_seconds": seconds}
        found[f"{way}/{length}/peak_gib"] = 0.25
    lines = doc_blocks.prefill(found).splitlines()
    assert lines[2:] == ["| 8,192 | 0.010 | 5.0 | 0.25 | 4.0 | 0.25 |", "| 16,384 | 0.020 | 20.0 | 0.25 | - | - |"]
