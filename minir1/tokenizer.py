"""Text to tokens and back, by the `tokenizers` library, and prompts by the chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minir1 import chat_template
from minir1.files import read_json, read_text, write_json
from minir1.text_stream import BYTE, TextStream

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE_FILE, OLDER_MAP = "chat_template.jinja", "special_tokens_map.json"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
QUOTE = "\ufdd0"  # a noncharacter, which no text holds; divides a text for `encode`
LATIN = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level BPE writes as they are
BYTE_OF = {chr(byte): byte for byte in LATIN}  # character in a token of byte-level BPE -> byte
BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in LATIN)}
TEMPLATE = (  # of the tokenizers made here: the question, then the assistant's turn
    "{% for message in messages %}"
    "{% if message.role == 'user' %}User:{{ message.content }}\nAssistant:"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template, as in a Hugging Face folder.

    `encode` adds no special token, whatever the folder's post-processor or `add_bos_token` says: the chat template
    writes those that a model expects. It neither truncates nor pads. The next save writes again what was loaded and is
    not used: `generation`, the content of generation_config.json (of which the end tokens are used), `config`, that of
    tokenizer_config.json, and further chat `templates` by name.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str = TEMPLATE, eos: str = EOS, pad: str = PAD, bos: str = ""
    ):
        self.backend, self.template = backend, template
        self.eos_token, self.pad_token, self.bos_token = eos, pad, bos  # bos: only for templates that write it
        self.eos, self.pad = self.id(eos), self.id(pad)
        self.generation, self.config, self.templates = {}, {}, {}
        self.ids = frozenset(backend.get_vocab(with_added_tokens=True).values())
        backend.no_truncation()
        backend.no_padding()
        added = [token for token in backend.get_added_tokens_decoder().values() if len(token.content) > 1]
        control = [t.content for t in added if t.special or (t.content[0], t.content[-1]) == ("<", ">")]
        control.sort(key=len, reverse=True)  # the longest is matched first
        self.control = re.compile("|".join(map(re.escape, control)) or "(?!)")  # nothing
        special = sorted({t.content for t in added if t.special} - {*TAGS}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")

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
        return list(dict.fromkeys([self.eos, *(also if isinstance(also, list) else [] if also is None else [also])]))

    def recommended(self, name: str, otherwise: float) -> float:
        """The temperature or top_p that generation_config.json recommends, if it recommends to draw at random."""
        number = self.generation.get(name)
        usable = isinstance(number, (int, float)) and not isinstance(number, bool)
        usable = usable and self.generation.get("do_sample", True) is True
        return float(number) if usable and 0 < number <= (1 if name == "top_p" else 10) else otherwise

    @property
    def unknown(self) -> int | None:
        """The token of a text that the vocabulary has no other for; None where there is no such token."""
        name = getattr(self.backend.model, "unk_token", None)
        return self.backend.token_to_id(name) if name else None

    @property
    def size(self) -> int:
        """The vocabulary that a model needs: the largest number of a token, plus 1."""
        return max(self.ids) + 1

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; none is added. Special tokens written in it are recognised unless `special` is False, but
        not those in a text that `quote` returned."""
        parts = (text if special else self.quote(text)).split(QUOTE)
        return [token for part in parts for token in self.backend.encode(part, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def lacking(self, text: str) -> list[str]:
        """The parts of a text that `encode` makes the unknown token, each once; not that token itself, which some
        tokenizers also use as their end token."""
        if (unknown := self.unknown) is None:
            return []
        found: dict[str, None] = {}
        for part in text.split(QUOTE):
            encoding = self.backend.encode(part, add_special_tokens=False)
            spans = (span for token, span in zip(encoding.ids, encoding.offsets) if token == unknown)
            found |= dict.fromkeys(part[start:end] for start, end in spans)
        return [part for part in found if part != self.backend.id_to_token(unknown)]

    def quote(self, text: str, assistant: bool = False) -> str:
        """The text for `encode`, with its control tokens as plain text, for what a user writes.

        Control tokens are the added tokens that are special or in angle brackets. Each is divided by QUOTE, where
        `encode` divides the text (sentencepiece adds a space there); any other text is returned as it is. With
        `assistant`, for what a model is to write, only special tokens are divided, such as the end token: think and
        answer tags, and marks that are not special (<tool_call>), stay tokens.
        """
        control = self.special if assistant else self.control
        normalizer = self.backend.normalizer  # as NFKC, which makes such tokens of other text
        if normalizer and control.search(normal := normalizer.normalize_str(text)):
            text = normal
        while control.search(text):  # again, if a part is another one
            text = control.sub(lambda match: match[0][0] + QUOTE + match[0][1:], text)
        return text

    def decode(self, tokens: Sequence[int], keep_special: bool = True) -> str:
        """The text of some tokens; without EOS and PAD if keep_special is False.

        A number that is no token (a model's vocabulary may be padded) becomes U+FFFD.
        """
        if not keep_special:
            tokens = [t for t in tokens if t not in (self.eos, self.pad)]
        pieces: list[list[int]] = [[]]
        for token in tokens:
            pieces[-1].append(token) if token in self.ids else pieces.append([])
        return "\ufffd".join(self.backend.decode(piece, skip_special_tokens=False) for piece in pieces)

    def bytes_of(self, token: int) -> bytes:
        """What one token adds to a text that it continues: also its space, or its part of a character.

        A number that is no token becomes U+FFFD, as in `decode`.
        """
        name = self.backend.id_to_token(token) if token in self.ids else ""
        text = self.decode([self.eos, token]).removeprefix(self.decode([self.eos]))
        if BYTE.fullmatch(name) and text != name:
            return bytes([int(name[3:5], 16)])
        if "\ufffd" in text and name and all(char in BYTE_OF for char in name):
            return bytes(BYTE_OF[char] for char in name)
        return text.encode()

    def decode_stream(self, tokens: Iterable[int], keep_special: bool = True) -> Iterator[str]:
        """The text of tokens that arrive one by one, in pieces: joined, they are that of `decode`.

        A character in several tokens comes whole, with the last of them; an emoji, to which others may be joined (a
        family, a flag, a tone of skin), comes with the token after it. Bytes that sentencepiece falls back to
        (`<0xE4>`) come when another token ends them, because one wrong byte makes all of them unreadable.
        """
        stream = TextStream(self, keep_special)
        for token in tokens:
            if text := stream.feed(token):
                yield text
        if rest := stream.rest():
            yield rest

    def chat(self, question: str) -> str:
        """The prompt that asks one question, by the chat template."""
        return self.render([{"role": "user", "content": question}])

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The chat template over messages with `role` and `content`, as transformers renders it, but with all that is
        not said by the assistant quoted.

        variables: others that a template uses, such as Qwen3's enable_thinking. ValueError without a template, and as
        `chat_template.render`.
        """
        if not self.template:
            raise ValueError("the checkpoint has no chat template: choose --template r1_zero or plain")
        messages = [m if m.get("role") == "assistant" else _each_text(m, self.quote) for m in messages]
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        special = {name: token for name, token in special.items() if token}
        values = {"messages": messages, "tools": None, "documents": None, **special, **variables}
        return chat_template.render(self.template, values | {"add_generation_prompt": add_generation_prompt})

    def save(self, path: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers opens with AutoTokenizer.

        Removes files that would override them: other templates and special_tokens_map.json.
        """
        path = Path(path)
        for old in (path / TEMPLATE_FILE, path / OLDER_MAP, *path.glob(MORE_TEMPLATES)):
            old.unlink(missing_ok=True)
        self.backend.save(str(path / "tokenizer.json"))
        config = {"clean_up_tokenization_spaces": False, **self.config, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"eos_token": self.eos_token, "pad_token": self.pad_token}
        if self.template:
            named = {"default": self.template, **self.templates}
            listed = [{"name": name, "template": template} for name, template in named.items()]
            config["chat_template"] = listed if self.templates else self.template
        if self.bos_token:
            config["bos_token"] = self.bos_token
        write_json(path / "tokenizer_config.json", config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` or a Hugging Face folder holds; ValueError names what is missing or damaged.

        Special tokens are those of tokenizer_config.json, else of special_tokens_map.json; the template that of
        chat_template.jinja, else of tokenizer_config.json (of several the one called default). Without one, `chat` and
        `render` raise ValueError.
        """
        file, stated, older = (Path(path) / name for name in ("tokenizer.json", "tokenizer_config.json", OLDER_MAP))
        added = read_json(file).get("added_tokens")
        config = {key: value for key, value in read_json(stated).items() if value is not None}
        config = (read_json(older) if older.exists() else {}) | config
        config.pop("auto_map", None)  # names code beside the file, which is not written
        templates = _templates(config.pop("chat_template", {}), stated)
        templates |= {own.stem: read_text(own) for own in Path(path).glob(MORE_TEMPLATES)}
        if (own := Path(path) / TEMPLATE_FILE).exists():
            templates["default"] = read_text(own)
        if templates and "default" not in templates:
            raise ValueError(f"{stated}: no chat_template is called default, of {sorted(templates)}")

        def text(name: str) -> str:
            token = config.get(name, "")
            token = token.get("content") if isinstance(token, dict) else token  # older files write a dict
            if not isinstance(token, str):
                raise ValueError(f"{stated}: {name} = {str(config[name])[:60]}: must be a string")
            return token

        if not (eos := text("eos_token")):
            raise ValueError(f"{stated} names no eos_token")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{file} is no tokenizer: {error}") from error
        for token in added or []:  # the library numbers them itself
            if (number := backend.token_to_id(token["content"])) != token["id"]:
                raise ValueError(f"{file}: token {token['content']!r} is number {token['id']}, but read as {number}")
        _add_tokens(backend, config.get("added_tokens_decoder", {}), stated)
        tokenizer = cls(backend, templates.pop("default", ""), eos, text("pad_token") or eos, text("bos_token"))
        tokenizer.config, tokenizer.templates = config, templates
        return tokenizer


def _add_tokens(backend: tokenizers.Tokenizer, listed: dict[str, dict], path: Path) -> None:
    """Add the tokens of `added_tokens_decoder`, by number, that tokenizer.json lacks; ValueError if one gets another
    number."""
    try:
        tokens = {int(number): tokenizers.AddedToken(**token) for number, token in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: added_tokens_decoder = {str(listed)[:60]}: must be tokens by number") from error
    for number, token in sorted(tokens.items()):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if (read := backend.token_to_id(token.content)) != number:
            raise ValueError(f"{path}: token {token.content!r} is number {number}, but read as {read}")


def _each_text(value, change: Callable[[str], str]):
    """`value` with every text in it changed, also in lists and dicts; what JSON does not know becomes text before."""
    if isinstance(value, dict):
        return {_each_text(key, change): _each_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(item, change) for item in value]
    return value if isinstance(value, (int, float, type(None))) else change(str(value))


def _templates(stated: str | list | dict, path: Path) -> dict[str, str]:
    """Chat templates by name."""
    if isinstance(stated, list) and all(isinstance(entry, dict) for entry in stated):
        stated = {str(entry.get("name")): entry.get("template") for entry in stated}
    named = {"default": stated} if isinstance(stated, str) else stated
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ValueError(f"{path}: chat_template = {str(stated)[:60]}: must be a string, or names and templates")
    return named


def word_level(words: Iterable[str], largest_number: int) -> Tokenizer:
    """One token per word, per number 0 … largest_number, per sign. A word includes the space before and after it.

    So `make 24 from 11,3` is `make `, `24`, ` from `, `11`, `,`, `3`. Unknown text becomes <|unk|>.
    """
    special = [EOS, PAD, UNK, *TAGS]
    entries = [*special, *(str(n) for n in range(largest_number + 1)), *"+-*=,:()\n ", *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\s?[A-Za-z]{2,}:?\s?|\s|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return Tokenizer(backend)


def train_bpe(
    texts: Iterable[str],
    size: int,
    numbers: bool = False,
    *,
    divide: pre_tokenizers.PreTokenizer | None = None,
    special: Sequence[str] = (),
) -> Tokenizer:
    """Byte-level BPE learned from texts, `size` tokens in all, special ones too. With `numbers`, groups of up to
    three digits are separate from other characters. ValueError if `size` is too small for the bytes.

    divide: what divides a text into pieces instead, and writes bytes as characters (see tokenizer_training.py).
    special: further special tokens."""
    special, alphabet = [EOS, PAD, *TAGS, *special], pre_tokenizers.ByteLevel.alphabet()
    if size < len(special) + len(alphabet):
        raise ValueError(f"size = {size}: at least {len(special) + len(alphabet)}, the special tokens and the bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not numbers)]
    if numbers:
        pattern = Regex(r"\d{1,3}| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]+")
        pieces = [pre_tokenizers.Split(pattern, behavior="isolated"), *pieces]
    backend.pre_tokenizer = divide or pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **settings))
    return Tokenizer(backend)
