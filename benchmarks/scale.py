"""Memory by card and bytes on the wire, for models and numbers of cards that are not at hand.

    python benchmarks/scale.py --measure     count what a token keeps, and run 1, 2 and 4 processes on gloo
    python benchmarks/scale.py --table       write the tables of docs/scale.md from the arithmetic

The arithmetic is that of `python -m finetune plan --cards N --nodes M` (`finetune/training/scale.py`). What
it takes from a measurement is the number of bytes that a token keeps for the backward pass, which `--measure`
writes into benchmarks/results/scale.json for each model. The tables need no weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import ROOT, provenance, write_result
from scale_process import CASES, NUM_MICRO_BATCHES, NUM_TOKENS, case_config
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.model.load import load_architecture
from finetune.runtime.accelerator import create_accelerator
from finetune.runtime.memory import GIB
from finetune.training.scale import (
    Unloaded,
    card_memory,
    count_kept_per_token,
    group_bytes,
    predict_unloaded,
    traffic,
)

RESULT = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
BASES = ("nf4", "int8", "none")
MODELS = ("0.5B", "8B", "32B", "70B")
CARDS = (1, 8, 64)
TOKENS = 1024
"""Of a micro-batch: 2 examples of 512 tokens, as configs/alpaca.yaml has them"""
PROCESSES = (1, 2, 4)


def architecture(model: str) -> Any:
    """The configuration of a model of this size: Qwen2-0.5B, -1.5B and Qwen2.5-32B, Llama-3-8B and -70B."""
    sizes = {  # hidden, intermediate, layers, heads, heads of keys, vocabulary
        "0.5B": (896, 4864, 24, 14, 2, 151936),
        "1.5B": (1536, 8960, 28, 12, 2, 151936),
        "8B": (4096, 14336, 32, 32, 8, 128256),
        "32B": (5120, 27648, 64, 40, 8, 152064),
        "70B": (8192, 28672, 80, 64, 8, 128256),
    }
    hidden, intermediate, layers, heads, key_heads, vocabulary = sizes[model]
    kind = LlamaConfig if model in ("8B", "70B") else Qwen2Config
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=model in ("0.5B", "1.5B"),
    )


def alpaca(base: str) -> Config:
    """LoRA r=8 on seven projections, an 8-bit optimizer and bf16, as configs/alpaca.yaml has them."""
    return parse_config(["--config", str(ROOT / "configs" / "alpaca.yaml"), "--model.quantization", base])


@cache
def planned(model: str, base: str) -> Unloaded:
    """The memory and the parts of a model, with the kept bytes that were counted before."""
    config = alpaca(base)
    accelerator = create_accelerator(config, config.train.mixed_precision)
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["kept_per_token"][model]
    return predict_unloaded(config, accelerator, architecture(model), kept)


def memory_table() -> str:
    """GiB of each card: while loading, and the peak of an update and what stays between them, by cards."""
    loading = [f"loading, {n}" for n in CARDS]
    peaks = [f"update, {n}" for n in CARDS]
    between = [f"between, {n}" for n in CARDS]
    rows = []
    for model in MODELS:
        for base in BASES:
            cards = [card_memory(planned(model, base), n, TOKENS) for n in CARDS]
            sizes = [card.loading for card in cards]
            sizes += [card.update for card in cards] + [card.between_updates for card in cards]
            rows.append([model, name_of(base), *(f"{size / GIB:.1f}" for size in sizes)])
    return markdown(["model", "base", *loading, *peaks, *between], rows)


def parts_table() -> str:
    """GiB of each of 8 cards that share the base, by part."""
    names = ["share", "adapter", "optimizer", "root, gathered", "layer, gathered", "kept", "layer", "head"]
    rows = []
    for model in MODELS:
        for base in BASES:
            card = card_memory(planned(model, base), 8, TOKENS)
            sizes = [card.base, card.adapter, card.optimizer, card.root, card.layers]
            sizes += [card.kept, card.at_layer, card.at_head]
            rows.append([model, name_of(base), *(f"{size / GIB:.2f}" for size in sizes)])
    return markdown(["model", "base", *names], rows)


def traffic_table() -> str:
    """GB that each card sends: of the base for a micro-batch, of the gradient for an update."""
    columns = [f"base, over {n}" for n in CARDS[1:]] + [f"gradient, {n}" for n in CARDS[1:]]
    rows = []
    for model in MODELS:
        for base in BASES:
            ways = [traffic(planned(model, base), n, n) for n in CARDS[1:]]
            sizes = [way.gathered for way in ways] + [way.reduced for way in ways]
            rows.append([model, name_of(base), *(f"{size / 1e9:.2f}" for size in sizes)])
    return markdown(["model", "base", *columns], rows)


def links_table() -> str:
    """Seconds for one micro-batch's base over 8 cards, by link, beside the products of its tokens."""
    rows = []
    for model in MODELS:
        for base in BASES:
            run = planned(model, base)
            sent = traffic(run, 8, 8).gathered
            seconds = [sent / bandwidth for bandwidth in LINKS.values()]
            products = 4 * TOKENS * layer_weights(model) / FLOP_PER_SECOND
            numbers = [*seconds, products]
            rows.append([model, name_of(base), *(f"{number:.3f}" for number in numbers)])
    return markdown(["model", "base", *LINKS, "products"], rows)


