"""The text of an answer while it arrives in pieces: stop strings, and the thinking apart from the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

OPEN, CLOSE = "<think>", "</think>"
THINKING, ANSWER = "thinking", "answer"


def parts(pieces: Iterable[str], opened: bool) -> Iterator[tuple[str, str]]:
    """(THINKING | ANSWER, text) of an answer that arrives in pieces, without its think tags.

    opened: the prompt ends with <think> (`templates.opened`). Else thinking is what an answer has between <think>, its
    first characters but for white space, and </think>, or its end where it never closes. All after that is the answer,
    also a tag in it. What may be part of a tag comes once that is decided. The texts of a kind joined are the same for
    every division into pieces.
    """
    splitter = ThinkSplitter(opened)
    for piece in pieces:
        yield from splitter.feed(piece)
    yield from splitter.rest()


class ThinkSplitter:
    """`parts`, for pieces that are handed in one by one."""

    def __init__(self, opened: bool):
        self.kind = THINKING if opened else ANSWER  # of the text that comes next, as far as is known
        self._begins, self._pending = True, ""  # whether an opening tag may still come; text that may be part of a tag

    def feed(self, piece: str) -> list[tuple[str, str]]:
        """(kind, text) of all that the next piece decides; no text is empty."""
        text, self._pending = self._pending + piece, ""
        if self._begins:
            start = text.lstrip()
            if OPEN.startswith(start) and start != OPEN:
                self._pending = text
                return []
            self._begins = False
            if start.startswith(OPEN):
                self.kind, text = THINKING, start.removeprefix(OPEN)
        if self.kind == ANSWER:
            return [(ANSWER, text)] if text else []
        thought, tag, answer = text.partition(CLOSE)
        if tag:
            self.kind = ANSWER
        elif count := beginning(thought, [CLOSE]):
            thought, self._pending = thought[:-count], thought[-count:]
        return [(kind, text) for kind, text in ((THINKING, thought), (ANSWER, answer)) if text]

    def rest(self) -> list[tuple[str, str]]:
        """What was held back, at the end of the answer: no tag after all."""
        text, self._pending = self._pending, ""
        return [(self.kind, text)] if text else []


class StopStrings:
    """The text up to the first of some strings, for pieces that are handed in one by one.

    The first is the one that is complete first, of several that end there the longest: what a reader sees who gets one
    character at a time. So the text does not depend on the division into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("a stop string is empty")
        self.found = False
        self._stops, self._pending = stops, ""

    def feed(self, piece: str) -> str:
        """The text that the next piece decides; nothing once a stop was found."""
        if self.found:
            return ""
        text, self._pending = self._pending + piece, ""
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)[1]]
        if count := beginning(text, self._stops):
            text, self._pending = text[:-count], text[-count:]
        return text

    def rest(self) -> str:
        """What was held back, at the end of the answer: no stop string after all."""
        text, self._pending = self._pending, ""
        return text


def beginning(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of a text may begin one of the marks: the most, or 0."""
    lengths = (n for mark in marks for n in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:n]))
    return max(lengths, default=0)
