"""Which evaluation is the best by the metric that `checkpoint.best_by` names, and when patience runs out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.config_checks import is_higher_better

Entry = dict[str, Any]
"""An eval line of metrics.jsonl"""


def is_better(entry: Mapping[str, Any], than: Mapping[str, Any], by: str) -> bool:
    """Whether the metric `by` of an eval line is better than that of another: of a loss, by more than the
    combined error of both."""
    if is_higher_better(by):
        return bool(entry[by] > than[by])
    error = math.hypot(entry.get("loss_error", 0), than.get("loss_error", 0))
    return bool(than[by] - entry[by] > error)


def best_of(evaluations: Sequence[Entry], by: str) -> Entry:
    """The eval line with the best `by`: a later one replaces an earlier one only if `is_better` holds."""
    best = evaluations[0]
    for entry in evaluations[1:]:
        if is_better(entry, best, by):
            best = entry
    return best


def best_value_first(evaluations: Sequence[Entry], by: str) -> list[Entry]:
    """The eval lines by their metric `by`, whatever its error; of equal ones the earliest first."""
    sign = -1 if is_higher_better(by) else 1
    return sorted(evaluations, key=lambda entry: (sign * entry[by], entry["step"]))


def is_out_of_patience(evaluations: Sequence[Entry], patience: int | None, by: str) -> bool:
    """Whether none of the last `patience` evaluations is better than the best one before them.

    `evaluations` are eval lines of metrics.jsonl, in order, so that a resumed run decides alike. `is_better`
    compares them by the metric `by`. With `patience` None, the result is False.
    """
    if patience is None or not evaluations:
        return False
    return len(evaluations) - evaluations.index(best_of(evaluations, by)) > patience


def best_in_words(by: str) -> str:
    """Such as `lowest eval loss` or `highest eval chrf`."""
    return f"{'highest' if is_higher_better(by) else 'lowest'} eval {by}"


def better_in_words(by: str) -> str:
    """Such as `lower loss` or `higher chrf`."""
    return f"{'higher' if is_higher_better(by) else 'lower'} {by}"
