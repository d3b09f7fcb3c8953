"""What a base keeps in memory on each of the processes that share it, from loading to after the first update.

    python benchmarks/sharded_base.py --out benchmarks/results/sharded_base.json

The base is a random Qwen2 with as many layers as make more than 500 MB of it when quantized, written into a
temporary folder. Each process measures
its resident memory (RSS), less what it had before loading, and counts the bytes of its frozen parameters.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from common import ROOT, provenance, write_result
from datasets import Dataset
from torch.distributed import all_gather_object, get_rank, get_world_size, is_initialized
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from finetune.data.collate import collate
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import load_model
from finetune.model.loss import TokenLoss
from finetune.model.sharding import choose_sharding, local_share, shard_base
from finetune.runtime.accelerator import create_accelerator
from finetune.runtime.memory import held_bytes, peak_memory_gib, release_freed_memory, reset_peak_memory
from finetune.training.optim import create_optimizer

MIB = 2**20
SIZES = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LAYERS = {"none": 24, "int8": 48, "nf4": 96}
TINY = {"num_hidden_layers": 2, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
TOKENS = 8  # memory is measured, not time


def measure(model: str, quantization: str, sharding: str, out: Path) -> None:
    """Load, shard and make one update, in this process; the main process writes what all measured.

    First it does all of that with a tiny base: what libraries take at their first use is no part of a base.
    """
    run(f"{model}-tiny", quantization, sharding)
    found = run(model, quantization, sharding)
    results: list[Any] = [found]
    if is_initialized():
        results = [None] * get_world_size()
        all_gather_object(results, found)
    if not is_initialized() or get_rank() == 0:
        out.write_text(json.dumps(results), encoding="utf-8")


def run(model: str, quantization: str, sharding: str) -> dict[str, Any]:
    """What this process measured."""
    AcceleratorState._reset_state()
    config = Config(
        model=ModelConfig(name_or_path=model, quantization=quantization),
        lora=LoraConfig(lora_dropout=0.0),
        train=TrainConfig(sharding=sharding),
        fast=FastConfig(int8_matmul="dequantize"),
        optim=OptimConfig(name="adamw"),
    )
    accelerator = create_accelerator(config, "bf16")
    device = accelerator.device
    chosen = choose_sharding(config, accelerator)
    release_freed_memory(0)
    before = held_bytes(device)
    reset_peak_memory(device)
    found: dict[str, Any] = {}

    def note(name: str) -> None:
        release_freed_memory(0)
        found[name] = round((held_bytes(device) - before) / MIB)

    loaded = load_model(config, "bf16", device, plain_weights=chosen.is_on)
    adapter, token_loss = FlatAdapter(loaded), TokenLoss(loaded).train()
    found["peak_while_loading_mib"] = round(peak_memory_gib(device) * 1024 - before / MIB)
    note("loaded_mib")
    row = {"input_ids": list(range(TOKENS)), "labels": list(range(TOKENS))}
    examples = Examples(Dataset.from_list([row]), truncated=[], dropped={})
    choose_fast_paths(config, accelerator, token_loss, examples, is_sharded=chosen.is_on)
    reset_peak_memory(device)
    shard_base(token_loss, chosen)
    found["peak_while_sharding_mib"] = round(peak_memory_gib(device) * 1024 - before / MIB)
    note("sharded_mib")
    reset_peak_memory(device)
    optimizer = create_optimizer("adamw", adapter, config.optim)
    with accelerator.autocast():
        sums = token_loss(collate([row], True))
    (sums.nll / sums.count).backward()
    adapter.reduce_gradients(accelerator)
    optimizer.step()
    found["peak_of_update_mib"] = round(peak_memory_gib(device) * 1024 - before / MIB)
    del sums
    note("after_update_mib")
    frozen = [p for p in loaded.parameters() if not p.requires_grad]
    found["frozen_mib"] = round(sum(local_share(p).numel() * p.element_size() for p in frozen) / MIB, 1)
    found["of_frozen_mib"] = round(sum(p.numel() * p.element_size() for p in frozen) / MIB, 1)
    # Beside the base, these stay: the adapter, its gradient, its copy in bf16 and the state of its optimizer.
    found["adapter_mib"] = round(len(adapter.weights) * (4 + 4 + 2 + 8) / MIB, 1)
    return found


def launch(num_processes: int, arguments: list[str], out: Path) -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    started = [*launcher, str(num_processes)] if num_processes > 1 else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([*started, __file__, "--measure", *arguments, str(out)], env=environment, check=True)
    measured: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True, dtype="bfloat16")
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "nf4"])
    args = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        for quantization in args.quantization:
            sizes = SIZES | {"num_hidden_layers": LAYERS[quantization]}
            write_model(Path(temporary) / "model", sizes)
            write_model(Path(temporary) / "model-tiny", sizes | TINY)
            whole = None
            for count in (1, *args.processes):
                arguments = [str(Path(temporary) / "model"), quantization, "none" if count == 1 else "base"]
                each = launch(count, arguments, Path(temporary) / "measured.json")
                most = max(one["after_update_mib"] - one["adapter_mib"] for one in each)
                whole = most if whole is None else whole
                true = each[0]["of_frozen_mib"]
                case = {"quantization": quantization, "processes": count, "base_mib": round(most)}
                case |= {"of_one_process": round(most / whole, 3), "of_true_size": round(most / true, 3)}
                cases.append({**case, "each": each})
                print(case, each[0], flush=True)
    if args.out:
        what = (
            "resident memory in MiB, less what the process had before loading; `base_mib` without the adapter"
        )
        write_result(
            args.out, {"what": what, "sizes": SIZES, "layers": LAYERS, **provenance(), "cases": cases}
        )


if __name__ == "__main__":
    main()
