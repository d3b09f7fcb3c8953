"""`python -m finetune merge RUN --output DIR`: the adapter in the weights, compared with what was trained."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from finetune.config import Config
from finetune.data.collate import iterate_batches
from finetune.data.plan import make_plan, plan_evaluation
from finetune.data.rows import load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.tokenize import Examples
from finetune.export.merge import (
    DEQUANTISED,
    FULL_PRECISION,
    load_unmerged,
    merge,
    model_bytes,
    round_weights,
    save_merged,
)
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.loss import TokenLoss
from finetune.ops.quantized import dropout_off
from finetune.run.adapter import Trained, TrainedModel, load_trained, parse_trained, trained_parser
from finetune.run.folder import read_environment
from finetune.runtime.console import console, say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a merged model has to keep of the trained one, on its eval rows.
LEAST_AGREEMENT = 0.99
MOST_LOSS_CHANGE = 0.005
CHUNK = 256  # target tokens whose logits are there at a time


class Predictions(NamedTuple):
    """What a model predicts for N target tokens, kept small: hidden [N, d] and the head's weight [V, d]."""

    hidden: Tensor
    weight: Tensor

    def logits(self, part: slice) -> Tensor:
        """[n, V] fp32, multiplied in the precision of the hidden states."""
        hidden = self.hidden[part]
        return (hidden @ self.weight.to(hidden.dtype).t()).float()


class Difference(NamedTuple):
    """Of predictions q from p, per target token."""

    kl: float
    """KL(p || q) in nats"""
    agreement: float
    """How often both have the same likeliest token"""
    loss: float
    """Of q, in nats"""


class Candidate(NamedTuple):
    base: str
    dtype: str
    num_bytes: int
    difference: Difference
    """From the trained model in fp32"""
    agreement_as_run: float
    """With the trained model in the run's own precision"""


def command(argv: Sequence[str]) -> None:
    """Write the merged model that is nearest to the trained one, or the one that is asked for.

    Raises:
        ValueError: arguments, an adapter, rows or a base that cannot be used.
    """
    arguments, trained = parse_trained(_parser(), argv)
    output: Path = arguments.output
    _check(arguments, trained.config)
    rows = load_rows(trained.config.data)
    opened = load_trained(trained)
    train_set, eval_set = tokenize_splits(rows, opened.tokenizer, trained.config.data)
    with console.status("computing what the trained model predicts"):
        comparison = _start_comparison(trained, opened, train_set, eval_set, arguments.rows)
    if comparison is None:
        say("Not compared: the model's logits are more than its head's product with its last hidden states.")
        base = arguments.which or (FULL_PRECISION if _is_plain(trained.config) else DEQUANTISED)
        dtype = arguments.dtype or "fp32"
    else:
        candidates = _compare_all(arguments, trained, opened, comparison)
        best = choose(candidates, comparison.loss)
        _show(comparison, opened.precision.actual, candidates, best)
        base, dtype = best.base, best.dtype
    with console.status(f"writing {output}"):
        model = merge(load_unmerged(trained, opened, base))
        save_merged(model, opened.tokenizer, DTYPES[dtype], output)
    size = model_bytes(model, DTYPES[dtype]) / 1e6
    say(f"Written: {_in_words(base)}, {dtype}, {size:,.0f} MB. It loads with transformers alone:")
    say(f'  AutoModelForCausalLM.from_pretrained("{output}"), AutoTokenizer.from_pretrained("{output}")')


def _parser() -> Any:
    parser = trained_parser(
        "merge",
        "--output DIR [--which BASE] [--dtype TYPE] [--rows N]",
        "Put the adapter into the weights: a model folder for transformers alone. Merged into the base as it "
        "was trained on (dequantized) and into the full-precision one, it is compared with the trained model "
        "on the run's eval rows; the nearest one is written, in 16 bits where they are enough.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder to be made")
    parser.add_argument(
        "--which", choices=[FULL_PRECISION, DEQUANTISED], help="write the merge into this base"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="write the weights so")
    parser.add_argument(
        "--rows", metavar="N", type=int, default=40, help="eval rows to compare on (default 40)"
    )
    return parser


