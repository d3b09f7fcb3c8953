"""Memory and time from the start of train.py to the end of a run of one update, by the number of rows.

    python benchmarks/many_rows.py --rows 1000 10000000 --folder FOLDER --out results.json

The rows are short and repeat after PERIOD, as preparing ten million different ones takes an hour. The file is
real, and so is reading it; what else preparation leaves in its cache is made for one period by the program's
own jobs, and copied for the others with their row numbers. So the cache holds the files that it would hold if
each row had been prepared. Then train.py runs from it, with a tiny random model and the starter's tokenizer,
as one process and as two. The first entry, of few rows, is what a run takes without them. FOLDER and the
cache need 1 KiB a row in all.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import pyarrow as pa
import torch
from common import ROOT, physical_cores, provenance, settings, write_result
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.config_parsing import parse_config
from finetune.data.preparing.chunk_files import counts_of, unpacked, with_counts
from finetune.data.preparing.chunks import CHUNK_ROWS
from finetune.data.preparing.encoding import EncodeRows
from finetune.data.preparing.row_tables import Part, ReadRows
from finetune.data.rows import SignPrompts
from finetune.data.splits import fingerprint_of, load_data
from finetune.model.load import load_tokenizer
from finetune.model.starter import starter_model_dir

PERIOD = 10 * CHUNK_ROWS
EVAL_ROWS = 200
SECONDS_BETWEEN_LOOKS = 0.25
FIGURES = {"VmHWM": "peak_rss_gib", "RssAnon": "anonymous_gib", "RssFile": "mapped_gib"}
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


def measure(count: int, num_processes: int, folder: Path) -> dict[str, Any]:
    """A run of one update on so many rows."""
    rows, model = folder / f"rows-{count}.jsonl", folder / "model"
    write_model(model)
    if not rows.exists():
        write_rows(rows, count)
    write_rows(folder / "eval.jsonl", EVAL_ROWS)
    changes = {**LENGTHS, "data.eval_path": folder / "eval.jsonl", "model.quantization": "none"}
    run_dir = folder / f"run-{count}-{num_processes}-{os.getpid()}"
    argv = settings(rows, run_dir, str(model), changes)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        prepared = pool.submit(prepare, argv).result()
    print(f"{count:,} rows prepared in {prepared['seconds']:.0f} s", file=sys.stderr, flush=True)
    result = {"rows": count, "processes": num_processes, "prepared": prepared, **run(argv, num_processes)}
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def run(argv: Sequence[str], num_processes: int) -> dict[str, Any]:
    """Run train.py as so many processes, and look at the memory of each until they end.

    Raises:
        RuntimeError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(ROOT / "train.py"), *argv]
    threads = str(max(1, physical_cores() // num_processes))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}
    peaks: dict[int, dict[str, float]] = {}
    start, before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for own in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            look_at(own, peaks)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode != 0:
        raise RuntimeError(f"train.py ended with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    largest = sorted(peaks.values(), key=lambda peak: -peak["peak_rss_gib"])[:num_processes]
    return {"seconds": seconds, "cpu_seconds": cpu, "memory": largest, "load_average": os.getloadavg()[0]}


def look_at(process: psutil.Process, peaks: dict[int, dict[str, float]]) -> None:
    """Note the memory of a process: its peak of all pages, the most anonymous and the most mapped ones so
    far, each as it was seen."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return
    fields = dict(line.split(":", 1) for line in lines)
    now = {name: int(fields[field].split()[0]) / 2**20 for field, name in FIGURES.items() if field in fields}
    if now:  # a process that has ended and is not waited for has none
        known = peaks.setdefault(process.pid, dict.fromkeys(FIGURES.values(), 0.0))
        known.update({name: max(known[name], gib) for name, gib in now.items()})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000, 10_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="for rows, caches and runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "from the start of train.py to the end of a run of one update, its rows being prepared",
        "rows_are": f"generated; different ones: {PERIOD:,}; their prepared files are copies of those of one "
        "period with other row numbers, not prepared one by one",
        "memory_is": "of each process: the peak of all its pages (VmHWM), and the most anonymous and the most"
        f" mapped ones that were seen in looks every {SECONDS_BETWEEN_LOOKS} s",
        **provenance(),
        "runs": [measure(count, size, args.folder) for count in args.rows for size in args.processes],
    }
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    if "HF_DATASETS_CACHE" not in os.environ:
        sys.exit("set HF_DATASETS_CACHE to a folder of its own: the cache of ten million rows is large")
    sys.exit(main(sys.argv[1:]))
