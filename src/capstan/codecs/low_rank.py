"""Matrices of low rank: the arithmetic of PowerSGD, whose halves lie on both sides of an average.

    p = project(m, q)              averaged over ranks
    basis = orthonormal(p)
    q = back(m, basis)             averaged over ranks
    m is nearly restore(basis, q)

With q kept from step to step this is one power iteration a step. Both halves are linear in the matrix, so
averages of small factors are factors of the average.

Source: PowerSGD, Vogels et al., arXiv 1905.13727.
Differs: columns are made orthonormal by a QR factorisation in float32 rather than by Gram-Schmidt.
"""

import torch
from torch import Tensor


def starting_factor(columns: int, rank: int, *, seed: int) -> Tensor:
    """A factor to begin with, float32 (columns, rank): the same on every rank for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, rank, generator=generator)


def project(matrix: Tensor, factor: Tensor) -> Tensor:
    """(rows, columns) and (columns, rank) to (rows, rank)."""
    return matrix @ factor


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, where they span less than their number completed to one."""
    basis: Tensor = torch.linalg.qr(columns.float(), mode="reduced").Q
    return basis.to(columns.dtype)


def back(matrix: Tensor, basis: Tensor) -> Tensor:
    """(rows, columns) and (rows, rank) to (columns, rank)."""
    return matrix.T @ basis


def restore(basis: Tensor, factor: Tensor) -> Tensor:
    """(rows, rank) and (columns, rank) to (rows, columns)."""
    return basis @ factor.T


def low_rank_elements(rows: int, columns: int, rank: int) -> int:
    """The elements of both factors: rank * (rows + columns)."""
    return rank * (rows + columns)


def is_worth_it(rows: int, columns: int, rank: int) -> bool:
    """Whether the factors are smaller than the matrix."""
    return low_rank_elements(rows, columns, rank) < rows * columns
