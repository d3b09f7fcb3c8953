"""`python -m finetune export RUN --output DIR`: write the merged model as GGUF, for llama.cpp and Ollama."""

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finetune.config import Config
from finetune.data.rows import Rows, load_rows
from finetune.export import llama_cpp
from finetune.export.comparison import Line, gain_kept, open_comparison, show_answers, show_differences
from finetune.export.fidelity import Comparison, compare
from finetune.export.gguf import read_gguf, unsupported, write_gguf
from finetune.export.merge import (
    DEQUANTIZED,
    FULL_PRECISION,
    load_unmerged,
    merge,
    require_new_folder,
    save_merged,
)
from finetune.export.modelfile import modelfile
from finetune.export.quantize import BLOCK_TYPES, quantize
from finetune.export.vllm import serve_with_vllm
from finetune.model.load import load_architecture
from finetune.run.adapter import (
    Trained,
    TrainedModel,
    load_trained,
    load_trained_tokenizer,
    parse_trained,
    trained_parser,
)
from finetune.runtime import system
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import console, say
from finetune.runtime.files import staged_folder

QUANTIZATIONS = ("f16", *BLOCK_TYPES, *llama_cpp.K_TYPES)


def command(argv: Sequence[str]) -> None:
    """Write the GGUF file and the Modelfile to the output folder, both or neither; then compare the file with
    the trained model.

    Raises:
        ValueError: invalid arguments; an adapter or a base that cannot be used; or a program of llama.cpp's
            is needed and not installed.
    """
    arguments, trained = parse_trained(_parser(), argv)
    output: Path = arguments.output
    require_new_folder(output)
    if arguments.rows < 1:
        raise ValueError(f"--rows must be at least 1, not {arguments.rows}")
    quantizer = llama_cpp.require_quantizer() if arguments.quantize in llama_cpp.K_TYPES else None
    converter = _converter(trained, arguments.trained)
    rows = _rows(trained.config)
    opened = load_trained(trained)
    comparison = None if rows is None else open_comparison(trained, opened, rows, arguments.rows)
    name = _name(trained)
    gguf_name = f"{name}-{arguments.quantize.upper()}.gguf"
    with console.status(f"writing {gguf_name}"):
        # An adapter that began as LoftQ makes up for what the quantized weights have lost.
        base = DEQUANTIZED if trained.config.lora.init_lora_weights == "loftq" else FULL_PRECISION
        model = merge(load_unmerged(trained, opened, base))
        config, length = model.config, _context_length(trained.config, model)
        text, left_out = modelfile(gguf_name, opened.tokenizer, trained.config.data.system_prompt, length)
        with staged_folder(output.absolute()) as staging:
            halves = staging / f"{name}-F16.gguf"
            _write_f16(halves, converter, model, opened.tokenizer, name)
            del model
            others = _quantize(halves, staging / gguf_name, quantizer, arguments.quantize)
            system.write_text(staging / "Modelfile", text)
    if others:
        say(_in_other_types(others))
    if comparison is not None:
        _compare(comparison, opened, output / gguf_name, config, arguments.quantize)
    _show(trained, opened.tokenizer, arguments.trained, output / gguf_name, left_out, length)


def _parser() -> CommandParser:
    parser = trained_parser(
        "export",
        "--output DIR [--quantize TYPE] [--rows N]",
        "Write the merged model as a GGUF file with a Modelfile, for llama.cpp and Ollama. The file is read "
        "back and compared with the trained model on the run's eval rows, to show how much of what was "
        "trained the rounding leaves.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to create")
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        type=str.lower,
        choices=QUANTIZATIONS,
        default="q8_0",
        help=f"data type of the matrices (default q8_0): f16, {', '.join(BLOCK_TYPES)}; and, if "
        f"llama-quantize is installed, {', '.join(llama_cpp.K_TYPES)}",
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, default=40, help="eval rows to compare on (default 40)"
    )
    return parser


