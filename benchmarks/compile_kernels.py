"""Triton's kernels compiled for cards that are not at hand: the registers of each, and that none spills.

    python benchmarks/compile_kernels.py --out benchmarks/results/kernels.json

Each launch of `finetune.ops.triton_makers` for a micro-batch of 1,004 tokens is recorded, without a device,
and compiled as it would be on a card: for the sizes of the models below, in bf16, fp16 and fp32.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.ops import dropout, triton_makers  # noqa: E402

NVIDIA = (75, 80, 86, 89, 90, 120)  # compute capabilities: Turing, A100, Ampere, Ada, Hopper, Blackwell
CARDS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in NVIDIA}
# AMD's Instinct MI200 and MI300, and a Radeon RX 7900. Triton compiles for them without ROCm.
CARDS |= {"gfx90a": GPUTarget("hip", "gfx90a", 64), "gfx942": GPUTarget("hip", "gfx942", 64)}
CARDS |= {"gfx1100": GPUTarget("hip", "gfx1100", 32)}
TURING = "sm_75"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TRITON_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
RESOURCES = ("registers", "spilled_bytes", "shared_memory")
TOKENS, TARGETS = 1004, 512
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Sizes(NamedTuple):
    """The sizes of a model, and the rank of the adapters that share an input."""

    hidden: int
    intermediate: int
    heads: int  # of queries and keys
    head_dim: int
    vocabulary: int
    rank: int


MODELS = {
    "Qwen2-0.5B": Sizes(896, 4864, 16, 64, 151_936, 24),
    "Qwen2-1.5B": Sizes(1536, 8960, 14, 128, 151_936, 24),
    "the longest rows": Sizes(triton_makers.LONGEST_ROW, 28_672, 40, 256, 262_144, 384),
}


class Launch(NamedTuple):
    """A kernel as a maker launches it."""

    kernel: str
    function: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


def launches(sizes: Sizes, dtype: torch.dtype) -> Iterator[Launch]:
    """Every launch of a training step with such a model, each once."""
    recorded: list[Launch] = []

    def record(module: Any, name: str, grid: Any, *arguments: Any, **settings: Any) -> None:
        recorded.append(Launch(name, getattr(module, name), arguments, settings | triton_makers.OPTIONS))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    makers, launch = triton_makers, triton_makers._launch
    makers._load()
    makers._launch = record
    try:
        x, weight = tensor(TOKENS, sizes.hidden), tensor(sizes.hidden)
        scale = tensor(TOKENS, dtype=torch.float32)
        makers.rms_norm(x, weight, 1e-6)
        makers.add_rms_norm(x, x, weight, 1e-6)
        makers.apply_rms_norm(x, weight, scale)
        makers.rms_norm_backward(x, weight, scale, x, None)
        makers.rms_norm_backward(x, weight, scale, x, x)
        positions = tensor(TOKENS, sizes.head_dim)
        for direction in (1, -1):
            heads = tensor(TOKENS, sizes.heads, sizes.head_dim)
            makers.rotate(heads, positions, positions, direction)
        gate_up, wide = tensor(TOKENS, 2 * sizes.intermediate), tensor(TOKENS, sizes.intermediate)
        makers.gated_silu(gate_up)
        makers.gated_silu_backward(gate_up, wide)
        logits, targets = tensor(TARGETS, sizes.vocabulary), tensor(TARGETS, dtype=torch.int64)
        for with_gradient in (False, True):
            makers.token_stats(logits, targets, with_gradient)
        codes = tensor(sizes.hidden, sizes.intermediate, dtype=torch.int8)
        makers.dequantize_int8(codes, tensor(sizes.hidden, dtype=torch.float32), dtype)
        pool = tensor(dropout.POOL_SIZE, dtype=dropout.INTEGERS[dtype.itemsize])
        makers.fill_noise(pool, 2**62, 0)
        if dtype != torch.float32:  # torch makes these
            a, v = tensor(sizes.rank, sizes.intermediate), tensor(TOKENS, sizes.rank)
            makers.dropped_product(wide, a, pool, 5)
            makers.dropped_sum(v, wide, pool, 5)
            makers.add_dropped(wide, v, a, pool, 5)
    finally:
        makers._launch = launch
        makers.disable()
    yield from recorded


def compiled(launch: Launch, card: str) -> dict[str, int]:
    """Compile a launch for a card. Returns a thread's registers, and the bytes it spills."""
    names = launch.function.arg_names
    constants = {name: value for name, value in launch.settings.items() if name in names}
    signature = dict(zip(names, [_type_of(x) for x in launch.arguments], strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    # torch aligns what it allocates, and a launch on a card sees that.
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(launch.arguments) if _is_aligned(x)}
    options = {name: launch.settings[name] for name in OPTIONS if name in launch.settings}
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=CARDS[card], options=options)
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    if launch.kernel in triton_makers.PRODUCTS:
        assert re.search(r"\bw?g?mma|v_w?mf?ma", text), f"{launch.kernel} takes no tensor cores on {card}"
    used = _resources(binary.asm["cubin"]) if "cubin" in binary.asm else _resources_amd(text)
    return used | {"shared_memory": binary.metadata.shared}


def _type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return TRITON_TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i64" if abs(argument) >= 2**31 else "i32"


def _is_aligned(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor)


def _resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of the one function of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def _resources_amd(assembly: str) -> dict[str, int]:
    """What the compiler says of an AMD program; its private segment holds what spills."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", assembly))
    return {
        "registers": int(found["vgpr_count"]),
        "spilled_bytes": int(found["private_segment_fixed_size"]),
    }


def cases(
    models: Sequence[str], cards: Sequence[str], dtypes: Sequence[torch.dtype]
) -> Iterator[dict[str, Any]]:
    """Compile every launch for every card. On Turing, torch makes the products and there is no bf16."""
    for model in models:
        for dtype in dtypes:
            for launch in launches(MODELS[model], dtype):
                for card in cards:
                    is_product = launch.kernel in triton_makers.PRODUCTS
                    if card == TURING and (is_product or dtype == torch.bfloat16):
                        continue
                    yield {
                        "kernel": launch.kernel,
                        "dtype": str(dtype).removeprefix("torch."),
                        "card": card,
                        **compiled(launch, card),
                    }


def source() -> str:
    """A digest of the kernels and their launches."""
    files = [ROOT / "finetune" / "ops" / f"triton_{name}.py" for name in ("kernels", "dropout", "makers")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _summary(found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel, type and card, the number of variants, and the most that one of them takes."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in found:
        groups.setdefault((case["kernel"], case["dtype"], case["card"]), []).append(case)
    return [
        {"kernel": kernel, "dtype": dtype, "card": card, "variants": len(variants)}
        | {key: max(variant[key] for variant in variants) for key in RESOURCES}
        for (kernel, dtype, card), variants in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    arguments = parser.parse_args()
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    found = _summary(cases(arguments.models, arguments.cards, dtypes))
    record = {"triton": triton.__version__, "source": source(), "models": arguments.models, "cases": found}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for case in found:
        print("  ".join(f"{key} {value}" for key, value in case.items()))


if __name__ == "__main__":
    main()
