"""A run that runs out of memory ends in one line: the key to lower, and how to resume."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from finetune.config import Config
from finetune.data.plan import Plan
from finetune.run.checkpoint import TrainState, list_checkpoints
from finetune.run.opening import RunFacts
from finetune.run.summary import launch_command
from finetune.runtime.processes import num_nodes

# In errors that are no torch.OutOfMemoryError: of torch's allocator on a CPU, and on a GPU of the driver and
# cuBLAS, which do without that allocator.
MESSAGES = ("you tried to allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in RAM."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
    )


def around_training(config: Config) -> AbstractContextManager[None]:
    """Before and after the updates: if memory runs out, say in one line what to change.

    Raises:
        ValueError: memory ran out.
    """
    return _in_one_line(lambda: _what_to_change(config))


def advice(facts: RunFacts, state: TrainState) -> AbstractContextManager[None]:
    """While a run trains and evaluates: if memory runs out, say in one line what to lower and how to resume.

    Raises:
        ValueError: memory ran out.
    """
    on_gpu = facts.model.device.type == "cuda"
    return _in_one_line(lambda: _how_to_resume(facts.config, facts.plan, state.step, on_gpu))


@contextmanager
def _in_one_line(what_to_do: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(what_to_do()) from error


def _what_to_change(config: Config) -> str:
    smaller = {"none": "int8 or nf4", "int8": "nf4"}.get(config.model.quantization)
    quantize = f", set model.quantization to {smaller}" if smaller else ""
    return (
        f"out of memory: choose a smaller model.name_or_path{quantize}, or lower "
        f"data.max_length (now {config.data.max_length})"
    )


def _how_to_resume(config: Config, plan: Plan, step: int, on_gpu: bool) -> str:
    run_dir, max_length = Path(config.output_dir), config.data.max_length
    checkpoints = list_checkpoints(run_dir)
    last = f"the last checkpoint is {checkpoints[0]}" if checkpoints else "there was no checkpoint yet"
    # Of the update being made, or of the last one. A budget above its largest micro-batch changes nothing.
    largest = plan.largest_batch(plan.update(min(step, plan.num_steps - 1)))
    budget = max(_about_half(largest), max_length)
    if budget < largest:
        lower = f"--train.max_tokens_per_micro_batch {budget}"
    elif not config.train.gradient_checkpointing:
        lower = "--train.gradient_checkpointing true"
    else:  # other examples: this run cannot take them up
        length = _about_half(max_length)
        lower = f"--data.max_length {length} --train.max_tokens_per_micro_batch {length}"
        lower += f" --output_dir {shlex.quote(f'{run_dir}-{length}')}"
        lower += f" --resume {shlex.quote(str(checkpoints[0]))}" if checkpoints else ""
    command = launch_command(run_dir, plan.num_processes, on_gpu, num_nodes())
    return f"out of memory after update {step}; {last}. To resume with less memory: {command} {lower}"


def _about_half(num_tokens: int) -> int:
    """Half of it, rounded down to a multiple of 64 where there is one."""
    half = num_tokens // 2
    return half // 64 * 64 or max(half, 2)
