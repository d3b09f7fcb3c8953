"""`python -m finetune plan --config FILE`: predict the memory and time of a run, and what would fit.

The memory is predicted by part. The largest update and the largest batch of the evaluation are then run once,
and what they took is shown beside the prediction. With `--cards N --nodes M` nothing is loaded: the memory of
each card and what it sends follow from the configuration of the model.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from rich.table import Table

from finetune.config import Config, examples_per_update
from finetune.data.plan import Plan, make_plan, requested_budget
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.given_adapter import parse_training_config
from finetune.model.load import load_architecture
from finetune.run.token_budget import fitting_budget, is_automatic, too_little_memory
from finetune.runtime.accelerator import choose_precision, create_accelerator
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.memory import GIB, room_on
from finetune.training.memory_model import (
    Measured,
    Prediction,
    measure_evaluation,
    measure_update,
    predict,
)
from finetune.training.scale import Card, Traffic, card_memory, predict_unloaded, traffic
from finetune.training.setup import Parts, load_parts


def command(argv: Sequence[str]) -> int:
    """Returns 0, or 1 if not even the longest example fits into the given GiB (with --cards: the update).

    Raises:
        ValueError: invalid arguments, or rows or a model that train.py cannot use either.
    """
    parser = config_parser(
        "plan",
        "[--gib N] [--cards N [--nodes M]]",
        "Memory by part and time of an epoch, predicted and measured, and the largest token budget that fits "
        "into a number of GiB. With --cards, the memory of each card and what it sends, without loading rows "
        "or weights.",
    )
    parser.add_argument("--gib", type=float, help="memory to fit into (default: what is free, less a margin)")
    parser.add_argument("--cards", type=int, help="cards of a node, for a run on several cards")
    parser.add_argument("--nodes", type=int, default=1, help="nodes with so many cards each (default: 1)")
    arguments, settings = split_arguments(parser, argv)
    if arguments.gib is not None and not 0 < arguments.gib < math.inf:
        raise ValueError(f"--gib must be above 0 and finite, not {arguments.gib}")
    _check_cards(arguments.cards, arguments.nodes)
    config = parse_training_config(settings)
    if arguments.cards is not None:
        return _plan_cards(config, arguments.cards, arguments.nodes, arguments.gib)
    parts = load_parts(config)
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    packing, device = fast_paths.packed, parts.accelerator.device
    gib = arguments.gib or _usable_gib(device)
    predicted = predict(config, parts.accelerator, parts.token_loss, packing)
    max_tokens = requested_budget(config)
    if is_automatic(config, device):
        max_tokens = max(fitting_budget(config, predicted, gib, packing), config.data.max_length)
    plan = make_plan(config, parts.train_set, packing, 0, 1, max_tokens)
    evaluation = measure_evaluation(parts, plan, parts.eval_set)  # first: an update may keep memory it freed
    update = measure_update(config, parts, plan)
    _show_parts(predicted, update)
    _show_peaks(predicted, plan, parts, update, evaluation)
    budget = predicted.largest_budget(gib)
    if budget < config.data.max_length:
        say(too_little_memory(config, budget, gib))
        return 1
    budget = max(budget // 64 * 64, config.data.max_length)
    say(f"{gib:.1f} GiB fit --train.max_tokens_per_micro_batch {budget}")
    return 0


def _usable_gib(device: torch.device) -> float:
    """The memory that a run may take on this device, printed with its parts."""
    room = room_on(device)
    say(f"A run can have {room.total_gib:.1f} GiB here, and leaves {room.margin_gib:.1f} of them as a margin")
    return room.usable_gib


def _show_parts(predicted: Prediction, update: Measured) -> None:
    table = Table("memory", "GiB", title="Predicted by part", title_justify="left")
    rows = [
        ("Python and libraries" if update.reserved_gib is None else "other tensors", predicted.process),
        ("base", predicted.base),
        ("adapter and its gradient", predicted.adapter),
        ("optimizer", predicted.optimizer),
        (
            f"kept of {update.largest_batch:,} tokens for the backward pass",
            update.largest_batch * predicted.kept_per_token,
        ),
        ("temporary, in the largest layer or the head", predicted.temporary(update.largest_batch)),
    ]
    for name, num_bytes in rows:
        table.add_row(name, f"{num_bytes / GIB:.2f}")
    console.print(table)


def _show_peaks(
    predicted: Prediction, plan: Plan, parts: Parts, update: Measured, evaluation: Measured | None
) -> None:
    """Print predicted and measured peaks, and how long an epoch takes."""
    measured = ["measured GiB"] if update.reserved_gib is None else ["allocated GiB", "reserved GiB"]
    table = Table("peak", "predicted GiB", *measured, "seconds")
    _add_peak(table, "longest update", predicted.of_update(update.largest_batch), update)
    epoch = update.seconds / update.num_tokens * float(plan.lengths.sum())
    if evaluation is not None:
        expected = predicted.held + predicted.temporary(evaluation.num_tokens)
        _add_peak(table, "longest eval batch", expected, evaluation)
        epoch += evaluation.seconds / evaluation.num_tokens * float(parts.eval_set.lengths.sum())
    console.print(table)
    say(f"An epoch: about {epoch / 60:,.1f} min, including its evaluation; epochs planned: {plan.num_epochs}")


def _add_peak(table: Table, name: str, predicted: float, measured: Measured) -> None:
    """Add a row: a prediction in bytes, and what was measured."""
    peaks = [predicted / GIB, measured.peak_gib]
    peaks += [] if measured.reserved_gib is None else [measured.reserved_gib]
    table.add_row(name, *(f"{gib:.2f}" for gib in peaks), f"{measured.seconds:.1f}")


def _check_cards(cards: int | None, nodes: int) -> None:
    if cards is None and nodes != 1:
        raise ValueError("--nodes needs --cards, the number of cards of a node")
    for name, number in (("cards", cards), ("nodes", nodes)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, not {number}")


def _plan_cards(config: Config, cards: int, nodes: int, gib: float | None) -> int:
    """Show what each card of a run needs and sends. Returns 1 if no `train.sharding` fits into `gib` GiB."""
    accelerator = create_accelerator(config, choose_precision(config.train.mixed_precision).actual)
    run = predict_unloaded(config, accelerator, load_architecture(config.model))
    num_tokens, num_cards = requested_budget(config), cards * nodes
    shards = {"none": 1}
    if cards > 1:
        shards["base"] = cards
    if nodes > 1:
        shards["base, over all nodes"] = num_cards
    memory = {name: card_memory(run, number, num_tokens) for name, number in shards.items()}
    sent = {name: traffic(run, number, num_cards) for name, number in shards.items()}
    say(f"{config.model.name_or_path}, {config.model.quantization}: nodes x cards = {nodes} x {cards}")
    say("Predicted, not run; without Python, the libraries, the driver's memory and the buffers of NCCL.")
    _show_parts_of_card(memory, num_tokens)
    _show_moments(memory)
    examples = examples_per_update(config.train, num_cards)
    _show_traffic(sent, math.ceil(examples / (num_cards * config.train.micro_batch_size)))
    if gib is None:
        return 0
    fitting = [name for name, card in memory.items() if max(card.loading, card.update) <= gib * GIB]
    say(f"{gib:.1f} GiB a card fit train.sharding: {'; '.join(fitting) or 'neither'}")
    return 0 if fitting else 1


def _show_parts_of_card(memory: dict[str, Card], num_tokens: int) -> None:
    cards = list(memory.values())
    rows: dict[str, list[float]] = {
        "base": [card.base for card in cards],
        "adapter and its gradient": [card.adapter for card in cards],
        "optimizer": [card.optimizer for card in cards],
        "embedding and head, gathered": [card.root for card in cards],
        "a decoder layer, gathered": [card.layers for card in cards],
        f"kept of {num_tokens:,} tokens for the backward pass": [card.kept for card in cards],
        "temporary, in the largest layer": [card.at_layer for card in cards],
        "temporary, in the head": [card.at_head for card in cards],
    }
    _show_columns("Memory of each card by part, GiB", memory, rows, GIB)


def _show_moments(memory: dict[str, Card]) -> None:
    cards = list(memory.values())
    rows: dict[str, list[float]] = {
        "while loading": [card.loading for card in cards],
        "first update": [card.first_update for card in cards],
        "later updates": [card.update for card in cards],
        "evaluation": [card.evaluation for card in cards],
        "between updates, saving": [card.between_updates for card in cards],
    }
    _show_columns("Peak of each card by moment, GiB", memory, rows, GIB)


def _show_traffic(sent: dict[str, Traffic], num_micro_batches: int) -> None:
    ways = list(sent.values())
    rows: dict[str, list[float]] = {
        "the base, for a micro-batch": [way.gathered for way in ways],
        "the adapter's gradient, for an update": [way.reduced for way in ways],
        f"an update of {num_micro_batches} micro-batches": [way.of_update(num_micro_batches) for way in ways],
    }
    _show_columns("Sent by each card, GB (10^9 bytes)", sent, rows, 10**9)


def _show_columns(title: str, columns: Iterable[str], rows: dict[str, list[float]], unit: int) -> None:
    """Print bytes in multiples of `unit`: a column for each way to shard."""
    table = Table("train.sharding", *columns, title=title, title_justify="left")
    for name, sizes in rows.items():
        table.add_row(name, *(f"{size / unit:.2f}" for size in sizes))
    console.print(table)
