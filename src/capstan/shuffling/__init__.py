"""shuffling: a training order as good as a full shuffle, at sequential speed (CorgiPile)."""

from capstan.shuffling.order import STRATEGIES, Order, Piece, Refill, num_steps

__all__ = ["STRATEGIES", "Order", "Piece", "Refill", "num_steps"]
