"""`capstan generate`: a file of prompts through a model that may be larger than the memory granted."""

import json
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console

from capstan.cli.progress import Report, show_progress
from capstan.cli.ranks import Ranks
from capstan.errors import InputError, UsageError

if TYPE_CHECKING:
    from capstan.generation.batch.job import BatchFile, BatchReport
    from capstan.generation.batch.shard import Shard
    from capstan.generation.planning.job_plan import JobPlan
    from capstan.generation.runtime.measured import Progress

ModelOption = Annotated[
    Path,
    typer.Option(
        "--model", help="A folder in Hugging Face format: config.json, *.safetensors, tokenizer files."
    ),
]
InputOption = Annotated[
    Path,
    typer.Option(
        "--input",
        help='Requests, one JSON object a line: {"prompt": "…"}, or OpenAI batch lines with custom_id and '
        "body. A line may set max_tokens, temperature, top_k, top_p, seed, stop, n, logprobs, "
        "prompt_logprobs, echo, ignore_eos.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Where answers go, one OpenAI batch response a line, as they are done. Run the same command "
        "again after a stop or a crash: it goes on, and answers every request once.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="cuda, or cpu: then a slice of host memory plays the fast device; auto chooses.")
]
DeviceMemoryOption = Annotated[
    str | None, typer.Option(help="Memory that may be used on the device, as 8GiB. Default: most of it.")
]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(help="Host memory for weights, KV cache and staging, as 32GiB. Default: most of it."),
]
DiskOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder for scratch files, so that the KV cache, activations and quantised weights may go to "
        "disk. Weights in their own bits are read from the model folder and need none."
    ),
]
WeightBitsOption = Annotated[
    int | None, typer.Option(help="16, 8 or 4 bits for weights; default: as they are in the checkpoint.")
]
CacheBitsOption = Annotated[
    int | None, typer.Option(help="16, 8 or 4 bits for keys and values; default: as the checkpoint.")
]
PlaceOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Place a part by hand; may be given several times. weights=device:0.3,host:0.5,disk:0.2  "
        "cache=host  activations=device  attention=host:0.5,device:0.5. What is not placed is planned."
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Answer only the I-th of N shares of the input, as 2/8: start one job for each I, on machines "
        "that need not know each other, and put the outputs together with `capstan merge`.",
    ),
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="New tokens for lines that do not say how many.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Start anew even though the output exists.")
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Print the plan and stop: nothing is loaded, nothing is written.")
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output, everything else on standard error."
    ),
]


