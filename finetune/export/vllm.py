"""The command that serves a trained adapter with vLLM: https://docs.vllm.ai/en/latest/cli/serve."""

import json
import shlex
from dataclasses import replace
from typing import Any

from finetune.data.templates.chat_template import stop_ids
from finetune.export.modelfile import writes_tools
from finetune.model.given_adapter import ADAPTER_CONFIG, largest_rank
from finetune.model.load import generation_ends, load_tokenizer
from finetune.model.starter import starter_model_dir
from finetune.report.model_card import VLLM_RANKS
from finetune.run.adapter import Trained
from finetune.run.folder import CHAT_TEMPLATE

# What is in the chat template of a model whose calls are read by vLLM's parser of that name.
TOOL_CALL_PARSERS = {
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
}


def serve_with_vllm(trained: Trained, tokenizer: Any, name: str, context_length: int) -> str:
    """Return the command that serves the adapter on its base, as the model `name`, with the template that was
    trained with; where vLLM cannot, how it serves the merged model. `context_length` is in tokens."""
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
    parts += ["--max-lora-rank", str(rank), "--max-model-len", str(context_length)]
    if differs:
        parts += ["--tokenizer", str(adapter), "--chat-template", str(adapter / CHAT_TEMPLATE)]
    if parser := tool_call_parser(tokenizer):
        parts += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    command = shlex.join(parts)
    known = {tokenizer.eos_token_id, *generation_ends(config.model)}
    if more := sorted(stop_ids(tokenizer) - known):
        command += f', and "stop_token_ids": {more} in each request'
    return command


def tool_call_parser(tokenizer: Any) -> str | None:
    """Return vLLM's name of the parser for the calls that the chat template writes, or None if it writes no
    tools, or calls in a form that is not known here."""
    if not writes_tools(tokenizer):
        return None
    templates = tokenizer.chat_template
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    return next((parser for mark, parser in TOOL_CALL_PARSERS.items() if mark in text), None)
