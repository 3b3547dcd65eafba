"""Whether a model's front looks its token ids up anywhere but in the input embedding.

The rows of the embedding are gathered before the front runs, and the ids that the front is given number those
rows: another table, or a comparison with some special id, would see numbers that mean nothing to it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EMBEDDING = torch.ops.aten.embedding.default
_COPIES = frozenset(
    {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default}
)


class TokenWatch(TorchDispatchMode):
    """Inside its `with` block, notes what is done with `tokens` beside looking up `rows`.

    `other_use` is the first such operation, by name.
    """

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.other_use: str | None = None
        self._rows = rows.untyped_storage().data_ptr()
        self._ids = [tokens]  # and copies of them, kept so that their memory is not used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self._is_id(each) for each in tree_leaves((args, kwargs))):
            if func in _COPIES:
                self._ids.append(result)
            elif not (func.is_view or self._looks_up_rows(func, args)):
                self.other_use = self.other_use or func.name()
        return result

    def _looks_up_rows(self, func: Any, args: Any) -> bool:
        return func is _EMBEDDING and args[0].untyped_storage().data_ptr() == self._rows

    def _is_id(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.is_meta:
            return False
        place = value.untyped_storage().data_ptr()
        return any(place == ids.untyped_storage().data_ptr() for ids in self._ids)
