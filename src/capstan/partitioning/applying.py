"""`apply` writes a table in buckets and switches to it; `rollback` switches back."""

import json
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError
from capstan.partitioning.reading import Key
from capstan.partitioning.scattering import scatter
from capstan.partitioning.tables import (
    FORMAT,
    MANIFEST,
    VERSION,
    Layout,
    Table,
    open_table,
    read_batches,
    read_manifest,
    state_of,
)
from capstan.storage import write_atomically


def apply(
    table: Table, key: Key, into: Path | str, *, num_buckets: int = 16, is_key_stored: bool = True
) -> Table:
    """Write a bucketed copy of a table's source and switch to it; the source stays as it is.

    The rows go to a folder of their own, whose name no reader knows before the manifest, written atomically,
    says it: who stops in the middle finds the layout that was there before.

    Args:
        table: what to lay out.
        key: read from the function that the jobs use.
        into: the folder of the laid-out table.
        num_buckets: two tables can be joined without a shuffle if their numbers are equal, or one divides the
            other.
        is_key_stored: keep the key as a column, where its type is plain, so that no job computes it again.

    Raises:
        UsageError: the key may change without its identity showing it.
        DoesNotFit: the disk is full; nothing was switched.
    """
    if not key.is_reusable:
        raise UsageError(
            f"The key {key} may change from run to run: {'; '.join(key.reasons)}. "
            "A layout by it would be wrong."
        )
    into = Path(into)
    state = state_of(table.source)
    previous = read_manifest(into) if (into / MANIFEST).is_file() else None
    data = f"rows-{secrets.token_hex(4)}"
    try:
        done = scatter(
            read_batches(Table(name=table.name, source=table.source).files()),
            lambda row: key.function(table.to_row(row)),
            into / data,
            num_buckets=num_buckets,
            key_column=f"__key_{key.identity}" if is_key_stored else None,
        )
        if state_of(table.source) != state:
            raise InputError(
                f"{table.source} changed while it was laid out; apply again when nobody writes to it."
            )
        layout = Layout(
            key=key.identity,
            key_text=str(key),
            num_buckets=num_buckets,
            data=data,
            key_column=done.key_column,
            num_rows={str(bucket): rows for bucket, rows in sorted(done.num_rows.items())},
        )
        (into / data).mkdir(parents=True, exist_ok=True)  # of an empty table
        _switch(into, _manifest(table, layout, state, previous))
    except BaseException:
        shutil.rmtree(into / data, ignore_errors=True)
        raise
    _sweep(into)
    return open_table(into, name=table.name, row=table.row)


def rollback(folder: Path | str) -> Table:
    """Switch back to the layout before, or to the source where there was none.

    Raises:
        InputError: nothing was applied.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["layout"] is None:
        raise InputError(f"{folder} is rolled back to its source already; there is nothing before that.")
    before = manifest["previous"] or {**manifest, "layout": None}
    _switch(folder, {**before, "previous": None})
    return open_table(folder)


def _manifest(
    table: Table, layout: Layout, state: list[list[Any]], previous: dict[str, Any] | None
) -> dict[str, Any]:
    if previous is not None:
        previous = {**previous, "previous": None}  # one step back is kept
    return {
        "format": FORMAT,
        "version": VERSION,
        "table": table.name,
        "source": str(table.source.resolve()),
        "source_state": state,
        "layout": asdict(layout),
        "previous": previous if previous and previous["layout"] else None,
    }


def _switch(folder: Path, manifest: dict[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def _sweep(folder: Path) -> None:
    """Remove rows that neither the layout nor the one before it uses."""
    manifest = read_manifest(folder)
    used = {each["layout"]["data"] for each in (manifest, manifest["previous"]) if each and each["layout"]}
    for path in folder.glob("rows-*"):
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
