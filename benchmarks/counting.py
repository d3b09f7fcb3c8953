"""Count what a program asks of a device: operations, bytes, live bytes, and waits of the host for it."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
# Products with dropout on one operand: beside the product, they read noise for each of its numbers.
DROPPED_PRODUCTS = {"finetune::dropped_product", "finetune::dropped_sum", "finetune::add_dropped"}
# They make memory and launch nothing.
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
FREE |= {"aten::detach", "aten::lift", "aten::lift_fresh", "aten::_local_scalar_dense"}
# They write a tensor that they do not read.
PURE_WRITES = {
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::random_",
    "aten::uniform_",
    "aten::normal_",
}
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

    An operation is a call that makes or changes memory; views are none. With `fake`, tensors on the device
    are fake and those on the CPU are real. Where the program then needs a number from the device, it gets
    True or 0, as if every check had passed.

    `decompositions` give the operations that an operator consists of on the device, by its name; or
    NotImplemented where it counts as it is.
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
        self._device, self.decompositions, self._fake = device, dict(decompositions or {}), fake
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

    def launch(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A kernel that is no operator of torch reads or writes these tensors."""
        self._current.operations += 1
        self._current.by_name[name] += 1
        self._current.traffic += _bytes(tensors)
        self._current.traffic_by_name[name] += _bytes(tensors)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = _operator(function)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        inputs = self._on_device(given)
        if inputs and operator.is_view:
            return function(*args, **kwargs)
        if inputs and operator.name in self.decompositions:
            with self:
                decomposed = self.decompositions[operator.name](*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if inputs and operator.name in WAITS:
            self.wait()
        result = self._compute(operator, function, args, kwargs, inputs, given)
        outputs = self._on_device(_tensors([result]))
        if inputs or outputs:
            written = self._on_device(_tensors(operator.written(args, kwargs)))
            self._count(operator, inputs, written, outputs)
        if _copies_between_devices(operator.name, given, result) and not _is_non_blocking(
            function, args, kwargs
        ):
            self.wait()
        for tensor in outputs:
            self._track(tensor)
        return result

    def _on_device(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [x for x in tensors if x.device.type == self._device]

    def _compute(
        self,
        operator: "_Operator",
        function: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        given: list[Tensor],
    ) -> Any:
        if self._fake is None:
            return function(*args, **kwargs)
        device, context = kwargs.get("device"), self._fake  # type: Any, Any
        if not inputs and (device is None or device.type != self._device):
            context = nullcontext()
        elif not all(isinstance(x, FakeTensor) for x in given):
            # Real tensors, on the CPU, become fake: torch would otherwise compute with them on the card.
            args, kwargs = tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
        try:
            with context:
                return function(*args, **kwargs)
        except DataDependentOutputException:
            return True if operator.name == "aten::equal" or given[0].dtype == torch.bool else 0

    def _count(
        self, operator: "_Operator", inputs: list[Tensor], written: list[Tensor], outputs: list[Tensor]
    ) -> None:
        known = {_storage(x) for x in inputs}
        made = [x for x in outputs if _storage(x) not in known]
        changed = [*made, *written]
        if operator.name in FREE or all(x.numel() == 0 for x in changed):
            return
        self._current.operations += 1
        self._current.by_name[operator.name] += 1
        traffic = _traffic(operator, inputs, written, made)
        self._current.traffic += traffic
        self._current.traffic_by_name[operator.name] += traffic

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


class _Operator(NamedTuple):
    name: str
    is_view: bool
    is_out: bool
    """It writes into given tensors without reading them"""
    writes: tuple[tuple[int, str], ...]
    """The places and names of the arguments that it changes"""

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        return [args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes]


@cache
def _operator(function: Any) -> _Operator:
    schema = function._schema
    returned = [value.alias_info for value in schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    name, is_out = function.name().partition(".")[0], function._overloadname.endswith("out")
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return _Operator(name, is_view, is_out, writes)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values, and in their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _traffic(operator: _Operator, inputs: list[Tensor], written: list[Tensor], made: list[Tensor]) -> int:
    name = operator.name
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
    if operator.is_out or name in PURE_WRITES:
        is_read -= {_storage(x) for x in written}
    return _bytes(x for x in inputs if _storage(x) in is_read) + _bytes([*written, *made])


def _bytes(tensors: Any) -> int:
    """The bytes of these tensors, each place once: a tensor that is given twice, or expanded, counts once."""
    places = {(_storage(x), x.storage_offset(), x.numel()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in places.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copies_between_devices(name: str, given: list[Tensor], result: Any) -> bool:
    if name == "aten::copy_":
        return given[0].device.type != given[1].device.type
    return name == "aten::_to_copy" and given[0].device.type != result.device.type


def _is_non_blocking(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("non_blocking", False))
