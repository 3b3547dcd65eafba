"""Progress on standard error: a live line on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[float, str], None]
"""Takes the share that is done, 0 to 1, and a few words on how it goes."""

_PLAIN_EVERY_S = 10.0


@contextmanager
def show_progress(task: str, console: Console) -> Iterator[Report]:
    """Show how far `task` is, with the time that it will still take."""
    if not console.is_terminal:
        yield _plain(task, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        identity = bar.add_task(task, total=1.0, words="")
        yield lambda share, words: bar.update(identity, completed=share, words=words)


def _plain(task: str, console: Console) -> Report:
    start_s = time.monotonic()
    last_s = start_s

    def report(share: float, words: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s < _PLAIN_EVERY_S:
            return
        last_s = now_s
        left_s = (now_s - start_s) * (1 - share) / share if share else 0.0
        console.print(f"{task} {share:.0%} {words}, {left_s:.0f} s left", highlight=False)

    return report
