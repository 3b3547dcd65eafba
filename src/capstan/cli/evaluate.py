"""`capstan evaluate`: what a model can do, and what a relaxation costs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from capstan.cli.evaluation_backends import opened_model
from capstan.cli.evaluation_table import comparison_table, show_runs
from capstan.cli.progress import show_progress
from capstan.errors import InputError, UsageError

if TYPE_CHECKING:
    from capstan.evaluation import Chat, Evaluated, GroupOfRuns, RunSpec, Scenario

app = typer.Typer(
    help="Measure a model by HELM's scenarios, and compare two evaluations instance by instance.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ModelOption = Annotated[
    str, typer.Option("--model", help="A model folder in Hugging Face format, or the name a server knows.")
]
BackendOption = Annotated[
    str,
    typer.Option(help="engine: Capstan's own, for models larger than memory. transformers: whole in memory. "
                 "server: an OpenAI-compatible one at --url."),
]  # fmt: skip
EntryOption = Annotated[
    list[str] | None,
    typer.Option("--run", help="A run entry such as mmlu:subject=anatomy,max_eval_instances=9, or a YAML or "
                 "Python file of your own; may be given several times."),
]  # fmt: skip
SuiteOption = Annotated[str | None, typer.Option(help="core, targeted, flexgen7 or smoke (no data needed).")]
SizeOption = Annotated[int | None, typer.Option(min=1, help="Instances of each of a suite's scenarios.")]
RootOption = Annotated[Path, typer.Option("--data-root", help="Where data lie, a folder for each scenario.")]
OutputOption = Annotated[
    Path, typer.Option("--output", help="Where answers and run folders go. The same command goes on there.")
]
NameOption = Annotated[str, typer.Option("--name", help="The suite's name in the output.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print what would be asked and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
UntilOption = Annotated[
    str | None,
    typer.Option(help="ci=0.02: ask more instances until the main metric is known to ± 0.02 (95 %)."),
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run programs that the model writes, with limits.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(help="FILE:MODEL, an entry of HELM's inference_idealized_runtimes.json, or a FILE that is "
                 "one such entry: adds the time of an ideal machine."),
]  # fmt: skip
ScorerOption = Annotated[
    Path | None, typer.Option("--toxicity-scorer", help="What `capstan evaluate toxicity` wrote.")
]


@app.command("run")
def run(
    model: ModelOption,
    output: OutputOption,
    run_entry: EntryOption = None,
    suite: SuiteOption = None,
    size: SizeOption = None,
    data_root: RootOption = Path("data"),
    backend: BackendOption = "engine",
    url: Annotated[str | None, typer.Option(help="A server's address, as http://127.0.0.1:8000/v1.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The server model's tokenizer folder.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The server's token; better in the environment, as CAPSTAN_TOKEN.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The server's context in tokens, where it does not say.")
    ] = None,
    weight_bits: Annotated[int | None, typer.Option(help="16, 8 or 4 bits for weights.")] = None,
    cache_bits: Annotated[int | None, typer.Option(help="16, 8 or 4 bits for keys and values.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = "auto",
    device_memory: Annotated[str | None, typer.Option(help="Memory on the device, as 8GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Host memory, as 32GiB.")] = None,
    disk: Annotated[Path | None, typer.Option(help="A folder for scratch files.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Draw the examples so many times.")] = None,
    until: UntilOption = None,
    name: NameOption = "capstan",
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hugging Face hub for missing files.")] = False,
    toxicity_scorer: ScorerOption = None,
    runtime_profile: ProfileOption = None,
    allow_code_execution: CodeOption = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write prompts by the model's chat template.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="With --apply-chat-template: what the system's message says.")
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option("--fewshot-as-multiturn", help="With it: each example of a task is a turn of its own."),
    ] = False,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run scenarios and write HELM run folders, with intervals and notes beside.

        capstan evaluate run --model models/llama --suite smoke --output results/llama

    Answers are kept as they come: stopped or killed, the same command goes on where it was.
    """
    from capstan.evaluation import (
        AnswerStore,
        Evaluator,
        group_reports,
        require_own_folder,
        write_groups,
        write_run,
    )
    from capstan.evaluation.planning import asked_by, plan_evaluation, trace_evaluation
    from capstan.evaluation.run_folder import plain_json
    from capstan.evaluation.running import prepare
    from capstan.plans import explain as explain_plan

    errors = Console(stderr=True, highlight=False)
    chat = _chat(apply_chat_template, system_instruction, fewshot_as_multiturn)
    wanted, groups = _wanted(run_entry or [], suite, size, data_root, trials)
    wanted = [(replace(spec, chat=chat), own) for spec, own in wanted]
    width = _until(until)
    memory = {"device": device, "device_memory": device_memory, "host_memory": host_memory, "disk": disk}
    bits = {"weight_bits": weight_bits, "cache_bits": cache_bits}
    server = {"url": url, "tokenizer": tokenizer, "api_key": api_key, "max_length": max_length}
    with opened_model(model, backend, **server, **memory, **bits) as opened:
        if explain:
            asked = [
                asked_by(prepare(spec, opened, root=data_root, scenario=own, uses_hub=hub), opened)
                for spec, own in wanted
            ]
            plan = plan_evaluation(asked, model=opened.name, machine="this machine")
            shown = {"verb": "evaluate", "plan": plan.to_dict(), "trace": None}
            typer.echo(plain_json(shown) if as_json else explain_plan(plan))
            return
        for spec, _ in wanted:
            require_own_folder(spec, opened.identity, output / "runs" / name)
        resources = _resources(toxicity_scorer, runtime_profile, data_root, allow_code_execution)
        with AnswerStore(output / "answers.jsonl") as store:
            if store.num_damaged:
                errors.print(f"{store.num_damaged:,} damaged answers are asked again.")
            evaluator = Evaluator(
                model=opened, store=store, root=data_root, uses_hub=hub, resources=resources
            )
            done = []
            for spec, own in wanted:
                with show_progress(spec.name, errors) as report:

                    def on_answered(count: int, of: int, report: Any = report) -> None:
                        report(count / max(1, of), f"{count:,} of {of:,}")

                    evaluated = _run_until(evaluator, spec, own, width, on_answered)
                done.append(evaluated)
                write_run(evaluated, output / "runs" / name)
        asked = [asked_by(each, opened) for each in done]
        plan = plan_evaluation(asked, model=opened.name, machine="this machine")
        trace = trace_evaluation(done, opened, machine="this machine")
    averages = group_reports(groups, done)
    write_groups(averages, output / "groups" / name)
    show_runs(done, averages, plan, trace, output, as_json=as_json)


