"""Decoder layers of Llama's kind as three autograd functions, so that a GPU has few operations to start.

    residual stream -> [norm, q, k and v, rotary positions] -> attention -> [o, sum, norm, gated MLP, sum]

The layers' modules keep all weights and stay what they were: only the forward method of each decoder layer is
replaced. Kept for the backward pass are the two sums of the residual stream, queries, keys and values, the
attention's output, gate and up, and LoRA's thin products. The rest is computed again.
"""

from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from finetune.ops import elementwise, lora, operators
from finetune.ops.adapter_weights import AdapterCopies
from finetune.ops.projection import Call, Projection
from finetune.ops.quantized import LINEARS, compute_dtype, dequantized, dropout_off

# The children of a decoder layer, of its attention and of its MLP: all of them, and no others.
CHILDREN = {
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
TOLERANCE = 5e-2  # the largest relative difference that rounding may cause


def enable(model: nn.Module, keep_joined: bool = True) -> tuple[int, int]:
    """Replace the forward method of each decoder layer that computes the same function as this module.

    `lora` and `elementwise` must be enabled. `keep_joined` is as in BaseWeights.
    Returns the numbers of replaced and of all decoder layers.
    """
    count = num_layers = 0
    for decoder, layers in stacks(model):
        copies = AdapterCopies(decoder)
        fused = [FusedLayer(layer, copies, keep_joined) for layer in layers if _is_candidate(layer)]
        equivalent = [layer for layer in fused if layer.is_equivalent()]
        for layer in fused:
            if layer in equivalent:
                layer.module.forward = layer
            else:
                layer.separate_weights()
        if equivalent:
            copies.start([parameter for layer in equivalent for parameter in layer.parameters])
        count, num_layers = count + len(equivalent), num_layers + len(layers)
    return count, num_layers


def disable(model: nn.Module) -> None:
    """Restore the layers' own forward methods, and give each linear layer a weight of its own again."""
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedLayer):
            del module.forward
            fused.separate_weights()
            fused.copies.stop()


def stacks(model: nn.Module) -> list[tuple[nn.Module, list[Any]]]:
    """Each module that has a list of layers with attention, and these layers."""
    return [
        (module, list(layers))
        for module in model.modules()
        for layers in module.children()
        if isinstance(layers, nn.ModuleList) and any(hasattr(layer, "self_attn") for layer in layers)
    ]


