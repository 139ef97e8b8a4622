"""Continuous batching: a request joins the running batch when it arrives, and leaves it when it ends.

    with Engine(model, rows=64) as engine:
        answer = engine.submit(Request(prompt, max_tokens=100, stop=tuple(tokenizer.stops)))
        for token in answer:
            print(token.id, token.logp)

One thread decodes: it prefills a few of the requests that wait, as far as there are free rows, draws one token in each
running row, hands the tokens out and removes the rows that have ended. The rows that run are the first of one cache,
and a step computes these alone. A request's noise depends on its seed, its row number and the position alone, so its
tokens are those of `sample.generate`, whoever else is served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from queue import SimpleQueue
from threading import Condition, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from minir1.data import pad_rows
from minir1.device import widest
from minir1.model.transformer import Transformer
from minir1.sample import BUDGET, EOS, PREFILL_CHUNK, STOP, bucket, check, choose, draw, nucleus, rows_to_keep, uniform

__all__ = ["BUDGET", "CANCELLED", "EOS", "STOP", "Answer", "Engine", "Full", "Request", "Token", "choose_each"]
CANCELLED = 3  # why an answer ended, beside EOS, STOP and BUDGET
LARGE = 8192  # slots of a row, unless others are asked for: the memory of a cache grows with them


class Full(RuntimeError):
    """As many requests wait as the engine lets wait."""


class Request(NamedTuple):
    """What to answer, and how to sample."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    stop: tuple[int, ...] = ()  # tokens that end the answer, the first of them the EOS
    seed: int = 0
    top_logprobs: int = 0  # how many of the most likely tokens are reported with each one drawn
    row: int = 0  # its row number in `generate`, where it would be one of several answers with this seed


class Token(NamedTuple):
    """A token drawn, the stop token too."""

    id: int
    logp: float  # under the distribution it was drawn from; at temperature 0 under that of temperature 1
    top: list[tuple[int, float]]  # the most likely tokens of that distribution and their log-probs, best first


class Answer:
    """The tokens of one request: an iterable that waits for each, and raises what went wrong in the engine."""

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request = request
        self.why: int | None = None  # EOS | STOP | BUDGET | CANCELLED, once it has ended
        self.count = 0  # tokens drawn
        self.last = -1  # the last of them
        self.cancelled = self.ended = False
        self.noise: Iterator[float] = iter(())  # one number for each token
        self._wake = wake
        self._arrived: SimpleQueue[Token | BaseException | None] = SimpleQueue()  # None: the end

    def cancel(self) -> None:
        """End it: its row is free within a step."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Token]:
        while isinstance(item := self._arrived.get(), Token):
            yield item
        self._finish(item)

    def arrived(self) -> tuple[list[Token], bool]:
        """The tokens that have arrived since the last call, without waiting, and whether they are the last."""
        tokens = []
        while not self._arrived.empty():
            if not isinstance(item := self._arrived.get(), Token):
                self._finish(item)
                return tokens, True
            tokens.append(item)
        return tokens, False

    def _finish(self, end: BaseException | None) -> None:
        self._arrived.put(end)  # for whoever reads on
        if end is not None:
            raise end

    # ---- the engine's side

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the last."""
        return len(self.request.prompt) + self.count - 1

    def add(self, token: Token) -> None:
        """Hand out the next token, with which the answer may end. ValueError in the answer if none could be drawn."""
        request = self.request
        if token.logp != token.logp:
            which = f"the logits of token {self.count} hold NaN or +inf, or only -inf"
            return self.end(ValueError(f"{which}: none can be drawn, the weights may be damaged"))
        self.count, self.last = self.count + 1, token.id
        self._arrived.put(token)
        if token.id in request.stop:
            self.end(EOS if token.id == request.stop[0] else STOP)
        elif self.count == request.max_tokens:
            self.end(BUDGET)
        else:
            self._wake()

    def end(self, why: int | BaseException) -> None:
        """Nothing follows; only the first call counts."""
        if not self.ended:
            failed = isinstance(why, BaseException)
            self.ended, self.why = True, None if failed else why
            self._arrived.put(why if failed else None)
            self._wake()


