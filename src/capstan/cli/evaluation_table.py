"""What `capstan evaluate run` shows: a row for each figure, one for each group's average, and notes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from capstan.evaluation import Difference, Evaluated
    from capstan.plans import Plan, Trace


def show_runs(
    done: Sequence["Evaluated"],
    groups: Sequence[dict[str, Any]],
    plan: "Plan",
    trace: "Trace",
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Print runs and groups as a table for people, or as one JSON object."""
    from capstan.evaluation.run_folder import plain_json, report_of

    reports = [report_of(each) for each in done]
    if as_json:
        accounts = {"plan": plan.to_dict(), "trace": trace.to_dict()}
        shown = {"verb": "evaluate", "output": str(output), "runs": reports, "groups": list(groups)}
        typer.echo(plain_json(shown | accounts))
        return
    table = Table("run", "metric", "value", "95 % interval", "instances", "seconds")
    for report in reports:
        for at, metric in enumerate((report["main_metric"], *report["shown_metrics"])):
            name, seconds = (escape(report["run"]), f"{report['seconds']:.1f}") if at == 0 else ("", "")
            table.add_row(name, metric, *_cells(report["intervals"].get(metric)), seconds)
    for group in groups:
        for metric, figure in group["averages"].items():
            table.add_row(f"group {escape(group['group'])}", metric, *_cells(figure), "")
    console = Console(highlight=False)
    console.print(table)
    for report in reports:
        for note in report["notes"]:
            console.print(f"{report['run'].partition(':')[0]}: {note}", markup=False)
    console.print(f"{output}: {len(reports)} runs.", markup=False)


def _cells(found: dict[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "n/a", "", ""
    return f"{found['mean']:.3f}", f"{found['low']:.3f} … {found['high']:.3f}", f"{found['count']:,}"


def comparison_table(found: list["Difference"]) -> Table:
    """Differences for people."""
    table = Table("run", "metric", "A", "B", "B − A", "95 % interval", "B higher / lower", "sign test p")
    for each in found:
        low, high = each.interval.low, each.interval.high
        table.add_row(
            escape(each.run.partition(":")[0]),
            each.metric,
            f"{each.a:.3f}",
            f"{each.b:.3f}",
            f"{each.interval.mean:+.3f}",
            f"{low:+.3f} … {high:+.3f}" + (" *" if each.is_clear else ""),
            f"{each.num_higher} / {each.num_lower}",
            f"{each.sign_p:.2f}",
        )
    unpaired = [f"{each.run.partition(':')[0]} {each.num_unpaired:,}" for each in found if each.num_unpaired]
    table.caption = (
        f"Instances that only one of both has, left out: {', '.join(unpaired)}" if unpaired else None
    )
    return table
