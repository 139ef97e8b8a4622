"""tokenizer.py: the words and numbers of the tiny corpus, byte-level BPE, chat templates, and folders."""
import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.tasks import countdown, countdown_corpus
from minir1.tokenizer import EOS, PAD, TAGS, UNK, Tokenizer, train_bpe, word_level

TEXTS = [
    "the cat sat on the mat. ", "12 and 345 make 357, not 12345.\n", "naïve café — 你好\n\n", "def f(x):\n    return x",
]
WORDS = word_level(countdown_corpus.WORDS, largest_number=24)
BPE = {numbers: train_bpe(TEXTS * 20, 320, numbers=numbers) for numbers in (False, True)}


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(t) for t in tokenizer.encode(text)]


# ---------------------------------------------------------------- a token a word


def test_a_number_is_one_token_and_words_take_their_spaces():
    assert pieces(WORDS, "User:make 24 from 11,3\nAssistant:<think>11-3=8:24 no\n</think><answer>(11-3)") == [
        "User:", "make ", "24", " from ", "11", ",", "3", "\nAssistant:",
        "<think>", "11", "-", "3", "=", "8", ":", "24", " no\n", "</think>", "<answer>", "(", "11", "-", "3", ")",
    ]
    assert all(len(WORDS.encode(str(n))) == 1 for n in range(25))


def test_what_is_unknown_is_unk_a_piece():
    assert pieces(WORDS, "25+3") == [UNK, "+", "3"]  # numbers end at 24
    assert pieces(WORDS, "3é?") == ["3", UNK, UNK]
    assert pieces(WORDS, "banana 3") == [UNK, "3"]


@pytest.mark.parametrize("level", sorted(countdown.LEVELS))
def test_round_trip_of_the_corpus(level):
    limit = countdown.level_of(level)
    tokenizer = word_level(countdown_corpus.WORDS, largest_number=max(100, limit.value, limit.high))
    texts = list(itertools.islice(countdown_corpus.documents(level, seed=1), 100))
    for text, tokens in zip(texts, tokenizer.encode_batch(texts)):
        assert tokens == tokenizer.encode(text)
        assert tokenizer.id(UNK) not in tokens
        assert tokenizer.decode(tokens) == text


def test_numbers_of_tokens():
    """Dense and without holes: special tokens first, in the order of their names."""
    vocab = WORDS.backend.get_vocab(with_added_tokens=True)
    assert sorted(vocab.values()) == list(range(WORDS.size))
    assert [vocab[token] for token in (EOS, PAD, UNK, *TAGS)] == list(range(7))
    assert (WORDS.eos, WORDS.pad) == (0, 1) and WORDS.id("24") == vocab["24"]
    with pytest.raises(ValueError, match="no token 'zebra'"):
        WORDS.id("zebra")


# ---------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("numbers", [False, True])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="12 ab\n<think>,.é", max_size=30)))
def test_bpe_gives_back_any_text(numbers, text):
    tokenizer = BPE[numbers]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_size_and_learning():
    assert BPE[False].size == 320
    assert len(BPE[False].encode("the cat sat on the mat. ")) < 15  # 24 bytes
    assert train_bpe(TEXTS, 262).size == 262
    with pytest.raises(ValueError, match="size = 261: at least 262"):
        train_bpe(TEXTS, 261)


def test_numbers_apart():
    """With `numbers` a digit shares its token with digits alone, three at most."""
    have = pieces(BPE[True], "x12,345 67\n1234567")
    assert [p for p in have if any(c.isdigit() for c in p)] == [p for p in have if p.isdigit()]
    assert all(len(p) <= 3 for p in have if p.isdigit())
    assert "".join(p for p in have if p.isdigit()) == "12345671234567"
    counting = train_bpe([f"{n} " for n in range(1000)] * 5, 262 + 990, numbers=True)
    assert all(len(counting.encode(str(n))) == 1 for n in range(1000))


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("tokenizer", [WORDS, *BPE.values()], ids=["words", "bpe", "bpe numbers"])
def test_special_tokens_are_recognised_and_none_is_added(tokenizer):
    for token in (EOS, PAD, *TAGS):
        assert tokenizer.encode(token) == [tokenizer.id(token)]
    assert pieces(tokenizer, f"3<think>{EOS}3") == ["3", "<think>", EOS, "3"]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [WORDS, *BPE.values()], ids=["words", "bpe", "bpe numbers"])
