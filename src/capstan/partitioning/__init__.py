"""partitioning: which key should data be stored by, so that later joins and groups need no shuffle?

    with record("runs.db"): ...       # what runs: keys, sizes, seconds
    print(advise("runs.db").explain())  # a layout and its price, or none

    orders = apply(orders, read_key(by_order), "laid_out/orders")  # in buckets by that key
    verify(work, [orders, lines])     # the same work before and after

Keys are read out of the user's own functions: `read_key`.

Source: Lachesis, arXiv 2006.16529.
"""

from capstan.partitioning.advice import ADVISORS, Advice, advise
from capstan.partitioning.applying import apply, rollback
from capstan.partitioning.cost import Rates, Workload, workload
from capstan.partitioning.history import History, JobRun, Side
from capstan.partitioning.jobs import group, join
from capstan.partitioning.reading import Key, read_key
from capstan.partitioning.recording import record
from capstan.partitioning.tables import Layout, Table, open_table
from capstan.partitioning.terms import Term
from capstan.partitioning.verifying import Verification, query, verify

__all__ = [
    "ADVISORS",
    "Advice",
    "History",
    "JobRun",
    "Key",
    "Layout",
    "Rates",
    "Side",
    "Table",
    "Term",
    "Verification",
    "Workload",
    "advise",
    "apply",
    "group",
    "join",
    "open_table",
    "query",
    "read_key",
    "record",
    "rollback",
    "verify",
    "workload",
]
