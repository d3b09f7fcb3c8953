"""Count what a program asks of a device: operations, bytes, live bytes, and how often the host waits for it."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

BLOCK = 512  # bytes: torch's allocator rounds the size of each storage up to a multiple

# Matrix products and attention: their bytes are not traffic beside the products.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"}
PRODUCTS |= {"aten::dot", "aten::mv", "bitsandbytes::int8_linear_matmul"}
PRODUCTS |= {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}
PRODUCTS |= {
    f"aten::_{kind}_attention_{direction}"
    for kind in ("flash", "efficient", "scaled_dot_product_flash", "scaled_dot_product_efficient")
    for direction in ("forward", "backward")
}
PRODUCTS |= {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"}
# Products with dropout on one operand: beside the product, they read one piece of noise for each number of it.
DROPPED_PRODUCTS = {"finetune::dropped_product", "finetune::dropped_sum", "finetune::add_dropped"}
# They make memory and launch nothing.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
FREE |= {"aten::detach", "aten::lift", "aten::lift_fresh", "aten::_local_scalar_dense"}
# They write a tensor that they do not read.
PURE_WRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::random_", "aten::uniform_", "aten::normal_"}
PURE_WRITES |= {"aten::_foreach_copy_", "aten::_foreach_zero_", "aten::bernoulli_"}
# They read or write only the places of a tensor that their indices name.
INDEXED = {"aten::embedding", "aten::gather", "aten::index", "aten::index_select"}
INDEXED_WRITES = {"aten::scatter_add_", "aten::scatter_", "aten::index_put_", "aten::index_add_"}
# Their result on the host depends on numbers on the device.
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


@dataclass
class Totals:
    """What one part of a program asked for."""

    operations: int = 0
    traffic: int = 0
    """Bytes read and written beside matrix products and attention, each operand of an operation once"""
    waits: int = 0
    peak: int = 0
    """The most bytes of storages alive at once, those from before included"""
    by_name: Counter[str] = field(default_factory=Counter)
    """Operations by name"""
    traffic_by_name: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Within it, each operation on tensors of `device` counts for the part that is current.

    An operation is a call that makes or changes memory; views are none. With `fake`, tensors on the device are
    fake and those on the CPU are real. Where the program then needs a number from the device, it gets one: True
    or 0, as if every check had passed.

    `decompositions` give the operations that a library's operator consists of on the device, by its name.
    """

    def __init__(
        self,
        device: str,
        decompositions: dict[str, Callable[..., Any]] | None = None,
        fake: FakeTensorMode | None = None,
    ) -> None:
        super().__init__()
        self.parts: dict[str, Totals] = {}
        self._current = self.parts.setdefault("", Totals())
        self._device, self._decompositions, self._fake = device, decompositions or {}, fake
        self._live: dict[int, int] = {}
        self._live_bytes = 0

    def start(self, name: str) -> None:
        """Count for this part from now on."""
        self._current = self.parts.setdefault(name, Totals())
        self._current.peak = max(self._current.peak, self._live_bytes)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._current
        self.start(name)
        try:
            yield
        finally:
            self._current = before

    def wait(self) -> None:
        """The host waits for the device."""
        self._current.waits += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.name().partition(".")[0]
        inputs = self._on_device((args, kwargs))
        if inputs and name in self._decompositions:
            with self:
                return self._decompositions[name](*args, **kwargs)
        if inputs and name in WAITS:
            self.wait()
        result = self._compute(function, name, args, kwargs, bool(inputs))
        outputs = self._on_device(result)
        if inputs or outputs:
            self._count(function, name, args, kwargs, inputs, outputs)
        if _copies_between_devices(name, args, kwargs, result) and not _is_non_blocking(function, args, kwargs):
            self.wait()
        for tensor in outputs:
            self._track(tensor)
        return result

    def _on_device(self, tree: Any) -> list[Tensor]:
        return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == self._device]

    def _compute(
        self, function: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], has_inputs: bool
    ) -> Any:
        device = kwargs.get("device")
        if self._fake is None or not has_inputs and (device is None or device.type != self._device):
            return function(*args, **kwargs)
        # Real tensors, on the CPU, become fake: torch would otherwise compute with them on the card.
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        try:
            with self._fake:
                return function(*args, **kwargs)
        except DataDependentOutputException:
            return True if name == "aten::equal" or args[0].dtype == torch.bool else 0

    def _faked(self, tensor: Tensor) -> Tensor:
        assert self._fake is not None
        if isinstance(tensor, FakeTensor):
            return tensor
        # Of another object: torch remembers what it made fake, and refuses to swap a remembered parameter.
        return self._fake.from_tensor(tensor.detach())

    def _count(
        self,
        function: Any,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        written = self._on_device(
            [
                args[index] if index < len(args) else kwargs.get(argument.name)
                for index, argument in enumerate(function._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        )
        known = {_storage(x) for x in inputs}
        made = [x for x in outputs if _storage(x) not in known]
        if name in FREE or not made and not written or all(x.numel() == 0 for x in [*made, *written]):
            return
        self._current.operations += 1
        self._current.by_name[name] += 1
        traffic = _traffic(name, inputs, written, made, is_out=function._overloadname.endswith("out"))
        self._current.traffic += traffic
        self._current.traffic_by_name[name] += traffic

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._live:
            return
        self._live[key] = size
        self._live_bytes += size
        self._current.peak = max(self._current.peak, self._live_bytes)

        def ended() -> None:
            self._live_bytes -= self._live.pop(key, 0)

        weakref.finalize(storage, ended)


def _traffic(
    name: str, inputs: list[Tensor], written: list[Tensor], made: list[Tensor], is_out: bool
) -> int:
    if name in PRODUCTS:
        return 0
    if name in DROPPED_PRODUCTS:
        return 2 * max(x.numel() for x in inputs if x.dtype.is_floating_point)
    if name in INDEXED:
        return 2 * _bytes(made) + _bytes(x for x in inputs if not x.dtype.is_floating_point)
    if name in INDEXED_WRITES:
        changes = [x for x in inputs if _storage(x) != _storage(written[0])]
        return _bytes(changes) + 2 * _bytes(x for x in changes if x.dtype == written[0].dtype)
    is_read = {_storage(x) for x in inputs}
    if is_out or name in PURE_WRITES:
        is_read -= {_storage(x) for x in written}
    return _bytes(x for x in inputs if _storage(x) in is_read) + _bytes([*written, *made])


def _bytes(tensors: Any) -> int:
    """The bytes of these tensors, each place once: a tensor that is given twice, or expanded, counts once."""
    places = {(_storage(x), x.storage_offset(), x.numel()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in places.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copies_between_devices(name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> bool:
    if name == "aten::copy_":
        return bool(args[0].device.type != args[1].device.type)
    return name == "aten::_to_copy" and bool(args[0].device.type != result.device.type)


def _is_non_blocking(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("non_blocking", False))
