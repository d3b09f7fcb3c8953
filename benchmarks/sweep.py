"""What a token costs train.py, against the rows, their length, the token budget and the examples per update.

    python benchmarks/sweep.py --data ROWS.json --out benchmarks/results/sweep.json --plot docs/sweep.svg

Short real runs of the seed job's configuration (configs/alpaca.yaml, int8 base), one after the other, each in
a process of its own. The seconds are those of the updates, without start and checkpoint; useful tokens are
those of the examples, without padding. The plot is drawn by hand: nothing needs to be installed for it.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    matmul_gflop_per_second,
    provenance,
    run_train,
    settings,
    usable_rows,
    write_result,
    write_rows,
)
from numpy.typing import NDArray

UPDATE, USUAL_LENGTH = 8, 120  # examples and tokens, where nothing else is said
PANELS = {
    "rows": "rows to train on",
    "length": "length of the rows (tokens)",
    "budget": "token budget of a micro-batch (tokens)",
    "examples": "examples per update",
}


class Point(NamedTuple):
    """One run, of `chosen` rows, and where it stands in the panels: {panel: x}."""

    chosen: list[int]
    changes: dict[str, Any]
    places: dict[str, int]


def points(lengths: NDArray[np.int64], num_tokens: int) -> list[Point]:
    """The runs, each of about `num_tokens` useful tokens, in whole updates."""
    usual = _nearest(lengths, USUAL_LENGTH, num_tokens)
    steps = len(usual) // UPDATE
    found = [Point(usual, {}, {"rows": len(usual), "length": USUAL_LENGTH, "examples": UPDATE})]
    for times in (8, 64):  # as many updates, of more rows to take them from
        chosen = _nearest(lengths, USUAL_LENGTH, times * num_tokens)
        found.append(Point(chosen, {"train.max_steps": steps}, {"rows": len(chosen)}))
    for examples in (2, 32):
        changes = {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": examples // 2}
        found.append(Point(usual, changes, {"examples": examples}))
    for length in (60, 240, 480):
        places = {"length": length, **({"budget": 1024} if length == 240 else {})}
        found.append(Point(_nearest(lengths, length, num_tokens), {}, places))
    for budget in (512, 2048):  # two and eight examples
        changes = {"train.max_tokens_per_micro_batch": budget}
        found.append(Point(_nearest(lengths, 240, num_tokens), changes, {"budget": budget}))
    return found


def _nearest(lengths: NDArray[np.int64], length: int, num_tokens: int) -> list[int]:
    """The rows nearest to `length` tokens: of whole updates, of about `num_tokens` tokens together."""
    count = UPDATE * max(1, round(num_tokens / length / UPDATE))
    nearest = np.argsort(np.abs(lengths - length), kind="stable")[:count]
    return sorted(nearest.tolist())


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows, lengths = usable_rows(args.data, args.model)
    measured = []
    for number, (chosen, changes, places) in enumerate(points(lengths, args.tokens), 1):
        rows_file = folder / f"rows-{number}.json"
        write_rows(rows_file, (rows[i] for i in chosen))
        rate = matmul_gflop_per_second()
        run = run_train(settings(rows_file, folder / str(number), args.model, changes))
        measured.append(
            {
                "places": places,
                "changes": changes,
                "rows": len(chosen),
                "mean_length": float(lengths[chosen].mean()),
                "longest": int(lengths[chosen].max()),
                "updates": len(run.updates),
                "useful_tokens": run.num_tokens,
                "target_tokens": run.num_target_tokens,
                "seconds": run.seconds,
                "seconds_per_useful_token": run.seconds / run.num_tokens,
                "peak_rss_gib": run.peak_rss_gib,
                "int8": run.int8,
                "matmul_gflop_per_second_before": rate,
            }
        )
        print(
            f"{places}: {run.seconds / run.num_tokens * 1e3:.2f} ms a token ({run.num_tokens} in "
            f"{run.seconds:.1f} s), {run.peak_rss_gib:.2f} GiB",
            flush=True,
        )
    return measured


# The plot: a panel for each thing that is swept, and in it a strip for each thing that is measured.

STRIPS = (
    ("seconds_per_useful_token", 1e3, "ms per useful token", "#1d5fa8", "{:.2f}"),
    ("peak_rss_gib", 1.0, "peak RSS (GiB)", "#b3541e", "{:.2f}"),
)
PANEL_WIDTH, STRIP_HEIGHT, GAP, LEFT, TOP = 215, 110, 30, 64, 44


def draw(measured: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG on white of its own, so that it can be read on a dark page too."""
    width = LEFT + len(PANELS) * (PANEL_WIDTH + GAP)
    height = TOP + 2 * (STRIP_HEIGHT + GAP) + 18
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 20, title, "start", 'font-size="13"'),
    ]
    for row, (key, scale, label, colour, pattern) in enumerate(STRIPS):
        top = TOP + row * (STRIP_HEIGHT + GAP)
        step = _nice_step(max(run[key] for run in measured) * scale)
        highest = step * math.ceil(1.15 * max(run[key] for run in measured) * scale / step)
        middle = top + STRIP_HEIGHT / 2
        parts.append(
            _text(16, middle, label, "middle", f'transform="rotate(-90 16 {middle})" fill="{colour}"')
        )
        for column, (name, x_label) in enumerate(PANELS.items()):
            left = LEFT + column * (PANEL_WIDTH + GAP)
            runs = sorted(
                (run["places"][name], run[key] * scale) for run in measured if name in run["places"]
            )
            parts += _draw_strip(runs, left, top, step, highest, colour, pattern, has_ticks=column == 0)
            if row == len(STRIPS) - 1:
                parts.append(_text(left + PANEL_WIDTH / 2, top + STRIP_HEIGHT + 34, x_label, "middle"))
    return "\n".join([*parts, "</svg>\n"])


