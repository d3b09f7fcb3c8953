"""Fine-tune a chat model on instructions: `accelerate launch train.py --config configs/alpaca.yaml`.

This file is the loop, top to bottom. What it calls lives in finetune/, one module a part.
"""

import math
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from finetune.batching import Plan, iterate_batches, iterate_updates, make_plan, plan_evaluation
from finetune.chat import tokenize_splits
from finetune.checkpoint import TrainState, load_checkpoint, save_adapter_and_tokenizer, save_checkpoint
from finetune.config import Config, parse_config
from finetune.evaluate import evaluate, generate_answers, pick_conversations
from finetune.loss import TokenLoss
from finetune.machine import choose_precision, create_accelerator, environment, peak_memory_gib
from finetune.metrics import Stopwatch, SumWindow, check_finite
from finetune.model import load_model, load_tokenizer
from finetune.optim import choose_optimizer, create_optimizer, learning_rate_at, set_learning_rate
from finetune.rows import load_rows
from finetune.run_folder import (
    RunStatus,
    find_checkpoint,
    keep_metrics_until,
    read_evaluations,
    run_status,
    start_run,
)
from finetune.tracking import Tracker, describe_data, describe_model, say, show_end, show_start


def train(config: Config) -> None:
    run_dir = Path(config.output_dir)
    precision = choose_precision(config.train.mixed_precision)
    accelerator = create_accelerator(config, precision.got)
    is_main, device = accelerator.is_main_process, accelerator.device
    if run_status(config) is RunStatus.FINISHED:
        if is_main:
            say(f"The run in {run_dir} is finished; its adapter is {run_dir / 'adapter'}.")
            say("To train again, choose another --output_dir, or delete that folder.")
        return

    # Data: rows -> tokens with their mask -> the plan of all updates.
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():  # the others find its tokens in the cache
        rows = load_rows(config.data)
        train_set, eval_set = tokenize_splits(rows, tokenizer, config.data)
    plan = make_plan(config, train_set, accelerator.process_index, accelerator.num_processes)
    eval_batches = plan_evaluation(plan, eval_set)
    conversations = pick_conversations(rows.eval, config.data.system_prompt)

    # Model: a frozen, quantised base with a LoRA adapter; the loss lies inside, so that DDP wraps both.
    model = load_model(config, precision.got, device)
    token_loss = TokenLoss(model).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_choice = choose_optimizer(config.optim.name, device)
    optimizer = create_optimizer(optimizer_choice.got, trainable, config.optim)
    ddp_loss, optimizer = accelerator.prepare(token_loss, optimizer)

    # The run: new, or going on from a checkpoint.
    checkpoint, damaged = find_checkpoint(config)
    state, window = TrainState(), SumWindow(device)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizer)
        if is_main:  # sums over all processes: they must count once
            window.restore(state.window_sums)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.loss_scaler)
    accelerator.wait_for_everyone()
    if is_main:
        start_run(config, environment(accelerator), plan, train_set, eval_set)
        keep_metrics_until(run_dir, state.step)
        facts = [*describe_model(config, model, device), *describe_data(rows, train_set, eval_set)]
        show_start(config, [precision, optimizer_choice], plan, facts)
        for line in damaged:
            say(line)
        if checkpoint is not None:
            say(f"Going on from {checkpoint}, after update {state.step}.")

    with Tracker(accelerator, config, plan, state.step) as tracker:

        def run_evaluation() -> None:
            tracker.show_activity("evaluating")
            batches = iterate_batches(eval_batches, eval_set.dataset, plan.layout.packing, device)
            tracker.log("eval", state.step, evaluate(accelerator, token_loss, batches))

        def write_answers() -> None:
            if is_main and conversations:
                tracker.show_activity("writing a few answers")
                answers = generate_answers(accelerator, model, tokenizer, conversations)
                tracker.log_answers(state.step, conversations, answers)
            accelerator.wait_for_everyone()

        if state.step == 0:
            write_answers()
            if config.eval.at_start and len(eval_set.dataset) > 0:
                run_evaluation()

        stopwatch = Stopwatch()
        for update, micro_batches in iterate_updates(plan, train_set.dataset, state.step, device):
            # Dropout noise depends on these three alone: a resumed run draws the same.
            reseed(config.train.seed, state.step, accelerator.process_index)
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
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            stopwatch.count(update.num_tokens)
            tracker.advance(state.step)

            if is_due(config.log.every_steps, state.step, plan):  # the only place that waits for the device
                metrics = window.reduce(accelerator)
                metrics |= {
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "useful_tokens_per_second": stopwatch.tokens_per_second(),
                    "peak_memory_gib": peak_memory_gib(device),
                }
                tracker.log("train", state.step, metrics)
            with stopwatch.paused():
                if len(eval_set.dataset) > 0 and is_due(config.eval.every, state.step, plan):
                    run_evaluation()
                if state.step == plan.num_steps:
                    write_answers()
                if is_due(config.checkpoint.every_steps, state.step, plan):
                    state.window_sums = check_finite(window.total(accelerator).tolist())
                    if accelerator.scaler is not None:
                        state.loss_scaler = accelerator.scaler.state_dict()
                    if is_main:
                        save_checkpoint(run_dir, state, model, optimizer, config.checkpoint.keep)
                    accelerator.wait_for_everyone()

    if is_main:
        save_adapter_and_tokenizer(run_dir / "adapter", model, tokenizer)
        show_end(read_evaluations(run_dir), run_dir)


def reseed(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def is_due(every: int | str, step: int, plan: Plan) -> bool:
    """Whether `step` ends a period of `every` updates (or "epoch"), or the run."""
    period = plan.steps_per_epoch if isinstance(every, str) else every
    return step % period == 0 or step == plan.num_steps


def main(argv: Sequence[str]) -> int:
    """Run, and turn what a user can get wrong into one line and exit code 2."""
    try:
        train(parse_config(argv))
    except ValueError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(
            f"stopped: {error}; the last checkpoint is from before. Lower optim.learning_rate?",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