def test_decode_without_the_ends_keeps_the_tags(tokenizer):
    tokens = tokenizer.encode(f"<think>3</think>{EOS}{PAD}{PAD}")
    assert tokenizer.decode(tokens) == f"<think>3</think>{EOS}{PAD}{PAD}"
    assert tokenizer.decode(tokens, keep_special=False) == "<think>3</think>"


@pytest.mark.parametrize("tokenizer", [WORDS, BPE[True]], ids=["words", "bpe"])
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = f"make 24 from 11,3<think>\n12345 café{EOS}"
    assert again.encode(text) == tokenizer.encode(text) and again.size == tokenizer.size
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (again.eos, again.pad, again.bos_token) == (tokenizer.eos, tokenizer.pad, "")
    assert again.template == tokenizer.template
    assert again.chat("3") == tokenizer.chat("3")


# ---------------------------------------------------------------- chat


def test_chat_template():
    assert WORDS.chat("make 24 from 11,3") == "User:make 24 from 11,3\nAssistant:"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert WORDS.render(messages) == f"User:a\nAssistant:b{EOS}"


def with_template(template, **tokens):
    return Tokenizer(WORDS.backend, template=template, **tokens)


def test_templates_as_hugging_face_writes_them():
    """Generation prompt, bos, loop controls, raise_exception, blocks trimmed."""
    tokenizer = with_template(
        "{{ bos_token }}{% for m in messages %}\n"
        "  {% if m.role == 'stop' %}{% break %}{% endif %}\n"
        "  {% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
        "[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        bos="<think>",
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "stop", "content": "x"}]
    said = tokenizer.render(messages, add_generation_prompt=False)
    assert said == f"<think>[user]hi{EOS}\n"
    assert tokenizer.render(messages) == said + "[assistant]"
    with pytest.raises(ValueError, match="cannot render these messages: no system"):
        tokenizer.render([{"role": "system", "content": ""}])


def test_templates_run_in_a_sandbox():
    with pytest.raises(ValueError, match="'__class__' of 'str' object is unsafe"):
        with_template("{{ ''.__class__.__mro__[1].__subclasses__() }}").chat("x")
    with pytest.raises(ValueError, match="'append' of 'list' object is unsafe"):
        with_template("{{ messages.append(1) }}").chat("x")


# ---------------------------------------------------------------- folders that others wrote


def change(folder, **values):
    """Change tokenizer_config.json; None takes a key away."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_tokens_written_as_dicts_and_a_missing_pad(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, eos_token={"content": "</answer>", "lstrip": False}, pad_token=None, bos_token="<think>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos == tokenizer.pad == WORDS.id("</answer>") and tokenizer.bos_token == "<think>"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.eos_token, again.pad_token, again.bos_token) == ("</answer>", "</answer>", "<think>")


def test_the_template_of_a_file_of_its_own(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, chat_template=None)
    assert Tokenizer.load(tmp_path).template == WORDS.template  # the folder names none: ours
    (tmp_path / "chat_template.jinja").write_text("Q: {{ messages[0].content }}")
    assert Tokenizer.load(tmp_path).chat("why?") == "Q: why?"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(tmp_path, name):
    WORDS.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        Tokenizer.load(tmp_path)


def test_missing_tokens_are_named(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="no token '<|im_end|>'".replace("|", r"\|")):
        Tokenizer.load(tmp_path)
    change(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="names no eos_token"):
        Tokenizer.load(tmp_path)


def test_size_counts_added_tokens():
    backend = tokenizers.Tokenizer.from_str(WORDS.backend.to_str())
    backend.add_tokens(["zebra"])
    assert Tokenizer(backend).size == WORDS.size + 1
