"""`capstan allocate`: which device computes which tasklet in a slow, uneven network?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from capstan.errors import UsageError
from capstan.hardware import Cluster, scenario

if TYPE_CHECKING:
    from capstan.allocation import Allocation

ClusterArgument = Annotated[
    Path | None,
    typer.Argument(
        help="A cluster as .yaml, or as .csv with the columns source,target,latency_s,bandwidth_bytes_per_s.",
        show_default=False,
    ),
]
ScenarioOption = Annotated[
    str | None,
    typer.Option(
        "--scenario",
        help="A built-in cluster of 64 devices instead of a file: datacenter, spot, two-universities, "
        "regional, worldwide or homogeneous.",
    ),
]
StagesOption = Annotated[
    int | None, typer.Option(help="Pipeline stages; devices / stages replicas hold each. The default is 8.")
]
CostModelOption = Annotated[
    str, typer.Option(help="'corrected', or 'paper' for the published constants with their typo.")
]
SearchOption = Annotated[
    str,
    typer.Option(
        help="'evolutionary', 'exhaustive', 'annealing', or 'auto': exhaustive while layouts are few."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same plan.")]
AsymmetricOption = Annotated[
    str, typer.Option(help="Links that differ by direction: 'refuse', or 'mean' of both directions' times.")
]
ParametersOption = Annotated[float, typer.Option(help="Parameters of the model, as 1.3e9.")]
HiddenOption = Annotated[int, typer.Option(help="Numbers that cross a boundary for each token.")]
TokensOption = Annotated[float, typer.Option(help="Tokens in the batch of one step, as 1e6.")]
EvaluateOption = Annotated[
    Path | None,
    typer.Option(
        help='Price the layout in this JSON file, {"groups": [[device, ...], ...]}, instead of searching.'
    ),
]
SvgOption = Annotated[Path | None, typer.Option(help="Write a map of the groups here.")]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on standard output, for programs, and no table."),
]


def allocate(
    cluster: ClusterArgument = None,
    scenario_name: ScenarioOption = None,
    stages: StagesOption = None,
    cost_model: CostModelOption = "corrected",
    search: SearchOption = "auto",
    seed: SeedOption = 0,
    asymmetric: AsymmetricOption = "refuse",
    parameters: ParametersOption = 1.3e9,
    hidden_size: HiddenOption = 2048,
    batch_tokens: TokensOption = 1e6,
    evaluate: EvaluateOption = None,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Assign pipeline stages and replicas to devices so that a training step waits least for the network.

    capstan allocate --scenario worldwide
    capstan allocate net.yaml --stages 4 --svg map.svg
    """
    # Imported here: NumPy takes a while.
    from capstan.allocation import TrainingTask, evaluate_layout, plan_allocation, read_layout
    from capstan.plans import explain
    from capstan.storage import write_atomically

    network = _network(cluster, scenario_name)
    task = TrainingTask(parameters=parameters, hidden_size=hidden_size, batch_tokens=batch_tokens)
    if evaluate is None:
        found = plan_allocation(
            network, stages=8 if stages is None else stages, task=task, cost_model=cost_model, search=search,
            seed=seed, asymmetric=asymmetric,
        )  # fmt: skip
    else:
        layout = read_layout(evaluate, network.names)
        if stages not in (None, layout.num_stages):
            raise UsageError(f"{evaluate} has {layout.num_stages} stages, but --stages asks for {stages}.")
        found = evaluate_layout(
            network, layout, task=task, cost_model=cost_model, seed=seed, asymmetric=asymmetric
        )
    if svg is not None:
        write_atomically(svg, found.svg)
    if as_json:
        typer.echo(json.dumps(_record(found, scenario_name, cluster, network)))
        return
    typer.echo(explain(found.plan), nl=False)
    typer.echo(_groups_text(found, network))
    if svg is not None:
        Console(stderr=True).print(f"The map is in {svg}", markup=False)


def _network(cluster: Path | None, scenario_name: str | None) -> Cluster:
    if (cluster is None) == (scenario_name is None):
        raise UsageError("Name either a cluster file or a --scenario, and not both.")
    if scenario_name is not None:
        return scenario(scenario_name)
    from capstan.allocation import read_cluster_file

    assert cluster is not None
    return read_cluster_file(cluster)


def _record(
    found: "Allocation", scenario_name: str | None, cluster: Path | None, network: Cluster
) -> dict[str, object]:
    from capstan.allocation import layout_to_dict

    return {
        "verb": "allocate",
        "scenario": scenario_name,
        "cluster": None if cluster is None else str(cluster),
        "layout": layout_to_dict(found.layout, network.names),
        "cost_s": found.cost_s,
        "data_parallel_s": found.data_parallel_s,
        "pipeline_s": found.pipeline_s,
        "search_s": found.search_s,
        "seed": found.seed,
        "plan": found.plan.to_dict(),
    }


def _groups_text(found: "Allocation", network: Cluster) -> str:
    """One line for each stage, in pipeline order, with its devices in the order of replicas."""
    lines = [
        f"stage {stage}: {', '.join(network.names[device] for device in group)}"
        for stage, group in enumerate(found.layout.groups)
    ]
    return "\n".join(lines)
