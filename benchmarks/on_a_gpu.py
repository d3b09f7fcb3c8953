"""The first hour on a card: is it right, does it fit, how fast is it. One command, offline, in ten minutes.

    python benchmarks/on_a_gpu.py --model DIR --data ROWS.csv --wheels DIR --out on_a_gpu.json

`--model` is a folder with a model and tokenizer; without it, Qwen2-0.5B with random weights is made, which
is as fast. `--wheels` is a folder with wheels of trl, liger_kernel or unsloth and of what they need; what is
not installed and not given is "not measured". Each step runs in a process of its own, with its own limit of
time: a failure costs its own row. `--device cpu --tiny` runs the same steps on a CPU with a tiny model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, provenance, write_result
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

BASES, PRECISIONS = ("int8", "nf4", "none"), ("bf16", "fp16", "no")
FAST_KEYS = ("attention", "head", "lora", "elementwise", "kernels")


class Step(NamedTuple):
    name: str
    function: str
    """In gpu_steps"""
    arguments: dict[str, Any]
    limit: int
    """Seconds"""


def all_steps(is_tiny: bool) -> list[Step]:
    """Correctness, then memory, then speed."""
    pairs = [(base, precision) for base in BASES for precision in PRECISIONS]
    keys = list(FAST_KEYS)
    if is_tiny:  # one of each kind
        pairs, keys = [("int8", "bf16"), ("none", "no")], ["head"]
    steps = [Step("tests/test_cuda.py", "run_tests", {}, 240)]
    steps += [
        Step(f"verify, {base}, {precision}", "compare", {"base": base, "precision": precision}, 60)
        for base, precision in pairs
    ]
    steps += [
        Step("verify, as on Turing", "imitate_turing", {}, 60),
        Step("the seed job on a 6 GB card", "train_on_a_small_card", {}, 120),
        Step("plan", "predict_memory", {}, 60),
        Step("peak of each part", "measure_phases", {}, 60),
        Step("profile", "profile_updates", {}, 90),
    ]
    for base in ("int8",) if is_tiny else BASES:
        changes = {"model.quantization": base}
        steps.append(Step(f"speed, {base}", "measure_speed", {"changes": changes}, 90))
    for key in keys:
        steps.append(
            Step(f"speed, fast.{key} off", "measure_speed", {"changes": {f"fast.{key}": "false"}}, 90)
        )
    options: dict[str, dict[str, Any]] = {
        "": {},
        ", padding-free": {"padding_free": True, "max_length": None},
        ", Liger": {"use_liger_kernel": True},
    }
    for name, option in options.items():
        arguments = {"base": "int8", "dropout": 0.1, **option}
        steps.append(Step(f"speed, TRL{name}", "measure_trl", arguments, 120))
    case = {"model.quantization": "nf4", "lora.lora_dropout": 0}
    steps.append(Step("speed, nf4, no dropout", "measure_speed", {"changes": case}, 90))
    steps.append(Step("speed, Unsloth, nf4, no dropout", "measure_unsloth", {}, 180))
    return steps


def run(step: Step, job: dict[str, Any]) -> dict[str, Any]:
    """The row of a step: its numbers, or why there are none."""
    # A process that divides must not have asked for CUDA, and bitsandbytes does when it is imported.
    context: Any = get_context("spawn" if torch.version.cuda else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(step.function, step.arguments, job, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        outcome = receiver.recv() if receiver.poll(step.limit) else _failed(f"took over {step.limit} s")
    except EOFError:
        process.join()
        outcome = _failed(f"its process ended with {process.exitcode}")
    if process.is_alive() and outcome["status"] == "failed":
        process.kill()
    process.join()
    return {"step": step.name, "seconds": time.perf_counter() - start, **outcome}


def _work(function: str, arguments: dict[str, Any], job: dict[str, Any], sender: Connection) -> None:
    """In the step's process."""
    import gpu_steps

    try:
        numbers = getattr(gpu_steps, function)(gpu_steps.Job(**job), **arguments)
        status = "ok" if numbers.pop("ok") else "failed"
        sender.send({"status": status, "numbers": numbers})
    except gpu_steps.NotMeasuredError as reason:
        sender.send({"status": "not measured", "reason": str(reason)})
    except BaseException as error:
        sender.send(_failed(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _failed(reason: str, trace: str = "") -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "traceback": trace}


def beside_trl(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row: how many times as fast as TRL as shipped, on an int8 base, and with what share of its memory."""
    by_name = {row["step"]: row.get("numbers") for row in rows}
    ours, trl = by_name["speed, int8"], by_name["speed, TRL"]
    row = {"step": "int8, beside TRL as shipped", "seconds": 0.0}
    if not ours or not trl:
        return {**row, "status": "not measured", "reason": "one of the two was not measured"}
    numbers = {
        "times_as_fast": ours["useful_tokens_per_second"] / trl["useful_tokens_per_second"],
        "share_of_its_peak": ours["peak_gib"] / trl["peak_gib"],
    }
    return {**row, "status": "ok", "numbers": numbers}


def show(rows: list[dict[str, Any]], device: str) -> None:
    table = Table("step", "result", "seconds", title=device, title_justify="left")
    for row in rows:
        table.add_row(row["step"], describe(row), f"{row['seconds']:.0f}")
    Console(width=150).print(table)


def describe(row: dict[str, Any]) -> str:
    """A row's result in a line: its plain numbers and texts, or why there are none."""
    if "reason" in row:
        return f"{row['status']}: {row['reason'].splitlines()[0] if row['reason'] else ''}"
    plain = {name: value for name, value in row["numbers"].items() if isinstance(value, int | float | str)}
    texts = [f"{name} {v:,.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in plain.items()]
    return ", ".join([row["status"], *texts])


def install(wheels: Path, folder: Path) -> str:
    """Unpack the wheels into a folder, for this run alone."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return str(folder)


def make_model(folder: Path, rows: Path, is_tiny: bool) -> str:
    """A Qwen2 with random weights, as large as Qwen2-0.5B or tiny, and a tokenizer of these rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(rows)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{%- for turn in messages -%}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    sizes = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    }
    vocabulary = 151936
    if is_tiny:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        vocabulary = len(tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2, **sizes
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with a model and its tokenizer (default: random weights)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "finance_sample.csv")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels to install for this run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for the tests")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), str(ROOT / "benchmarks")]
        if args.wheels is not None:
            paths.append(install(args.wheels, Path(folder) / "packages"))
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        sys.path[:0] = paths
        get_context("forkserver").set_forkserver_preload(["gpu_steps"])
        model = args.model or make_model(Path(folder) / "model", args.data, args.tiny)
        job = {"model": model, "rows": str(args.data), "folder": folder, "is_tiny": args.tiny}
        rows = []
        for step in all_steps(args.tiny):
            rows.append(run(step, job))
            print(f"{step.name}: {describe(rows[-1])}", file=sys.stderr, flush=True)
    rows.append(beside_trl(rows))
    record = provenance()
    show(rows, record["environment"]["device"])
    command = f"python benchmarks/on_a_gpu.py --device {args.device}{' --tiny' if args.tiny else ''}"
    what = "the first hour on a card: correctness, memory and speed"
    write_result(args.out, {"what": what, "command": command, **record, "rows": rows})
    return 0 if all(row["status"] != "failed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
