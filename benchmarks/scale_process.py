"""One process of a run with a whole or a shared base: what it holds, sends and takes at most.

    torchrun --nproc_per_node N benchmarks/scale_process.py --model FOLDER --out FILE

Writes the numbers of each process for each case, a list by rank. Sent are the bytes that the kernel counts on
this process's own TCP connections. The peak is that of resident memory, above what the process held before.
"""

import argparse
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import distributed  # noqa: E402

from finetune.config import Config, ModelConfig, TrainConfig  # noqa: E402
from finetune.data.collate import collate  # noqa: E402
from finetune.data.preparing.examples import Examples  # noqa: E402
from finetune.model.fast_paths import choose_fast_paths  # noqa: E402
from finetune.model.flat_adapter import FlatAdapter  # noqa: E402
from finetune.model.load import load_model  # noqa: E402
from finetune.model.loss import TokenLoss  # noqa: E402
from finetune.model.sharding import choose_sharding, local_share, shard_base  # noqa: E402
from finetune.runtime.accelerator import create_accelerator  # noqa: E402
from finetune.runtime.memory import release_freed_memory  # noqa: E402

CASES = [("none", "none"), ("none", "base"), ("int8", "base"), ("nf4", "base")]
NUM_TOKENS, NUM_MICRO_BATCHES, NUM_UPDATES = 64, 2, 2
# Offset of tcpi_bytes_sent in Linux's struct tcp_info; tcpi_bytes_retrans, which it includes, follows.
BYTES_SENT = 200


def measure(model: str, base: str, sharding: str) -> dict[str, Any]:
    AcceleratorState._reset_state()
    config = case_config(model, base, sharding)
    accelerator = create_accelerator(config, "bf16")
    reset_peak()
    before_loading = resident()
    shares = choose_sharding(config, accelerator)
    peft_model = load_model(config, "bf16", accelerator.device, plain_weights=shares.is_on)
    adapter, token_loss = FlatAdapter(peft_model), TokenLoss(peft_model).train()
    rows = examples()
    train_set = Examples(Dataset.from_list(rows), truncated=[], dropped={})
    paths = choose_fast_paths(config, accelerator, token_loss, train_set, "dequantize", shares.is_on)
    shard_base(token_loss, shares)
    loading = resident("VmHWM") - before_loading  # with the trials of the fast paths
    frozen = [parameter for parameter in peft_model.parameters() if not parameter.requires_grad]
    batch = collate(rows, paths.packed)
    gathered, reduced, peaks, seconds = [], [], [], []
    for _ in range(1 + NUM_UPDATES):  # the first one warms up
        release_freed_memory(0)
        distributed.barrier()
        reset_peak()
        before, sent, start = resident(), sent_bytes(), time.perf_counter()
        adapter.zero_gradients()
        for _ in range(NUM_MICRO_BATCHES):
            with accelerator.autocast():
                sums = token_loss(batch)
            accelerator.backward(sums.nll / len(batch.target_ids))
        distributed.barrier()  # what is still in a buffer would be counted later
        of_passes = sent_bytes()
        adapter.reduce_gradients(accelerator)
        seconds.append(time.perf_counter() - start)
        distributed.barrier()
        gathered.append(of_passes - sent)
        reduced.append(sent_bytes() - of_passes)
        peaks.append(resident("VmHWM") - before)
    return {
        "base": base,
        "sharding": sharding,
        "frozen_bytes": sum(local_share(own).numel() * own.element_size() for own in frozen),
        "gathered": min(gathered[1:]),
        "reduced": min(reduced[1:]),
        "seconds": min(seconds[1:]),
        "update_peak": min(peaks[1:]),
        "loading_peak": loading,
    }


def case_config(model: str, base: str, sharding: str) -> Config:
    return Config(
        model=ModelConfig(name_or_path=model, quantization=base),
        train=TrainConfig(mixed_precision="bf16", sharding=sharding),
    )


def examples() -> list[dict[str, Any]]:
    """Four, that share nothing: NUM_TOKENS tokens, of which half are targets."""
    length = NUM_TOKENS // 4
    half = length // 2
    return [
        {"input_ids": [3 + row] * length, "labels": [-100] * half + [3 + row] * (length - half)}
        for row in range(4)
    ]


def sent_bytes() -> int:
    """Bytes that this process has sent over its open TCP connections, by the kernel's count, once each."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile: it was that of the listing
            continue
        with connection:
            is_tcp = connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX
            if is_tcp:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                total += sent - again
    return total


def resident(field: str = "VmRSS") -> int:
    """Bytes of resident memory now, or with "VmHWM" the most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    for base, sharding in CASES:
        own = measure(arguments.model, base, sharding)
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, own)
        results.append(ranks)
    if distributed.get_rank() == 0:
        arguments.out.write_text(json.dumps(results), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
