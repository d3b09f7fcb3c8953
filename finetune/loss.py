"""The loss: a causal language model in, sums over target tokens out."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.batching import MicroBatch, pack, pad
from finetune.chat import IGNORE, Examples
from finetune.machine import Setting
from finetune.model import dropout_off

# Of a token's logits, relative to their spread: what the order of sums may change in bf16, with room.
MOST_ROUNDING = 0.3


@dataclass(frozen=True)
class TokenSums:
    """Sums over target tokens: fp32 scalars on the device. Dividing by `count` gives the means."""

    nll: Tensor
    """Negative log-likelihood of the target tokens, in nats; the only one with a gradient"""
    entropy: Tensor
    """Entropy of the predicted distributions, in nats"""
    correct: Tensor
    """How often the likeliest token was the target"""
    count: Tensor
    """Number of target tokens"""


class TokenLoss(nn.Module):
    """A causal language model with the loss inside, so that DDP wraps both and no logits leave it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.can_skip_logits = "logits_to_keep" in inspect.signature(_base_forward(model)).parameters

    def forward(self, batch: MicroBatch) -> TokenSums:
        return sum_over_tokens(self.target_logits(batch), batch.target_ids)

    def target_logits(self, batch: MicroBatch) -> Tensor:
        """[N, vocabulary]: the logits at the target positions, in the precision of the forward pass."""
        # A single row can ask the model for the positions it needs, and no others reach the head.
        keep = self.can_skip_logits and len(batch.input_ids) == 1
        arguments: dict[str, Any] = {"logits_to_keep": batch.target_positions} if keep else {}
        logits: Tensor = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **arguments,
        ).logits
        return logits[0] if keep else logits.flatten(0, 1)[batch.target_positions]


def choose_layout(packing: bool, accelerator: Any, token_loss: TokenLoss, train_set: Examples) -> Setting:
    """Pack only where the model keeps packed examples apart.

    Models differ in whether they heed a mask between the examples of a row and positions that restart: one
    with a recurrent state cannot, and one with a sliding window may lose it. So it is tried on the longest
    example: its logits behind another one must be those that it has alone.
    """
    name = "layout"
    if not packing:
        return Setting(name, "padded", "padded")
    longest, other = int(train_set.lengths.argmax()), int(train_set.lengths.argmin())
    tokens, before = train_set.dataset[longest]["input_ids"], train_set.dataset[other]["input_ids"][:64]
    first = {"input_ids": before, "labels": [IGNORE] * len(before)}
    second = {"input_ids": tokens, "labels": [IGNORE, *tokens[1:]]}
    with torch.no_grad(), dropout_off(token_loss), accelerator.autocast():
        alone = token_loss.target_logits(pad([second]).to(accelerator.device)).float()
        try:
            behind = token_loss.target_logits(pack([first, second]).to(accelerator.device)).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model that knows no such mask fails in a way of its own
            reason = f"the model takes no mask between packed examples ({type(error).__name__})"
            return Setting(name, "packed", "padded", reason)
    # By token, since a convolution would carry over to the first ones alone.
    difference = ((behind - alone).square().mean(-1) / alone.var(-1)).sqrt().max()
    if float(difference) < MOST_ROUNDING:
        return Setting(name, "packed", "packed")
    return Setting(name, "packed", "padded", "the model computes packed examples otherwise than each alone")


def describe_loss(layout: Setting, token_loss: TokenLoss) -> Setting:
    """Which tokens the head sees: packed rows ask the model for the logits of their targets alone."""
    if layout.got == "padded":
        return Setting("loss path", "logits of all tokens", "logits of all tokens")
    asked = "logits of target tokens"
    if token_loss.can_skip_logits:
        return Setting("loss path", asked, asked)
    return Setting("loss path", asked, "logits of all tokens", "the model's forward has no logits_to_keep")


def sum_over_tokens(logits: Tensor, target_ids: Tensor) -> TokenSums:
    """Sums of logits [N, V] against target_ids [N], computed in fp32."""
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, target_ids[:, None]).sum()
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum()
        correct = (logits.argmax(-1) == target_ids).sum()
    count = torch.tensor(len(target_ids), device=logits.device)
    return TokenSums(nll, entropy, correct.float(), count.float())


def _base_forward(model: nn.Module) -> Any:
    """The forward method of the causal model, below PEFT's wrapper."""
    get_base_model = getattr(model, "get_base_model", None)
    return (model if get_base_model is None else get_base_model()).forward
