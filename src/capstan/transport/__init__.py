"""transport: how do bytes cross?

`Ledger` counts every byte by link and content. A `Lane` is one ordered worker for one direction; on a
GPU it has a stream of its own, so that copies run beside compute. A `Group` is processes that work together:
tensors and values pass between them. A `Communicator` is the one thread that speaks to a group, in order;
on it run the operations of `collectives`. `sessions` connect processes that are no group: over any network,
each update applied once.

What holds tensors imports torch, when its name is first used; ledger and sessions do not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from capstan.transport.ledger import Ledger

if TYPE_CHECKING:
    from capstan.transport.communicator import Communicator, Pending
    from capstan.transport.conversation import Conversation, Operation
    from capstan.transport.crossing import cross
    from capstan.transport.group import Group
    from capstan.transport.lanes import Lane, Ticket, stream_of
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

_WITH_TORCH = {
    "Clock": "stopwatch",
    "Communicator": "communicator",
    "Conversation": "conversation",
    "Group": "group",
    "Lane": "lanes",
    "Operation": "conversation",
    "Pending": "communicator",
    "Shape": "shaping",
    "Stopwatch": "stopwatch",
    "Ticket": "lanes",
    "cross": "crossing",
    "stream_of": "lanes",
}


def __getattr__(name: str) -> object:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
