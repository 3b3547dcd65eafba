"""The dense network of a recommender: towers over embeddings and dense columns, and layers over both."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capstan.recommendation.training_config import DenseOptimizerSettings, NetworkSettings


class RankingNetwork(nn.Module):
    """`forward(embeddings [B, E], dense [B, C])` gives logits `[B]`.

    Each tower's layers are Linear, batch normalisation if asked for, activation; those on top have no
    normalisation. torch's default initialisation, from `seed`.
    """

    def __init__(
        self, settings: NetworkSettings, *, num_embedded: int, num_dense: int, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.over_slots = _layers(num_embedded, settings.slots, settings, normalised=settings.batch_norm)
            self.over_dense = _layers(num_dense, settings.dense, settings, normalised=settings.batch_norm)
            width = (settings.slots or (num_embedded,))[-1] + (settings.dense or (num_dense,))[-1]
            self.top = _layers(width, settings.top, settings, normalised=False)
            self.logit = nn.Linear((settings.top or (width,))[-1], 1)

    def forward(self, embeddings: Tensor, dense: Tensor) -> Tensor:
        both = torch.cat((self.over_slots(embeddings), self.over_dense(dense)), 1)
        return self.logit(self.top(both))[:, 0]  # type: ignore[no-any-return]


def _layers(
    width: int, sizes: Sequence[int], settings: NetworkSettings, *, normalised: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in sizes:
        layers.append(nn.Linear(width, size))
        if normalised:
            layers.append(nn.BatchNorm1d(size))
        if settings.activation == "relu":
            layers.append(nn.ReLU())
        width = size
    return nn.Sequential(*layers)


def multiplications(settings: NetworkSettings, *, num_embedded: int, num_dense: int) -> int:
    """Multiply-adds of one sample's forward pass: the sizes of all weight matrices."""
    total = 0
    ends = []
    for width, sizes in ((num_embedded, settings.slots), (num_dense, settings.dense)):
        for size in sizes:
            total += width * size
            width = size
        ends.append(width)
    width = sum(ends)
    for size in (*settings.top, 1):
        total += width * size
        width = size
    return total


def dense_optimizer(network: nn.Module, settings: DenseOptimizerSettings) -> torch.optim.Optimizer:
    """torch's optimizer of that name."""
    parameters, lr, decay = network.parameters(), settings.lr, settings.weight_decay
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
    if settings.kind == "adagrad":
        return torch.optim.Adagrad(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
