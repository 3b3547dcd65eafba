"""What to place where and what it would cost: decided from shapes, without moving a tensor."""

from capstan.generation.planning.batching import Block, BlockShape, Length
from capstan.generation.planning.placement import TIERS, Placement, Tier

__all__ = ["TIERS", "Block", "BlockShape", "Length", "Placement", "Tier"]
