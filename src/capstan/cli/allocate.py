"""`capstan allocate`: which device computes which tasklet in a slow, uneven network?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from capstan.cli.allocate_step import (
    StepOptions,
    allocate_step,
    groups_text,
    layout_in,
    write_rank_map,
)
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
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="The same file as an option.", show_default=False)
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
    int | None,
    typer.Option(
        help="Pipeline stages; devices / stages replicas hold each. 8 under the paper's cost; a simulated "
        "step tries all that divide the devices.",
        show_default=False,
    ),
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
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        help="Plan by a simulated step instead of the paper's cost: with compute, micro-batches, overlap "
        "and memory. 'gpipe', '1f1b', or 'auto': the faster one. Options down to --gantt ask for it, too.",
        show_default=False,
    ),
]
MicroBatchesOption = Annotated[
    int | None,
    typer.Option(
        help="Micro-batches of a replica's samples; else the best of 1, 2, … 64.", show_default=False
    ),
]
ActivationBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of activations over boundaries (16); 1 to 8 in groups of 64, 16 or 32. Several to choose "
        "from as 4,8,16: fewer are taken only where that is faster.",
        show_default=False,
    ),
]
GradientBitsOption = Annotated[
    str | None, typer.Option(help="The same of gradients that come back (16).", show_default=False)
]
DataParallelBitsOption = Annotated[
    str | None, typer.Option(help="The same of gradients between replicas (32).", show_default=False)
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", help="Layers of the model (24).", show_default=False)
]
SequenceOption = Annotated[float | None, typer.Option(help="Tokens of a sample (2048).", show_default=False)]
FlopsOption = Annotated[
    float | None,
    typer.Option(
        "--device-flops",
        help="Flops/s of devices whose speed the cluster does not tell (5e13).",
        show_default=False,
    ),
]
NicOption = Annotated[
    float | None,
    typer.Option(
        "--nic-gbit",
        help="Gbit/s that all transfers of a device share, each way; unbounded unless given.",
        show_default=False,
    ),
]
SlowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--slow", help="DEVICE=FACTOR: it has become slower. What happens, and a plan with few moves."
    ),
]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option("--without", help="DEVICE: it has left. What happens, and a plan with few moves."),
]
GanttOption = Annotated[
    Path | None, typer.Option(help="Write a chart of the simulated step here, as .svg.", show_default=False)
]
RankMapOption = Annotated[
    Path | None,
    typer.Option(
        help="Write here which rank runs where, as JSON, and print the torchrun command of every device.",
        show_default=False,
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
    cluster_option: ClusterOption = None,
    schedule: ScheduleOption = None,
    micro_batches: MicroBatchesOption = None,
    activation_bits: ActivationBitsOption = None,
    gradient_bits: GradientBitsOption = None,
    data_parallel_bits: DataParallelBitsOption = None,
    layers: LayersOption = None,
    sequence: SequenceOption = None,
    device_flops: FlopsOption = None,
    nic_gbit: NicOption = None,
    slow: SlowOption = None,
    without: WithoutOption = None,
    gantt: GanttOption = None,
    rank_map: RankMapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Assign pipeline stages and replicas to devices so that a training step waits least for the network.

    capstan allocate --scenario worldwide

    capstan allocate net.yaml --stages 4 --svg map.svg

    By a simulated step, which also chooses stages, micro-batches and schedule:

    capstan allocate --scenario worldwide --schedule auto --activation-bits 4,16 --rank-map ranks.json

    capstan allocate net.yaml --schedule 1f1b --slow tokyo-3=2 --without oslo-1 --gantt step.svg
    """
    # Imported here: NumPy takes a while.
    from capstan.allocation import TrainingTask, evaluate_layout, plan_allocation
    from capstan.plans import explain
    from capstan.storage import write_atomically

    if cluster is not None and cluster_option is not None:
        raise UsageError("Name the cluster file once: as an argument or by --cluster.")
    cluster = cluster or cluster_option
    network = _network(cluster, scenario_name)
    task = TrainingTask(parameters=parameters, hidden_size=hidden_size, batch_tokens=batch_tokens)
    asked = StepOptions(
        schedule=schedule, micro_batches=micro_batches, activation_bits=activation_bits,
        gradient_bits=gradient_bits, data_parallel_bits=data_parallel_bits, layers=layers, sequence=sequence,
        device_flops=device_flops, nic_gbit=nic_gbit, slow=tuple(slow or ()), without=tuple(without or ()),
        gantt=gantt,
    )  # fmt: skip
    if asked != StepOptions():
        if svg is not None or cost_model != "corrected":
            raise UsageError(
                "--svg and --cost-model belong to the paper's cost. A simulated step has --gantt; leave its "
                "options out for the paper's cost."
            )
        allocate_step(
            network, task, asked, stages=stages, layout=evaluate, rank_map=rank_map, search=search, seed=seed,
            asymmetric=asymmetric, as_json=as_json,
            named={"scenario": scenario_name, "cluster": None if cluster is None else str(cluster)},
        )  # fmt: skip
        return
    if evaluate is None:
        found = plan_allocation(
            network, stages=8 if stages is None else stages, task=task, cost_model=cost_model, search=search,
            seed=seed, asymmetric=asymmetric,
        )  # fmt: skip
    else:
        layout = layout_in(evaluate, network, stages)
        found = evaluate_layout(
            network, layout, task=task, cost_model=cost_model, seed=seed, asymmetric=asymmetric
        )
    if svg is not None:
        write_atomically(svg, found.svg)
    ranks = rank_map and write_rank_map(rank_map, found.layout, network)
    if as_json:
        record = _record(found, scenario_name, cluster, network)
        typer.echo(json.dumps(record | ({"torchrun": ranks} if ranks else {})))
        return
    typer.echo(explain(found.plan), nl=False)
    typer.echo(groups_text(found.layout, network))
    for line in ranks or ():
        typer.echo(line)
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
