"""From a cluster and a task to a layout: search, compare with what people write down, explain."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np

from capstan.allocation.annealing import search_annealing
from capstan.allocation.cost import CostModel, as_listed_s
from capstan.allocation.evolution import random_layouts, search_evolution
from capstan.allocation.exhaustive import num_layouts, search_all
from capstan.allocation.explanation import Priced, aligned, plan_of, priced
from capstan.allocation.layout import Layout, contiguous, strided
from capstan.allocation.layout_map import layout_svg
from capstan.allocation.pair_seconds import Numbers, PairSeconds, pair_seconds
from capstan.allocation.task import Tasklet, TrainingTask
from capstan.errors import DoesNotFit, UsageError, unknown_name
from capstan.hardware import Cluster
from capstan.plans import Alternative, Choice, Plan, bytes_text

SEARCHES = ("auto", "evolutionary", "exhaustive", "annealing")
_FEW_LAYOUTS = 1000
_NUM_RANDOM = 100
_SAME = 1 + 1e-12


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A layout, what it costs, how long it took to find, the plan that explains it and a map as SVG."""

    layout: Layout
    data_parallel_s: float
    pipeline_s: float
    search_s: float
    seed: int
    plan: Plan
    svg: str

    @property
    def cost_s(self) -> float:
        return self.data_parallel_s + self.pipeline_s


class _Network(NamedTuple):
    """What every step of planning reads."""

    cluster: Cluster
    tasklet: Tasklet
    pairs: PairSeconds
    model: CostModel


def plan_allocation(
    cluster: Cluster,
    *,
    stages: int = 8,
    task: TrainingTask | None = None,
    cost_model: str = "corrected",
    search: str = "auto",
    seed: int = 0,
    asymmetric: str = "refuse",
    clock: Callable[[], float] = perf_counter,
) -> Allocation:
    """Which device computes which tasklet, so that a step takes least under the paper's cost.

    Args:
        stages: pipeline stages; each is held by devices / stages replicas.
        task: what is trained; the paper's GPT3-1.3B unless given.
        cost_model: `corrected` or `paper`, see `TrainingTask.tasklet`.
        search: `evolutionary`, `exhaustive`, `annealing`, or `auto`: exhaustive while there are at most a
            thousand layouts, evolutionary beyond.
        seed: of everything random; the same seed gives the same plan.
        asymmetric: `refuse` or `mean`, see `pair_seconds`.

    The answer never costs more than the strided or the contiguous layout, whatever the search.

    Raises:
        UsageError: devices cannot be divided into the stages, or another argument makes no sense.
        DoesNotFit: a device is known to have less memory than its stage's weights, gradients and optimizer.
    """
    require_search(search, seed)
    task = task or TrainingTask()
    network = _network(cluster, stages, task, cost_model, asymmetric)
    count = len(cluster.names)
    search, reason = search_for(search, count, stages)
    begun = clock()
    found = searched(search, network.model, stages, np.random.default_rng(seed))
    search_s = clock() - begun
    candidates = {
        "strided": strided(count, stages=stages).array,
        "contiguous": contiguous(count, stages=stages).array,
        search: found,
    }
    prices = network.model.total_s(np.stack(list(candidates.values())))
    # The layout that people know, where it is as good.
    name, groups = next(
        item for item, price in zip(candidates.items(), prices, strict=True) if price <= prices.min() * _SAME
    )
    choices = (
        Choice(name="search", value=search, reason=reason),
        Choice(name="layout", value=name, reason="the cheapest of those compared"),
        _cost_choice(cost_model),
    )
    return _allocation(network, task, groups, choices, search_s, seed)


def evaluate_layout(
    cluster: Cluster,
    layout: Layout,
    *,
    task: TrainingTask | None = None,
    cost_model: str = "corrected",
    seed: int = 0,
    asymmetric: str = "refuse",
) -> Allocation:
    """What a given layout costs; the order of its stages and of their members is chosen as well as can be.

    Raises:
        UsageError: the layout holds another number of devices than the cluster.
    """
    require_devices(layout, cluster)
    task = task or TrainingTask()
    network = _network(cluster, layout.num_stages, task, cost_model, asymmetric)
    choices = (Choice(name="layout", value="given", reason="evaluated as asked"), _cost_choice(cost_model))
    return _allocation(network, task, layout.array, choices, 0.0, seed)


def _network(cluster: Cluster, stages: int, task: TrainingTask, cost_model: str, asymmetric: str) -> _Network:
    count = len(cluster.names)
    require_divisible(count, stages)
    _require_memory(cluster, task.state_bytes(stages=stages), stages)
    replicas = count // stages
    tasklet = task.tasklet(stages=stages, replicas=replicas, cost_model=cost_model)
    pairs = pair_seconds(cluster, tasklet, replicas=replicas, asymmetric=asymmetric)
    return _Network(cluster, tasklet, pairs, CostModel(pairs))


