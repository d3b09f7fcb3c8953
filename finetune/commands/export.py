"""`python -m finetune export RUN --output DIR`: write the merged model as GGUF, for llama.cpp and Ollama."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.templates.chat_template import stop_ids
from finetune.export.merge import load_merged, require_new_folder
from finetune.export.modelfile import modelfile
from finetune.model.given_adapter import ADAPTER_CONFIG, largest_rank
from finetune.model.load import generation_ends, load_architecture, load_tokenizer
from finetune.model.starter import starter_model_dir
from finetune.report.model_card import VLLM_RANKS
from finetune.run.adapter import Trained, load_trained_tokenizer, parse_trained, trained_parser
from finetune.run.folder import CHAT_TEMPLATE
from finetune.runtime import system
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import say
from finetune.runtime.files import staged_folder

CONVERTER = "python llama.cpp/convert_hf_to_gguf.py"


def command(argv: Sequence[str]) -> None:
    """Write the GGUF file and the Modelfile to the output folder, both or neither.

    Raises:
        ValueError: the folder is not empty, the base cannot be loaded, or only llama.cpp's converter supports
            its architecture.
    """
    arguments, trained = parse_trained(_parser(), argv)
    output: Path = arguments.output
    require_new_folder(output)
    try:
        from finetune.export.gguf import unsupported, write_gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install {error.name}") from error
    base = trained.config.model
    if reason := unsupported(load_architecture(base), load_trained_tokenizer(trained)):
        raise ValueError(
            f"{base.name_or_path} cannot be written as GGUF here ({reason}); llama.cpp may: "
            f"python -m finetune merge {shlex.quote(str(arguments.trained))} --output merged && "
            f"{CONVERTER} merged --outtype {arguments.format} --outfile merged.gguf"
        )
    merged = load_merged(trained)
    name = _name(trained)
    gguf_name = f"{name}-{arguments.format.upper()}.gguf"
    length = _context_length(trained.config, merged.model)
    text, left_out = modelfile(gguf_name, merged.tokenizer, trained.config.data.system_prompt, length)
    with staged_folder(output.absolute()) as staging:
        write_gguf(staging / gguf_name, merged.model, merged.tokenizer, name, arguments.format)
        system.write_text(staging / "Modelfile", text)
    _show(trained, merged.tokenizer, output, gguf_name, left_out)


def _parser() -> CommandParser:
    parser = trained_parser("export", "--output DIR [--format q8_0|f16]", __doc__ or "")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to create")
    parser.add_argument(
        "--format", choices=("q8_0", "f16"), default="q8_0", help="data type of the matrices (default q8_0)"
    )
    return parser


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


def _show(trained: Trained, tokenizer: Any, output: Path, gguf_name: str, left_out: Sequence[str]) -> None:
    """Print what was written, and the commands that serve it."""
    size = (output / gguf_name).stat().st_size
    say(f"gguf         {output / gguf_name} ({size / 2**20:,.0f} MiB)")
    say(f"Modelfile    {output / 'Modelfile'}")
    for remark in left_out:
        say(f"             without {remark}")
    name, modelfile_path = _name(trained), shlex.quote(str(output / "Modelfile"))
    say(f"llama.cpp    llama-cli --jinja -m {shlex.quote(str(output / gguf_name))}")
    say(f"Ollama       ollama create {name} -f {modelfile_path} && ollama run {name}")
    say(f"vLLM         {_vllm(trained, tokenizer, name)}")


def _vllm(trained: Trained, tokenizer: Any, name: str) -> str:
    """The command that serves the adapter on its base with the template that was trained with; where vLLM
    cannot, how it serves the merged model."""
    config, adapter = trained.config, trained.adapter
    # The starter's weights differ slightly from the hub's: serve it from the folder that was trained on.
    named = config.model.name_or_path
    base = str(starter_model_dir()) if named == "starter" else named
    rank = next((rank for rank in VLLM_RANKS if rank >= largest_rank(adapter)), None)
    own = load_tokenizer(replace(config, data=replace(config.data, chat_template=None)))
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    differs = (own.chat_template, own.eos_token_id) != (tokenizer.chat_template, tokenizer.eos_token_id)
    if (
        config.lora.use_dora
        or rank is None
        or base.endswith(".gguf")
        or config.lora.init_lora_weights == "loftq"  # for a base in 4 bits
        # vLLM loads no rows of embeddings and no whole modules with an adapter.
        or settings.get("trainable_token_indices")
        or settings.get("modules_to_save")
        or (differs and not trained.own_tokenizer)  # of a checkpoint, which has no file of them
    ):
        return "vllm serve MERGED, with the folder that `python -m finetune merge` writes"
    parts = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={adapter}"]
    parts += ["--max-lora-rank", str(rank)]
    if differs:
        parts += ["--tokenizer", str(adapter), "--chat-template", str(adapter / CHAT_TEMPLATE)]
    command = shlex.join(parts)
    known = {tokenizer.eos_token_id, *generation_ends(config.model)}
    if more := sorted(stop_ids(tokenizer) - known):
        command += f', and "stop_token_ids": {more} in each request'
    return command
