"""Fine-tune a chat model on instructions: `accelerate launch train.py --config configs/alpaca.yaml`.

This file is the loop, top to bottom. What it calls lives in finetune/, one module a part.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from finetune import machine, run_folder, screen
from finetune.bad_update import examine_update, write_bad_update
from finetune.batching import Plan, iterate_updates, make_plan, plan_evaluation
from finetune.card import model_card
from finetune.chat import tokenize_splits
from finetune.checkpoint import (
    TrainState,
    estimate_bytes,
    load_best,
    load_checkpoint,
    save_checkpoint,
    save_result,
)
from finetune.command import run_command
from finetune.config import Config, parse_config
from finetune.evaluate import evaluate, evaluation_metrics, is_out_of_patience, pick_conversations
from finetune.generation import generate_answers
from finetune.loss import TokenLoss
from finetune.metrics import Stopwatch, SumWindow, all_finite
from finetune.model import (
    base_fingerprint,
    check_vocabulary,
    describe_base,
    load_model,
    load_tokenizer,
    training_flop,
)
from finetune.optim import choose_optimizer, create_optimizer, learning_rate_at, set_learning_rate
from finetune.paths import choose_paths
from finetune.report import leave_report
from finetune.rows import find_leaks, load_rows
from finetune.signals import StopRequest, on_main
from finetune.tracking import Tracker


def train(config: Config) -> int:
    """Train as configured, and return the exit code: 0, or 128 + the signal that stopped the run."""
    run_dir = Path(config.output_dir)
    precision = machine.choose_precision(config.train.mixed_precision)
    accelerator = machine.create_accelerator(config, precision.got)
    is_main, device = accelerator.is_main_process, accelerator.device
    stop = StopRequest(accelerator)
    if run_folder.run_status(config) is run_folder.RunStatus.FINISHED:
        if is_main:
            screen.show_finished(run_dir)
        return 0

    # Data: rows -> tokens with their mask.
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():  # the others find its tokens in the cache
        rows = load_rows(config.data)
        train_set, eval_set = tokenize_splits(rows, tokenizer, config.data)
    leaks = find_leaks(rows)
    conversations = pick_conversations(rows.eval, config.data.system_prompt)

    # Model: a frozen, quantised base with a LoRA adapter; the loss lies inside, so that DDP wraps both.
    model = load_model(config, precision.got, device)
    check_vocabulary(model, tokenizer)
    token_loss = TokenLoss(model).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_choice = choose_optimizer(config.optim.name, device)
    optimizer = create_optimizer(optimizer_choice.got, trainable, config.optim)
    ddp_loss, optimizer = accelerator.prepare(token_loss, optimizer)

    # What was asked, beside what runs; the plan of all updates.
    paths = choose_paths(config, accelerator, token_loss, train_set, run_folder.recorded_int8(config))
    settings = [*machine.describe_machine(accelerator), precision, describe_base(config.model, model)]
    settings += [optimizer_choice, *paths]
    if config.strict:
        machine.require_as_asked(settings)
    packing = paths.layout.got == "packed"
    flop_per_second = machine.matmul_rate(device, precision.got)
    plan = make_plan(config, train_set, packing, accelerator.process_index, accelerator.num_processes)
    eval_batches = plan_evaluation(plan, eval_set)

    # The run: new, or going on from a checkpoint.
    checkpoint, remarks = run_folder.find_checkpoint(config)
    state, window = TrainState(base_fingerprint(config.model, model)), SumWindow(device)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, state.base, model, optimizer, accelerator.scaler)
        if is_main:  # sums over all processes: they must count once
            window.restore(state.window_sums)

    def open_run() -> None:
        described = screen.describe(config, model, rows, train_set, eval_set, leaks, flop_per_second)
        described += screen.batch_arithmetic(config, plan)
        facts = {  # what environment.json records
            **machine.environment(accelerator),
            "base": state.base,
            "int8": paths.int8.got,
            "described": described,
            "settings": [asdict(setting) for setting in settings],
            "rows": run_folder.count_rows(rows, train_set, eval_set, len(leaks)),
        }
        size = estimate_bytes(model, optimizer_choice.got)
        run_folder.start_run(config, facts, plan, train_set, eval_set, checkpoint, state.step, size)
        run_folder.keep_lines_until(run_dir, state.step)
        screen.show_start(config, settings, described)
        screen.show_checkpoint(checkpoint, remarks, state.step)

    on_main(accelerator, open_run)
    evaluations = run_folder.read_evaluations(run_dir)  # in all processes, which must end together

    with Tracker(accelerator, config, plan, state.step) as tracker, stop:

        def is_over() -> bool:
            patience = config.train.early_stopping_patience
            return state.step == plan.num_steps or is_out_of_patience(evaluations, patience)

        def write_answers() -> None:
            if not stop.requested:
                tracker.show_activity("writing a few answers")
                answers = generate_answers(accelerator, model, tokenizer, conversations)
                tracker.log_answers(state.step, conversations, answers)

        def evaluate_and_answer() -> None:
            """The evaluation and the answers that are due now, but for those made before a kill."""
            first = state.step == 0
            due = config.eval.at_start if first else is_due(config.eval.every, state.step, plan)
            if due and len(eval_set.dataset) > 0 and not tracker.was_made("eval", state.step):
                if config.checkpoint.keep_best:
                    save()
                tracker.show_activity("evaluating")
                sums = evaluate(accelerator, token_loss, eval_batches, eval_set.dataset, packing, stop)
                if sums is not None:  # else it was stopped, and is made when the run goes on
                    tracker.write_example_sums(state.step, eval_set, sums)
                    metrics = evaluation_metrics(sums, eval_set, leaks)
                    tracker.log("eval", state.step, metrics)
                    evaluations.append({"step": state.step, **metrics})
            if (first or is_over()) and conversations and not tracker.was_made("answers", state.step):
                on_main(accelerator, write_answers)

        def save() -> None:
            state.window_sums = window.total(accelerator).tolist()
            scaler, keep = accelerator.scaler, config.checkpoint
            parts = (run_dir, state, model, optimizer, scaler, keep, evaluations)
            if state.step > 0:
                on_main(accelerator, lambda: save_checkpoint(*parts))

        def explain() -> None:
            examples = train_set.dataset
            record = examine_update(accelerator, token_loss, plan, state.step, examples, tokenizer)
            screen.say(write_bad_update(run_dir, record, state, model, optimizer, accelerator.scaler))

        evaluate_and_answer()
        stopwatch = Stopwatch(training_flop(model), flop_per_second)
        for update, micro_batches in iterate_updates(plan, train_set.dataset, state.step, device):
            if stop.agreed() or is_over():
                break
            # Dropout noise depends on these three alone: a resumed run draws the same.
            machine.reseed(config.train.seed, state.step, accelerator.process_index)
            learning_rate = learning_rate_at(state.step, plan.num_steps, config.optim)
            set_learning_rate(optimizer, learning_rate)
            for number, batch in enumerate(micro_batches, 1):
                # DDP all-reduces once, with the last micro-batch. It averages over processes, and
                # num_processes undoes that: the loss of an update is a mean over all its target tokens.
                is_last = number == len(micro_batches)
                with nullcontext() if is_last else accelerator.no_sync(ddp_loss):
                    with accelerator.autocast():
                        sums = ddp_loss(batch)
                    scale = accelerator.num_processes / update.num_target_tokens
                    accelerator.backward(sums.nll * scale)
                window.add(sums)
            grad_norm = accelerator.clip_grad_norm_(trainable, config.optim.max_grad_norm or math.inf)
            if not all_finite(accelerator, window, grad_norm):  # in an update, the one wait for the device
                on_main(accelerator, explain)
                raise FloatingPointError(f"a number of update {state.step + 1} is not finite")
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            stopwatch.count(update.num_tokens, micro_batches)
            tracker.advance(state.step)

            if is_due(config.log.every_steps, state.step, plan):
                metrics = window.reduce(accelerator)
                metrics |= {
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    **stopwatch.speed(),
                    "peak_memory_gib": machine.peak_memory_gib(device),
                }
                tracker.log("train", state.step, metrics)
            with stopwatch.paused():
                if is_due(config.checkpoint.every_steps, state.step, plan):
                    save()
                evaluate_and_answer()

        stop.agreed()  # one that came since the last update, too
        save()

    if is_main and stop.exit_code:
        screen.show_stop(config, accelerator, state.step)
    elif is_main:
        remarks = load_best(run_dir, evaluations, state, model) if config.checkpoint.keep_best else []
        run_folder.record_adapter_step(run_dir, state.step)
        training_config, card = run_folder.training_config(config), model_card(run_dir, config)
        save_result(run_dir / "adapter", model, tokenizer, training_config, card)
        screen.show_end(config, plan, evaluations, state.step, remarks)
        leave_report(run_dir)
    return stop.exit_code


def is_due(every: int | str, step: int, plan: Plan) -> bool:
    """Whether `step` ends a period of `every` updates (or "epoch"), or the run."""
    period = plan.steps_per_epoch if isinstance(every, str) else every
    return step % period == 0 or step == plan.num_steps


def main(argv: Sequence[str]) -> int:
    """Run, and turn what a user can get wrong into one line and exit code 2."""

    def run(argv: Sequence[str]) -> int:
        config = parse_config(argv)
        with run_folder.only_one_at_a_time(config):
            return train(config)

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
