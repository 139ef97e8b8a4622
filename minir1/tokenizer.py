"""Text to tokens and back, by the `tokenizers` library; chat templates in Jinja."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import tokenizers
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minir1.files import read_json

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE_FILE, OLDER_MAP = "chat_template.jinja", "special_tokens_map.json"
TEMPLATE = (  # of the tokenizers made here: the question, then the assistant's turn
    "{% for message in messages %}"
    "{% if message.role == 'user' %}User:{{ message.content }}\nAssistant:"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template, as in a Hugging Face folder.

    `encode` adds no special token, whatever the folder's post-processor or `add_bos_token` says: the chat template
    writes those that a model expects. `generation` is the content of the folder's generation_config.json (several end
    tokens, sampling defaults): only the end tokens are used, and the next save writes all of it again.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str = TEMPLATE, eos: str = EOS, pad: str = PAD, bos: str = ""
    ):
        self.backend, self.template = backend, template
        self.eos_token, self.pad_token, self.bos_token = eos, pad, bos  # bos: only for templates that write it
        self.eos, self.pad = self.id(eos), self.id(pad)
        self.generation: dict = {}

    def id(self, token: str) -> int:
        """The number of one token; ValueError if there is none."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return number

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer: the EOS, then the further ones that generation_config.json names."""
        also = self.generation.get("eos_token_id")
        return list(dict.fromkeys([self.eos, *(also if isinstance(also, list) else [])]))

    @property
    def size(self) -> int:
        """How many tokens there are, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens written in it are recognised, none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int], keep_special: bool = True) -> str:
        """The text of some tokens; without EOS and PAD if keep_special is False.

        A number that is no token (a model's vocabulary may be padded) becomes U+FFFD.
        """
        if not keep_special:
            tokens = [t for t in tokens if t not in (self.eos, self.pad)]
        pieces: list[list[int]] = [[]]
        for token in tokens:
            pieces.append([]) if token >= self.size else pieces[-1].append(token)
        return "\ufffd".join(self.backend.decode(piece, skip_special_tokens=False) for piece in pieces)

    def chat(self, question: str) -> str:
        """The prompt that asks one question, by the chat template."""
        return self.render([{"role": "user", "content": question}])

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The chat template over messages with `role` and `content`, in jinja's sandbox, as transformers renders it.

        variables: others that a template uses, such as Qwen3's enable_thinking. ValueError if the template is no Jinja,
        leaves the sandbox, needs a variable that is not set, or itself refuses the messages.
        """
        if not self.template:
            raise ValueError("the checkpoint has no chat template: choose --template r1_zero or plain")
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        special = {name: token for name, token in special.items() if token}
        values = {"messages": messages, "tools": None, "documents": None, **special, **variables}
        try:
            return _compiled(self.template).render(values, add_generation_prompt=add_generation_prompt)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja: line {error.lineno}: {error}") from error
        except (TemplateError, TypeError, ArithmeticError, ValueError, LookupError, RecursionError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def save(self, path: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers opens with AutoTokenizer.

        Removes files that would override them: chat_template.jinja and special_tokens_map.json.
        """
        path = Path(path)
        for name in (TEMPLATE_FILE, OLDER_MAP):
            (path / name).unlink(missing_ok=True)
        self.backend.save(str(path / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
        }
        if self.template:
            config["chat_template"] = self.template
        if self.bos_token:
            config["bos_token"] = self.bos_token
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` or a Hugging Face folder holds; ValueError names what is missing or damaged.

        Special tokens are those of tokenizer_config.json, else of special_tokens_map.json; the template that of
        chat_template.jinja, else of tokenizer_config.json (of several the one called default). Without one, `chat` and
        `render` raise ValueError.
        """
        path = Path(path)
        read_json(path / "tokenizer.json")
        config = read_json(path / "tokenizer_config.json")
        older = read_json(path / OLDER_MAP) if (path / OLDER_MAP).exists() else {}

        def text(name: str) -> str | None:
            token = config.get(name) or older.get(name)
            return token["content"] if isinstance(token, dict) else token  # older files write a dict

        if text("eos_token") is None:
            raise ValueError(f"{path / 'tokenizer_config.json'} names no eos_token")
        template = _default_template(config.get("chat_template"), path) or ""
        if (path / TEMPLATE_FILE).exists():
            template = (path / TEMPLATE_FILE).read_text(encoding="utf-8")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{path / 'tokenizer.json'} is no tokenizer: {error}") from error
        eos = text("eos_token")
        return cls(backend, template, eos=eos, pad=text("pad_token") or eos, bos=text("bos_token") or "")


def _default_template(stated: str | list | None, path: Path) -> str | None:
    if not isinstance(stated, list):
        return stated
    named = {entry["name"]: entry["template"] for entry in stated}
    if "default" not in named:
        raise ValueError(f"{path / 'tokenizer_config.json'}: no chat_template is called default, of {sorted(named)}")
    return named["default"]


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what a model wrote and changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@lru_cache
def _compiled(template: str) -> Template:
    """A chat template with what Hugging Face lets it use: trimmed blocks, break and continue, three functions."""

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own escapes <, > and &, for web pages
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def word_level(words: Iterable[str], largest_number: int) -> Tokenizer:
    """One token per word, per number 0 … largest_number, per sign. A word includes the space before and after it.

    So `make 24 from 11,3` is `make `, `24`, ` from `, `11`, `,`, `3`. Unknown text becomes <|unk|>.
    """
    special = [EOS, PAD, UNK, *TAGS]
    entries = [*special, *(str(n) for n in range(largest_number + 1)), *"+-*=,:()\n ", *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\s?[A-Za-z]+:?\s?|\s|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], size: int, numbers: bool = False) -> Tokenizer:
    """Byte-level BPE learned from texts, `size` tokens in all, special ones too. With `numbers`, groups of up to
    three digits are separate from other characters. ValueError if `size` is too small for the bytes."""
    special, alphabet = [EOS, PAD, *TAGS], pre_tokenizers.ByteLevel.alphabet()
    if size < len(special) + len(alphabet):
        raise ValueError(f"size = {size}: at least {len(special) + len(alphabet)}, the special tokens and the bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not numbers)]
    if numbers:
        pattern = Regex(r"\d{1,3}| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]+")
        pieces = [pre_tokenizers.Split(pattern, behavior="isolated"), *pieces]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
