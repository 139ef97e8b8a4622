"""experiments/train_tokenizer.py: what it measures by hand, what it holds out, and the folder that it leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import transformers
from runs import command
from test_tokenizer import llama

from experiments import train_tokenizer
from experiments.train_tokenizer import Config, backend_of, by_length, measure, names, overlaps, recipe
from minir1.seed import hashed
from minir1.tokenizer import Tokenizer, word_level
from minir1.tokenizer_training import PRESETS

WORDS = word_level(["make ", " from "], 24).backend
ONES = {"tokens_per_word": 1.0, "tokens_per_number": 1.0}


@pytest.fixture
def config(tmp_path):
    lines = [{"text": f"def f_{n}(x):\n    return x + {n}1234  # n° {n}\n" * (n + 1)} for n in range(30)]
    data = tmp_path / "corpus.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.md").write_text("Words, and more words.\n")
    (tmp_path / "prose" / "b.txt").write_text("no letters: 12 345\n" * 3)
    for name in ("llama", "bare"):
        (tmp_path / name).mkdir()
    llama().save(tmp_path / "llama")
    WORDS.save(str(tmp_path / "bare" / "tokenizer.json"))
    against = (tmp_path / "llama", tmp_path / "bare" / "tokenizer.json")
    kinds = {"prose": tmp_path / "prose"}
    shared = {"held_out": 0.2, "size": 270, "kinds": kinds, "against": against, "out": tmp_path / "made"}
    return Config(data=(data,), preset="code", **shared)


# ---- what is measured --------------------------------------------------------------------------


def test_measure_by_hand():
    """`make `, 24, ` from `, 11, comma, 3: six tokens of 20 bytes; the second text has no number."""
    assert measure(WORDS, ["make 24 from 11,3"]) == {
        "bytes": 17, "bytes_per_token": 17 / 6, **ONES,
    }  # fmt: skip
    assert measure(WORDS, ["3é?"]) == {"bytes": 4, "bytes_per_token": 4 / 3, "unknown": 2 / 3, **ONES}
    assert measure(WORDS, ["make make "]) == {"bytes": 10, "bytes_per_token": 5.0, "tokens_per_word": 1.0}
    assert measure(WORDS, []) == {"bytes": 0, "bytes_per_token": 0.0}


def test_a_word_has_as_many_tokens_as_hold_a_part_of_it():
    """sentencepiece puts a space before the text, and writes é in two bytes: both belong to one character."""
    backend = llama().backend
    result = measure(backend, ["hello the 12 né"])
    tokens = backend.encode("hello the 12 né", add_special_tokens=False).tokens
    assert tokens == [*("▁h", "e", "l", "l", "o", "▁t", "he", "▁"), "<0x31>", "<0x32>", "▁", "n", "<0xC3>", "<0xA9>"]
    assert result["bytes"] == 16 and result["bytes_per_token"] == 16 / 14
    assert result["tokens_per_word"] == (5 + 2 + 3) / 3 and result["tokens_per_number"] == 2.0


def test_overlaps_by_hand():
    tokens = np.array([[0, 2], [2, 3], [3, 3], [3, 7], [7, 8]])
    spans = np.array([[0, 1], [0, 3], [2, 7], [4, 6], [7, 8], [8, 9]])
    # the third token holds nothing, at position 3: it counts for the span around it
    assert overlaps(tokens, spans).tolist() == [1, 2, 3, 1, 1, 0]


def test_tokens_of_a_number_by_its_digits():
    made = {digits: train_tokenizer.train(["a"], replace(PRESETS["math"], digits=digits, size=1362)).backend
            for digits in ("single", "right_threes")}  # fmt: skip
    assert by_length(made["single"]) == {f"digits/{n}": n for n in range(1, 13)}
    assert by_length(made["right_threes"]) == {f"digits/{n}": -(-n // 3) for n in range(1, 13)}


# ---- a run -------------------------------------------------------------------------------------


def test_a_run_leaves_a_folder_that_transformers_opens_and_a_report(config, capsys):
    report = train_tokenizer.main(config)
    files = sorted(str(path.relative_to(config.out)) for path in config.out.rglob("*") if path.is_file())
    assert files == ["figures/tokenizer.png", "report.json", "tokenizer.json", "tokenizer_config.json"]
    assert (config.out / "figures" / "tokenizer.png").stat().st_size > 10_000
    assert json.loads((config.out / "report.json").read_text()) == report
    ours, theirs = Tokenizer.load(config.out), transformers.AutoTokenizer.from_pretrained(config.out)
    text = "def f_3(x):\r\n\treturn 1234 👍🏽 你好\x00"
    assert theirs(text)["input_ids"] == ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert report["kinds"] == ["held out", "prose"]
    assert list(report["tokenizers"]) == ["this one (code)", "llama", "bare"]
    one, other = (report["tokenizers"][name] for name in ("this one (code)", "llama"))
    assert one["size"] == 270 == ours.size and other["size"] == llama().size
    assert one["prose/bytes"] == other["prose/bytes"] == 23 + 57
    assert one["held out/bytes_per_token"] > 1.2 > other["held out/bytes_per_token"] > 0.9
    assert one["digits/12"] == 12 and one["prose/tokens_per_number"] == 2.5
    shown = capsys.readouterr().out
    assert "compression by kind of text" in shown and shown.count("held out") == 3
    assert "texts give only" not in shown and "3.48 (61% unknown)" in shown


def test_what_is_held_out_is_not_trained_on(config, monkeypatch):
    trained, real = [], train_tokenizer.train

    def train(texts, made):
        trained.extend(texts)
        return real(trained, made)

    monkeypatch.setattr(train_tokenizer, "train", train)
    report = train_tokenizer.main(config)
    texts = [json.loads(line)["text"] for line in config.data[0].read_text().splitlines()]
    held_out = [text for text in texts if hashed(text) < 0.2]
    assert trained == [text for text in texts if text not in held_out] and len(held_out) > 1
    assert report["tokenizers"]["llama"]["held out/bytes"] == sum(len(text.encode()) for text in held_out)


def test_the_options_replace_what_the_preset_says(config):
    assert recipe(replace(config, size=None)) == PRESETS["code"]
    assert recipe(replace(config, digits="whole", bound=99, size=400, special=("<a>",))) == replace(
        PRESETS["code"], digits="whole", bound=99, size=400, special=("<a>",)
    )


def test_without_held_out_texts_and_kinds_only_numbers_are_measured(config):
    report = train_tokenizer.main(replace(config, held_out=0.0, kinds={}, against=()))
    assert report["kinds"] == [] and set(report["tokenizers"]["this one (code)"]) > {"size", "digits/1"}


def test_tokenizers_of_the_same_name_are_called_by_their_paths(tmp_path):
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "c" / "tokenizer.json"]
    assert names(paths) == [str(paths[0]), str(paths[1]), "c"]


def test_a_tokenizer_to_compare_with_neither_truncates_nor_pads(tmp_path):
    backend = tokenizers.Tokenizer.from_str(WORDS.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(backend_of(tmp_path).encode("24,11,3").ids) == 5


@pytest.mark.parametrize(
    "line, message",
    [
        ("--preset chess", "invalid choice"),
        ("--bound 99", "bound = 99: only --digits whole has a bound"),
        ("--held-out 2", "held_out = 2.0: 0 to 1"),
        ("--size 200", "size = 200: at least 262"),
        ("--against none", "against = none: there is no file none"),
        ("--against corpus.jsonl", "corpus.jsonl is no tokenizer"),
        ("--kinds prose none", "there is no file or folder none"),
        ("--special a a", "special = ('a', 'a'): different texts"),
        ("--digits whole --bound 100000000", "size = 4096: at least 100000253, 6 special"),
        ("--out corpus.jsonl/x", "corpus.jsonl is no folder that can be written to"),
        ("--out corpus.jsonl", "out = corpus.jsonl is a file: choose a folder"),
    ],
)
def test_wrong_lines_end_in_one_line(line, message, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", f"train_tokenizer --data corpus.jsonl --preset code {line}".split())
    with pytest.raises(SystemExit) as end:
        train_tokenizer.cli.run(train_tokenizer.main, Config)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_it_runs_from_the_command_line_once(config, tmp_path):
    words = "-m experiments.train_tokenizer --data corpus.jsonl prose --preset languages --size 2000 --out made".split()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0 and "the texts give only" in done.stdout, done.stderr
    with pytest.raises(ValueError, match=f"^{config.out} already holds a tokenizer: choose another --out$"):
        train_tokenizer.main(config)
