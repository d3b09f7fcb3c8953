"""The loss: sums over target tokens of a causal language model's predictions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from finetune.data.collate import Boundaries, MicroBatch
from finetune.ops.adapter_weights import in_dtype
from finetune.ops.chunked_head import ChunkedTokenSums, bytes_per_logit, chunked_token_stats, tokens_per_chunk
from finetune.ops.token_rows import rows_of
from finetune.ops.trained_modules import plain_layer


@dataclass(frozen=True)
class TokenSums:
    """Sums over target tokens: fp32 scalars on the device. Dividing by `count` gives the means."""

    nll: Tensor
    """Negative log-likelihood of the target tokens, in nats; the only one with a gradient"""
    entropy: Tensor
    """Entropy of the predicted distributions, in nats"""
    correct: Tensor
    """Number of target tokens that were predicted correctly (argmax)"""
    count: Tensor
    """Number of target tokens"""
    by_source: Tensor | None = None
    """[S, 4] fp32: the four sums of each source, without a gradient; None where they are not told apart"""


class TokenLoss(nn.Module):
    """A causal language model with its loss: the logits never leave the module.

    It starts on the reference paths; `fast_paths.choose_fast_paths` enables the fast ones. Where the base is
    sharded, its weights exist within `forward`, `token_stats`, `target_logits` and `generate` alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.base: Any = _base(model)
        self.can_skip_logits = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self.masks_packed_sequences = True
        """Pass a mask over the whole packed sequence; False: pass its boundaries to the attention"""
        self.head_mib: int | None = None
        """MiB for the logits of a chunk of target tokens; None: the model's own head computes all logits"""

    def forward(self, batch: MicroBatch) -> TokenSums:
        targets, is_from = batch.target_ids, batch.is_from
        if self.head_mib is None:
            return reference_token_sums(self._target_logits(batch), targets, is_from)
        stats = None if is_from is None else torch.empty(len(targets), 3, device=targets.device)
        weight = plain_layer(self.get_output_embeddings()).weight
        trained = weight if weight.requires_grad else None
        sums: Tensor = self._through_head(ChunkedTokenSums.apply, batch, self.head_mib, stats, trained)
        return _token_sums(sums, targets, stats, is_from)

    @torch.no_grad()
    def token_stats(self, batch: MicroBatch) -> Tensor:
        """[N, 3] fp32, for each target token: nll and entropy in nats, and 1 if it is predicted correctly."""
        if self.head_mib is None:
            return reference_token_stats(self._target_logits(batch), batch.target_ids)
        return self._through_head(chunked_token_stats, batch, self.head_mib)

    def _through_head(
        self, function: Callable[..., Tensor], batch: MicroBatch, mib: int, *more: Tensor | None
    ) -> Tensor:
        hidden, head = self.target_hidden(batch), self.base.get_output_embeddings()
        weight, rows = plain_layer(head).weight, rows_of(head)
        with torch.autocast(hidden.device.type, enabled=False):
            (weight,) = in_dtype([weight], hidden.dtype)
            size = bytes_per_logit(hidden.dtype, hidden.device)
            chunk = tokens_per_chunk(mib, len(weight), size)
            trained = (None, None) if rows is None else (rows.values, rows.ids)
            return function(hidden, weight, batch.target_ids, chunk, *trained, *more)

    def target_logits(self, batch: MicroBatch) -> Tensor:
        """[N, vocabulary]: the logits at the target positions, in the precision of the forward pass."""
        return self._target_logits(batch)

    def generate(self, **inputs: Any) -> Tensor:
        """[B, T]: token ids, as the model's method of this name generates them."""
        model: Any = self.model
        # All ranks stop together, even if rounding has them generate different tokens.
        tokens: Tensor = model.generate(**inputs, synced_gpus=isinstance(self, FSDPModule))
        return tokens

    def get_output_embeddings(self) -> Any:
        """The head, as the model's method of this name returns it."""
        return self.base.get_output_embeddings()

    def _target_logits(self, batch: MicroBatch) -> Tensor:
        # For a single sequence, the model can compute the logits of the target positions only.
        keep = self.can_skip_logits and len(batch.input_ids) == 1
        chosen: dict[str, Any] = {"logits_to_keep": batch.target_positions} if keep else {}
        logits: Tensor = self.model(**self.inputs(batch), **chosen).logits
        return logits[0] if keep else logits.flatten(0, 1)[batch.target_positions]

    def target_hidden(self, batch: MicroBatch) -> Tensor:
        """[N, d]: the input of the head at the target positions, in the precision of its multiplication."""
        states: Tensor = self.base.get_decoder()(**self.inputs(batch)).last_hidden_state
        hidden = states.flatten(0, 1)[batch.target_positions]
        kind = hidden.device.type
        return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The arguments of the model's forward method, or of its decoder's."""
        limits = batch.limits
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if not isinstance(limits, Boundaries):
            return {**inputs, "attention_mask": limits}
        if self.masks_packed_sequences:
            return {**inputs, "attention_mask": limits.mask()}
        # A mask of one element: without any mask, the model would create one.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        return {**inputs, "attention_mask": nothing, "boundaries": limits}


def reference_token_sums(logits: Tensor, target_ids: Tensor, is_from: Tensor | None = None) -> TokenSums:
    """Sums of logits [N, V] against target_ids [N], computed in fp32; `is_from` as in MicroBatch."""
    stats = reference_token_stats(logits, target_ids)
    return _token_sums(stats.sum(0), target_ids, stats.detach(), is_from)


def _token_sums(sums: Tensor, target_ids: Tensor, stats: Tensor | None, is_from: Tensor | None) -> TokenSums:
    """TokenSums of the sums [3] of stats [N, 3]; without `stats` or `is_from` not by source."""
    nll, entropy, correct = sums.unbind()
    by_source = None if stats is None or is_from is None else sums_by_source(stats, is_from)
    return TokenSums(nll, entropy.detach(), correct.detach(), _count(target_ids), by_source)


def sums_by_source(stats: Tensor, is_from: Tensor) -> Tensor:
    """[S, 4] fp32: the sums over each source's tokens of stats [N, 3], and their number; is_from [N, S] bool.

    Selected and added up, not by `index_add_`: on a GPU that has no fixed order of addition.
    """
    sums = torch.where(is_from[:, :, None], stats[:, None], 0.0).sum(0)
    return torch.cat([sums, is_from.sum(0)[:, None]], dim=1)


def reference_token_stats(logits: Tensor, target_ids: Tensor) -> Tensor:
    """[N, 3] of logits [N, V] and target_ids [N], computed in fp32; only the first column has a gradient."""
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, target_ids[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        correct = (logits.argmax(-1) == target_ids).float()
    return torch.stack([nll, entropy, correct], dim=1)


def _count(target_ids: Tensor) -> Tensor:
    """Created on the device: copying a number there would block the host."""
    return torch.full((), float(len(target_ids)), device=target_ids.device)


def _base(model: nn.Module) -> Any:
    """The causal model below PEFT's wrapper."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