def _check(arguments: argparse.Namespace, config: Config) -> None:
    output = arguments.output
    if arguments.rows < 1:
        raise ValueError(f"--rows must be at least 1, not {arguments.rows}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} is there already; name a new folder")
    if arguments.which == DEQUANTISED and _is_plain(config):
        raise ValueError("--which dequantized: the base of this run was not quantized")


def _is_plain(config: Config) -> bool:
    return config.model.quantization == "none"


class Comparison(NamedTuple):
    """The examples to compare on, and what the trained model predicts there."""

    examples: Examples
    batches: list[list[int]]
    packing: bool
    target_ids: Tensor
    as_run: Predictions
    """In the run's own precision and on its paths"""
    trained: Predictions
    """The same weights, computed in fp32: without the rounding that no two computations share"""
    loss: float
    """Of `trained`"""


def _start_comparison(
    trained: Trained, opened: TrainedModel, train_set: Examples, eval_set: Examples, num_rows: int
) -> Comparison | None:
    """None where a model's logits cannot be had from its last hidden states."""
    config = replace(trained.config, fast=replace(trained.config.fast, head=True))
    examples = eval_set
    if len(eval_set.dataset) == 0:
        say("The run has no eval rows: compared on rows that it was trained on.")
        examples = train_set
    dataset = examples.dataset.select(range(min(num_rows, len(examples.dataset))))
    examples = Examples(dataset, examples.truncated, examples.dropped)
    token_loss = TokenLoss(opened.model)
    int8 = None if trained.run_dir is None else str(read_environment(trained.run_dir)["int8"])
    packing = choose_fast_paths(config, opened.accelerator, token_loss, train_set, int8).packed
    if token_loss.head_mib is None:
        return None
    batches = plan_evaluation(make_plan(config, train_set, packing, 0, 1), examples)
    device = opened.accelerator.device
    ids = [batch.target_ids for batch in iterate_batches(batches, dataset, packing, device)]
    precision = opened.accelerator.autocast()
    as_run = predict(token_loss, batches, examples, packing, precision)
    # An unmerged adapter, so that the merge itself is tested too.
    reference = load_unmerged(trained, opened, DEQUANTISED)
    in_fp32 = predict(TokenLoss(reference), batches, examples, packing, nullcontext())
    in_fp32 = Predictions(in_fp32.hidden, as_run.weight)  # the same head: rounded to the run's precision
    loss = difference(as_run, in_fp32, torch.cat(ids)).loss
    return Comparison(examples, batches, packing, torch.cat(ids), as_run, in_fp32, loss)


@torch.no_grad()
def predict(
    token_loss: TokenLoss,
    batches: Sequence[list[int]],
    examples: Examples,
    packing: bool,
    precision: AbstractContextManager[Any],
) -> Predictions:
    """The predictions of all target tokens, without dropout."""
    weight: Tensor = token_loss.base.get_output_embeddings().weight
    micro_batches = iterate_batches(batches, examples.dataset, packing, weight.device)
    with dropout_off(token_loss), precision:
        hidden = [token_loss.target_hidden(batch) for batch in micro_batches]
    return Predictions(torch.cat(hidden), weight)


@torch.no_grad()
def difference(p: Predictions, q: Predictions, target_ids: Tensor) -> Difference:
    """How q differs from p on N target tokens; target_ids [N]."""
    sums = torch.zeros(3, dtype=torch.float64, device=target_ids.device)
    for start in range(0, len(target_ids), CHUNK):
        part = slice(start, start + CHUNK)
        log_p, log_q = (predictions.logits(part).log_softmax(-1) for predictions in (p, q))
        same = log_p.argmax(-1) == log_q.argmax(-1)
        nll = -log_q.gather(-1, target_ids[part, None])
        sums += torch.stack([(log_p.exp() * (log_p - log_q)).sum(), same.sum(), nll.sum()]).double()
    kl, agreement, loss = (sums / len(target_ids)).tolist()
    return Difference(kl, agreement, loss)


def _compare_all(
    arguments: argparse.Namespace, trained: Trained, opened: TrainedModel, comparison: Comparison
) -> list[Candidate]:
    """The merges that may be written: into each base, in fp32 and in the run's 16 bits."""
    bases = [FULL_PRECISION] if _is_plain(trained.config) else [DEQUANTISED, FULL_PRECISION]
    bases = bases if arguments.which is None else [arguments.which]
    half = "fp16" if opened.precision.actual == "fp16" else "bf16"
    dtypes = ["fp32", half] if arguments.dtype is None else [arguments.dtype]
    return [candidate for base in bases for candidate in _compare(trained, opened, comparison, base, dtypes)]


