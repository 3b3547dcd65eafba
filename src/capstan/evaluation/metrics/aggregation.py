"""From instances to a run: means by trial, by split and perturbation, and the worst case over perturbations.

Every metric is a function of an instance's answers, of a group of instances, or of all; what is common to all
of them, how values become a run's statistics, is here.

Source: HELM, `metrics/metric.py`, `reference_metric.py`, `evaluate_instances_metric.py`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.instances import Instance, PerturbationDescription
from capstan.evaluation.metrics.stat import Context, Stat, StatName, merge_into, merged
from capstan.evaluation.models import LanguageModel
from capstan.evaluation.specs import AdapterSpec


@dataclass(frozen=True, kw_only=True)
class InstanceStats:
    """What was measured on one instance in one trial."""

    instance: Instance
    train_trial: int
    stats: tuple[Stat, ...]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's per_instance_stats.json."""
        own: dict[str, Any] = {"instance_id": self.instance.id, "train_trial_index": self.train_trial}
        if self.instance.perturbation is not None:
            own["perturbation"] = self.instance.perturbation.to_dict()
        return own | {"stats": [each.to_dict() for each in self.stats]}


@dataclass(frozen=True)
class Answered:
    """A run whose requests are answered: what metrics are computed from."""

    spec: AdapterSpec
    states: Sequence[RequestState]
    model: LanguageModel
    resources: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def instances(self) -> list[Instance]:
        """Every instance asked, once, in order."""
        return list(dict.fromkeys(state.instance for state in self.states))

    @cached_property
    def _by_key(self) -> dict[tuple[int, Instance], list[RequestState]]:
        found: dict[tuple[int, Instance], list[RequestState]] = defaultdict(list)
        for state in self.states:
            found[state.train_trial, state.instance].append(state)
        return found

    def of(self, trial: int, instance: Instance) -> list[RequestState]:
        """The requests made of an instance in a trial."""
        return self._by_key.get((trial, instance), [])


class Measured(Protocol):
    """A metric: gives a run's statistics, and those of its instances."""

    def __call__(self, run: Answered) -> "Measurement":
        """Measure a run."""
        ...


@dataclass(frozen=True)
class Measurement:
    """A run's statistics and its instances'."""

    stats: list[Stat]
    per_instance: list[InstanceStats] = field(default_factory=list)


OfInstance = Callable[[Answered, Sequence[RequestState]], list[Stat]]
OfStats = Callable[[Mapping[str, Stat]], list[Stat]]
OfInstances = Callable[[Sequence[Sequence[Stat]]], list[Stat]]


def _nothing(_: Any) -> list[Stat]:
    return []


def by_instance(
    run: Answered,
    measure: OfInstance,
    *,
    wants_references: bool,
    derive: OfStats = _nothing,
    derive_from_instances: OfInstances = _nothing,
) -> Measurement:
    """Measure each instance, then take means over instances and over trials.

    `wants_references`: whether the metric is about requests that ask for one reference each, or the others.
    `derive` computes statistics of a context from its sums, `derive_from_instances` from its instances.
    """
    totals: dict[StatName, Stat] = {}
    per_instance: list[InstanceStats] = []
    for trial in range(run.spec.num_train_trials):
        found: list[tuple[Instance, list[Stat]]] = []
        for instance in run.instances:
            states = _relevant(run.of(trial, instance), wants_references)
            stats = measure(run, states) if states else []
            found.append((instance, [each.in_context(Context.of(instance)) for each in stats]))
        per_instance += [
            InstanceStats(instance=instance, train_trial=trial, stats=tuple(stats))
            for instance, stats in found
            if stats
        ]
        of_trial = merged(each for _, stats in found for each in stats)
        for context, stats in _by_context(of_trial.values()).items():
            _add(of_trial, derive({each.name.name: each for each in stats}), context)
        for context, group in _instances_by_context(found).items():
            _add(of_trial, derive_from_instances(group), context)
        for each in worst_cases(found):
            merge_into(of_trial, each)
        for each in of_trial.values():
            merge_into(totals, each.only_mean())
    return Measurement(list(totals.values()), per_instance)


