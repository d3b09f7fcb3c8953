"""Answer requests as they come: those that wait for the same model are answered together, as one batch."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from finetune.data.templates.chat_template import stop_ids
from finetune.run.adapter import TrainedModel
from finetune.run.answers import answer


@dataclass(frozen=True)
class Asked:
    """A prompt, and how it is to be answered."""

    prompt: list[int]
    """Token ids"""
    which: Literal["tuned", "base"]
    max_new_tokens: int
    temperature: float
    """0: the most likely token"""
    seed: int
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends"""


@dataclass(frozen=True)
class Progress:
    """What is written of an answer so far."""

    text: str
    """Without surrounding white space, and without what may turn out to be the start of a stop text"""
    num_tokens: int
    """Generated tokens, including the one that ends the turn"""
    end: Literal["stop", "length"] | None
    """Why it ended: the model or a stop text ended it, or the limit of tokens; None: it goes on"""


class Job:
    """An answer under way. `report` is called with each Progress, and with the exception that ended it, if
    one did, on the engine's thread."""

    def __init__(self, asked: Asked, report: Callable[[Progress | Exception], object]) -> None:
        self.asked = asked
        self.report = report
        self.ended = False
        self._tokens: list[int] = []

    def cancel(self) -> None:
        """End the answer with its next token: nobody waits for it any more."""
        self.ended = True

    def add(self, token: int, tokenizer: Any, ends: frozenset[int]) -> None:
        """Take in the next token."""
        self._tokens.append(token)
        num_tokens, is_end = len(self._tokens), token in ends
        text = tokenizer.decode(self._tokens[:-1] if is_end else self._tokens, skip_special_tokens=False)
        cut = min((text.find(stop) for stop in self.asked.stop if stop in text), default=-1)
        end: Literal["stop", "length"] | None = None
        if cut >= 0 or is_end:
            text, end = text[:cut] if cut >= 0 else text, "stop"
        elif num_tokens >= self.asked.max_new_tokens:
            end = "length"
        else:
            text = text[: _settled_length(text, self.asked.stop)]
        self.ended = end is not None
        self.report(Progress(text.strip(), num_tokens, end))

    def fail(self, error: Exception) -> None:
        if not self.ended:
            self.ended = True
            self.report(error)


def _settled_length(text: str, stop: Sequence[str]) -> int:
    """How much of an unfinished text no later token changes or takes back."""
    length = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character of several tokens
    starts = [one[:size] for one in stop for size in range(1, len(one))]
    return min([length, *(len(text) - len(start) for start in starts if text.endswith(start))])


class Engine:
    """Answers requests on a thread of its own, in the order in which they came. Use it as a context."""

    def __init__(self, model: TrainedModel, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine")

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all answers, and wait for the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while jobs := self._next_batch():
            try:
                self._answer(jobs)
            except torch.OutOfMemoryError:
                reason = f"out of memory for {len(jobs)} answers at once; serve with a lower --batch_size"
                _fail(jobs, RuntimeError(reason))
            except Exception as error:  # of one batch: the server goes on
                _fail(jobs, error)

    def _next_batch(self) -> list[Job]:
        """The first of the waiting jobs, and those that can be answered with it; none once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return []
            batch: list[Job] = []
            for job in list(self._waiting):
                if len(batch) < self._batch_size and self._fits([*batch, job]):
                    batch.append(job)
                    self._waiting.remove(job)
            return batch

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether these jobs can be one batch."""
        kinds = {(job.asked.which, job.asked.temperature) for job in jobs}
        # Ended answers are filled up to the longest: none may run beyond the model's positions.
        length = max(len(job.asked.prompt) for job in jobs) + max(job.asked.max_new_tokens for job in jobs)
        return len(kinds) == 1 and (len(jobs) == 1 or self._positions is None or length <= self._positions)

    def _answer(self, jobs: Sequence[Job]) -> None:
        first = jobs[0].asked
        with self._model.model.disable_adapter() if first.which == "base" else nullcontext():
            answer(
                self._model,
                [job.asked.prompt for job in jobs],
                max(job.asked.max_new_tokens for job in jobs),
                first.temperature,
                [job.asked.seed for job in jobs],
                stopping=_Writing(jobs, self._model.tokenizer, lambda: self._is_closed),
            )


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        job.fail(error)


class _Writing(StoppingCriteria):  # type: ignore[misc]
    """Hands each new token to its job, and says which answers have ended."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, is_closed: Callable[[], bool]) -> None:
        self._jobs = jobs
        self._tokenizer = tokenizer
        self._ends = stop_ids(tokenizer)
        self._is_closed = is_closed

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for job, token in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.ended:
                job.add(token, self._tokenizer, self._ends)
        is_closed = self._is_closed()
        return torch.tensor([job.ended or is_closed for job in self._jobs], device=input_ids.device)