def _draw_strip(
    runs: Sequence[tuple[int, float]],
    left: float,
    top: float,
    step: float,
    highest: float,
    colour: str,
    pattern: str,
    has_ticks: bool,
) -> list[str]:
    """A line through runs (x, y) over a grid that begins at 0; x is logarithmic."""
    bottom = top + STRIP_HEIGHT
    first, last = math.log(runs[0][0]), math.log(runs[-1][0])
    parts = []
    for tick in range(round(highest / step) + 1):
        y = bottom - STRIP_HEIGHT * tick * step / highest
        line = "#888" if tick == 0 else "#e4e4e4"
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="{line}"/>')
        if has_ticks:
            parts.append(_text(left - 6, y + 4, f"{tick * step:g}", "end"))
    marks = []
    for x, y in runs:
        share = (math.log(x) - first) / (last - first) if last > first else 0.5
        marks.append((left + 22 + (PANEL_WIDTH - 44) * share, bottom - STRIP_HEIGHT * y / highest))
        parts.append(_text(marks[-1][0], bottom + 15, f"{x:,}", "middle"))
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in marks)
    parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for (x, y), (_, value) in zip(marks, runs, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(_text(x, y - 8, pattern.format(value), "middle", f'fill="{colour}"'))
    return parts


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {attributes}>{escape(text)}</text>'


def _nice_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, such that three to six of them reach `highest`."""
    power = 10.0 ** math.floor(math.log10(highest / 3))
    return next(factor * power for factor in (1, 2, 5, 10) if highest / (factor * power) <= 5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="rows in Alpaca's columns")
    parser.add_argument("--tokens", type=int, default=4096, help="useful tokens of a run, about")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    record = provenance()
    command = f"python benchmarks/sweep.py --data {args.data.name} --tokens {args.tokens}"
    result = {
        "what": "seconds per useful token and peak RSS of short runs of train.py, int8 base",
        "command": f"{command} --model {Path(args.model).name}",
        **record,
        "cuda": "measured" if record["environment"]["device"][:3] != "CPU" else "not measured",
        "runs": measured,
    }
    write_result(args.out, result)
    hardware = f"{record['environment']['processor']}; {record['environment']['device']}"
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    args.plot.write_text(
        draw(measured, f"train.py, {Path(args.model).name}, int8 base, on {hardware}"), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
