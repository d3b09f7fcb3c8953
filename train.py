"""Fine-tune a chat model on instructions: `python train.py --config configs/alpaca.yaml`.

This file is the loop, top to bottom. What it calls lies in finetune/, one folder for each concern:
docs/architecture.md is the map.
"""

import sys

from finetune.runtime.cli import check_settings, run_command

# A mistyped key is answered before the imports, which take seconds.
if __name__ == "__main__" and (code := check_settings(sys.argv[1:])):
    sys.exit(code)

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.data.collate import iterate_updates
from finetune.data.plan import Plan, make_plan
from finetune.data.splits import load_data
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.load import base_fingerprint, check_vocabulary, describe_base, load_model, load_tokenizer
from finetune.model.loss import TokenLoss
from finetune.report.model_card import model_card
from finetune.report.page import leave_report
from finetune.run import folder, out_of_memory, summary, token_budget
from finetune.run.bad_update import record_bad_update
from finetune.run.checkpoint import Checkpointer, History, TrainState
from finetune.run.evaluator import Evaluator
from finetune.run.opening import RunFacts, open_run
from finetune.run.tracker import Tracker
from finetune.runtime import accelerator as machine
from finetune.runtime.choice import require_as_requested
from finetune.runtime.memory import peak_memory_gib, release_freed_memory
from finetune.runtime.processes import on_main
from finetune.runtime.signals import StopRequest
from finetune.training.metrics import Stopwatch, SumWindow, all_finite
from finetune.training.optim import choose_optimizer, create_optimizer, learning_rate_at, set_learning_rate


def train(config: Config) -> int:
    """Train as configured. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    precision = machine.choose_precision(config.train.mixed_precision)
    accelerator = machine.create_accelerator(config, precision.actual)
    device, rank = accelerator.device, accelerator.process_index
    stop = StopRequest(accelerator)  # made before the slow loading: it notes its launcher
    if folder.run_status(config) is folder.RunStatus.FINISHED:
        if accelerator.is_main_process:
            summary.show_finished(Path(config.output_dir))
        return 0

    # Data: rows -> token ids and labels.
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():  # the other ranks find its tokens in the cache
        data = load_data(config.data, tokenizer)

    # Model: a frozen, quantized base with a LoRA adapter. The loss lies inside, so that DDP wraps both.
    model = load_model(config, precision.actual, device)
    check_vocabulary(model, tokenizer)
    token_loss = TokenLoss(model).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_choice = choose_optimizer(config.optim.name, device)
    optimizer = create_optimizer(optimizer_choice.actual, trainable, config.optim)
    ddp_loss, optimizer = accelerator.prepare(token_loss, optimizer)

    # Fast paths, each checked against its reference path; then the plan of all updates.
    fast_paths = choose_fast_paths(config, accelerator, token_loss, data.train, folder.recorded_int8(config))
    budget = token_budget.choose(config, accelerator, token_loss, fast_paths.packed)
    choices = [*machine.describe_machine(accelerator), precision, describe_base(config.model, model)]
    choices += [optimizer_choice, *fast_paths, *budget.choices]
    if config.strict:
        require_as_requested(choices)
    flop_per_second = machine.matmul_rate(device, precision.actual)
    plan = make_plan(config, data.train, fast_paths.packed, rank, accelerator.num_processes, budget.tokens)

    # The run: new, or resumed from its newest whole checkpoint.
    window = SumWindow(device)
    checkpointer = Checkpointer(config, accelerator, model, optimizer, window)
    source, remarks = folder.find_checkpoint(config)
    state = checkpointer.resume(source, base_fingerprint(config.model, model))
    facts = RunFacts(config, model, data, plan, choices, fast_paths, budget, flop_per_second)
    on_main(accelerator, open_run, accelerator, facts, state, checkpointer, source, remarks)
    history = folder.read_evaluations(Path(config.output_dir))  # on every rank: all must stop together

    with Tracker(accelerator, config, plan, state.step) as tracker, stop, out_of_memory.advice(facts, state):
        evaluator = Evaluator(accelerator, config, token_loss, tokenizer, plan, data, tracker, stop, history)
        evaluator.run_if_due(state, checkpointer)  # before training
        stopwatch = Stopwatch(model, flop_per_second)
        for update, micro_batches in iterate_updates(plan, data.train.dataset, state.step, device):
            if stop.should_stop() or evaluator.is_over(state.step):
                break
            # Dropout noise depends on these three alone: a resumed run draws the same.
            machine.reseed(config.train.seed, state.step, rank)
            learning_rate = learning_rate_at(state.step, plan.num_steps, config.optim)
            set_learning_rate(optimizer, learning_rate)

            for number, batch in enumerate(micro_batches, 1):
                # DDP all-reduces once, at the last micro-batch. It averages over ranks, which num_processes
                # undoes: the loss of an update is the mean over all its target tokens, however laid out.
                is_last = number == len(micro_batches)
                with nullcontext() if is_last else accelerator.no_sync(ddp_loss):
                    with accelerator.autocast():
                        sums = ddp_loss(batch)  # nll, entropy, correct, count
                    scale = accelerator.num_processes / update.num_target_tokens
                    accelerator.backward(sums.nll * scale)
                window.add(sums)
            grad_norm = accelerator.clip_grad_norm_(trainable, config.optim.max_grad_norm or math.inf)
            if not all_finite(accelerator, window, grad_norm):  # the only host-device sync of an update
                arguments = (token_loss, plan, state, data.train.dataset, tokenizer)
                on_main(accelerator, record_bad_update, accelerator, checkpointer, *arguments)
                raise FloatingPointError(f"a number of update {state.step + 1} is not finite")
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            release_freed_memory(state.step)

            stopwatch.count(update.num_tokens, micro_batches)
            tracker.advance(state.step)
            if plan.is_due(config.log.every_steps, state.step):
                metrics = window.reduce(accelerator)
                metrics |= {"learning_rate": learning_rate, "grad_norm": float(grad_norm)}
                metrics |= {**stopwatch.speed(), "peak_memory_gib": peak_memory_gib(device)}
                tracker.log("train", state.step, metrics)
            with stopwatch.paused():
                if plan.is_due(config.checkpoint.every_steps, state.step):
                    checkpointer.save(state, history)
                evaluator.run_if_due(state, checkpointer)

        stop.should_stop()  # a signal may have come after the last update
        checkpointer.save(state, history)

    if accelerator.is_main_process and stop.exit_code:
        summary.show_stop(config, accelerator, state.step)
    elif accelerator.is_main_process:
        finish(checkpointer, tokenizer, plan, state, history)
    return stop.exit_code


def finish(
    checkpointer: Checkpointer, tokenizer: Any, plan: Plan, state: TrainState, history: History
) -> None:
    """Write the result (with `keep_best`, the adapter of the best checkpoint), its card and the report."""
    config, run_dir = checkpointer.config, checkpointer.run_dir
    remarks = checkpointer.load_best(state, history) if config.checkpoint.keep_best else []
    folder.record_adapter_step(run_dir, state.step)
    texts = folder.training_config(config), model_card(run_dir, config)
    checkpointer.save_result(run_dir / folder.RESULT, tokenizer, *texts)
    summary.show_end(config, plan, history, state.step, remarks)
    leave_report(run_dir)


def run(argv: Sequence[str]) -> int:
    """Train with the configuration that the command line gives."""
    config = parse_config(argv)
    with folder.only_one_at_a_time(config), out_of_memory.around_training(config):
        return train(config)


def main(argv: Sequence[str]) -> int:
    """Run, and turn what a user can get wrong into one line and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
