"""Which samples lie on which device. NumPy only; the same seed deals the same samples everywhere."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capstan.errors import UsageError, unknown_name

SCHEMES = ("iid", "labels", "dirichlet")


def partition(
    labels: NDArray[np.integer],
    num_devices: int,
    *,
    scheme: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    min_samples: int = 1,
) -> list[NDArray[np.int64]]:
    """Indices of each device's samples: every sample on exactly one device.

    `iid` deals shuffled samples evenly; `labels` sorts them by label and cuts the row evenly, so that a
    device knows a label or two; `dirichlet` divides each label by shares drawn from Dirichlet(alpha, …)
    and then moves samples from the largest device to those with fewer than `min_samples`.

    Raises:
        UsageError: the scheme is unknown, or there are too few samples.

    Source: Dirichlet shares, Hsu et al., arXiv 1909.06335.
    """
    count = len(labels)
    if num_devices < 1 or count < num_devices * max(1, min_samples):
        raise UsageError(
            f"{count} samples do not give {num_devices} devices {max(1, min_samples)} each: take fewer."
        )
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(count)
    if scheme == "iid":
        return [np.sort(part) for part in np.array_split(order, num_devices)]
    if scheme == "labels":
        by_label = order[np.argsort(labels[order], kind="stable")]
        return [np.sort(part) for part in np.array_split(by_label, num_devices)]
    if scheme == "dirichlet":
        return _dirichlet(labels, order, num_devices, alpha, max(1, min_samples), rng)
    raise unknown_name("partition", scheme, SCHEMES)


def balanced_batches(sizes: Sequence[int], total: int) -> list[int]:
    """A batch for each device in proportion to its samples, about `total` together: ceil(total n_i / n).

    Where devices have very different numbers of samples, equal batches make as many iterations as the largest
    needs, each with few samples of the others; these make them as many as those of one machine.
    """
    if total < 1:
        raise UsageError(f"A batch has at least one sample, found {total} for all devices together.")
    count = max(1, sum(sizes))
    return [max(1, -(-total * size // count)) for size in sizes]


def _dirichlet(
    labels: NDArray[np.integer],
    order: NDArray[np.int64],
    num_devices: int,
    alpha: float,
    min_samples: int,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    if not (np.isfinite(alpha) and alpha > 0):
        raise UsageError(f"alpha of a Dirichlet partition must be above 0, found {alpha}.")
    parts: list[list[int]] = [[] for _ in range(num_devices)]
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ends = np.floor(np.cumsum(rng.dirichlet([alpha] * num_devices)) * len(members) + 0.5).astype(int)
        for part, chosen in zip(parts, np.split(members, ends[:-1].clip(0, len(members))), strict=True):
            part.extend(chosen.tolist())
    for part in parts:
        while len(part) < min_samples:
            part.append(max(parts, key=len).pop())
    return [np.array(sorted(part), np.int64) for part in parts]
