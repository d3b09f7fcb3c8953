"""LoRA layers that share an input: one product with their joint frozen weight, one with all their A.

y = x W^T + bias + scaling * dropout(x) A^T B^T, forward and backward as plain functions, for autograd
functions to call. All layers see the same dropout noise on the input.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.ops import operators
from finetune.ops.adapter_weights import AdapterCopies, in_dtype, joined, pass_on_gradient
from finetune.ops.base_weights import BaseWeights
from finetune.ops.dropout import draw_start, dropped_share
from finetune.ops.quantized import multiply


class Call(NamedTuple):
    """What the forward pass of a projection and its backward pass use besides their inputs."""

    a: Tensor
    """[R, in]: the A of all adapted layers in the data type of the products; R is the sum of their ranks"""
    bs: list[Tensor]
    """[out, r]: the B of each adapted layer"""
    factors: list[float]
    """What each layer's share is multiplied by: its scaling, and what dropout leaves of it"""
    noise: tuple[Tensor, int] | None
    """Which numbers of the input are dropped: the pool of masks, and where it is read from"""


class Projection:
    """Linear layers of one input, with frozen weights, each with a LoRA adapter or without.

    x [T, in], y [T, out]: the layers' outputs side by side.
    """

    def __init__(self, layers: Sequence[Any], keep_joined: bool = True) -> None:
        """`layers` are PEFT's LoRA layers, each with one active adapter and equal dropout, or plain ones.

        `keep_joined` is as in BaseWeights.
        """
        self.base = BaseWeights([getattr(layer, "base_layer", layer) for layer in layers], keep_joined)
        ends = [*accumulate(self.base.sizes)]
        adapted = [number for number, layer in enumerate(layers) if isinstance(layer, LoraLayer)]
        self.lora_layers: list[Any] = [layers[number] for number in adapted]
        self._outputs = [slice(ends[number] - self.base.sizes[number], ends[number]) for number in adapted]
        self._names: list[str] = [layer.active_adapters[0] for layer in self.lora_layers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B."""
        pairs = list(zip(self.lora_layers, self._names, strict=True))
        return [
            *(layer.lora_A[name].weight for layer, name in pairs),
            *(layer.lora_B[name].weight for layer, name in pairs),
        ]

    def is_ready(self) -> bool:
        """Whether the adapters that it was built with are the active ones, none is merged, and the layers see
        the same dropout."""
        return (
            all(
                layer.active_adapters == [name] and not (layer.disable_adapters or layer.merged)
                for layer, name in zip(self.lora_layers, self._names, strict=True)
            )
            and len({*self._dropouts()}) <= 1
        )

    def _dropouts(self) -> list[float]:
        modules = [
            layer.lora_dropout[name] for layer, name in zip(self.lora_layers, self._names, strict=True)
        ]
        return [float(x.p) if isinstance(x, nn.Dropout) and x.training else 0.0 for x in modules]

    def begin(self, dtype: torch.dtype, copies: AdapterCopies | None = None) -> Call | None:
        """Draw the noise, and get the adapters' weights, for one forward pass; None without adapters."""
        if not self.lora_layers:
            return None
        parameters, count = self.parameters, len(self.lora_layers)
        weights = in_dtype(parameters, dtype) if copies is None else copies.of(parameters, dtype)
        a, rate = joined(weights[:count]), self._dropouts()[0]
        noise = (operators.noise_pool(rate, dtype, a.device), draw_start()) if rate > 0 else None
        factors = [
            layer.scaling[name] / (1 - dropped_share(rate))
            for layer, name in zip(self.lora_layers, self._names, strict=True)
        ]
        return Call(a, weights[count:], factors, noise)

    def forward(
        self, x: Tensor, call: Call | None, int8_matmul: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """y, and for the backward pass u [T, R] = dropout(x) A^T without dropout's factor.

        With `int8_matmul`, bitsandbytes multiplies int8 weights by int8 activations.
        """
        if int8_matmul:
            y = torch.cat([multiply(x, base, True) for base in self.base.bases], dim=1)
        else:
            y = F.linear(x, self.base.dequantize(x.dtype), self.base.bias(x.dtype))
        if call is None:
            return y, None
        u = x @ call.a.t() if call.noise is None else operators.dropped_product(x, call.a, *call.noise)
        for y_part, u_part, b, factor in self._by_layer(y, u, call):
            y_part.addmm_(u_part, b.t(), alpha=factor)
        return y, u

    def input_gradient(self, dy: Tensor, v: Tensor | None, call: Call | None) -> Tensor:
        """The gradient of x."""
        dx = dy @ self.base.dequantize(dy.dtype)
        if call is None or v is None:
            return dx
        if call.noise is None:
            return dx.addmm_(v, call.a)
        operators.add_dropped(dx, v, call.a, *call.noise)
        return dx

    def gradients_of_b(
        self, dy: Tensor, u: Tensor | None, call: Call | None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """v [T, R] = factor * dy B, which the other gradients follow from, and the gradients of all B."""
        if call is None or u is None:
            return None, []
        v, parameters = dy.new_empty(u.shape), self.parameters[len(call.bs) :]
        of_b: list[Tensor | None] = []
        for (dy_part, u_part, b, factor), v_part, parameter in zip(
            self._by_layer(dy, u, call), torch.split(v, _ranks(call), dim=1), parameters, strict=True
        ):
            v_part.addmm_(dy_part, b, beta=0, alpha=factor)
            of_b += pass_on_gradient([parameter], (u_part.t() @ dy_part).t(), factor)
        return v, of_b

    def gradients_of_a(self, v: Tensor | None, x: Tensor, call: Call | None) -> list[Tensor | None]:
        """The gradients of all A."""
        if call is None or v is None:
            return []
        product = v.t() @ x if call.noise is None else operators.dropped_sum(v, x, *call.noise)
        return pass_on_gradient(self.parameters[: len(call.bs)], product, 1.0)

    def _by_layer(self, y: Tensor, u: Tensor, call: Call) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """The parts of y [T, out] and u [T, R] that belong to each adapted layer, its B, and its factor."""
        y_parts = [y[:, outputs] for outputs in self._outputs]
        return zip(y_parts, torch.split(u, _ranks(call), dim=1), call.bs, call.factors, strict=True)


def _ranks(call: Call) -> list[int]:
    return [b.shape[1] for b in call.bs]