def _compare(
    trained: Trained, opened: TrainedModel, comparison: Comparison, base: str, dtypes: Sequence[str]
) -> list[Candidate]:
    """The merge into one base, rounded to one type after the other; computed in fp32, as the trained one."""
    candidates = []
    with console.status(f"comparing the {_in_words(base)} merge"):
        model = merge(load_unmerged(trained, opened, base))
        batches, packing = comparison.batches, comparison.packing
        for name in dtypes:
            round_weights(model, DTYPES[name])
            got = predict(TokenLoss(model), batches, comparison.examples, packing, nullcontext())
            against = (comparison.trained, comparison.as_run)
            to_trained, to_run = (difference(p, got, comparison.target_ids) for p in against)
            size = model_bytes(model, DTYPES[name])
            candidates.append(Candidate(base, name, size, to_trained, to_run.agreement))
    return candidates


def choose(candidates: Sequence[Candidate], loss: float) -> Candidate:
    """The smallest that keeps what the trained model of this loss predicts, or else the nearest to it."""
    faithful = [candidate for candidate in candidates if is_faithful(candidate, loss)]
    if faithful:
        return min(faithful, key=lambda candidate: (candidate.num_bytes, candidate.difference.kl))
    return min(candidates, key=lambda candidate: candidate.difference.kl)


def is_faithful(candidate: Candidate, loss: float) -> bool:
    _, agreement, own = candidate.difference
    return agreement >= LEAST_AGREEMENT and abs(own / loss - 1) <= MOST_LOSS_CHANGE


def _show(comparison: Comparison, precision: str, candidates: Sequence[Candidate], best: Candidate) -> None:
    """Print how far each merge is from the trained model, and why this one is written."""
    exact, as_run, loss = comparison.trained, comparison.as_run, comparison.loss
    precision = "fp32" if precision == "no" else precision
    own = difference(exact, as_run, comparison.target_ids)
    num_rows, num_tokens = len(comparison.examples.dataset), len(comparison.target_ids)
    columns = ("", "KL", "loss", "change", "top-1", "as run", "MB")
    table = Table(*columns, title=f"{num_tokens:,} target tokens of {num_rows:,} rows", title_justify="left")

    def add(name: str, it: Difference, as_run: str, size: str = "", style: str = "") -> None:
        change = f"{it.loss / loss - 1:+.2%}"
        cells = (f"{it.kl:.1e}", f"{it.loss:.4f}", change, f"{it.agreement:.1%}", as_run, size)
        table.add_row(name, *cells, style=style)

    table.add_row("trained, in fp32", "", f"{loss:.4f}", "", "", f"{own.agreement:.1%}", "")
    add(f"trained, as run ({precision})", own, "")
    for it in candidates:
        size, style = f"{it.num_bytes / 1e6:,.0f}", "bold" if it is best else ""
        add(f"{_in_words(it.base)}, {it.dtype}", it.difference, f"{it.agreement_as_run:.1%}", size, style)
    console.print(table)
    say("KL and top-1 (the same likeliest token) per target token: from the trained weights, all in fp32.")
    say(f"as run: top-1 with the run's own computation in {precision}.")
    say(_reason(candidates, best, loss))


def _reason(candidates: Sequence[Candidate], best: Candidate, loss: float) -> str:
    name = f"{_in_words(best.base)}, {best.dtype}"
    bars = (
        f"at least {LEAST_AGREEMENT:.0%} of the likeliest tokens and the loss within {MOST_LOSS_CHANGE:.1%}"
    )
    if not is_faithful(best, loss):
        return f"{name}: no closer merge was compared, but it does NOT keep {bars}."
    smaller = [it for it in candidates if it.num_bytes < best.num_bytes and it.base == best.base]
    reason = f"{name}: it keeps {bars}"
    if smaller:
        reason += f"; {smaller[0].dtype} does not: it rounds off more than the adapter's smaller changes"
    return reason + "."


def _in_words(base: str) -> str:
    return base.replace("_", " ")
