"""What was requested beside what runs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What was requested and what actually runs; `reason` says why where the two differ."""

    name: str
    requested: str
    actual: str
    reason: str = ""


def require_as_requested(choices: Sequence[Choice]) -> None:
    """Raise ValueError, naming each, where something else runs than what was requested."""
    differing = [
        f"{choice.name}: requested {choice.requested}, actual {choice.actual} ({choice.reason})"
        for choice in choices
        if choice.requested != choice.actual
    ]
    if differing:
        raise ValueError(
            f"strict is on, and the run would differ from what was requested: {'; '.join(differing)}"
        )
