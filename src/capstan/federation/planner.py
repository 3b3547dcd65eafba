"""What a job will send: its schedule replayed on sizes, exact where no batch is lost. NumPy only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from capstan.federation.packets import Sizes
from capstan.federation.schedule import Settings, epoch_iterations
from capstan.federation.traffic import DOWN, UP, DeviceLink
from capstan.federation.wire import Wire, label_sizes, weight_sizes
from capstan.plans import Traffic


@dataclass(frozen=True, kw_only=True)
class JobSizes:
    """A job without tensors.

    `cut_width` elements a sample go up; `feature_width` come down to a head, 0 where there is none.
    `num_shared` elements are the device part that is averaged. Devices `with_own_bottom` never are.
    """

    num_samples: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    cut_width: int
    num_shared: int
    num_classes: int
    feature_width: int = 0
    with_own_bottom: frozenset[int] = field(default_factory=frozenset)


class Forecast(NamedTuple):
    """Bytes, iterations and samples of some epochs, and what they take on such links without computing."""

    traffic: Traffic
    iterations: int
    samples: int
    link_s: float
    is_exact: bool


def forecast(
    sizes: JobSizes,
    wire: Wire,
    settings: Settings,
    epochs: Sequence[int],
    link: DeviceLink,
    fresh: Mapping[int, bool] | None = None,
) -> Forecast:
    """Replay `epochs`. `fresh` says which devices already have the newest average: none at a job's start."""
    is_fresh = {device: bool(fresh and fresh.get(device)) for device in range(len(sizes.num_samples))}
    counted: Counter[tuple[str, str]] = Counter()
    iterations = samples = 0
    link_s, exact = 0.0, settings.loss_rate == 0
    for epoch in epochs:
        for iteration in epoch_iterations(sizes.num_samples, sizes.batch_sizes, settings, epoch):
            loads: dict[int, Counter[str]] = {}
            for batch in iteration.batches:
                load = loads[batch.device] = Counter()
                messages = (
                    []
                    if settings.algorithm == "fedavg"
                    else _messages(sizes, wire, settings, len(batch.rows))
                )
                if _is_shared(sizes, batch.device) and not is_fresh[batch.device]:
                    messages.append((DOWN, "weights", weight_sizes(sizes.num_shared)))
                    is_fresh[batch.device] = True
                _add(messages, counted, load)
                samples += len(batch.rows)
                exact &= (
                    wire.is_size_known(len(batch.rows), sizes.cut_width) or settings.algorithm == "fedavg"
                )
            shared = [device for device in iteration.averaged if _is_shared(sizes, device)]
            for device in shared:
                load = loads.setdefault(device, Counter())
                _add([(UP, "weights", weight_sizes(sizes.num_shared))], counted, load)
            if shared:
                is_fresh = dict.fromkeys(is_fresh, False)
            iterations += 1
            link_s += max(link.seconds(load[UP], load[DOWN]) for load in loads.values())
    return Forecast(Traffic(counted), iterations, samples, link_s, exact)


def _is_shared(sizes: JobSizes, device: int) -> bool:
    return sizes.num_shared > 0 and device not in sizes.with_own_bottom


def _messages(sizes: JobSizes, wire: Wire, settings: Settings, rows: int) -> list[tuple[str, str, Sizes]]:
    messages = [
        (UP, "values", wire.forward_sizes(rows, sizes.cut_width)),
        (DOWN, "values", wire.backward_sizes(rows, sizes.cut_width)),
    ]
    if settings.algorithm == "u-shaped":
        messages.append((DOWN, "values", wire.forward_sizes(rows, sizes.feature_width)))
        messages.append((UP, "values", wire.backward_sizes(rows, sizes.feature_width)))
    else:
        messages.append((UP, "labels", label_sizes(rows, sizes.num_classes)))
    return messages


def _add(
    messages: Sequence[tuple[str, str, Sizes]], counted: Counter[tuple[str, str]], load: Counter[str]
) -> None:
    for link, content, size in messages:
        counted[link, content] += size.values
        counted[link, "index"] += size.index
        counted[link, "framing"] += size.framing
        load[link] += size.total
