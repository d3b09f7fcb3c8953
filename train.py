"""Fine-tune a chat model on instructions: `python train.py --config configs/alpaca.yaml`.

This file is the loop, top to bottom. What it calls lies in finetune/, and docs/architecture.md is the map.
"""

import sys

from finetune.runtime.cli import check_settings, run_command

# A mistyped key is answered before the imports, which take seconds.
if __name__ == "__main__" and (code := check_settings(sys.argv[1:])):
    sys.exit(code)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.collate import iterate_updates
from finetune.data.plan import Plan, make_plan
from finetune.data.splits import load_data
from finetune.data.templates.named_templates import added_token_ids
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.given_adapter import parse_training_config
from finetune.model.load import base_fingerprint, check_vocabulary, describe_model, load_model, load_tokenizer
from finetune.model.loss import TokenLoss
from finetune.model.sharding import choose_sharding, shard_base
from finetune.report.model_card import model_card
from finetune.report.page import leave_report, show_finished
from finetune.run import folder, out_of_memory, summary, token_budget
from finetune.run.bad_update import record_bad_update
from finetune.run.checkpoint import Checkpointer, History, Trained, TrainState
from finetune.run.evaluator import Evaluator
from finetune.run.opening import RunFacts, open_run, require_same_start
from finetune.run.tracker import Tracker
from finetune.runtime import accelerator as machine
from finetune.runtime.choice import require_as_requested
from finetune.runtime.memory import peak_memory_gib, release_freed_memory
from finetune.runtime.processes import on_main
from finetune.runtime.signals import StopRequest
from finetune.training.loss_scale import LossScale
from finetune.training.metrics import Numbers, Stopwatch, SumWindow, check_numbers
from finetune.training.optim import choose_optimizer, create_optimizer, learning_rate_at, set_learning_rate


def train(config: Config) -> int:
    """Train as configured. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    precision = machine.choose_precision(config.train.mixed_precision)
    accelerator = machine.create_accelerator(config, precision.actual)
    device, rank, size = accelerator.device, accelerator.process_index, accelerator.num_processes
    stop = StopRequest(accelerator)  # made before the slow loading: it notes its launcher
    if folder.run_status(config) is folder.RunStatus.FINISHED:
        on_main(accelerator, show_finished, Path(config.output_dir))
        return 0

    # Data: rows -> token ids and labels.
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)  # one process of a node prepares it, the others find it in the cache

    # Model: a frozen, quantized base with a LoRA adapter, whose weights lie in one flat tensor.
    (source, remarks), int8 = folder.find_checkpoint(config), folder.recorded_int8(config)
    require_same_start(accelerator, data, source)
    sharding, added = choose_sharding(config, accelerator), added_token_ids(tokenizer)
    model = load_model(config, precision.actual, device, added, source, data.train, sharding.is_on)
    check_vocabulary(model, tokenizer)
    adapter, token_loss = FlatAdapter(model, bool(config.optim.lora_b_lr_ratio)), TokenLoss(model).train()
    adapter.broadcast(accelerator)
    optimizer_choice = choose_optimizer(config.optim.name, device)
    optimizer = create_optimizer(optimizer_choice.actual, adapter, config.optim)

    # Fast paths, each checked against its reference path; a share of the base; the plan of all updates.
    fast_paths = choose_fast_paths(config, accelerator, token_loss, data.train, int8, sharding.is_on)
    shard_base(token_loss, sharding, data.train, fast_paths.packed)
    budget = token_budget.choose(config, accelerator, token_loss, fast_paths.packed)
    choices = [*machine.describe_machine(accelerator, config.log.trackers), precision, *sharding.choices]
    choices += [*describe_model(config, model), optimizer_choice, *fast_paths, *budget.choices]
    if config.strict:
        require_as_requested(choices)
    flop_per_second = machine.matmul_rate(device, precision.actual)
    plan = make_plan(config, data.train, fast_paths.packed, rank, size, budget.tokens, sharding.is_on)

    # The run: new, or resumed from its newest whole checkpoint.
    loss_scale, window = LossScale(precision.actual), SumWindow(device, list(plan.sources.values()))
    checkpointer = Checkpointer(config, accelerator, Trained(adapter, optimizer, loss_scale), window)
    state = checkpointer.resume(source, base_fingerprint(config.model, model))
    facts = RunFacts(config, model, tokenizer, data, plan, choices, fast_paths, budget, flop_per_second)
    on_main(accelerator, open_run, accelerator, facts, state, checkpointer, source, remarks)
    history = folder.read_evaluations(Path(config.output_dir))  # on every rank: all must stop together

    with Tracker(accelerator, config, plan, state.step) as tracker, stop, out_of_memory.advice(facts, state):
        evaluator = Evaluator(accelerator, config, token_loss, tokenizer, plan, data, tracker, stop, history)
        evaluator.run_if_due(state, checkpointer)  # before training
        stopwatch = Stopwatch(model, flop_per_second)
        updates = iterate_updates(plan, data.train.dataset, state.step, device)
        for update, micro_batches in loss_scale.repeating(updates):
            if stop.should_stop() or evaluator.is_over(state.step):
                break
            # Dropout noise depends on these three alone: a resumed run and a repeated update draw the same.
            machine.reseed(config.train.seed, state.step, rank)
            learning_rate = learning_rate_at(state.step, plan.num_steps, config.optim)
            set_learning_rate(optimizer, learning_rate)
            adapter.zero_gradients()
            window.begin_update()
            for batch in micro_batches:
                with accelerator.autocast():
                    sums = token_loss(batch)  # nll, entropy, correct, count
                # The mean over the target tokens of all micro-batches and ranks, however laid out.
                accelerator.backward(loss_scale.apply(sums.nll / update.num_target_tokens))
                window.add(sums)
            adapter.reduce_gradients(accelerator)
            grad_norm = adapter.clip_gradients(config.optim.max_grad_norm, loss_scale.value)
            numbers = check_numbers(accelerator, window, grad_norm)  # the only host-device sync of an update
            if loss_scale.adapt_to(numbers):  # fp16 overflowed: the same update again, at half the scale
                continue
            if numbers is not Numbers.FINITE:
                raise record_bad_update(accelerator, checkpointer, token_loss, plan, state, data, tokenizer)
            optimizer.step()
            window.keep_update()
            state.step += 1
            release_freed_memory(state.step)

            stopwatch.count(update.num_tokens, micro_batches)
            tracker.advance(state.step)
            if plan.is_due(config.log.every_steps, state.step):
                metrics = window.reduce(accelerator) | {"learning_rate": learning_rate}
                metrics |= {"grad_norm": float(grad_norm), **loss_scale.metrics(), **stopwatch.speed()}
                tracker.log("train", state.step, metrics | {"peak_memory_gib": peak_memory_gib(device)})
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
    summary.show_end(config, plan, history, state.step, remarks + checkpointer.trained.loss_scale.remarks())
    leave_report(run_dir)


def run(argv: Sequence[str]) -> int:
    """Train with the configuration that the command line gives."""
    config = parse_training_config(argv)
    with folder.only_one_at_a_time(config), out_of_memory.around_training(config):
        return train(config)


def main(argv: Sequence[str]) -> int:
    """Run, and turn what a user can get wrong into one line and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
