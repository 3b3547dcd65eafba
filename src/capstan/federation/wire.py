"""How tensors cross the cut: what is kept, how it is written, and how large that is. NumPy only."""

from dataclasses import dataclass, field
from typing import Literal

from capstan.errors import UsageError, unknown_name
from capstan.federation.index_codes import IndexSpace, code_from_name
from capstan.federation.packets import DENSE, SUPPORT, Sizes, is_size_known, message_sizes
from capstan.federation.sparsifiers import Sparsifier, TopK
from capstan.federation.value_codes import FLOATING, label_type, value_bytes

DOWNLINKS = ("support", "top-k", "dense")


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What is sent for one tensor that crosses, and for the gradient that answers it.

    `sparsifier` None sends everything. The gradient is sent on the support of the tensor (`support`), where
    it is that of the masked network exactly and needs no index; or as its own largest elements (`top-k`, as
    many as the sparsifier keeps, optionally with error feedback), or whole (`dense`).
    """

    sparsifier: Sparsifier | None = field(default_factory=lambda: TopK(keep=0.1))
    downlink: Literal["support", "top-k", "dense"] = "support"
    index: str = "elias-fano"
    value_type: str = "float16"
    has_error_feedback: bool = False

    def __post_init__(self) -> None:
        code_from_name(self.index)
        if self.downlink not in DOWNLINKS:
            raise unknown_name("downlink", self.downlink, DOWNLINKS)
        if self.value_type not in FLOATING:
            raise unknown_name("value type", self.value_type, FLOATING)
        if self.downlink == "top-k" and not isinstance(self.sparsifier, TopK):
            raise UsageError(
                "A downlink of its own top-k keeps what the uplink's top-k keeps: give one there."
            )
        if self.has_error_feedback and self.downlink != "top-k":
            raise UsageError(
                "Error feedback remembers what a sparsified gradient left out. On the support nothing of the "
                "masked network's gradient is left out. Use it with downlink: top-k."
            )

    def forward_index(self) -> str:
        """The index code of the tensor's message."""
        return DENSE if self.sparsifier is None else self.index

    def backward_index(self) -> str:
        """The index code of the gradient's message."""
        if self.sparsifier is None or self.downlink == "dense":
            return DENSE
        return SUPPORT if self.downlink == "support" else self.index

    def space(self, rows: int, width: int) -> IndexSpace | None:
        """What is kept of (rows, width), or None where values decide it."""
        if self.sparsifier is None:
            return IndexSpace(rows, width, rows * width)
        return self.sparsifier.space(rows, width)

    def is_size_known(self, rows: int, width: int) -> bool:
        """Whether sizes depend on counts alone, so that a plan is exact."""
        space = self.space(rows, width)
        return space is not None and is_size_known(self.forward_index(), space)

    def forward_sizes(self, rows: int, width: int) -> Sizes:
        """The tensor's message; of Rice what is expected."""
        return message_sizes(self.forward_index(), self.value_type, self._planned(rows, width))

    def backward_sizes(self, rows: int, width: int) -> Sizes:
        """The gradient's message."""
        index = self.backward_index()
        space = IndexSpace(rows, width, rows * width) if index == DENSE else self._planned(rows, width)
        return message_sizes(index, self.value_type, space)

    def _planned(self, rows: int, width: int) -> IndexSpace:
        # A threshold keeps what it keeps; everything is what it can take.
        return self.space(rows, width) or IndexSpace(rows, width, rows * width)


def label_sizes(rows: int, num_classes: int) -> Sizes:
    """The message of a batch's labels."""
    return Sizes(index=0, values=value_bytes(label_type(num_classes), rows))


def weight_sizes(num_parameters: int) -> Sizes:
    """The message of some layers' weights, float32."""
    return Sizes(index=0, values=value_bytes("float32", num_parameters))