class Engine:
    """Answers requests from any thread while it is open: `with Engine(model) as engine`.

    rows: answers at once. slots: tokens of a row, prompt and answer; None: the model's max_positions. waiting: requests
    that may wait for a row. The cache of rows · slots tokens is allocated here. While prompts are prefilled, at most as
    many tokens as one row has, the rows that run wait. An error in a prefill, such as a lack of memory, is raised in
    its answers alone; after any other error (`error`) the engine accepts nothing more.
    """

    def __init__(self, model: Transformer, rows: int = 64, slots: int | None = None, waiting: int = 256):
        slots = model.config.max_positions if slots is None else slots
        for name, value in {"rows": rows, "slots": slots, "waiting": waiting}.items():
            if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value < 2**31:
                raise ValueError(f"{name} = {value!r}: an integer of at least 1, below 2^31")
        self.model, self.rows, self.slots, self.waiting = model, rows, slots, waiting
        try:
            self._cache = model.cache(rows, slots)
        except RuntimeError as error:  # from the allocator
            lower = "lower --rows, or the tokens of a row (--max-length of serve, --window of chat)"
            raise MemoryError(f"a cache of {rows} rows of {slots} tokens: {lower}") from error
        self._queue: deque[Answer] = deque()
        self._running: list[Answer] = []  # the answer in row 0, 1, …
        self._changed = Condition()
        self._open = False
        self.error: BaseException | None = None  # what ended the loop

    def __enter__(self) -> Engine:
        self._open, self._thread = True, Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self._thread.join()

    def close(self) -> None:
        """End what runs and waits as CANCELLED, within a step."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def submit(self, request: Request, wake: Callable[[], None] = lambda: None) -> Answer:
        """The answer to a request, which begins when there is a free row.

        wake: called in the engine's thread whenever something has arrived; it must neither wait nor raise.
        ValueError for settings out of range (`sample.check`) and for a request that does not fit into a row; Full if
        too many wait; RuntimeError if the engine is closed or has failed.
        """
        settings = request.max_tokens, request.temperature, request.top_k, request.top_p
        check(self.model, [request.prompt], 1, *settings, 0, request.stop, request.seed)
        bounds = {"top_logprobs": (request.top_logprobs, self.model.config.vocab), "row": (request.row, 2**63 - 1)}
        for name, (value, most) in bounds.items():
            if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= most:
                raise ValueError(f"{name} = {value!r}: an integer, 0 to {most}")
        if len(request.prompt) + request.max_tokens > self.slots:
            asked = f"{len(request.prompt)} tokens of the prompt and max_tokens = {request.max_tokens}"
            raise ValueError(f"{asked} do not fit into the {self.slots} tokens of a row")
        answer = Answer(request, wake)
        with self._changed:
            if self.error is not None:
                raise RuntimeError(f"the engine has failed: {self.error}") from self.error
            if not self._open:
                raise RuntimeError("the engine is closed: submit inside `with Engine(model) as engine`")
            if len(self._running) + len(self._queue) >= self.rows + self.waiting:
                raise Full(f"{len(self._queue)} requests wait already")
            self._queue.append(answer)
            self._changed.notify()
        return answer

    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return len(self._running), len(self._queue)

    # ---- the loop, in a thread of its own

    @torch.no_grad()
    def _run(self) -> None:
        end: int | BaseException = CANCELLED
        try:
            self._matrix = self.model.head_matrix()
            while self._has_work():
                self._join()
                self._remove()
                self._step()
                self._remove()
        except BaseException as error:  # whatever it is, every answer raises it
            end = error
        with self._changed:
            self._open, self.error = False, end if isinstance(end, BaseException) else None
            for answer in (*self._running, *self._queue):
                answer.end(end)
            self._running.clear()
            self._queue.clear()

    def _has_work(self) -> bool:
        """Wait for requests; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._running or not self._open)
            return self._open

    def _join(self) -> None:
        """Requests that wait get free rows: the oldest, and others as far as the prefill has no more tokens than a row.

        Each different prompt is prefilled once, in a cache of its own. The others wait for the next step, so that the
        rows that run draw a token in between.
        """
        first, longest = len(self._running), 0
        rows_of: dict[tuple[int, ...], list[int]] = {}
        with self._changed:
            for answer in [answer for answer in self._queue if answer.cancelled]:
                self._queue.remove(answer)
                answer.end(CANCELLED)
            for answer in list(self._queue):
                if len(self._running) == self.rows:
                    break
                prompt = tuple(answer.request.prompt)
                width, height = max(longest, len(prompt)), len(rows_of) + (prompt not in rows_of)
                if rows_of and width * height > self.slots:
                    continue
                longest = width
                rows_of.setdefault(prompt, []).append(len(self._running))
                self._queue.remove(answer)
                self._running.append(answer)
        if not rows_of:
            return
        new = self._running[first:]
        rows = [row for rows in rows_of.values() for row in rows]
        source = [n for n, rows in enumerate(rows_of.values()) for _ in rows]
        try:
            for answer in new:
                answer.noise = noise(answer.request, self.model.device)
            grid, lengths = pad_rows(list(rows_of), self.model.device)
            cache = self.model.cache(*grid.shape)
            last = self.model.prefill(grid, lengths=lengths, cache=cache, chunk=PREFILL_CHUNK)
            self._cache.put(rows, cache, source)
            logits = self.model.logits(last, self._matrix)[source]
        except Exception as error:  # such as a lack of memory for these prompts
            del self._running[first:]
            for answer in new:
                answer.end(error)
        else:
            self._draw([self._running[row] for row in rows], logits)

    def _step(self) -> None:
        """One token for each row that runs; on CUDA a few unused rows fill the batch up to a size of `bucket`."""
        running, device = self._running, self.model.device
        if not running:
            return
        unused = [0] * (min(self.rows, bucket(len(running), device)) - len(running))
        cache = self._cache.view([answer.length for answer in running] + unused)
        tokens = torch.tensor([answer.last for answer in running] + unused, device=device)
        hidden = self.model.hidden(tokens.unsqueeze(1), cache=cache)
        self._draw(running, self.model.logits(hidden[: len(running), 0], self._matrix))

    def _draw(self, answers: list[Answer], logits: Tensor) -> None:
        """Draw and hand out the next token of each answer. logits: fp32 [B, V]."""
        requests = [answer.request for answer in answers]
        numbers = [next(answer.noise) for answer in answers]
        numbers = torch.tensor(numbers, dtype=widest(logits.device), device=logits.device)
        settings = [(request.temperature, request.top_k, request.top_p) for request in requests]
        tokens, logp, z = choose_each(logits, numbers, settings)
        tops = most_likely(z, [request.top_logprobs for request in requests])
        for answer, *drawn in zip(answers, tokens.tolist(), logp.tolist(), tops):
            answer.add(Token(*drawn))

    def _remove(self) -> None:
        """Free the rows of answers that have ended or are cancelled: the last rows move there."""
        for answer in self._running:
            if answer.cancelled:
                answer.end(CANCELLED)
        rows = rows_to_keep(torch.tensor([answer.ended for answer in self._running]))
        if len(rows) < len(self._running):
            self._cache.view([answer.length for answer in self._running]).keep(rows)
            self._running = [self._running[row] for row in rows]


