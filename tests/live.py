"""How many bytes of tensors live at once."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`most` bytes of the tensors that are made within it live at the same time.

    What one of this project's operators makes and frees inside is not seen, only its results are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._living: set[int] = set()

    def restart(self) -> None:
        """Forget what lived before: `most` starts with what lives now."""
        self.most = self._now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                self._track(result)
        return results

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return
        self._living.add(key)
        self._now += size
        self.most = max(self.most, self._now)

        def end() -> None:
            self._living.discard(key)
            self._now -= size

        weakref.finalize(storage, end)
