"""How much tensor memory is alive: an accounting of torch's own allocations."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, follows every storage that torch operations of this thread create.

    `peak_bytes` is the most that was alive at once; storages that existed before do not count. It works on
    the meta device too, where it tells what a computation *would* take.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: WeakKeyDictionary[torch.UntypedStorage, Any] = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch.tensor(…) makes its storage outside of dispatch and lifts it in by this operation.
        is_new = func is torch.ops.aten.lift_fresh.default
        for tensor in () if is_new else _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), None)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size_bytes = storage.nbytes()

        def forget(_: Any) -> None:
            self.live_bytes -= size_bytes

        self._known[storage] = ref(storage, forget)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among what an operation takes or gives: schemas nest nothing but lists and tuples.

    torch's own tree of leaves does the same at several times the price, once an operation.
    """
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
