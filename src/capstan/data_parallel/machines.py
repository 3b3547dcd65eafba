"""Which ranks share a machine."""

import socket

from capstan.transport import Group


def machines_of(group: Group) -> list[list[int]]:
    """The ranks of each machine, told apart by host name; in the order of their first ranks. All must
    call it.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, name in enumerate(group.gather(socket.gethostname())):
        ranks_of.setdefault(name, []).append(rank)
    return list(ranks_of.values())
