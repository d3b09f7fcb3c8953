"""`python -m finetune merge RUN --output DIR`: merge the adapter into the weights and check the result."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.rows import load_rows
from finetune.export.comparison import Line, gain_kept, open_comparison, show_answers, show_differences
from finetune.export.fidelity import (
    DTYPES,
    MAX_LOSS_CHANGE,
    MIN_AGREEMENT,
    Candidate,
    Comparison,
    choose,
    compare_merge,
    is_faithful,
)
from finetune.export.merge import (
    DEQUANTIZED,
    FULL_PRECISION,
    load_unmerged,
    merge,
    model_bytes,
    require_new_folder,
    save_merged,
)
from finetune.run.adapter import Trained, TrainedModel, load_trained, parse_trained, trained_parser
from finetune.runtime.console import console, say


def command(argv: Sequence[str]) -> None:
    """Write the merged model that is nearest to the trained one, or the requested one.

    Raises:
        ValueError: invalid arguments, or an adapter, rows or a base that cannot be used.
    """
    arguments, trained = parse_trained(_parser(), argv)
    output: Path = arguments.output
    _check(arguments, trained.config)
    rows = load_rows(trained.config.data, trained.config.eval.sets)
    opened = load_trained(trained)
    comparison = open_comparison(trained, opened, rows, arguments.rows)
    if comparison is None:
        base = arguments.which or (DEQUANTIZED if _is_quantized(trained.config) else FULL_PRECISION)
        dtype = arguments.dtype or "fp32"
    else:
        candidates = _compare(arguments, trained, opened, comparison)
        best = choose(candidates, comparison.loss)
        _show(comparison, opened.precision.actual, candidates, best)
        base, dtype = best.base, best.dtype
    with console.status(f"writing {output}"):
        model = merge(load_unmerged(trained, opened, base))
        save_merged(model, opened.tokenizer, DTYPES[dtype], output)
    if comparison is not None:
        show_answers(comparison, opened, model.float(), "merged")
    size = model_bytes(model, DTYPES[dtype]) / 1e6
    say(f"Written: {_in_words(base)}, {dtype}, {size:,.0f} MB. It loads with transformers alone:")
    say(f'  AutoModelForCausalLM.from_pretrained("{output}"), AutoTokenizer.from_pretrained("{output}")')


def _parser() -> Any:
    parser = trained_parser(
        "merge",
        "--output DIR [--which BASE] [--dtype TYPE] [--rows N]",
        "Merge the adapter into the weights: a model folder that transformers alone can load. The adapter is "
        "merged into the base as it was trained on (dequantized) and into the full-precision base, and each "
        "result is compared with the trained model on the run's eval rows. The nearest one is written, in 16 "
        "bits if they suffice.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to create")
    parser.add_argument("--which", choices=[FULL_PRECISION, DEQUANTIZED], help="merge into this base")
    parser.add_argument("--dtype", choices=list(DTYPES), help="data type of the written weights")
    parser.add_argument(
        "--rows", metavar="N", type=int, default=40, help="eval rows to compare on (default 40)"
    )
    return parser


def _check(arguments: argparse.Namespace, config: Config) -> None:
    if arguments.rows < 1:
        raise ValueError(f"--rows must be at least 1, not {arguments.rows}")
    require_new_folder(arguments.output)
    if arguments.which == DEQUANTIZED and not _is_quantized(config):
        raise ValueError("--which dequantized: the base of this run was not quantized")


def _is_quantized(config: Config) -> bool:
    return config.model.quantization != "none"


def _compare(
    arguments: argparse.Namespace, trained: Trained, opened: TrainedModel, comparison: Comparison
) -> list[Candidate]:
    """Compare the merges that may be written: into each base, in fp32 and in 16 bits."""
    bases = [DEQUANTIZED, FULL_PRECISION] if _is_quantized(trained.config) else [FULL_PRECISION]
    bases = bases if arguments.which is None else [arguments.which]
    half = "fp16" if opened.precision.actual == "fp16" else "bf16"
    dtypes = ["fp32", half] if arguments.dtype is None else [arguments.dtype]
    candidates = []
    for base in bases:
        with console.status(f"comparing the {_in_words(base)} merge"):
            candidates += compare_merge(trained, opened, comparison, base, dtypes)
    return candidates


def _show(comparison: Comparison, precision: str, candidates: Sequence[Candidate], best: Candidate) -> None:
    """Print how far each merge is from the trained model, and why `best` is written."""
    lines = [
        Line(
            f"{_in_words(it.base)}, {it.dtype}", it.difference, it.agreement_as_run, it.num_bytes, it is best
        )
        for it in candidates
    ]
    show_differences(comparison, precision, lines)
    say(_reason(candidates, best, comparison.loss))
    say(gain_kept(comparison.base, comparison.loss, best.difference))


def _reason(candidates: Sequence[Candidate], best: Candidate, loss: float) -> str:
    name = f"{_in_words(best.base)}, {best.dtype}"
    bounds = (
        f"at least {MIN_AGREEMENT:.0%} of the most likely tokens and the loss within {MAX_LOSS_CHANGE:.1%}"
    )
    if not is_faithful(best, loss):
        return f"{name}: the nearest merge that was compared, but it does NOT keep {bounds}."
    smaller = [it for it in candidates if it.num_bytes < best.num_bytes and it.base == best.base]
    reason = f"{name}: it keeps {bounds}"
    if smaller:
        reason += f"; {smaller[0].dtype} does not: its rounding loses the adapter's smaller changes"
    return reason + "."


def _in_words(base: str) -> str:
    return base.replace("_", " ")
