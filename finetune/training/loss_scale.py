"""fp16's loss scale: an update whose gradient overflows is made again at half the scale.

fp16 ends at 65,504, and what lies below 6e-8 becomes 0. Multiplying the loss shifts small gradients into that
range, and may shift large ones out of it. An update is deterministic, so it can be repeated: unlike
`torch.amp.GradScaler`, which leaves such an update out, this loses no examples and no step of the schedule.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from finetune.training.metrics import Metrics, Numbers

FIRST = 2.0**12
GROWTH_INTERVAL = 2000  # good updates in a row, after which the scale doubles, as torch's does

T = TypeVar("T")


class LossScale:
    """The factor of the loss in the backward pass: a power of two in fp16, 1 otherwise."""

    def __init__(self, precision: str) -> None:
        self.value = FIRST if precision == "fp16" else 1.0
        self.num_repeats = 0
        """How often an update of this run was made again"""
        self._is_used = precision == "fp16"
        self._num_good = 0  # updates since the scale changed
        self._must_repeat = False

    def apply(self, loss: Any) -> Any:
        """The loss to call `backward` with; `FlatAdapter.clip_gradients` divides the gradient again."""
        return loss * self.value if self._is_used else loss

    def repeating(self, updates: Iterable[T]) -> Iterator[T]:
        """The updates; each is given again as long as `adapt_to` says that it must be repeated."""
        for update in updates:
            self._must_repeat = True
            while self._must_repeat:
                self._must_repeat = False
                yield update

    def adapt_to(self, numbers: Numbers) -> bool:
        """Halve the scale if the gradient of this update overflowed; double it if this was the last of
        GROWTH_INTERVAL good updates. Returns whether the update must be repeated. At scale 1 it must not:
        then the gradient itself is not finite."""
        if numbers is Numbers.GRADIENT_NOT_FINITE and self.value > 1:
            self.value /= 2
            self._num_good = 0
            self.num_repeats += 1
            self._must_repeat = True
        elif numbers is Numbers.FINITE and self._is_used:
            self._num_good += 1
            if self._num_good == GROWTH_INTERVAL:
                self.value *= 2
                self._num_good = 0
        return self._must_repeat

    def metrics(self) -> Metrics:
        """For a log line: the scale, and the repeats so far; nothing where no scale is used."""
        return {"loss_scale": self.value, "overflow_repeats": self.num_repeats} if self._is_used else {}

    def remarks(self) -> list[str]:
        """For the end of a run: that updates were repeated, if any were."""
        if self.num_repeats == 0:
            return []
        times = "once" if self.num_repeats == 1 else f"{self.num_repeats} times"
        return [f"fp16: an update overflowed and was made again at half the loss scale {times}."]

    def state_dict(self) -> dict[str, float | int]:
        """For a checkpoint: a run that resumes must scale as one that was not stopped."""
        if not self._is_used:
            return {}
        return {"scale": self.value, "good_updates": self._num_good, "repeats": self.num_repeats}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore `state_dict`, or that of torch's GradScaler, which older checkpoints hold. A run that began
        in another precision has none: the scale stays as it is."""
        if self._is_used and state:
            self.value = float(state["scale"])
            self._num_good = int(state.get("good_updates", state.get("_growth_tracker", 0)))
            self.num_repeats = int(state.get("repeats", 0))
