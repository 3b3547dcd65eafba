"""Which of some named tensors a computed tensor depends on."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING: frozenset[str] = frozenset()


def _takes_shapes_only(func: Any) -> bool:
    """Whether an operation's result knows no more of its arguments than their shape and dtype."""
    name: str = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


class Origins(TorchDispatchMode):
    """While active, follows named tensors through torch's operations.

    A result depends on whatever an argument depends on, views and what was written in place included.
    `decided` are the names on which a number that Python took out of a tensor depends: what the program did
    next may hang on it, and is not followed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decided: frozenset[str] = _NOTHING
        self._of: WeakKeyDictionary[torch.UntypedStorage, frozenset[str]] = WeakKeyDictionary()

    def name(self, tensor: Tensor, name: str) -> Tensor:
        """The same tensor, which depends on `name` from now on, and on nothing else."""
        self._of[tensor.untyped_storage()] = frozenset({name})
        return tensor

    def of(self, value: Any) -> frozenset[str]:
        """The names on which the tensors in `value` depend."""
        tensors = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        return _NOTHING.union(*(self._of.get(each.untyped_storage(), _NOTHING) for each in tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = _NOTHING if _takes_shapes_only(func) else self.of((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.decided |= names
        for each in tree_leaves(result) if names else ():
            if isinstance(each, Tensor):
                self._of[each.untyped_storage()] = self.of(each) | names
        return result
