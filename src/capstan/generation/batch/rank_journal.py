"""One journal for all ranks: the first rank writes it, the others know what it holds."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from capstan.errors import InputError
from capstan.generation.batch.journal import Journal
from capstan.transport import Group


class FollowedJournal:
    """The journal as the other ranks see it: what is appended there, the first rank appends."""

    def __init__(self, answered: set[str]) -> None:
        self.answered = answered

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """The first rank does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_together(
    group: Group, digest: str, open_journal: Callable[[], Journal]
) -> Journal | FollowedJournal:
    """Open a journal on the first rank. All ranks must call it, with the digest of their input.

    Raises:
        InputError: the ranks were given different inputs.
    """
    journal = open_journal() if group.is_first else None
    try:
        others = [rank for rank, each in enumerate(group.gather(digest)) if each != digest]
        if others:
            raise InputError(
                f"Rank {others[0]} reads another input than rank {group.rank}. Give all the same."
            )
        answered = set(group.share(sorted(journal.answered) if journal else None))
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    return journal or FollowedJournal(answered)
