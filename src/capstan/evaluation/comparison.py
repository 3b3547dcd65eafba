"""Two evaluations of the same instances: per-instance differences, their interval, and a sign test.

What both get right or wrong alike says nothing; pairing leaves it out, so far smaller differences are seen
than two separate intervals would show.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from capstan.errors import InputError
from capstan.evaluation.intervals import Interval, passages_of, resampled, wilson

Key = tuple[str, str, int]
"""Instance, perturbation (as JSON, empty for none), trial."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B less A on one metric of one run.

    `num_higher` and `num_lower` count instances; `sign_p` is the two-sided exact sign test's.
    `num_unpaired` instances stand in one of the two only, and are left out.
    `smallest_seen` is the difference that an interval of this width would just have told from none.
    """

    run: str
    metric: str
    a: float
    b: float
    interval: Interval
    num_higher: int
    num_lower: int
    sign_p: float
    num_unpaired: int = 0

    @property
    def smallest_seen(self) -> float:
        return self.interval.half_width

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval.low > 0 or self.interval.high < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {
            name: getattr(self, name)
            for name in ("run", "metric", "a", "b", "num_higher", "num_lower", "sign_p", "num_unpaired")
        }
        return own | {"difference": self.interval.to_dict(), "smallest_seen": self.smallest_seen}


def paired(
    run: str,
    metric: str,
    a: Mapping[Key, float],
    b: Mapping[Key, float],
    clusters: Mapping[str, str] | None = None,
) -> Difference:
    """Compare two sets of values on the instances that both have; `clusters` says which belong together.

    Raises:
        InputError: they have none in common.
    """
    from scipy.stats import binomtest

    by_instance: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for key in a.keys() & b.keys():
        by_instance.setdefault(key[:2], []).append((a[key], b[key]))
    if not by_instance:
        raise InputError(f"{run}: A and B share no instance on {metric}, so they cannot be paired.")
    instances = sorted(by_instance)
    means = [
        (sum(x for x, _ in pairs) / len(pairs), sum(y for _, y in pairs) / len(pairs))
        for pairs in (by_instance[each] for each in instances)
    ]
    owners = [(clusters or {}).get(key, key) for key, _ in instances]
    differences = [y - x for x, y in means]
    higher, lower = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    count = higher + lower
    return Difference(
        run=run,
        metric=metric,
        a=sum(x for x, _ in means) / len(means),
        b=sum(y for _, y in means) / len(means),
        interval=_interval(means, owners),
        num_higher=higher,
        num_lower=lower,
        sign_p=float(binomtest(higher, count).pvalue) if count else 1.0,
        num_unpaired=len({key[:2] for key in a.keys() ^ b.keys()} - by_instance.keys()),
    )


def _interval(means: list[tuple[float, float]], clusters: Sequence[str]) -> Interval:
    """The mean difference's interval. Where none of n answers changed, still up to Wilson's share may."""
    differences = [y - x for x, y in means]
    is_share = all(0 <= value <= 1 for pair in means for value in pair)
    num, num_told = len(means), len(set(clusters))
    if num > 1 and is_share and not any(differences):
        bound = wilson(0.0, num_told).high
        return Interval(0.0, -bound, bound, num)
    if num > 1 and is_share and len(set(differences)) == 1:
        scaled = wilson((differences[0] + 1) / 2, num_told)
        return Interval(differences[0], 2 * scaled.low - 1, 2 * scaled.high - 1, num)
    return resampled(differences, clusters=clusters)


class _Content(NamedTuple):
    """What tells each instance's content from others', by its id, and what it is asked about, by that."""

    keys: dict[str, str]
    texts: dict[str, str]


def _read_content(folder: Path) -> _Content:
    """What a run's instances say, of its requests; nothing where they are not there.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "scenario_state.json"
    content, seen = _Content({}, {}), Counter[str]()
    if not path.exists():
        return content
    try:
        for state in json.loads(path.read_text())["request_states"]:
            told = state["instance"]
            name = str(told["id"])
            if told.get("perturbation") or name in content.keys:
                continue
            said = json.dumps([told["input"]["text"], told.get("references", [])], sort_keys=True)
            digest = hashlib.sha256(said.encode()).hexdigest()
            # Of equal ones the first belongs to the first.
            content.keys[name] = f"{digest} {seen[digest]}"
            content.texts[content.keys[name]] = told["input"]["text"]
            seen[digest] += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Run the evaluation again.") from error
    return content


def read_values(folder: Path, keys: Mapping[str, str] | None = None) -> dict[str, dict[Key, float]]:
    """Of a run's folder: metric to values of unperturbed instances, under their ids or what `keys` has.

    Raises:
        InputError: there is no per_instance_stats.json, or it is damaged.
    """
    path = folder / "per_instance_stats.json"
    try:
        entries = json.loads(path.read_text())
        found: dict[str, dict[Key, float]] = {}
        for entry in entries:
            if entry.get("perturbation"):
                continue
            name = str(entry["instance_id"])
            key = ((keys or {}).get(name, name), "", int(entry["train_trial_index"]))
            for stat in entry["stats"]:
                if stat.get("mean") is not None:
                    found.setdefault(stat["name"]["name"], {})[key] = float(stat["mean"])
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Name the folder of an evaluation."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Make it again with rescore.") from error
    return found


def compare_folders(a: Path, b: Path, *, metrics: Mapping[str, str]) -> list[Difference]:
    """Compare every run that both folders have, on the metric that `metrics` names for it.

    Instances are paired by what they say, not by their ids, which another file or order of it changes.

    Raises:
        InputError: a folder is not there, or they have no run in common.
    """
    for folder in (a, b):
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}. Name the folder of an evaluation.")
    runs_a = {path.parent.name: path.parent for path in a.rglob("per_instance_stats.json")}
    runs_b = {path.parent.name: path.parent for path in b.rglob("per_instance_stats.json")}
    by_key_a = {run_key(name): path for name, path in runs_a.items()}
    by_key_b = {run_key(name): path for name, path in runs_b.items()}
    common = sorted(by_key_a.keys() & by_key_b.keys())
    if not common:
        raise InputError(f"{a} and {b} have no run in common: {len(runs_a)} and {len(runs_b)} runs.")
    found = []
    for name in common:
        content_a, content_b = (_read_content(by_key[name]) for by_key in (by_key_a, by_key_b))
        if not (content_a.keys and content_b.keys):
            content_a = content_b = _Content({}, {})
        values_a = read_values(by_key_a[name], content_a.keys)
        values_b = read_values(by_key_b[name], content_b.keys)
        wanted = metrics.get(name) or next(iter(values_a), "")
        if wanted in values_a and wanted in values_b:
            passages = passages_of(content_a.texts)
            found.append(paired(name, wanted, values_a[wanted], values_b[wanted], passages))
    return found


def run_key(name: str) -> str:
    """A run's name without its model, by which two evaluations' runs belong together."""
    head, _, told = name.partition(":")
    kept = [part for part in told.split(",") if part and not part.startswith(("model=", "model_deployment="))]
    return head + (":" + ",".join(kept) if kept else "")
