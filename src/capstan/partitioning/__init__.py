"""partitioning: which key should data be stored by, so that later joins and groups need no shuffle?

Keys are read out of the user's own functions: `read_key`.

Source: Lachesis, arXiv 2006.16529.
"""

from capstan.partitioning.reading import Key, read_key
from capstan.partitioning.terms import Term

__all__ = ["Key", "Term", "read_key"]