def require_search(search: str, seed: int) -> None:
    """There is such a search, and a seed for it."""
    if search not in SEARCHES:
        raise unknown_name("search", search, SEARCHES)
    if seed < 0:
        raise UsageError(f"The seed is {seed}; give 0 or a whole number above it.")


def search_for(wanted: str, num_devices: int, stages: int) -> tuple[str, str]:
    """The search that `auto` takes, or the one wanted; and why."""
    if wanted != "auto":
        return wanted, "asked for"
    few = num_layouts(num_devices, stages=stages) <= _FEW_LAYOUTS
    return ("exhaustive", "few layouts") if few else ("evolutionary", "too many to try all")


def searched(name: str, model: CostModel, stages: int, rng: np.random.Generator) -> Numbers:
    """(stages, replicas): what one of `SEARCHES` but `auto` finds."""
    if name == "exhaustive":
        return search_all(model, stages=stages)
    if name == "annealing":
        return search_annealing(model, stages=stages, rng=rng)
    return search_evolution(model, stages=stages, rng=rng)


def _allocation(
    network: _Network,
    task: TrainingTask,
    groups: Numbers,
    choices: tuple[Choice, ...],
    search_s: float,
    seed: int,
) -> Allocation:
    stages = len(groups)
    layout = aligned(network.model, groups)
    found = priced(network.model, layout)
    alternatives = _alternatives(network, stages, found, seed)
    plan = plan_of(
        network.cluster, network.tasklet, layout, found, choices=choices, alternatives=alternatives,
        state_bytes=task.state_bytes(stages=stages),
    )  # fmt: skip
    return Allocation(
        layout=layout,
        data_parallel_s=found.data_parallel_s,
        pipeline_s=found.pipeline_s,
        search_s=search_s,
        seed=seed,
        plan=plan,
        svg=layout_svg(layout, network.pairs.classes, network.cluster.names, plan=plan, found=found),
    )


def _alternatives(network: _Network, stages: int, found: Priced, seed: int) -> tuple[Alternative, ...]:
    """The layouts people write down, ranks that know nothing of the network, and the second best."""
    count = len(network.cluster.names)
    model = network.model
    # Read before the layouts below are priced: what a search met, and nothing where none was made.
    next_best_s = model.next_best_s(found.total_s)
    hand = np.stack([strided(count, stages=stages).array, contiguous(count, stages=stages).array])
    strided_s, contiguous_s = model.total_s(hand).tolist()
    drawn = random_layouts(count, stages=stages, count=_NUM_RANDOM, rng=np.random.default_rng(seed))
    random_s = float(as_listed_s(network.pairs, drawn).mean())
    alternatives = [
        Alternative(name="strided", seconds=strided_s, reason="each place spread over all stages"),
        Alternative(name="contiguous", seconds=contiguous_s, reason="neighbours share a stage"),
        Alternative(
            name="random ranks", seconds=random_s, reason=f"mean of {_NUM_RANDOM}, used in the order drawn"
        ),
    ]
    if next_best_s is not None:
        alternatives.append(
            Alternative(name="second best", seconds=next_best_s, reason="the next price that the search met")
        )
    return tuple(alternatives)


def _cost_choice(cost_model: str) -> Choice:
    reasons = {
        "corrected": "decimal bytes, hidden size as given",
        "paper": "published constants, with 2024 for 2048 and GiB among GB",
    }
    return Choice(name="cost model", value=cost_model, reason=reasons[cost_model])


def require_devices(layout: Layout, cluster: Cluster) -> None:
    """The layout holds as many devices as the cluster has."""
    count = layout.num_stages * layout.num_replicas
    if count != len(cluster.names):
        raise UsageError(f"The layout holds {count} devices, but the cluster has {len(cluster.names)}.")


def require_divisible(count: int, stages: int) -> None:
    """So many devices hold so many stages, equally many each."""
    if stages < 1:
        raise UsageError(f"{stages} stages make no pipeline; ask for at least 1.")
    if count % stages:
        ways = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        few = "fewer devices than stages" if count < stages else "they do not divide evenly"
        raise UsageError(
            f"{count} devices cannot hold {stages} stages of equally many: {few}. Ask for {ways} stages, or "
            "leave devices out of the cluster."
        )


def _require_memory(cluster: Cluster, state_bytes: int, stages: int) -> None:
    small = {
        name: device.memory_bytes
        for name, device in cluster.devices.items()
        if device.memory_bytes < state_bytes
    }
    if small:
        name = min(small, key=lambda each: small[each])
        raise DoesNotFit(
            f"Each of {stages} stages needs at least {bytes_text(state_bytes)} for weights, gradients and "
            f"optimizer, but {name} has {bytes_text(small[name])}, and {len(small)} of {len(cluster.names)} "
            "devices are too small. Ask for more stages or leave the small devices out."
        )