def by_group(run: Answered, measure: Callable[[Sequence[RequestState]], list[Stat]]) -> Measurement:
    """Measure all instances of the same split and perturbation together, then take means over trials."""
    totals: dict[StatName, Stat] = {}
    for trial in range(run.spec.num_train_trials):
        groups: dict[Context, list[RequestState]] = defaultdict(list)
        for instance in run.instances:
            groups[Context.of(instance)].extend(_relevant(run.of(trial, instance), False))
        of_trial: dict[StatName, Stat] = {}
        for context, states in groups.items():
            _add(of_trial, measure(states), context)
        for each in of_trial.values():
            merge_into(totals, each.only_mean())
    return Measurement(list(totals.values()))


def _relevant(states: Sequence[RequestState], wants_references: bool) -> list[RequestState]:
    return [state for state in states if (state.reference_index is not None) == wants_references]


def _add(stats: dict[StatName, Stat], more: Iterable[Stat], context: Context) -> None:
    for each in more:
        merge_into(stats, each.in_context(context))


def _by_context(stats: Iterable[Stat]) -> dict[Context, list[Stat]]:
    found: dict[Context, list[Stat]] = defaultdict(list)
    for each in stats:
        found[each.name.context].append(each)
    return found


def _instances_by_context(found: Iterable[tuple[Instance, list[Stat]]]) -> dict[Context, list[list[Stat]]]:
    groups: dict[Context, list[list[Stat]]] = defaultdict(list)
    for instance, stats in found:
        if stats:
            groups[Context.of(instance)].append(stats)
    return groups


# --- the worst case ---------------------------------------------------------------------------------------


def worst_cases(found: Sequence[tuple[Instance, Sequence[Stat]]]) -> list[Stat]:
    """For each instance the lowest value over a perturbation and the original; its mean over instances.

    "robustness" and "fairness" take the lowest over all perturbations of that family. Beside each single
    perturbation stands the original's value on the same instances ("before").

    Differs: nothing; HELM takes the minimum also of metrics of which less is better, and so do we, so that
    figures compare.
    """
    by_metric: dict[tuple[StatName, str | None], list[Stat]] = defaultdict(list)
    for instance, stats in found:
        for each in stats:
            plain = StatName(each.name.name, each.name.context._replace(perturbation=None))
            by_metric[plain, instance.id].append(each)
    worst: dict[StatName, Stat] = {}
    for (name, _), stats in by_metric.items():
        for each in _worst_of_instance(name, stats):
            merge_into(worst, each)
    return list(worst.values())


def _worst_of_instance(name: StatName, stats: Sequence[Stat]) -> list[Stat]:
    def under(perturbation: PerturbationDescription) -> Stat:
        return Stat(StatName(name.name, name.context._replace(perturbation=perturbation)))

    original = next((each for each in stats if each.name.context.perturbation is None), None)
    families = [
        under(PerturbationDescription(name="robustness", robustness=True)),
        under(PerturbationDescription(name="fairness", fairness=True)),
    ]
    singles = []
    for each in stats:
        perturbation = each.name.context.perturbation
        if perturbation is None:
            continue
        if perturbation.robustness:
            families[0].merge(each)
        if perturbation.fairness:
            families[1].merge(each)
        singles.append(replace(each))
    found = []
    for each in (*families, *singles):
        perturbation = each.name.context.perturbation
        assert perturbation is not None
        if original is not None:
            each.merge(original)
            if perturbation.name not in ("robustness", "fairness"):
                found.append(under(replace(perturbation, computed_on="original")).merge(original))
        if each.count:
            found.append(under(replace(perturbation, computed_on="worst")).add(each.min))
    return found
