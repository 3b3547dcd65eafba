"""transport: how do bytes cross?

`Ledger` counts every byte by link and content. A `Lane` is one ordered worker for one direction; on a
GPU it has a stream of its own, so that copies run beside compute. A `Group` is processes that work together:
tensors and values pass between them.
"""

from capstan.transport.crossing import cross
from capstan.transport.group import Group
from capstan.transport.lanes import Lane, Ticket, stream_of
from capstan.transport.ledger import Ledger
from capstan.transport.stopwatch import Stopwatch

__all__ = ["Group", "Lane", "Ledger", "Stopwatch", "Ticket", "cross", "stream_of"]
