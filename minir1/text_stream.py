"""Text from tokens that arrive one by one: characters and emoji come whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tokenizer.py imports this file
    from minir1.tokenizer import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, in sentencepiece's spelling
CONTEXT = 4  # tokens that `decode_stream` decodes again: a character has four bytes at most
EMOJI = "[\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\u3030\u303d\u3297\u3299" + (
    "\U0001f000-\U0001f1e5\U0001f200-\U0001faff]"  # all but the letters of flags
)
MORE = "[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*"  # style, key, tone of skin, tag
FLAG = "[\U0001f1e6-\U0001f1ff]"  # two letters are one flag
UNFINISHED = re.compile(  # an emoji at the end of a text that may be incomplete: joined to others, or half a flag
    rf"(?P<joined>{EMOJI}{MORE}(?:\u200d{EMOJI}{MORE})*\u200d?)\Z|(?<!{FLAG})(?:{FLAG}{FLAG})*(?P<half>{FLAG})\Z"
)


class TextStream:
    """`Tokenizer.decode_stream`, for tokens that are handed in one by one.

    before: tokens whose text these continue. Else a first space may be missing, as sentencepiece writes none there.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = True, before: Sequence[int] = ()):
        self.tokenizer, self.skipped = tokenizer, () if keep_special else (tokenizer.eos, tokenizer.pad)
        start = max(0, len(before) - CONTEXT)
        while start and self._is_byte(before[start]):  # the bytes of a character are decoded together
            start -= 1
        self._window = list(before[start:])  # the last tokens
        self._sent = len(tokenizer.decode(self._window).rstrip("\ufffd"))  # characters of their text that were read
        self._pending = ""  # an emoji to which others may be joined

    def _is_byte(self, token: int) -> bool:
        return token in self.tokenizer.ids and bool(BYTE.fullmatch(self.tokenizer.backend.id_to_token(token)))

    def feed(self, token: int) -> str:
        """The text that is certain with the next token, perhaps none."""
        if token in self.skipped:
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""
        text = self.tokenizer.decode(self._window).removesuffix("\ufffd")  # perhaps the beginning of a character
        new, self._sent = text[self._sent :], len(text)
        if len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._sent = len(self.tokenizer.decode(self._window).removesuffix("\ufffd"))
        new = self._pending + new
        match = UNFINISHED.search(new)
        certain = match.start(match.lastgroup) if match else len(new)
        self._pending = new[certain:]
        return new[:certain]

    def rest(self, truncated: bool = False) -> str:
        """The text that was held back, after the last token. truncated: without an incomplete character at its end."""
        text = self.tokenizer.decode(self._window)[self._sent :]  # the window may begin inside a character, too
        for dropped in range(1, CONTEXT if truncated else 1):
            shorter = self.tokenizer.decode(self._window[:-dropped])[self._sent :]
            if text.endswith("\ufffd") and not shorter.endswith("\ufffd"):
                text = shorter
        return self._pending + text