def _is_candidate(layer: Any) -> bool:
    """Whether a layer has the parts of Llama's and no others, each known to compute what Llama's does."""
    for name, children in CHILDREN.items():
        part = getattr(layer, name, None) if name else layer
        if not isinstance(part, nn.Module) or {child for child, _ in part.named_children()} != children:
            return False
    parts = (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
    linears = _linears(layer)
    of_adapters = {
        id(parameter)
        for linear in linears
        if isinstance(linear, LoraLayer)
        for half in (linear.lora_A, linear.lora_B)
        for parameter in half.parameters()
    }
    trained = {id(parameter) for parameter in layer.parameters() if parameter.requires_grad}
    return (
        all(elementwise.is_enabled(part) for part in parts)
        and all(type(linear) in LINEARS or lora.is_ready(linear) for linear in linears)
        and not any(getattr(linear, "int8_matmul", False) for linear in linears)
        and trained <= of_adapters
        and not any(_has_hooks(module) for module in layer.modules() if module is not layer)
    )


def _linears(layer: Any) -> list[Any]:
    """The seven linear layers, with an adapter or without."""
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _has_hooks(module: Any) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


class FusedLayer:
    """The forward method of a decoder layer."""

    def __init__(self, layer: Any, copies: AdapterCopies, keep_joined: bool = True) -> None:
        """`copies` are those of the decoder that the layer belongs to. `keep_joined` is as in BaseWeights."""
        self.module, self.copies = layer, copies
        q, k, v, o, gate, up, down = _linears(layer)
        self.qkv, self.out, self.gate_up, self.down = (
            Projection(layers, keep_joined) for layers in ([q, k, v], [o], [gate, up], [down])
        )
        self.projections = (self.qkv, self.out, self.gate_up, self.down)
        # Modules whose hooks would not run. The others' are those of `in_fp32`, which need not.
        adapted = [linear for linear in _linears(layer) if isinstance(linear, LoraLayer)]
        self._skipped = [layer.self_attn, layer.mlp, *adapted]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapters' weights."""
        return [parameter for projection in self.projections for parameter in projection.parameters]

    def separate_weights(self) -> None:
        """Give each linear layer a weight of its own again."""
        for projection in self.projections:
            projection.base.separate()

    def is_equivalent(self) -> bool:
        """Whether the layer's own method gives the same for random input."""
        layer, weight = self.module, self.module.input_layernorm.weight
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 8, len(weight), generator=generator).to(weight.device, weight.dtype)
        angles = torch.linspace(0, 3, 8 * layer.self_attn.head_dim // 2, device=weight.device).view(1, 8, -1)
        angles = torch.cat([angles, angles], dim=-1)
        positions = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        with torch.no_grad(), dropout_off(layer), dequantized(layer):
            try:
                expected = type(layer).forward(layer, x, attention_mask=None, position_embeddings=positions)
            except Exception:  # it takes other inputs, so it is a different kind of layer
                return False
            if not self._can_compute(x, positions):
                return False
            actual = self._compute(x, self._calls(x), positions)
        return bool((actual - expected).float().norm() <= TOLERANCE * expected.float().norm())

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """[B, T, d] of hidden_states [B, T, d]. The layer's own method runs where this one cannot."""
        if arguments or not self._can_compute(hidden_states, **named):
            own: Tensor = type(self.module).forward(self.module, hidden_states, *arguments, **named)
            return own
        calls = self._calls(hidden_states)
        if self.module.gradient_checkpointing and self.module.training:
            compute = partial(self._compute, calls=calls, **named)
            result: Tensor = self.module._gradient_checkpointing_func(compute, hidden_states)
            return result
        return self._compute(hidden_states, calls, **named)

    def _can_compute(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> bool:
        """Whether there is no cache, one precision for all, and the layer is as it was when enabled."""
        return (
            past_key_values is None
            and position_embeddings is not None
            and position_embeddings[0].shape[-1] == self.module.self_attn.head_dim
            and compute_dtype(x) == x.dtype == position_embeddings[0].dtype
            and all(projection.is_ready() for projection in self.projections)
            and not any(_has_hooks(module) for module in self._skipped)
        )

    def _calls(self, x: Tensor) -> list[Call | None]:
        """What each projection uses in this forward pass."""
        return [projection.begin(x.dtype, self.copies) for projection in self.projections]

    def _compute(
        self,
        x: Tensor,
        calls: list[Call | None],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        **others: Any,
    ) -> Tensor:
        attention, shape = self.module.self_attn, x.shape
        qkv_call, *other_calls = calls
        rows = x.reshape(-1, shape[-1])
        cos, sin = (part.expand(*shape[:2], -1).reshape(len(rows), -1) for part in position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            rows, *heads = _NormQkv.apply(  # type: ignore[no-untyped-call]
                rows, cos, sin, self, qkv_call, *self.qkv.parameters
            )
        attend = AttentionInterface()[attention.config._attn_implementation]
        attended, _ = attend(
            attention,
            *(part.view(*shape[:2], *part.shape[1:]).transpose(1, 2) for part in heads),
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **others,
        )
        parameters = [p for projection in self.projections[1:] for p in projection.parameters]
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = _OutMlp.apply(  # type: ignore[no-untyped-call]
                rows, attended.reshape(len(rows), -1).to(x.dtype), self, other_calls, *parameters
            )
        return result.view(shape)


class _NormQkv(torch.autograd.Function):
    """The first norm, the products with q, k and v, and rotary positions.

    x [T, d] -> x, queries [T, H, D], keys and values [T, K, D]. x is passed through, so that the gradient of
    the residual stream comes here, and one operation adds it to that of the norm. cos, sin [T, D].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, fused: FusedLayer, call: Call | None, *_: nn.Parameter
    ) -> tuple[Tensor, ...]:
        norm, size = fused.module.input_layernorm, fused.module.self_attn.head_dim
        normed, scale = operators.rms_norm(x, norm.weight.to(x.dtype), norm.variance_epsilon)
        qkv, u = fused.qkv.forward(normed, call)
        heads = qkv.view(len(x), -1, size)
        num_queries, num_keys, _ = (outputs // size for outputs in fused.qkv.base.sizes)
        rotated = operators.rotate(heads[:, : num_queries + num_keys], cos, sin, 1)
        values = heads[:, num_queries + num_keys :].contiguous()
        ctx.save_for_backward(x, cos, sin, scale, u)
        ctx.fused, ctx.call = fused, call
        return x, rotated[:, :num_queries], rotated[:, num_queries:], values

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor, dqueries: Tensor, dkeys: Tensor, dvalues: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, cos, sin, scale, u = ctx.saved_tensors
        norm, qkv, call = ctx.fused.module.input_layernorm, ctx.fused.qkv, ctx.call
        weight = norm.weight.to(x.dtype)
        rotated = operators.rotate(torch.cat([dqueries, dkeys], dim=1), cos, sin, -1)
        dy = torch.cat([rotated, dvalues], dim=1).view(len(x), -1)
        v, of_b = qkv.gradients_of_b(dy, u, call)
        of_a = qkv.gradients_of_a(v, operators.apply_rms_norm(x, weight, scale), call) if of_b else []
        if ctx.needs_input_grad[0]:
            dnormed = qkv.input_gradient(dy, v, call)
            dx = operators.rms_norm_backward(x, weight, scale, dnormed, dx)
        return dx, None, None, None, None, *of_a, *of_b


class _OutMlp(torch.autograd.Function):
    """The attention's output layer, the second norm and the gated MLP, with both sums of the residual stream.

    x [T, d] and the attention's result [T, H * D] -> [T, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        fused: FusedLayer,
        calls: list[Call | None],
        *_: nn.Parameter,
    ) -> Tensor:
        norm = fused.module.post_attention_layernorm
        out_call, gate_up_call, down_call = calls
        projected, u_out = fused.out.forward(attended, out_call)
        weight = norm.weight.to(x.dtype)
        total, normed, scale = operators.add_rms_norm(x, projected, weight, norm.variance_epsilon)
        gate_up, u_gate_up = fused.gate_up.forward(normed, gate_up_call)
        y, u_down = fused.down.forward(operators.gated_silu(gate_up), down_call)
        ctx.save_for_backward(attended, total, scale, gate_up, u_out, u_gate_up, u_down)
        ctx.fused, ctx.calls = fused, calls
        return y.add_(total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        attended, total, scale, gate_up, u_out, u_gate_up, u_down = ctx.saved_tensors
        fused, (out_call, gate_up_call, down_call) = ctx.fused, ctx.calls
        weight, dy = fused.module.post_attention_layernorm.weight.to(total.dtype), dy.contiguous()

        v, of_down_b = fused.down.gradients_of_b(dy, u_down, down_call)
        dproduct = fused.down.input_gradient(dy, v, down_call)
        dgate_up, product = operators.gated_silu_backward(gate_up, dproduct)
        of_down_a = fused.down.gradients_of_a(v, product, down_call)
        del dproduct, product

        v, of_gate_up_b = fused.gate_up.gradients_of_b(dgate_up, u_gate_up, gate_up_call)
        normed = operators.apply_rms_norm(total, weight, scale) if of_gate_up_b else total
        of_gate_up_a = fused.gate_up.gradients_of_a(v, normed, gate_up_call)
        dnormed = fused.gate_up.input_gradient(dgate_up, v, gate_up_call)
        dtotal = operators.rms_norm_backward(total, weight, scale, dnormed, dy)

        v, of_out_b = fused.out.gradients_of_b(dtotal, u_out, out_call)
        of_out_a = fused.out.gradients_of_a(v, attended, out_call)
        dattended = fused.out.input_gradient(dtotal, v, out_call)
        of_adapters = (of_out_a, of_out_b, of_gate_up_a, of_gate_up_b, of_down_a, of_down_b)
        return dtotal, dattended, None, None, *chain.from_iterable(of_adapters)
