"""Memory that runs out where a test wants it to: at an operator call, or where more bytes are alive than a GPU has."""

import weakref
from collections.abc import Container
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.63 GiB"


class RunOutAt(TorchDispatchMode):
    """While entered, counts operator calls (backward and recomputation too) and fails those chosen."""

    def __init__(self, at: Container[int] = ()) -> None:
        super().__init__()
        self.at = at
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if call in self.at:
            raise torch.OutOfMemoryError(MESSAGE)
        return func(*args, **(kwargs or {}))


class SmallGpu(TorchDispatchMode):
    """While entered, follows every new storage from birth to death, and fails the operator that takes more than there is.

    Args:
        num_bytes: of the GPU; None for one that never runs out.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.used = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._follow(storage)
        self.peak = max(self.peak, self.used)
        if self.num_bytes is not None and self.used > self.num_bytes:
            raise torch.OutOfMemoryError(MESSAGE)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()

        def died() -> None:
            del self._alive[key]
            self.used -= num_bytes

        self.used += num_bytes
        self._alive[key] = weakref.finalize(storage, died)
