"""What a token costs train.py, against the rows, their length, the token budget and the examples per update.

    python benchmarks/sweep.py --data ROWS.json --out benchmarks/results/sweep.json --plot docs/sweep.svg

Short real runs of the seed job's configuration (configs/alpaca.yaml, int8 base), one after the other, each in
a process of its own. The seconds are those of the updates, without start and checkpoint; useful tokens are
those of the examples, without padding.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
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


def draw(measured: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A column for each thing that is swept, and in it a panel for each thing that is measured."""
    strips = (
        ("seconds_per_useful_token", 1e3, "ms per useful token", "#1d5fa8"),
        ("peak_rss_gib", 1.0, "peak RSS (GiB)", "#b3541e"),
    )
    figure, axes = plt.subplots(len(strips), len(PANELS), figsize=(12, 5), sharey="row", sharex="col")
    for row, (key, scale, label, colour) in zip(axes, strips, strict=True):
        for panel, name in zip(row, PANELS, strict=True):
            runs = sorted(
                (run["places"][name], run[key] * scale) for run in measured if name in run["places"]
            )
            panel.plot(*zip(*runs, strict=True), "o-", color=colour)
            for x, y in runs:
                panel.annotate(
                    f"{y:.2f}", (x, y), (0, 6), textcoords="offset points", ha="center", color=colour
                )
            panel.set_xscale("log")
            panel.set_xticks([x for x, _ in runs], [f"{x:,}" for x, _ in runs], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(axis="y", alpha=0.3)
            panel.margins(x=0.15)
        row[0].set_ylim(0, 1.2 * max(run[key] * scale for run in measured))
        row[0].set_ylabel(label, color=colour)
    for panel, label in zip(axes[-1], PANELS.values(), strict=True):
        panel.set_xlabel(label)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


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
    draw(measured, f"train.py, {Path(args.model).name}, int8 base, on {hardware}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