def _converter(trained: Trained, given: Path) -> str | None:
    """Return the program that writes the model as GGUF, or None if `write_gguf` does.

    Raises:
        ValueError: there is neither.
    """
    base = trained.config.model
    reason = unsupported(load_architecture(base), load_trained_tokenizer(trained))
    if reason is None:
        return None
    if program := llama_cpp.converter():
        say(f"Converted by {program}: {reason}.")
        return program
    raise ValueError(
        f"{base.name_or_path} cannot be written as GGUF here ({reason}); llama.cpp's converter may: put its "
        "convert_hf_to_gguf.py on PATH, or run "
        f"python -m finetune merge {shlex.quote(str(given))} --output merged && "
        "python llama.cpp/convert_hf_to_gguf.py merged --outtype f16 --outfile merged.gguf"
    )


def _rows(config: Config) -> Rows | None:
    """The rows to compare on; None, which is said, if they cannot be read: an adapter is exported without."""
    try:
        return load_rows(config.data, config.eval.sets)
    except ValueError as error:
        say(f"Not compared with the trained model: {error}")
        return None


def _write_f16(path: Path, converter: str | None, model: Any, tokenizer: Any, name: str) -> None:
    if converter is None:
        write_gguf(path, model, tokenizer, name)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        save_merged(model, tokenizer, torch.float16, Path(folder) / name)
        llama_cpp.convert(converter, Path(folder) / name, path)


def _quantize(source: Path, target: Path, quantizer: str | None, name: str) -> dict[str, str]:
    """Replace a file of 16-bit weights by one of the type `name`; return the matrices of another type."""
    if name == "f16":
        return {}
    others = {}
    if quantizer is None:
        others = quantize(source, target, name)
    else:
        llama_cpp.quantize(quantizer, source, target, name)
    source.unlink()
    return others


def _in_other_types(others: Mapping[str, str]) -> str:
    parts = []
    for kind in sorted(set(others.values())):
        names = [name for name, its in others.items() if its == kind]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"{kind}: {', '.join(names[:2])}{more}")
    return f"In another type: {'; '.join(parts)}."


def _compare(
    comparison: Comparison, opened: TrainedModel, path: Path, config: Any, quantization: str
) -> None:
    """Read the file back and print how it differs from the trained model."""
    try:
        with console.status(f"comparing {path.name}"):
            model = read_gguf(path, config, opened.accelerator.device)
            found, as_run = compare(comparison, model)
    except ValueError as error:
        say(f"Not compared with the trained model: {error}")
        return
    line = Line(quantization, found, as_run, path.stat().st_size, is_written=True)
    show_differences(comparison, opened.precision.actual, [line])
    say(gain_kept(comparison.base, comparison.loss, found))
    show_answers(comparison, opened, model, quantization)


def _name(trained: Trained) -> str:
    """The model's name: that of the run's folder, in characters that Ollama accepts."""
    folder = trained.run_dir or trained.adapter
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._") or "model"


def _context_length(config: Config, model: Any) -> int:
    """Tokens of context to serve with: Ollama cuts longer prompts without a word, and some of its versions at
    4,096 tokens by default, which may be fewer than an example had."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = max(4096, config.data.max_length)
    return wanted if positions is None else min(wanted, positions)


def _show(
    trained: Trained, tokenizer: Any, given: Path, path: Path, left_out: Sequence[str], length: int
) -> None:
    """Print what was written, and the commands that serve it."""
    say(f"gguf         {path} ({path.stat().st_size / 2**20:,.0f} MiB)")
    say(f"Modelfile    {path.parent / 'Modelfile'}")
    for remark in left_out:
        say(f"             without {remark}")
    name, modelfile_path = _name(trained), shlex.quote(str(path.parent / "Modelfile"))
    say(f"llama.cpp    llama-cli --jinja -c {length} -m {shlex.quote(str(path))}")
    say(f"Ollama       ollama create {name} -f {modelfile_path} && ollama run {name}")
    say(f"vLLM         {serve_with_vllm(trained, tokenizer, name, length)}")
    merged = f"python -m finetune merge {shlex.quote(str(given))} --output merged"
    if find_spec("mlx_lm"):
        say(f"MLX          {merged} && mlx_lm.convert --hf-path merged --mlx-path mlx -q")
    if find_spec("optimum"):
        say(f"ONNX         {merged} && optimum-cli export onnx --model merged onnx")
