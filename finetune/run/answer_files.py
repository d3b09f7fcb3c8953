"""The file of an evaluation's answers (`eval.answers`): each beside its row's own, and how they compare."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from finetune.model.generate import Answer
from finetune.run.folder import EVALUATIONS, read_lines
from finetune.runtime.files import write_atomically
from finetune.training.answer_scores import Question, Scores


def answer_scores_file(run_dir: Path, step: int) -> Path:
    return run_dir / EVALUATIONS / f"answers_{step:06d}.jsonl"


def write_answer_scores(
    run_dir: Path,
    step: int,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    scores: Sequence[Scores],
) -> None:
    """Write a line for each question, in their order: row number, both answers, tokens, and the scores."""
    lines = [
        {
            "row_number": question.row_number,
            "reference": question.reference.text,
            "answer": answer.text,
            "num_tokens": answer.num_tokens,
            **score._asdict(),
        }
        for question, answer, score in zip(questions, answers, scores, strict=True)
    ]
    path = answer_scores_file(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_answer_scores(run_dir: Path, step: int) -> pd.DataFrame | None:
    """What `write_answer_scores` wrote after `step` updates, a row for each line; None if it is not there.

    Raises:
        ValueError: it is not the record of an evaluation.
    """
    path = answer_scores_file(run_dir, step)
    if not path.exists():
        return None
    try:
        frame = pd.DataFrame(read_lines(path))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not {"row_number", *Scores._fields} <= set(frame.columns):
        raise ValueError(f"{path} is not the record of an evaluation")
    return frame