def noise(request: Request, device: torch.device) -> Iterator[float]:
    """The number in [0, 1) that draws each token of the answer, as in `generate`."""
    positions = len(request.prompt) + torch.arange(request.max_tokens, device=device)
    return iter(uniform(request.seed, torch.tensor(request.row, device=device), positions).tolist())


def choose_each(
    logits: Tensor, noise: Tensor, settings: Sequence[tuple[float, int, float]]
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample.choose` for rows with settings of their own: (temperature, top_k, top_p) of each row.

    logits: fp32 [B, V]; noise: [B]. Returns tokens int64 [B], their logp [B], and z [B, V], logits of the distributions
    to which these belong (at temperature 0 that of temperature 1).
    """

    def column(values: list[float]) -> Tensor:  # [B', 1]
        return torch.tensor(values, dtype=widest(logits.device), device=logits.device).unsqueeze(1)

    temperatures, top_ks, top_ps = zip(*settings)
    z = logits / column([temperature or 1.0 for temperature in temperatures]).to(logits.dtype)
    limited = [row for row, k in enumerate(top_ks) if k and temperatures[row]]
    if limited:
        ks = torch.tensor([min(top_ks[row], z.shape[1]) for row in limited], device=z.device).unsqueeze(1)
        part = z[limited]
        kth = part.topk(int(ks.max()), dim=-1).values.gather(1, ks - 1)
        z[limited] = part.masked_fill(part < kth, float("-inf"))
    narrow = [row for row, p in enumerate(top_ps) if p < 1 and temperatures[row]]
    if narrow:
        z[narrow] = nucleus(z[narrow], column([top_ps[row] for row in narrow]))
    tokens, logp, _ = draw(z, noise)
    greedy = [row for row, temperature in enumerate(temperatures) if temperature == 0]
    if greedy:
        tokens[greedy], logp[greedy], _ = choose(z[greedy], noise[greedy], 0.0, 0, 1.0)
    return tokens, logp, z


def most_likely(z: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row its counts[b] most likely tokens with their log-probs, best first; none of probability 0."""
    if not any(counts):
        return [[] for _ in counts]
    values, tokens = (x.tolist() for x in z.log_softmax(-1).topk(max(counts), dim=-1))
    ranked = (list(zip(*row))[:count] for row, count in zip(zip(tokens, values), counts))
    return [[(token, logp) for token, logp in row if logp > float("-inf")] for row in ranked]