def _wanted(
    entries: list[str], suite: str | None, size: int | None, root: Path, trials: int | None
) -> tuple[list[tuple["RunSpec", "Scenario"]], list["GroupOfRuns"]]:
    """All runs with their scenarios, and which of them belong to a group of tasks."""
    from capstan.evaluation import GroupOfRuns, run_spec_of, suite_entries
    from capstan.evaluation.run_folder import folder_name
    from capstan.evaluation.scenarios import group_of, parse_entry, scenario_of

    entries = entries + (suite_entries(suite, size=size) if suite else [])
    if not entries:
        raise UsageError("Say what to run: --run ENTRY (several times if you like) or --suite NAME.")
    found: list[tuple[RunSpec, Scenario]] = []
    groups = []
    for entry in entries:
        group = group_of(entry)
        owns = group.scenarios if group is not None else (scenario_of(*parse_entry(entry)),)
        specs = [run_spec_of(entry, root=root, scenario=own) for own in owns]
        specs = [spec.with_adapter(num_train_trials=trials) if trials else spec for spec in specs]
        found += zip(specs, owns, strict=True)
        if group is not None:
            names = {own.name: spec.name for spec, own in zip(specs, owns, strict=True)}
            groups += [GroupOfRuns(group=each, runs=names) for each in group.all_groups]
    by_folder: dict[str, RunSpec] = {}
    for spec, _ in found:
        if by_folder.setdefault(folder_name(spec.name), spec) != spec:
            raise UsageError(
                f"Two different runs are called {spec.name}: one folder cannot hold both. Rename one, or run "
                "them with two --output."
            )
    return found, groups


def _chat(applies: bool, system: str | None, multiturn: bool) -> "Chat | None":
    from capstan.evaluation import Chat

    if not applies:
        if system is not None or multiturn:
            raise UsageError("--system-instruction and --fewshot-as-multiturn go with --apply-chat-template.")
        return None
    return Chat(system_instruction=system or "", multiturn=multiturn)


def _until(told: str | None) -> float | None:
    if told is None:
        return None
    kind, _, value = told.partition("=")
    try:
        width = float(value)
    except ValueError:
        width = 0.0
    if kind != "ci" or not 0 < width < math.inf:
        raise UsageError(f"--until wants ci= and a half width such as ci=0.02, not {told!r}.")
    return width


_FIRST, _GROWTH = 50, 2


def _run_until(
    evaluator: Any, spec: "RunSpec", scenario: "Scenario", width: float | None, on_answered: Any
) -> "Evaluated":
    """A run as it is, or on more and more of its instances until its main metric is known well enough."""
    from capstan.evaluation.intervals import level_of_look

    most, look = spec.adapter_spec.max_eval_instances, 1
    count = min(_FIRST, most or _FIRST) if width is not None else most
    while True:
        asked = spec.with_adapter(max_eval_instances=count)
        evaluated: Evaluated = evaluator.run(asked, scenario=scenario, on_answered=on_answered)
        if width is None or count is None:
            return evaluated
        evaluated = replace(evaluated, level=level_of_look(look))
        found = evaluated.interval(evaluated.main_metric)
        known = found is not None and found.half_width <= width
        num_asked = len({state.instance.id for state in evaluated.states})
        if known or (most is not None and count >= most) or num_asked < count:
            note = f"asked {num_asked:,} instances for a half width of {width:g}: " + (
                "reached" if known else "not reached, there are no more"
            )
            looked = (
                f"looked {look} times: intervals are of {evaluated.level:.2%}, so that all hold with 95 %"
            )
            return replace(evaluated, notes=(*evaluated.notes, note, looked))
        count = min(count * _GROWTH, most) if most is not None else count * _GROWTH
        look += 1