def generate(
    model: ModelOption,
    input_file: InputOption,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    device_memory: DeviceMemoryOption = None,
    host_memory: HostMemoryOption = None,
    disk: DiskOption = None,
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    place: PlaceOption = None,
    max_tokens: MaxTokensOption = 128,
    shard: ShardOption = None,
    overwrite: OverwriteOption = False,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of prompts with a model that need not fit on the device.

    Weights, KV cache and activations are placed over device, host memory and disk, and a large block of
    prompts goes through the layers together, so that each weight is moved once for many tokens. See what
    would happen first:

        capstan generate --model DIR --input prompts.jsonl --device-memory 8GiB --explain

    Under torchrun the layers are divided over the ranks, each with its own device and memory.
    """
    # Imported here: torch and transformers take seconds, which `capstan --help` need not.
    from capstan.generation.batch.job import lengths_of, open_journal, prefix_of, read_batch, run_batch
    from capstan.generation.batch.shard import WHOLE, Shard
    from capstan.generation.planning.opening import plan_for
    from capstan.plans import compare
    from capstan.plans import explain as explain_plan

    errors = Console(stderr=True, highlight=False)
    share = Shard.parse(shard) if shard is not None else WHOLE
    quieten_transformers()
    if output is None and not explain:
        raise UsageError("Say where the answers go with --output, or ask only for the plan with --explain.")
    with errors.status("opening the model") if errors.is_terminal else nullcontext():
        planner, torch_device = plan_for(
            model,
            device=device,
            device_memory=device_memory,
            host_memory=host_memory,
            disk=disk,
            weight_bits=weight_bits,
            cache_bits=cache_bits,
            place=place or (),
            group="auto",
        )
        batch = read_batch(input_file, planner.model, max_tokens=max_tokens, shard=share)
    ranks = Ranks(planner.model)
    errors.quiet = not ranks.is_first  # from here on, the first rank speaks for all
    _report_bad_lines(batch, errors)
    if explain:
        if not batch.requests:
            asked = input_file if share == WHOLE else f"Shard {share} of {input_file}"
            raise InputError(f"{asked} has no request that can be answered: nothing to plan.")
        wanted = batch.requests
        plan = planner.plan(lengths_of(wanted), prefix=prefix_of(wanted, planner)).plan
        as_object = {"verb": "generate", "plan": plan.to_dict(), "trace": None} | ranks.accounts(plan, None)
        ranks.say(json.dumps(as_object) if as_json else ranks.one_after_another(explain_plan(plan)))
        return

    def show_plan(opening: "JobPlan") -> None:
        ranks.say(ranks.one_after_another(explain_plan(opening.plan)), err=as_json)

    assert output is not None
    with open_journal(batch, output, planner.model, overwrite=overwrite) as journal:
        if journal.answered:
            errors.print(f"{len(journal.answered):,} requests are answered already; going on with the rest.")
        watch = _Watch(errors, sum(length.new for length in lengths_of(batch.requests)))
        with watch:
            report = run_batch(
                batch,
                journal,
                planner,
                torch_device,
                disk_folder=disk,
                on_plan=show_plan,
                on_loaded=watch.loaded,
                on_progress=watch.generated,
            )
    if as_json:
        ranks.say(json.dumps(_as_json(report, output, share) | ranks.accounts(report.plan, report.trace)))
        return
    if report.plan is not None and report.trace is not None:
        ranks.say(ranks.one_after_another(compare(report.plan, report.trace)))
    ranks.say(_summary(report, output))


def quieten_transformers() -> None:
    """Its advice is for people who call it themselves; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _report_bad_lines(batch: "BatchFile", errors: Console) -> None:
    for bad in batch.bad_lines[:5]:
        errors.print(f"bad line: {bad.reason}", markup=False)
    if len(batch.bad_lines) > 5:
        errors.print(f"… and {len(batch.bad_lines) - 5:,} more; the output has a line for each.")


def _summary(report: "BatchReport", output: Path) -> str:
    parts = [f"{report.num_answered:,} answered"]
    if report.num_errors:
        parts.append(f"{report.num_errors:,} bad lines")
    if report.num_answered_before:
        parts.append(f"{report.num_answered_before:,} had been done before")
    return f"{output}: {', '.join(parts)}."


def _as_json(report: "BatchReport", output: Path, shard: "Shard") -> dict[str, Any]:
    return {
        "verb": "generate",
        "output": str(output),
        "shard": str(shard),
        "num_answered": report.num_answered,
        "num_errors": report.num_errors,
        "num_answered_before": report.num_answered_before,
        "plan": report.plan.to_dict() if report.plan else None,
        "trace": report.trace.to_dict() if report.trace else None,
    }


class _Watch:
    """Progress of a batch job: loading, then tokens."""

    def __init__(self, console: Console, num_tokens: int) -> None:
        self._console, self._num_tokens = console, max(1, num_tokens)
        self._stack = ExitStack()
        self._report: Report | None = None
        self._task = ""

    def loaded(self, done_bytes: int, all_bytes: int) -> None:
        """So many bytes of the checkpoint have been brought to their places."""
        self._show("loading weights", done_bytes / max(1, all_bytes), "")

    def generated(self, progress: "Progress") -> None:
        """A sweep is over."""
        speed = progress.num_generated / progress.seconds if progress.seconds else 0.0
        # Sequences that stop early take their unused tokens with them.
        share = max(progress.num_generated / self._num_tokens, progress.num_finished / progress.num_sequences)
        words = (
            f"{speed:,.0f} tokens/s, sweep {progress.num_sweeps:,}, block of {progress.num_running}, "
            f"{progress.num_finished:,} of {progress.num_sequences:,} done"
        )
        self._show("generating", min(1.0, share), words)

    def _show(self, task: str, share: float, words: str) -> None:
        if task != self._task:
            self._stack.close()
            self._report = self._stack.enter_context(show_progress(task, self._console))
            self._task = task
        assert self._report is not None
        self._report(share, words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
