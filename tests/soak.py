"""Kill a small run again and again, and see that it always goes on and ends as if it had never been killed.

    python tests/soak.py --kills 100
    python tests/soak.py --processes --kills 30

The second is of several processes: tests/process_soak.py. In the first, the run is train.py's own, on a tiny
random model: int8 base, LoRA dropout, paged 8-bit AdamW, bf16. Each process is forked from this one, which
has the libraries loaded, and is killed with SIGKILL: every second one while it writes a checkpoint, the
others at any moment. A run that ends is compared with one that was left alone, file by file and point by
point, and the next one starts anew.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
from conftest import ROOT, tiny_model, tiny_tokenizer  # noqa: E402
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.util.tensor_util import make_ndarray  # noqa: E402

import train  # noqa: E402

NOT_THE_TRAINING = ("useful_tokens_per_second", "mfu", "peak_memory_gib")
SETTINGS = {
    "model.quantization": "int8",
    "data.max_length": 128,
    "train.micro_batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.num_epochs": 15,
    "optim.learning_rate": 1e-2,
    "log.every_steps": 3,
    "checkpoint.every_steps": 1,
    "eval.every": 5,
}


def start(job: Callable[[], int], log: Path) -> int:
    """Fork a process that does the job; its output is appended to the log. Returns its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = job()
    finally:
        os._exit(code)


def end_of(process: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def has_ended(process: int) -> int | None:
    number, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def make_inputs(folder: Path) -> int:
    """The model, and twenty rows: sixteen to train on, four updates an epoch."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model(len(tokenizer)).save_pretrained(folder / "model")
    rows = [
        {
            "instruction": f"What is {n} plus {n}?",
            "input": "",
            "output": f"It is {2 * n}." + " Really." * (n % 5),
        }
        for n in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


def run_in(folder: Path, output_dir: Path) -> Callable[[], int]:
    (folder / "none.yaml").write_text("{}\n", encoding="utf-8")
    settings = {"model.name_or_path": folder / "model", "data.path": folder / "rows.jsonl", **SETTINGS}
    argv = ["--config", str(folder / "none.yaml"), "--output_dir", str(output_dir)]
    argv += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return lambda: train.main(argv)


def kill_at_a_moment(process: int, output_dir: Path, seconds: float, rng: random.Random) -> int | None:
    """SIGKILL after a random time, or while a checkpoint is written; its exit code where it ended before."""
    in_a_write = rng.random() < 0.5
    deadline = time.monotonic() + rng.uniform(0, 0.5 if in_a_write else 1) * seconds
    while time.monotonic() < deadline:
        if (code := has_ended(process)) is not None:
            return code
        time.sleep(0.001)
    if in_a_write:
        while not any((output_dir / "checkpoints").glob(".*.partial")):
            if (code := has_ended(process)) is not None:
                return code
        time.sleep(rng.uniform(0, 0.01))
    os.kill(process, signal.SIGKILL)
    code = end_of(process)
    return None if code == -signal.SIGKILL else code


def result_of(output_dir: Path) -> dict[str, Any]:
    """All that a run leaves, in a form that can be compared: files by their bytes, metrics without the
    clock's, TensorBoard's points in order."""
    files = [*(output_dir / "adapter").iterdir(), *(output_dir / "checkpoints").rglob("*")]
    lines = [
        json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    # TensorBoard's own reader
    events = EventAccumulator(str(output_dir / "tensorboard"), {"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.partition("/")[2] not in NOT_THE_TRAINING]
    return {
        **{str(path.relative_to(output_dir)): path.read_bytes() for path in files if path.is_file()},
        "metrics": [{k: x for k, x in line.items() if k not in NOT_THE_TRAINING} for line in lines],
        "answers": (output_dir / "answers.jsonl").read_text(encoding="utf-8"),
        **{
            tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)]
            for tag in tags
        },
    }


def soak(kills: int, seed: int, folder: Path) -> None:
    """Raises AssertionError for a state that no run goes on from, or an end that is not the undisturbed."""
    rng = random.Random(seed)
    log = folder / "log.txt"
    assert end_of(start(lambda: make_inputs(folder), log)) == 0, log.read_text()
    reference = folder / "undisturbed"
    for again in (False, True):  # the second knows how long a run takes with everything in the caches
        if again:
            shutil.rmtree(reference)
        started = time.monotonic()
        assert end_of(start(run_in(folder, reference), log)) == 0, log.read_text()
        seconds = time.monotonic() - started
    expected = result_of(reference)

    output_dir = folder / "run"
    done = in_writes = ends = 0
    while True:
        for leftover in (output_dir / "checkpoints").glob(".*.partial"):
            shutil.rmtree(leftover)  # lest it be taken for one that is being written
        process = start(run_in(folder, output_dir), log)
        # Once the kills are done, the run that is under way goes on to its end.
        code = kill_at_a_moment(process, output_dir, seconds, rng) if done < kills else end_of(process)
        if code is None:
            done += 1
            in_writes += any((output_dir / "checkpoints").glob(".*.partial"))
            print(
                f"\r{done} kills, {in_writes} in a checkpoint's write, {ends} runs compared",
                end="",
                flush=True,
            )
            continue
        assert code == 0, f"after {done} kills the run cannot go on:\n{log.read_text()[-3000:]}"
        found = result_of(output_dir)
        differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        assert not differing, f"after {done} kills these differ from the undisturbed run: {differing}"
        ends += 1
        if done >= kills:
            break
        shutil.rmtree(output_dir)
    print(
        f"\r{done} kills, {in_writes} in a checkpoint's write; {ends} runs ended, all as the undisturbed one"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", action="store_true", help="kill runs of several processes")
    parser.add_argument("--output", type=Path, help="with --processes: a JSON file for what was found")
    arguments = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each kill that it finds
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
        if not arguments.processes:
            soak(arguments.kills, arguments.seed, Path(folder))
            return
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import process_soak  # it imports this module
        from common import provenance, write_result

        for found in process_soak.soak(arguments.kills, arguments.seed, Path(folder)):
            if arguments.output is not None:
                write_result(arguments.output, {"seed": arguments.seed, **found})
        if arguments.output is not None:
            write_result(arguments.output, {"seed": arguments.seed, **found, **provenance()})
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