def _resources(
    scorer: Path | None, runtime_profile: str | None, root: Path, allow_code: bool
) -> dict[str, Any]:
    from capstan.evaluation import DataFolder
    from capstan.evaluation.metrics.efficiency import read_runtime_profile
    from capstan.evaluation.toxicity_fit import ToxicityScorer

    words = DataFolder(folder=root / "bias")
    targets = {
        kind: words.text(f"{kind}.txt").split() if words.exists(f"{kind}.txt") else []
        for kind in ("adjective", "profession")
    }
    loaded = ToxicityScorer.load(scorer) if scorer is not None else None
    profile = read_runtime_profile(runtime_profile) if runtime_profile is not None else None
    return {
        "toxicity_scorer": loaded,
        "allow_code_execution": allow_code,
        "bias_targets": targets,
        "idealised_runtime": profile,
    }


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="The folder of one evaluation.")],
    b: Annotated[Path, typer.Argument(help="The folder of the other.")],
    metric: Annotated[str | None, typer.Option(help="A metric; default: each run's main one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations instance by instance: what did 4 bits cost?

    For each run that both have: both means, the mean difference B − A with its interval, on how many
    instances B is higher or lower, and the sign test.
    """
    from capstan.evaluation import compare_folders
    from capstan.evaluation.comparison import run_key
    from capstan.evaluation.run_folder import plain_json, read_report

    metrics = {}
    for report in [*a.rglob("capstan.json"), *b.rglob("capstan.json")]:
        metrics[run_key(report.parent.name)] = metric or read_report(report.parent).get("main_metric", "")
    found = compare_folders(a, b, metrics=metrics)
    if not found:
        raise InputError(f"{a} and {b} share no run with the metric {metric or 'of their reports'}.")
    if as_json:
        typer.echo(plain_json({"verb": "evaluate compare", "runs": [each.to_dict() for each in found]}))
        return
    Console(highlight=False).print(comparison_table(found))


@app.command("rescore")
def rescore(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one with several below it.")],
    model: Annotated[Path, typer.Option(help="A folder with the model's tokenizer.")],
    data_root: RootOption = Path("data"),
    toxicity_scorer: ScorerOption = None,
    runtime_profile: ProfileOption = None,
    allow_code_execution: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the metrics of answered runs again, without the model: ours or crfm-helm's."""
    from capstan.evaluation import Evaluated, measure, read_run, write_run
    from capstan.evaluation.intervals import LEVEL
    from capstan.evaluation.run_folder import plain_json, read_report, report_of
    from capstan.evaluation.tokenizer_only import TokenizerOnly

    counted = TokenizerOnly(model)
    resources = _resources(toxicity_scorer, runtime_profile, data_root, allow_code_execution)
    folders = [path.parent for path in sorted(folder.rglob("scenario_state.json"))]
    if not folders:
        raise InputError(f"There is no run below {folder}: no scenario_state.json.")
    reports = []
    for each in folders:
        spec, states = read_run(each)
        told = read_report(each)
        evaluated = Evaluated(
            spec=spec,
            states=states,
            measurement=measure(spec, states, counted, resources),
            seconds=told.get("seconds", 0.0),
            notes=tuple(told.get("notes", ())),
            main_metric=told.get("main_metric", ""),
            main_split=told.get("main_split", ""),
            shown_metrics=tuple(told.get("shown_metrics", ())),
            model_identity=told.get("model_identity", ""),
            level=told.get("level", LEVEL),
        )
        write_run(evaluated, each.parent)
        reports.append(report_of(evaluated))
        if not as_json:
            typer.echo(f"{each}: {len(evaluated.measurement.stats):,} statistics")
    if as_json:
        typer.echo(plain_json({"verb": "evaluate rescore", "runs": reports}))


@app.command("list")
def list_scenarios(data_root: RootOption = Path("data")) -> None:
    """List scenarios, whether their data are there, and suites."""
    from capstan.evaluation import SCENARIOS, SUITES

    table = Table("scenario", "about", "main metric", "data")
    for each in SCENARIOS:
        there = "generated" if not each.page else "there" if (data_root / each.folder).is_dir() else each.page
        table.add_row(each.name, each.description, each.main_metric, there)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Suites: {', '.join(SUITES)}")


@app.command("toxicity")
def toxicity(
    labelled: Annotated[Path, typer.Argument(help="A CSV with comment_text and toxicity, as CivilComments.")],
    output: Annotated[Path, typer.Option("--output", help="Where the scorer goes, a JSON file.")],
    name: Annotated[str, typer.Option(help="What figures made with it are called.")] = "own",
    limit: Annotated[int | None, typer.Option(help="Read so many rows.")] = None,
) -> None:
    """Fit a toxicity scorer from labelled comments, with a card of how well it does."""
    from capstan.evaluation.run_folder import plain_json
    from capstan.evaluation.toxicity_fit import fit_scorer

    scorer = fit_scorer(labelled, name=name, limit=limit)
    scorer.save(output)
    typer.echo(plain_json(scorer.card))
