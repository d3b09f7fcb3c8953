"""Choose the path for each part: the fast path if it is requested and computes what the reference path does.

Each fast path is compared with the unchanged model on the longest example. Models differ in what they compute
around their attention and their head, and a fast path must not silently skip any of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.config import Config
from finetune.data.collate import MicroBatch, pack, pad
from finetune.data.preparing.examples import Examples
from finetune.data.templates.tokenize import IGNORE
from finetune.model.int8_matmul import choose_int8
from finetune.model.loss import TokenLoss
from finetune.ops import decoder_layer, elementwise, lora, operators, quantized
from finetune.ops.attention import PACKED, describe_kernel
from finetune.ops.quantized import dequantized, dropout_off
from finetune.ops.trained_modules import plain_layer, trained_copy, wrappers
from finetune.runtime.accelerator import DTYPES
from finetune.runtime.choice import Choice
from finetune.runtime.memory import reset_peak_memory

# The largest difference of a token's logits, relative to their spread. In bf16, the order of sums alone
# changes some tokens by up to 0.4. Wrong positions or examples that are not separated change some by over 2.
MAX_ROUNDING = 0.7
# Of the longest example: all its logits, in fp32 and several times, would need more memory than an update.
TOKENS_COMPARED = 64


class FastPaths(NamedTuple):
    """What was requested and what actually runs, for each part."""

    layout: Choice
    attention: Choice
    loss: Choice
    lora: Choice
    elementwise: Choice
    layers: Choice
    int8: Choice
    kernels: Choice

    @property
    def packed(self) -> bool:
        """Whether examples are packed rather than padded."""
        return self.layout.actual == "packed"


def choose_fast_paths(
    config: Config,
    accelerator: Any,
    token_loss: TokenLoss,
    train_set: Examples,
    int8: str | None = None,
    is_sharded: bool = False,
) -> FastPaths:
    """Enable the configured fast paths of token_loss and its model that give the same results.

    `int8` is how an earlier part of this run multiplied int8 weights; if given, it is used without measuring.
    With `is_sharded` they are those of a base that is to be sharded afterwards: none keeps a tensor of it.
    The process's peak memory is counted anew after the trials, which are no part of the training.
    """
    use_reference_paths(token_loss)
    trial = _Trial(accelerator, token_loss, train_set)
    expected = trial.logits(trial.alone)
    kernels_choice = _choose_kernels(config, accelerator.device)
    int8_choice = choose_int8(config, accelerator, token_loss.model, train_set, int8, is_sharded)
    if config.fast.lora and int8_choice.actual != "int8":
        quantized.enable(token_loss.model)
    lora_choice = _choose_lora(config, token_loss.model, int8_choice, trial, expected, not is_sharded)
    elementwise_choice = _choose_elementwise(config, token_loss.model, trial, expected)
    layers_choice = _choose_layers(config, token_loss.model, int8_choice, trial, expected, not is_sharded)
    layout, attention = _choose_layout(config, token_loss, trial, expected)
    loss = _choose_head(config, token_loss, trial)
    del expected, trial
    reset_peak_memory(accelerator.device)
    of_layers = (lora_choice, elementwise_choice, layers_choice)
    return FastPaths(layout, attention, loss, *of_layers, int8_choice, kernels_choice)


def require_same_results(accelerator: Any, token_loss: TokenLoss, train_set: Examples, packing: bool) -> None:
    """Compare the chosen fast paths, on the longest example, with the reference paths once more: with weights
    that the base got after they were chosen. Where it is sharded, all processes must call this.

    Raises:
        ValueError: the results differ.
    """
    trial = _Trial(accelerator, token_loss, train_set)
    expected = _reference_logits(token_loss, trial)
    if fault := trial.fault(trial.packed if packing else trial.alone, expected):
        raise ValueError(
            f"with the base's own weights, the fast paths do not compute the longest example ({fault}): set "
            "train.sharding to none, or the keys of `fast` and train.packing to false"
        )
    reset_peak_memory(accelerator.device)


def _reference_logits(token_loss: TokenLoss, trial: "_Trial") -> Tensor:
    """[N, vocabulary] fp32 of the longest example's chosen tokens, by the reference paths. The fast ones stay
    chosen."""
    base, own = token_loss.base, str(token_loss.base.config._attn_implementation)
    modules = [module for module in token_loss.modules() if "forward" in module.__dict__]
    replaced = [module.__dict__.pop("forward") for module in modules]
    if own == PACKED:
        base.set_attn_implementation("sdpa")
    try:
        return trial.logits(trial.alone)
    finally:
        base.set_attn_implementation(own)
        for module, forward in zip(modules, replaced, strict=True):
            module.forward = forward


def use_reference_paths(token_loss: TokenLoss) -> None:
    """Compute everything as transformers, PEFT and bitsandbytes do."""
    token_loss.masks_packed_sequences, token_loss.head_mib = True, None
    decoder_layer.disable(token_loss.model)
    lora.disable(token_loss.model)
    elementwise.disable(token_loss.model)
    quantized.disable(token_loss.model)
    operators.disable()
    if token_loss.base.config._attn_implementation == PACKED:
        token_loss.base.set_attn_implementation("sdpa")


class _Trial:
    """The longest example as a padded sequence by itself, and after another example in a packed sequence.

    If examples have branches, its second half is a branch there, behind other tokens that it does not see.
    Both have the same targets, at most TOKENS_COMPARED: the first token behind what the examples share, the
    last one, and others evenly between them.
    """

    def __init__(self, accelerator: Any, token_loss: TokenLoss, train_set: Examples) -> None:
        longest, other = int(train_set.lengths.argmax()), int(train_set.lengths.argmin())
        tokens, before = train_set.dataset[longest]["input_ids"], train_set.dataset[other]["input_ids"][:64]
        shared = min(16, len(tokens) // 4)  # a prefix that the packed sequence contains once
        before = tokens[:shared] + before
        first = {"input_ids": before, "labels": [IGNORE] * len(before)}
        targets = torch.linspace(shared + 1, len(tokens) - 1, TOKENS_COMPARED).round().int().tolist()
        chosen = set(targets)
        labels = [token if place in chosen else IGNORE for place, token in enumerate(tokens)]
        second = {"input_ids": tokens, "labels": labels}
        self.alone = pad([second]).to(accelerator.device)
        if train_set.sequence_sizes is not None:
            second = _as_branch(second, before, max(shared + 1, len(tokens) // 2))
        self.packed = pack([first, second]).to(accelerator.device)
        self._accelerator, self._token_loss = accelerator, token_loss
        self.device = accelerator.device
        self.dtype = DTYPES[accelerator.mixed_precision]

    def call(self, function: Callable[[MicroBatch], Any], batch: MicroBatch) -> Any:
        """The function's result without dropout, in the run's precision.

        Layers of bitsandbytes dequantize their weights: on a GPU they would round the activations to int8,
        and so be farther from the truth than a fast path that does not.
        """
        exact, precision = dequantized(self._token_loss), self._accelerator.autocast()
        with torch.no_grad(), dropout_off(self._token_loss), exact, precision:
            return function(batch)

    def logits(self, batch: MicroBatch) -> Tensor:
        """[N, vocabulary] fp32 of the longest example's chosen tokens."""
        logits: Tensor = self.call(self._token_loss.target_logits, batch).float()
        return logits

    def fault(self, batch: MicroBatch, expected: Tensor) -> str | None:
        """Why the longest example's logits differ from those of the reference paths; None if they agree."""
        try:
            logits = self.logits(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each model rejects unknown arguments in its own way
            first_line = (str(error).splitlines() or [""])[0][:200]
            known = isinstance(error, NotImplementedError)
            return first_line if known else f"{type(error).__name__}: {first_line}"
        # By token, because a convolution would leak into the first tokens of an example only.
        difference = ((logits - expected).square().mean(-1) / expected.var(-1)).sqrt().max()
        return None if float(difference) < MAX_ROUNDING else "different results"


def _as_branch(example: dict[str, Any], unseen: list[int], attach: int) -> dict[str, Any]:
    """The example with all behind its first `attach` tokens as a branch, and the tokens `unseen` between."""

    def around(column: str, between: list[int]) -> list[int]:
        values: list[int] = example[column]
        return values[:attach] + between + values[attach:]

    return {
        "input_ids": around("input_ids", unseen),
        "labels": around("labels", [IGNORE] * len(unseen)),
        "branches": [(attach + len(unseen), attach)],
    }


def _choose_kernels(config: Config, device: torch.device) -> Choice:
    """How the fast paths compute everything except large matrix multiplications."""
    reference = "torch's operations"
    if device.type not in ("cpu", "cuda"):
        return Choice("kernels", reference, reference)
    name, compiled = ("CPU kernels", "compiled") if device.type == "cpu" else ("GPU kernels", "Triton")
    if not config.fast.kernels:
        return Choice(name, reference, reference)
    try:
        operators.enable(device)
    except (OSError, ValueError) as error:  # no compiler, or no folder for the library
        return Choice(name, compiled, reference, str(error))
    if device.type == "cpu":
        return Choice(name, compiled, compiled)
    makers = operators.makers(device)
    left = [operator for operator, maker in makers.items() if maker.name == "torch"]
    reasons = dict.fromkeys(maker.reason for maker in makers.values() if maker.reason)
    actual = f"{compiled}, except {', '.join(left)}" if left else compiled
    return Choice(name, compiled, actual, "; ".join(reasons))


def _choose_layout(
    config: Config, token_loss: TokenLoss, trial: _Trial, expected: Tensor
) -> tuple[Choice, Choice]:
    """Packed sequences, if the model keeps their examples separate.

    Not every model respects a mask between the examples and positions that restart: a model with a recurrent
    state cannot, and a model with a sliding window may ignore it.
    """
    base, own = token_loss.base, str(token_loss.base.config._attn_implementation)
    kernel, kernel_reason = describe_kernel(trial.device, trial.dtype, _head_size(base))
    requested = f"packed, {kernel}" if config.fast.attention and config.train.packing else own
    if not config.train.packing:
        return Choice("layout", "padded", "padded"), Choice("attention", own, own)
    reason = f"the model supports only {own} attention"
    if config.fast.attention and own == "sdpa":
        base.set_attn_implementation(PACKED)
        token_loss.masks_packed_sequences = False
        fault = trial.fault(trial.packed, expected)
        if fault is None:
            attention = Choice("attention", requested, requested, kernel_reason)
            return Choice("layout", "packed", "packed"), attention
        base.set_attn_implementation(own)
        token_loss.masks_packed_sequences = True
        reason = f"tried on the longest example: {fault}"
    attention = Choice("attention", requested, own, "" if requested == own else reason)
    fault = trial.fault(trial.packed, expected)
    if fault is None:
        return Choice("layout", "packed", "packed"), attention
    if fault == "different results":
        reason = "the model computes packed examples differently from separate ones"
    else:
        reason = f"the model accepts no mask between packed examples ({fault})"
    return Choice("layout", "packed", "padded", reason), attention


def _head_size(base: Any) -> int:
    settings = base.config.get_text_config()
    size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return int(size)


def _choose_head(config: Config, token_loss: TokenLoss, trial: _Trial) -> Choice:
    """The head in chunks, if the logits are exactly its product with the last hidden states."""
    name, chunks = "loss", f"target tokens in chunks of {config.fast.head_mib} MiB"
    reference = "all logits of target tokens" if token_loss.can_skip_logits else "logits of all tokens"
    if not config.fast.head:
        return Choice(name, reference, reference)
    outer = token_loss.base.get_output_embeddings()
    head = plain_layer(outer)
    if type(head) is not nn.Linear or head.bias is not None:
        return Choice(name, chunks, reference, "the head has LoRA or a bias, or is no plain linear layer")
    if trial.call(lambda batch: _computes_logits(token_loss, outer, batch), trial.alone):
        token_loss.head_mib = config.fast.head_mib
        return Choice(name, chunks, chunks)
    return Choice(name, chunks, reference, "the model's logits are not just its head's output")


def _computes_logits(token_loss: TokenLoss, head: nn.Module, batch: MicroBatch) -> bool:
    """Whether the head's input is the decoder's hidden states, and its output is the logits.

    The head gets eight times its usual input, so that a soft cap on the logits would show.
    """
    seen: dict[str, Tensor] = {}

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["hidden"] = inputs[0]
        return (8 * inputs[0],)

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen["logits"] = output

    handles = [head.register_forward_pre_hook(enlarge), head.register_forward_hook(keep)]
    try:
        logits = token_loss.target_logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    hidden: Tensor = token_loss.base.get_decoder()(**token_loss.inputs(batch)).last_hidden_state
    # The head computes either the target positions alone or all of them.
    hidden = hidden.flatten(0, 1)
    own_hidden, own_logits = (seen[name].flatten(0, 1) for name in ("hidden", "logits"))
    if len(own_logits) == len(hidden):
        own_logits = own_logits[batch.target_positions]
    else:
        hidden = hidden[batch.target_positions]
    return torch.equal(logits, own_logits) and torch.equal(hidden, own_hidden)


def _choose_lora(
    config: Config, model: nn.Module, int8: Choice, trial: _Trial, expected: Tensor, keep_joined: bool
) -> Choice:
    """One function for the LoRA layers that share an input."""
    name, fused, reference = "LoRA layers", "one function for each input", "PEFT's"
    if not config.fast.lora:
        return Choice(name, reference, reference)
    num_fast, num_all = lora.enable(model, int8.actual == "int8", keep_joined)
    if num_fast == 0:
        return Choice(name, fused, reference, "DoRA, or unsupported layer types")
    if fault := trial.fault(trial.alone, expected):
        lora.disable(model)
        return Choice(name, fused, reference, f"tried on the longest example: {fault}")
    if num_fast < num_all:
        return Choice(name, fused, f"{fused}, except {num_all - num_fast}", "unsupported layer types")
    return Choice(name, fused, fused)


def _choose_elementwise(config: Config, model: nn.Module, trial: _Trial, expected: Tensor) -> Choice:
    """Norms, rotary positions and gated activations that save only their inputs."""
    name, fast, reference = "norms, rotary, SiLU", "keep their inputs", "the model's"
    if not config.fast.elementwise:
        return Choice(name, reference, reference)
    if elementwise.enable(model) == 0:
        return Choice(name, fast, reference, "no supported norm, rotary attention or gated SiLU")
    if fault := trial.fault(trial.alone, expected):
        elementwise.disable(model)
        return Choice(name, fast, reference, f"tried on the longest example: {fault}")
    trained = [wrapper for wrapper in wrappers(model) if elementwise.is_norm(trained_copy(wrapper))]
    if trained:
        return Choice(name, fast, f"{fast}, except {len(trained)}", "norms that are trained")
    return Choice(name, fast, fast)


def _choose_layers(
    config: Config, model: nn.Module, int8: Choice, trial: _Trial, expected: Tensor, keep_joined: bool
) -> Choice:
    """Whole decoder layers in a few functions, where their parts are fast."""
    name, fused, reference = "decoder layers", "fused", "module by module"
    if not (config.fast.lora and config.fast.elementwise):
        return Choice(name, reference, reference)
    if int8.actual == "int8":
        return Choice(name, fused, reference, "int8 weights are multiplied in int8")
    num_fused, num_all = decoder_layer.enable(model, keep_joined)
    if num_fused == 0:
        return Choice(name, fused, reference, "no layers of Llama's kind with fast parts")
    if fault := trial.fault(trial.alone, expected):
        decoder_layer.disable(model)
        return Choice(name, fused, reference, f"tried on the longest example: {fault}")
    if num_fused < num_all:
        return Choice(name, fused, f"{fused}, except {num_all - num_fused}", "layers of another kind")
    return Choice(name, fused, fused)
