"""PowerSGD: the average of matrices of gradients, of low rank, with error feedback."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capstan.codecs import Compressor, Identity
from capstan.codecs.low_rank import back, is_worth_it, orthonormal, project, restore, starting_factor
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import split
from capstan.errors import UsageError
from capstan.transport import Conversation, Operation
from capstan.transport.collectives import average


class PowerSGD(Algorithm):
    """Every matrix M of gradients becomes P Q^T of a given rank, averaged in two halves.

        M_i = g_i + e_i;  P = orthonormal(mean_i M_i Q);  Q = mean_i M_i^T P;  g = P Q^T;  e_i = M_i - g

    16-bit gradients are worked on, and cross, in float32: sums of a matrix's rows leave float16's range.
    Vectors, and matrices whose factors would be larger, are averaged as they are. What has more
    dimensions is a matrix of its first and all other ones.

    Source: Vogels et al., arXiv 1905.13727. Unlike PyTorch's hook, which hung on gloo with several
    buckets, nothing is sent from a callback.
    """

    name = "powersgd"
    exchanges_gradients = True
    needs_optimizer = False

    def __init__(self, rank: int = 4) -> None:
        if rank < 1:
            raise UsageError(f"The rank of a factor is at least 1, found {rank}.")
        self.rank = rank
        self._exact = Compressor(Identity())
        self._factors: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}

    @property
    def description(self) -> str:
        return f"{self.name}: rank {self.rank}"

    @property
    def carries_all_values(self) -> bool:
        return False  # a factor mixes them, and the error would keep them

    def exchange(
        self, talk: Conversation, values: Tensor, shapes: Sequence[tuple[int, ...]], key: str
    ) -> Operation:
        gradients, values = values, values.to(torch.promote_types(values.dtype, torch.float32))
        error = self._errors.get(key)
        if error is not None and error.shape == values.shape:
            values.add_(error.to(values.device))
        views = split(values, shapes)
        matrices = {at: _matrix(view) for at, view in enumerate(views) if self._is_factored(view)}
        plain = [view.reshape(-1) for at, view in enumerate(views) if at not in matrices]
        factors = {at: self._factor(f"{key}/{at}", matrix) for at, matrix in matrices.items()}

        first = [project(matrix, factors[at]).reshape(-1) for at, matrix in matrices.items()]
        sent = torch.cat([*first, *plain])
        yield from average(talk, sent, compressor=self._exact, key=key)
        parts = split(sent, [*((len(each), self.rank) for each in matrices.values()), *map(_shape, plain)])
        bases = {at: orthonormal(part) for at, part in zip(matrices, parts, strict=False)}
        wanted = values.clone()
        for target, part in zip(plain, parts[len(matrices) :], strict=True):
            target.copy_(part)

        if matrices:
            second = torch.cat([back(each, bases[at]).reshape(-1) for at, each in matrices.items()])
            yield from average(talk, second, compressor=self._exact, key=key)
            halves = split(second, [(each.shape[1], self.rank) for each in matrices.values()])
            for (at, matrix), factor in zip(matrices.items(), halves, strict=True):
                matrix.copy_(restore(bases[at], factor))
                self._factors[f"{key}/{at}"] = factor.nan_to_num(0.0, 0.0, 0.0)
        if gradients is not values:
            gradients.copy_(values)
        self._errors[key] = wanted.sub_(values).nan_to_num_(0.0, 0.0, 0.0)
        # What was averaged as it is owes nothing.
        for view in (each for at, each in enumerate(split(wanted, shapes)) if at not in matrices):
            view.zero_()

    def sent_elements(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """How many numbers of gradients of such shapes each of its averages takes."""
        views = [torch.empty(shape, device="meta") for shape in shapes]
        matrices = [_matrix(view).shape for view in views if self._is_factored(view)]
        plain = sum(view.numel() for view in views if not self._is_factored(view))
        first = plain + self.rank * sum(rows for rows, _ in matrices)
        return [first, self.rank * sum(columns for _, columns in matrices)] if matrices else [first]

    def _is_factored(self, view: Tensor) -> bool:
        matrix = _matrix(view) if view.dim() > 1 and view.numel() else None
        return matrix is not None and is_worth_it(matrix.shape[0], matrix.shape[1], self.rank)

    def _factor(self, key: str, matrix: Tensor) -> Tensor:
        known = self._factors.get(key)
        if known is None or known.shape[0] != matrix.shape[1]:
            known = starting_factor(matrix.shape[1], self.rank, seed=zlib.crc32(key.encode()))
        return known.to(matrix)

    def rescale(self, factor: float) -> None:
        for error in self._errors.values():
            error.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "factors": {key: each.clone() for key, each in self._factors.items()},
            "errors": {key: each.clone() for key, each in self._errors.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factors = {key: each.clone() for key, each in state["factors"].items()}
        self._errors = {key: each.clone() for key, each in state["errors"].items()}


def _matrix(view: Tensor) -> Tensor:
    return view.view(view.shape[0], -1)


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
