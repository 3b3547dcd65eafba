"""partitioning: which key should data be stored by, so that later joins and groups need no shuffle?

    with record("runs.db"): ...       # what runs: keys, sizes, seconds
    print(advise("runs.db").explain())  # a layout and its price, or none

Keys are read out of the user's own functions: `read_key`.

Source: Lachesis, arXiv 2006.16529.
"""

from capstan.partitioning.advice import ADVISORS, Advice, advise
from capstan.partitioning.cost import Rates, Workload, workload
from capstan.partitioning.history import History, JobRun, Side
from capstan.partitioning.reading import Key, read_key
from capstan.partitioning.recording import record
from capstan.partitioning.terms import Term

__all__ = [
    "ADVISORS",
    "Advice",
    "History",
    "JobRun",
    "Key",
    "Rates",
    "Side",
    "Term",
    "Workload",
    "advise",
    "read_key",
    "record",
    "workload",
]
