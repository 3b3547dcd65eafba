"""`capstan serve`: an OpenAI-compatible server over the generation engine."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from capstan.cli.generate import (
    CacheBitsOption,
    DeviceMemoryOption,
    DeviceOption,
    DiskOption,
    ExplainOption,
    HostMemoryOption,
    PlaceOption,
    WeightBitsOption,
    quieten_transformers,
)
from capstan.errors import InputError, UsageError
from capstan.plans import Plan, Trace, compare, parse_bytes
from capstan.plans import explain as explain_plan

if TYPE_CHECKING:
    from capstan.generation.planning.planner import Planner
    from capstan.generation.serving.crew import Counts

_TOKEN_VARIABLE = "CAPSTAN_TOKEN"

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A folder in Hugging Face format: config.json, *.safetensors, tokenizer files.",
    ),
]
HostOption = Annotated[
    str, typer.Option(help="The address to listen on. Beyond this machine a token is needed.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")]
LongestOption = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=4,
        help="Tokens of a prompt and its answer together, at most: so long is every slot. "
        "Default: the model's context, but no more than 2048.",
    ),
]
SlotsOption = Annotated[
    int, typer.Option(min=1, help="Answers that run at a time, at most; fewer if memory is short.")
]
QueueOption = Annotated[
    int,
    typer.Option(
        min=0, help="Answers that may wait for a slot; beyond that clients get 429 and when to come back."
    ),
]
MaxTokensOption = Annotated[
    int, typer.Option(min=1, help="New tokens for requests that do not say how many.")
]
NameOption = Annotated[
    str | None, typer.Option(help="What clients call the model; default: the folder's name.")
]
FilesOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder for /v1/files and /v1/batches. A server that is started over it again goes on with "
        "the batches that were not finished. Without it there are no batches."
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        help=f"A file that holds the token which clients must show; or set {_TOKEN_VARIABLE}. It is no "
        "option itself, because other users see the options of a running program."
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        help="A web page, as https://example.org, whose scripts may ask this server; may be given again. "
        "'*' for every page.",
    ),
]
BodyOption = Annotated[str, typer.Option("--max-body", help="Size of a request, at most.")]
FileOption = Annotated[str, typer.Option("--max-file", help="Size of an uploaded file, at most.")]
ShutdownOption = Annotated[
    float, typer.Option("--shutdown-seconds", min=0, help="How long running requests may go on after Ctrl-C.")
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output when the server ends (with --explain: the plan), "
        "everything else on standard error.",
    ),
]


def serve(
    model: ModelArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    max_length: LongestOption = None,
    slots: SlotsOption = 64,
    queue: QueueOption = 1024,
    max_tokens: MaxTokensOption = 128,
    name: NameOption = None,
    files: FilesOption = None,
    token_file: TokenFileOption = None,
    allow_origin: OriginOption = None,
    max_body: BodyOption = "4MiB",
    max_file: FileOption = "256MiB",
    shutdown_s: ShutdownOption = 30.0,
    device: DeviceOption = "auto",
    device_memory: DeviceMemoryOption = None,
    host_memory: HostMemoryOption = None,
    disk: DiskOption = None,
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    place: PlaceOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer OpenAI's HTTP API with a model that need not fit on the device.

    Requests join between two sweeps over the layers, so many clients share each reading of the weights. See
    what it will take, then start it and ask:

        capstan serve models/llama --max-length 1024 --slots 32 --explain

        capstan serve models/llama --max-length 1024 --slots 32

        curl http://127.0.0.1:8000/v1/models

    In Python: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any"). Routes: /v1/completions
    (echo, logprobs, prompt_logprobs, stream), /v1/chat/completions, /v1/models, /v1/files, /v1/batches,
    /tokenize, /detokenize, /health, /metrics. Ctrl-C ends the server when what runs is answered.
    """
    token = _token(token_file)
    # Imported here: torch and transformers take seconds, which `capstan --help` need not.
    from capstan.generation.engine import Engine
    from capstan.generation.planning.opening import plan_for
    from capstan.generation.runtime.arrivals import open_lengths
    from capstan.generation.serving import Limits, is_loopback, listen, run_server

    errors = Console(stderr=True, highlight=False)
    quieten_transformers()
    if not is_loopback(host) and token is None and not explain:
        raise UsageError(
            f"Whoever can reach {host} could use this server. Give it a token, with --token-file or in the "
            f"variable {_TOKEN_VARIABLE}, or leave --host as it is."
        )
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
        )
        limits = Limits(
            longest=_longest(planner, max_length),
            queue=queue,
            max_tokens=max_tokens,
            body_bytes=parse_bytes(max_body),
            file_bytes=parse_bytes(max_file),
            shutdown_s=shutdown_s,
        )
        opening = planner.plan(open_lengths(limits.longest, slots))
    if explain:
        as_object = {"verb": "serve", "plan": opening.plan.to_dict(), "trace": None}
        typer.echo(json.dumps(as_object) if as_json else explain_plan(opening.plan))
        return
    typer.echo(explain_plan(opening.plan), err=as_json)
    called = name or model.resolve().name
    with (
        listen(host, port) as listening,
        Engine.start(planner, opening, torch_device, disk_folder=disk) as engine,
    ):
        url = f"http://{'[' + host + ']' if ':' in host else host}:{listening.getsockname()[1]}"
        counts = run_server(
            engine,
            listening,
            name=called,
            limits=limits,
            token=token,
            folder=files,
            allow_origins=allow_origin or (),
            on_ready=lambda _: errors.print(f"{called} is served at {url}", markup=False, soft_wrap=True),
        )
        plan, trace = engine.plan, engine.trace
    _report(counts, plan, trace, as_json=as_json)


def _token(file: Path | None) -> str | None:
    """The token that clients must show, if there is one."""
    if file is None:
        return os.environ.get(_TOKEN_VARIABLE) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The token in {file} cannot be read: {error}.") from error
    if not token:
        raise InputError(f"{file} is empty; it must hold the token that clients show.")
    return token


def _longest(planner: "Planner", asked: int | None) -> int:
    context = planner.model.meta_model.max_positions
    if asked is None:
        return min(context or 2048, 2048)
    if context is not None and asked > context:
        raise UsageError(f"--max-length {asked:,} exceeds the model's context of {context:,} tokens.")
    return asked


def _report(counts: "Counts", plan: Plan, trace: Trace | None, *, as_json: bool) -> None:
    if as_json:
        record: dict[str, Any] = {
            "verb": "serve",
            "num_requests": counts.asks,
            "num_refused": counts.refused,
            "num_finished": counts.finished,
            "num_dropped": counts.dropped,
            "prompt_tokens": counts.prompt_tokens,
            "generated_tokens": counts.new_tokens,
            "plan": plan.to_dict(),
            "trace": trace.to_dict() if trace else None,
        }
        typer.echo(json.dumps(record))
        return
    if trace is not None and trace.phases:
        typer.echo(compare(plan, trace))
    typer.echo(f"{counts.asks:,} requests, {counts.new_tokens:,} tokens generated.")
