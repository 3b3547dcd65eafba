"""Groups of lm-evaluation-harness's tasks, and the averages that stand for them.

    value = sum over tasks of w * figure / sum of w      w = number of questions (weight_by_size), or 1

A group's YAML names tasks, tags and groups of the YAML files beside it and below, or holds them; what else it
says holds for each of its tasks.

Source: lm-evaluation-harness 0.4, `config/group.py`, `docs/new_task_guide.md`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import CapstanError, InputError, unknown_name
from capstan.evaluation.intervals import Interval
from capstan.evaluation.scenarios.lm_eval_tasks import lm_eval_scenario, read_task
from capstan.evaluation.scenarios.scenario import Scenario
from capstan.evaluation.scenarios.tables import read_yaml

_OWN = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}
_AGGREGATE = ("metric", "aggregation", "weight_by_size", "filter_list")


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One average of a group: of which figure, and whether longer tasks count for more."""

    metric: str
    weight_by_size: bool = True

    def of(self, figures: Mapping[str, Interval]) -> Interval | None:
        """The average of the tasks' figures, by task; None where there is none.

        The interval takes the tasks as independent: its half width is the root of the weighted squares' sum.
        """
        weights = {name: each.num if self.weight_by_size else 1 for name, each in figures.items()}
        total = sum(weights.values())
        if not total:
            return None
        mean = sum(weights[name] * each.mean for name, each in figures.items()) / total
        half = math.sqrt(sum((weights[n] * each.half_width) ** 2 for n, each in figures.items())) / total
        return Interval(mean, mean - half, mean + half, sum(each.num for each in figures.values()))


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """A group: all of its tasks, its averages, and the groups in it."""

    name: str
    scenarios: tuple[Scenario, ...]
    aggregates: tuple[Aggregate, ...]
    groups: tuple["TaskGroup", ...] = ()

    @property
    def all_groups(self) -> tuple["TaskGroup", ...]:
        """This group and those in it."""
        return (self, *(inner for each in self.groups for inner in each.all_groups))


def read_group(path: Path) -> TaskGroup | None:
    """The group that a YAML file describes; None where it is no group.

    Raises:
        InputError: it names what there is not, or cannot be taken over.
    """
    told = read_yaml(path)
    if "group" not in told and not isinstance(told.get("task"), list):
        return None
    told = read_task(path)
    return _group(told, path, {}, ()) if isinstance(told.get("task"), list) else None


def _group(
    told: Mapping[str, Any], path: Path, overrides: Mapping[str, Any], above: tuple[str, ...]
) -> TaskGroup:
    name = told.get("group")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: a list of tasks needs the name of their group: group: NAME.")
    if name in above:
        raise InputError(f"{path}: the group {name} contains itself.")
    members = told.get("task")
    if not isinstance(members, list) or not members:
        raise InputError(f"{path}: the group {name} wants a list of tasks in task, not {members!r}.")
    shared = {key: value for key, value in told.items() if key not in _OWN} | dict(overrides)
    scenarios: dict[str, Scenario] = {}
    groups = []
    for member in members:
        for found in _members(member, path, shared, (*above, name)):
            if isinstance(found, TaskGroup):
                groups.append(found)
            for each in found.scenarios if isinstance(found, TaskGroup) else (found,):
                scenarios.setdefault(each.name, each)
    return TaskGroup(
        name=name,
        scenarios=tuple(scenarios.values()),
        aggregates=_aggregates(told, path),
        groups=tuple(groups),
    )


def _members(
    member: Any, path: Path, shared: Mapping[str, Any], above: tuple[str, ...]
) -> list[Scenario | TaskGroup]:
    """What one entry of a group's list stands for."""
    if isinstance(member, dict) and isinstance(member.get("task"), list):
        return [_group(member, path, shared, above)]
    told = dict(member) if isinstance(member, dict) else {"task": member}
    name, overrides = told.get("task"), dict(shared) | told
    if not isinstance(name, str):
        raise InputError(f"{path}: a group holds names of tasks or mappings with one, not {member!r}.")
    by_name, by_tag = _there(path.parent)
    own = {key: value for key, value in overrides.items() if key != "task"}
    if name in by_name:
        there = by_name[name]
        inner = read_yaml(there)
        if isinstance(inner.get("task"), list):
            return [_group(read_task(there), there, own, above)]
        return [lm_eval_scenario(there, own)]
    if name in by_tag:
        return [lm_eval_scenario(each, own) for each in by_tag[name]]
    if "doc_to_text" in told or "include" in told:
        return [lm_eval_scenario(path, overrides)]
    raise InputError(f"{path}: {unknown_name(f'task below {path.parent}', name, [*by_name, *by_tag])}")


def _there(folder: Path) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """The tasks and groups of a folder's YAML files by name, and tasks by tag. Others are not looked at."""
    by_name: dict[str, Path] = {}
    by_tag: dict[str, list[Path]] = {}
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            told = read_yaml(path)
        except CapstanError:
            continue
        name = told.get("group") if isinstance(told.get("task"), list) else told.get("task")
        if not isinstance(name, str):
            continue
        if name in by_name:
            raise InputError(f"{path} and {by_name[name]} are both called {name}.")
        by_name[name] = path
        tags = told.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            by_tag.setdefault(str(tag), []).append(path)
    return by_name, by_tag


def _aggregates(told: Mapping[str, Any], path: Path) -> tuple[Aggregate, ...]:
    listed = told.get("aggregate_metric_list") or []
    listed = [listed] if isinstance(listed, dict) else listed
    found = []
    for each in listed:
        if not isinstance(each, dict) or not isinstance(each.get("metric"), str):
            raise InputError(f"{path}: aggregate_metric_list wants mappings with a metric, not {each!r}.")
        for key in each:
            if key not in _AGGREGATE:
                raise InputError(
                    f"{path}: {unknown_name('key of aggregate_metric_list', str(key), _AGGREGATE)}"
                )
        if each.get("aggregation", "mean") != "mean":
            raise InputError(
                f"{path}: the aggregation {each['aggregation']!r} cannot be taken over; mean can."
            )
        weighs = each.get("weight_by_size", True)
        if not isinstance(weighs, bool):
            raise InputError(f"{path}: weight_by_size must be true or false, not {weighs!r}.")
        filters = each.get("filter_list") or "none"
        for name in [filters] if isinstance(filters, str) else filters:
            metric = each["metric"] if name == "none" else f"{each['metric']},{name}"
            found.append(Aggregate(metric=metric, weight_by_size=weighs))
    return tuple(found)
