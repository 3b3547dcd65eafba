"""Batch files: a file of requests in, a file of answers out, every line answered exactly once."""

from capstan.generation.batch.journal import Journal
from capstan.generation.batch.shard import WHOLE, Shard

__all__ = ["WHOLE", "Journal", "Shard"]