# Bytes a second in one direction, by the standards and data sheets that docs/scale.md names.
LINKS = {"PCIe 4.0 x16": 31.5e9, "NVLink 3": 300e9, "NVLink 4": 450e9}
FLOP_PER_SECOND = 0.5 * 312e12
"""Half of an A100's dense bf16 peak: an assumption"""


def layer_weights(model: str) -> int:
    """Numbers in the decoder layers."""
    return sum(group_bytes(layer) for layer in planned(model, "none").base.layers) // 2


def measured_table() -> str:
    """What 1, 2 and 4 processes held, sent and took, and its ratio to the arithmetic."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    names = [
        "frozen MiB",
        "sent MB for an update",
        "to the arithmetic",
        "peak MiB",
        "predicted",
        "loading MiB",
    ]
    rows = []
    for case in result["processes"]:
        ratio = "" if case["num_processes"] == 1 else f"{case['sent'] / case['predicted_sent']:.4f}"
        numbers = [f"{case['held'] / 2**20:.1f}", f"{case['sent'] / 1e6:.1f}", ratio]
        numbers += [f"{case[key] / 2**20:.0f}" for key in ("update_peak", "predicted_peak", "loading_peak")]
        labels = [case["sharding"], name_of(case["base"]), str(case["num_processes"])]
        rows.append([*labels, *numbers, f"{case['seconds']:.2f}"])
    return markdown(["sharding", "base", "processes", *names, "seconds"], rows)


def name_of(base: str) -> str:
    return "bf16" if base == "none" else base


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


TABLES = {
    "memory": memory_table,
    "parts": parts_table,
    "traffic": traffic_table,
    "links": links_table,
    "measured": measured_table,
}


def with_tables(page: str) -> str:
    """The page with each table between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n\n", "\n<!-- end -->"
        before, _, rest = page.partition(start)
        assert end in rest, name
        page = before + start + table() + end + rest.partition(end)[2]
    return page


def measure() -> None:
    """Count what a token keeps in each model, and run processes with a model of 10 million parameters."""
    config = alpaca("none")
    accelerator = create_accelerator(config, config.train.mixed_precision)
    kept = {
        model: count_kept_per_token(config, accelerator, architecture(model)) for model in ("1.5B", *MODELS)
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        small = Qwen2Config(**sizes, **heads, tie_word_embeddings=True)
        Qwen2ForCausalLM(small).to(torch.bfloat16).save_pretrained(folder)
        processes = [case for number in PROCESSES for case in run_processes(folder, number)]
    result = {"provenance": provenance(), "tokens": NUM_TOKENS, "micro_batches": NUM_MICRO_BATCHES}
    write_result(RESULT, {**result, "kept_per_token": kept, "processes": processes})


def run_processes(folder: str, num_processes: int) -> list[dict[str, Any]]:
    """What so many processes measured with the model of a folder, beside what is predicted of them.

    Of several processes, the most of each number.
    """
    script = str(ROOT / "benchmarks" / "scale_process.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [*torchrun, "--nproc_per_node", str(num_processes), script, "--model", folder]
        result = subprocess.run(
            [*command, "--out", str(out)],
            # What is freed is given back at once, so that resident memory is what is allocated.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(result.stderr[-4000:])
        cases = json.loads(out.read_text(encoding="utf-8"))
    config = case_config(folder, "none", "none")
    accelerator = create_accelerator(config, "bf16")
    kept = count_kept_per_token(config, accelerator, load_architecture(config.model))
    return [
        beside_prediction(folder, base, sharding, num_processes, ranks, kept)
        for (base, sharding), ranks in zip(CASES, cases, strict=True)
    ]


def beside_prediction(
    folder: str, base: str, sharding: str, num_processes: int, ranks: list[dict[str, Any]], kept: float
) -> dict[str, Any]:
    """The most that any process measured, and what the arithmetic says."""
    config = case_config(folder, base, sharding)
    accelerator = create_accelerator(config, "bf16")
    run = predict_unloaded(config, accelerator, load_architecture(config.model), kept)
    num_shards = num_processes if sharding == "base" else 1
    card = card_memory(run, num_shards, NUM_TOKENS, "cpu")
    sent = traffic(run, num_shards, num_processes)
    most = {key: max(own[key] for own in ranks) for key in ranks[0] if key not in ("base", "sharding")}
    return {
        "base": base,
        "sharding": sharding,
        "num_processes": num_processes,
        **most,
        "held": most["frozen_bytes"],
        "predicted_held": card.base - run.base.replicated,
        "sent": most["gathered"] + most["reduced"],
        "predicted_gathered": NUM_MICRO_BATCHES * sent.gathered,
        "predicted_reduced": sent.reduced,
        "predicted_sent": sent.of_update(NUM_MICRO_BATCHES),
        "predicted_peak": card.update - card.between_updates,
        "predicted_loading": card.loading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    if arguments.table:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
