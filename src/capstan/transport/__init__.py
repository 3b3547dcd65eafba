"""transport: how do bytes cross?

`Ledger` counts every byte by link and content. A `Lane` is one ordered worker for one direction; on a
GPU it has a stream of its own, so that copies run beside compute. A `Group` is processes that work together:
tensors and values pass between them. A `Communicator` is the one thread that speaks to a group, in order;
on it run the operations of `collectives`.
"""

from capstan.transport.communicator import Communicator, Pending
from capstan.transport.conversation import Conversation, Operation
from capstan.transport.crossing import cross
from capstan.transport.group import Group
from capstan.transport.lanes import Lane, Ticket, stream_of
from capstan.transport.ledger import Ledger
from capstan.transport.shaping import Shape
from capstan.transport.stopwatch import Clock, Stopwatch

__all__ = [
    "Clock",
    "Communicator",
    "Conversation",
    "Group",
    "Lane",
    "Ledger",
    "Operation",
    "Pending",
    "Shape",
    "Stopwatch",
    "Ticket",
    "cross",
    "stream_of",
]
