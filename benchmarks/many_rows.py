"""Memory and time from the start of train.py to the end of its first update, by the number of rows.

    python benchmarks/many_rows.py --rows 1000 10000000 --folder FOLDER --out results.json

The rows are short and repeat after PERIOD, as preparing ten million different ones takes an hour. The file is
real, and so is reading it; what else preparation leaves in its cache is made for one period by the program's
own jobs, and copied for the others with their row numbers. So the cache holds the files that it would hold if
each row had been prepared. Then train.py runs from it, in a process of its own, with a tiny random model and
the starter's tokenizer. The first entry, of few rows, is what a run takes without them. FOLDER needs 1 KiB a
row.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyarrow as pa
import torch
from common import provenance, run_process, settings, write_result
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.config_parsing import parse_config
from finetune.data.preparing.chunks import CHUNK_ROWS, counts_of, unpacked, with_counts
from finetune.data.preparing.encoding import EncodeRows
from finetune.data.preparing.row_tables import Part, ReadRows
from finetune.data.rows import SignPrompts
from finetune.data.splits import fingerprint_of, load_data
from finetune.model.load import load_tokenizer
from finetune.model.starter import starter_model_dir

PERIOD = 10 * CHUNK_ROWS
EVAL_ROWS = 200
LENGTHS = {"data.max_length": 128, "data.eval_fraction": 0, "eval.at_start": "false", "train.max_steps": 1}


def write_rows(path: Path, count: int) -> None:
    """Short additions; the same after PERIOD."""
    texts = []
    for number in range(min(count, PERIOD)):
        row = {
            "instruction": f"Add {number} and {number * 7 % 1000}.",
            "input": "",
            "output": f"{number * 3}",
        }
        texts.append(json.dumps(row) + "\n")
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, PERIOD):
            file.write("".join(texts[: count - start]))


def write_model(folder: Path) -> None:
    """A random model of two narrow layers, with the starter's tokenizer."""
    if (folder / "config.json").exists():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_model_dir())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


class Place(NamedTuple):
    """Where a chunk of rows lies."""

    first_number: int
    num_rows: int
    source: int


def once_a_period(job: Callable[[Any, Any], pa.Table], place_of: Callable[[Any], Place]) -> Any:
    """The job, done for the chunks of the first period; of the others, its result with their row numbers."""
    made: dict[Place, tuple[int, pa.Table]] = {}

    def do(self: Any, payload: Any) -> pa.Table:
        number, num_rows, source = place_of(payload)
        key = Place((number - 1) % PERIOD, num_rows, source)
        if key not in made:
            made[key] = number, job(self, payload)
        first, table = made[key]
        if number == first or "row_number" not in table.column_names:
            return table
        moved = pa.array(table["row_number"].to_numpy() + (number - first))
        column = table.column_names.index("row_number")
        return with_counts(table.set_column(column, "row_number", moved), counts_of(table))

    return do


def place_of_table(payload: bytes) -> Place:
    table = unpacked(payload)
    return Place(table["row_number"][0].as_py(), len(table), table["source"][0].as_py())


def place_of_part(part: Part) -> Place:
    return Place(part.first_number, part.raw.num_rows, part.source)


def prepare(argv: Sequence[str]) -> dict[str, Any]:
    """Fill the cache for these arguments of train.py."""
    start = time.perf_counter()
    config = parse_config(argv)
    with (
        patch("finetune.data.preparing.chunks.available_cpus", lambda: 1),
        patch.object(ReadRows, "__call__", once_a_period(ReadRows.__call__, place_of_part)),
        patch.object(EncodeRows, "__call__", once_a_period(EncodeRows.__call__, place_of_table)),
        patch.object(SignPrompts, "__call__", once_a_period(SignPrompts.__call__, place_of_table)),
    ):
        data = load_data(config, load_tokenizer(config))
    return {
        "seconds": time.perf_counter() - start,
        "tokens": int(data.train.lengths.sum()),
        **fingerprint_of(data.train, data.eval),
    }


def measure(count: int, folder: Path) -> dict[str, Any]:
    """A run of one update on so many rows."""
    rows, model = folder / f"rows-{count}.jsonl", folder / "model"
    write_model(model)
    write_rows(rows, count)
    write_rows(folder / "eval.jsonl", EVAL_ROWS)
    changes = {**LENGTHS, "data.eval_path": folder / "eval.jsonl", "model.quantization": "none"}
    run_dir = folder / f"run-{count}-{os.getpid()}"
    argv = settings(rows, run_dir, str(model), changes)
    prepared = prepare(argv)
    print(f"{count:,} rows prepared in {prepared['seconds']:.0f} s", file=sys.stderr, flush=True)
    start, before = time.perf_counter(), os.times()
    peak_gib = run_process(["train.py", *argv])
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(
        f"{count:,} rows: {seconds:.1f} s, {cpu:.1f} s CPU, {peak_gib:.2f} GiB", file=sys.stderr, flush=True
    )
    return {
        "rows": count,
        "prepared": prepared,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_gib": peak_gib,
        "load_average": os.getloadavg()[0],
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="for rows, caches and runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "from the start of train.py to the end of a run of one update, its rows being prepared",
        "rows_are": f"generated; different ones: {PERIOD:,}; their prepared files are copies of those of one "
        "period with other row numbers, not prepared one by one",
        **provenance(),
        "runs": [measure(count, args.folder) for count in args.rows],
    }
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    if "HF_DATASETS_CACHE" not in os.environ:
        sys.exit("set HF_DATASETS_CACHE to a folder of its own: the cache of ten million rows is large")
    sys.exit(main(sys.argv[1:]))
