"""A small causal language model as a chain of layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capstan.errors import UsageError


class Embedding(nn.Module):
    """Tokens (samples, tokens) to hidden states (samples, tokens, dim), with learned positions."""

    def __init__(self, vocabulary: int, sequence: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(sequence, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden: Tensor = self.tokens(tokens) + self.positions(positions)
        return hidden


class Layer(nn.Module):
    """Causal attention and a feed-forward part, each after a norm and beside a residual connection."""

    def __init__(self, dim: int, num_heads: int, feed_forward: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, feed_forward), nn.Linear(feed_forward, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        samples, tokens, dim = hidden.shape
        mixed = self.queries_keys_values(self.attention_norm(hidden))
        heads = mixed.view(samples, tokens, 3, self._num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind()
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(samples, tokens, dim))
        added: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return added


def decoder(
    *,
    vocabulary: int,
    sequence: int,
    dim: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    feed_forward: int | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Embedding, layers, and norm with a linear head to logits (samples, tokens, vocabulary).

    The weights depend on the seed only, so every rank builds the same.

    Raises:
        UsageError: heads do not divide the dimension.
    """
    if dim % num_heads:
        raise UsageError(f"{num_heads} heads do not divide a dimension of {dim}. Choose a divisor.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Embedding(vocabulary, sequence, dim),
            *(Layer(dim, num_heads, feed_forward or 2 * dim) for _ in range(num_layers)),
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, vocabulary)),
        )


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each next token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
