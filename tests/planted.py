"""A metric of answers that disagrees with the loss, and moments at which a run that follows it is killed.

As a program, it is train.py in one of several processes. At each start it is killed at the next moment
of those that the environment variable MOMENTS names, with commas between; nothing is tidied up.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills import StoppedError

import finetune.run.eval_answers as eval_answers_module
import finetune.run.evaluator as evaluator_module
from finetune.run.evaluator import Evaluator
from finetune.run.tracker import Tracker
from finetune.training import answer_scores
from finetune.training.answer_scores import mean_scores

# As in test_best.py, the loss is the lowest after the third update. The planted metric is the highest after
# the second: the fifth is only as good, and then patience has run out.
PLANTED = {0: 1.0, 1: 5.0, 2: 9.0, 3: 4.0, 4: 6.0, 5: 9.0}
LOWEST_LOSS, BEST, ENDS_AT = 3, 2, 5
FOLLOWS_CHRF = {
    "optim__name": "adamw",
    "optim__schedule": "constant",
    "train__seed": 41,
    "train__num_epochs": 4,
    "train__early_stopping_patience": ENDS_AT - BEST,
    "eval__every": 1,
    "eval__answers": 4,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 1,
    "checkpoint__keep_best": True,
    "checkpoint__best_by": "chrf",
}

Patch = tuple[Any, str, Any]
"""What `setattr` takes"""


def plant() -> list[Patch]:
    """Patches for a chrF that is that of PLANTED, whatever the answers; they are made three at a time."""
    at_step: list[int] = []
    evaluate = Evaluator._evaluate

    def noting_evaluate(self: Evaluator, step: int) -> None:
        at_step.append(step)
        evaluate(self, step)

    def planted_scores(scores: Any) -> Any:
        return mean_scores(scores) | ({"chrf": PLANTED[at_step[-1]]} if at_step else {})

    return [
        (Evaluator, "_evaluate", noting_evaluate),
        (evaluator_module, "mean_scores", planted_scores),
        (answer_scores, "ANSWERS_AT_A_TIME", 3),
    ]


# Kills: each patches a function of the program, which then stops it.


def before_the_answers() -> Patch:
    activity = Tracker.show_activity

    def show(self: Tracker, what: str) -> None:
        activity(self, what)
        if what.startswith("answering") and (self._run_dir / "checkpoints").exists():  # not before training
            raise StoppedError

    return Tracker, "show_activity", show


def between_two_batches() -> Patch:
    generate, calls = eval_answers_module.answer_prompts, iter(range(100))

    def answer(*arguments: Any) -> Any:
        if next(calls) == 3:  # two batches an evaluation: the second batch of the second one
            raise StoppedError
        return generate(*arguments)

    return eval_answers_module, "answer_prompts", answer


def at_the_file_of_answers(step: int, after: bool) -> Patch:
    write = Tracker.write_answer_scores

    def write_or_stop(self: Tracker, at: int, *rest: Any) -> None:
        if at != step or after:
            write(self, at, *rest)
        if at == step:
            raise StoppedError

    return Tracker, "write_answer_scores", write_or_stop


def after_the_line_of(step: int) -> Patch:
    log = Tracker.log

    def log_and_stop(self: Tracker, split: str, at: int, metrics: Any) -> None:
        log(self, split, at, metrics)
        if split == "eval" and at == step:
            raise StoppedError

    return Tracker, "log", log_and_stop


def while_pruning() -> Patch:
    remove = shutil.rmtree

    def remove_half(path: Any, **options: Any) -> None:
        if Path(path).name == ".step_000004.removed.partial" and not options:
            (Path(path) / "state.json").unlink()
            raise StoppedError
        remove(path, **options)

    return shutil, "rmtree", remove_half


def while_writing_the_result() -> Patch:
    replace = os.replace

    def replace_or_stop(source: Any, target: Any) -> None:
        if Path(target).name == "adapter":
            raise StoppedError
        replace(source, target)

    return os, "replace", replace_or_stop


MOMENTS: dict[str, tuple[int, Callable[[], Patch]]] = {
    "before the answers": (1, before_the_answers),
    "between two batches": (1, between_two_batches),
    "before the file of answers": (0, lambda: at_the_file_of_answers(3, after=False)),
    "after the file of answers": (0, lambda: at_the_file_of_answers(3, after=True)),
    "after the line": (0, lambda: after_the_line_of(4)),
    "while pruning": (0, while_pruning),
    "while writing the result": (0, while_writing_the_result),
}
"""In the order in which a run meets them: the rank that is killed there if there are two, and the patch"""


class _Killed(BaseException):
    def __init__(self) -> None:
        os._exit(9)


def main() -> int:
    import train

    moments = os.environ["MOMENTS"].split(",")
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    patches = plant()
    if start < len(moments):
        rank, patch = MOMENTS[moments[start]]
        if rank == int(os.environ["RANK"]):
            patches.append(patch())
    for patch in patches:
        setattr(*patch)
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    globals()["StoppedError"] = _Killed
    sys.exit(main())
