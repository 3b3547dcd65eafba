"""What a step of every algorithm would take, before anything runs; which one to switch on, and why.

Source: the bounds of docs/data_parallel.md, after BAGUA, arXiv 2107.01499.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from capstan.codecs import codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.asynchronous import AsyncAverage
from capstan.data_parallel.buckets import BUCKET_BYTES
from capstan.data_parallel.centralised import Centralised
from capstan.data_parallel.decentralised import Decentralised
from capstan.data_parallel.local_sgd import LocalSGD
from capstan.data_parallel.low_precision import LowPrecisionDecentralised
from capstan.data_parallel.names import ALGORITHMS, algorithm_from_name
from capstan.data_parallel.powersgd import PowerSGD
from capstan.errors import UsageError
from capstan.plans import Choice, Phase, Plan, Traffic, explain
from capstan.transport.collectives import chunk_bounds
from capstan.transport.message import HEADER_BYTES

LINK, COMPUTE = "rank->others", "compute"
# Gloo sends nothing before it has heard that the other end receives, which is one latency more; the second
# exchange of an average is announced early.
_HEARD = 1
BUCKET_CHOICES: tuple[int, ...] = tuple(1 << power for power in range(18, 28))


@dataclass(frozen=True, kw_only=True)
class Network:
    """Every rank's link to the others: what all can send at once, and how long a byte is on its way."""

    num_ranks: int
    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if self.num_ranks < 2 or not self.bandwidth_bytes_per_s > 0 or not self.latency_s >= 0:
            raise UsageError(
                "A network has at least 2 ranks, a bandwidth above 0 and a latency of at least 0; found "
                f"{self.num_ranks} ranks, {self.bandwidth_bytes_per_s} bytes/s, {self.latency_s} s."
            )


class Coding(NamedTuple):
    """Seconds that encoding and decoding one element take."""

    encode_s: float
    decode_s: float


_FREE = Coding(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step: how many numbers each bucket has, in the order in which gradients become ready, and compute.

    `coding` says, by codec, what encoding and decoding one element takes; a codec that is not there costs
    nothing. The identity's is what moving an element through memory takes.
    """

    bucket_elements: tuple[int, ...]
    forward_s: float
    backward_s: float
    optimizer_s: float = 0.0
    coding: Mapping[str, Coding] = field(default_factory=dict, hash=False)

    @classmethod
    def even(
        cls,
        num_elements: int,
        *,
        compute_s: float,
        bucket_bytes: int = BUCKET_BYTES,
        coding: Mapping[str, Coding] | None = None,
    ) -> "Workload":
        """Equal buckets, and a third of the compute forward, two thirds backward."""
        count = max(1, -(-4 * num_elements // bucket_bytes))
        sizes = tuple(end - start for start, end in chunk_bounds(num_elements, count) if end > start)
        return cls(
            bucket_elements=sizes,
            forward_s=compute_s / 3,
            backward_s=2 * compute_s / 3,
            coding=coding or {},
        )

    @property
    def num_elements(self) -> int:
        """All numbers."""
        return sum(self.bucket_elements)

    @property
    def compute_s(self) -> float:
        """What one rank takes alone."""
        return self.forward_s + self.backward_s + self.optimizer_s


class Hop(NamedTuple):
    """One exchange of a bucket: what a rank sends, how many latencies it must take, coding before it, and the
    latencies that gloo adds."""

    sent_bytes: float
    latencies: float
    coding_s: float
    added_latencies: float = 0


class Prediction(NamedTuple):
    """A step, predicted. `ideal_s` is the formula of docs/data_parallel.md: all bytes at once, latencies
    once, nothing for coding; `exposed_s` is what the network adds."""

    algorithm: str
    step_s: float
    ideal_s: float
    sent_bytes: float
    exposed_s: float


def predict(algorithm: Algorithm | str, workload: Workload, network: Network) -> Prediction:
    """How long a step takes with an algorithm, on average over steps."""
    made = algorithm_from_name(algorithm) if isinstance(algorithm, str) else algorithm
    hops = [_hops(made, elements, workload, network) for elements in workload.bucket_elements]
    sent = sum(hop.sent_bytes for bucket in hops for hop in bucket)
    step_s = _step_s(made, hops, workload, network)
    every = _every(made)
    compute_s = workload.compute_s
    return Prediction(
        made.name,
        compute_s + (step_s - compute_s) / every,
        compute_s + (_ideal_s(made, hops, sent, workload, network) - compute_s) / every,
        sent / every,
        (step_s - compute_s) / every,
    )


def choose(
    workload: Workload, network: Network, *, among: Sequence[str] = tuple(ALGORITHMS)
) -> tuple[str, list[Prediction]]:
    """The synchronous algorithm with the shortest step that is closest to plain training, and all
    predictions.

    Of those within 10 % of the shortest the one that comes first in `ALGORITHMS` is taken: they are in
    the order of how much they change.
    """
    predictions = [predict(name, workload, network) for name in among]
    safe = [each for each in predictions if each.algorithm in _SYNCHRONOUS] or predictions
    shortest = min(each.step_s for each in safe)
    return next(each.algorithm for each in safe if each.step_s <= 1.1 * shortest), predictions


def choose_bucket_bytes(
    algorithm: str, num_elements: int, network: Network, *, compute_s: float, coding: Mapping[str, Coding]
) -> int:
    """The bucket size with the shortest predicted step: small ones start early, large ones pay fewer
    latencies.
    """

    def step_s(size: int) -> float:
        work = Workload.even(num_elements, compute_s=compute_s, bucket_bytes=size, coding=coding)
        return predict(algorithm, work, network).step_s

    best: int = min(BUCKET_CHOICES, key=step_s)
    return best


def differs(predicted_s: float, measured_s: float, *, share: float = 0.2) -> bool:
    """Whether a measured step is so far from the predicted one that the network should be probed anew."""
    return abs(measured_s - predicted_s) > share * predicted_s


def plan_of(algorithm: str, workload: Workload, network: Network) -> Plan:
    """A step of one algorithm as a plan."""
    chosen, _ = choose(workload, network)
    found = predict(algorithm, workload, network)
    link_s = found.sent_bytes / network.bandwidth_bytes_per_s
    phase = Phase(
        name="step",
        seconds=found.step_s,
        busy_s={LINK: link_s, COMPUTE: workload.compute_s},
        traffic=Traffic({(LINK, algorithm): int(found.sent_bytes)}),
    )
    return Plan(
        system="data_parallel",
        title=f"{workload.num_elements:,} parameters on {network.num_ranks} ranks",
        machine=f"{8e-6 * network.bandwidth_bytes_per_s:,.0f} Mbit/s, {1e3 * network.latency_s:g} ms",
        phases=(phase,),
        choices=(Choice(name="algorithm", value=algorithm, reason=_reason(found, chosen, workload)),),
    )


def explain_algorithms(workload: Workload, network: Network) -> str:
    """All algorithms side by side, whether several ranks are worth it at all, and what to switch on."""
    chosen, predictions = choose(workload, network)
    lines = [explain(plan_of(chosen, workload, network))]
    lines.append(f"{'algorithm':<30}{'step':>10}{'ideal':>10}{'sent':>12}{'network adds':>14}")
    for each in predictions:
        mark = "  <-" if each.algorithm == chosen else ""
        lines.append(
            f"{each.algorithm:<30}{each.step_s:>8.3f} s{each.ideal_s:>8.3f} s{each.sent_bytes / 1e6:>9.2f} MB"
            f"{each.exposed_s:>12.3f} s{mark}"
        )
    plain = next(each for each in predictions if each.algorithm == "gradient_allreduce")
    gain = network.num_ranks * workload.compute_s / plain.step_s
    if gain < 1:
        lines.append(
            f"With plain averages {network.num_ranks} ranks are slower than one: in the {plain.step_s:.2f} s "
            f"of a step one rank alone would do {plain.step_s / workload.compute_s:.1f} of its own, and they "
            f"do {network.num_ranks} together. Switch on {chosen}."
        )
    return "\n".join(lines)


_SYNCHRONOUS = ("gradient_allreduce", "bytegrad", "onebit", "topk", "powersgd")


def _reason(found: Prediction, chosen: str, workload: Workload) -> str:
    if found.exposed_s <= 0.1 * workload.compute_s:
        return "the network is hidden behind compute"
    better = "" if found.algorithm == chosen else f"; {chosen} would be faster"
    return f"the network adds {found.exposed_s:.2f} s to {workload.compute_s:.2f} s of compute{better}"


def _every(algorithm: Algorithm) -> int:
    return algorithm.every if isinstance(algorithm, LocalSGD | Decentralised) else 1


def _hops(algorithm: Algorithm, elements: int, workload: Workload, network: Network) -> list[Hop]:
    """The exchanges of one bucket."""
    n = network.num_ranks
    if isinstance(algorithm, AsyncAverage):
        return []
    if isinstance(algorithm, LowPrecisionDecentralised):
        return _swap(algorithm.codec.name, elements, min(2, n - 1), workload)
    if isinstance(algorithm, Decentralised) and algorithm.peers == "shift_one":
        return _swap("identity", elements, 1, workload)
    if isinstance(algorithm, PowerSGD):
        side = max(1, round(elements**0.5))  # as if each bucket were one square matrix
        return _average("identity", algorithm.rank * side, n, workload) * 2
    if isinstance(algorithm, Centralised) and algorithm.route == "ring":
        return [Hop(2 * (n - 1) / n * 4 * elements, 2 * (n - 1), 0.0)]
    if isinstance(algorithm, Centralised | LocalSGD):
        return _average(algorithm.codec.name, elements, n, workload, feedback=algorithm.error_feedback)
    return _average("identity", elements, n, workload)


def _average(codec: str, elements: int, n: int, workload: Workload, *, feedback: bool = False) -> list[Hop]:
    chunk, cost = -(-elements // n), workload.coding.get(codec, _FREE)
    move = workload.coding.get("identity", _FREE)
    # Feedback decodes what it has encoded, and adds and subtracts: three more passes over memory.
    encode_s = cost.encode_s + (cost.decode_s + 3 * move.encode_s if feedback else 0.0)
    sent = (n - 1) * _message_bytes(codec, chunk)
    return [
        Hop(sent, 1, elements * encode_s + chunk * cost.decode_s, _HEARD),
        Hop(sent, 1, elements * (cost.decode_s + move.decode_s) + chunk * (encode_s + cost.decode_s)),
        Hop(0, 0, elements * cost.decode_s),
    ]


def _swap(codec: str, elements: int, copies: int, workload: Workload) -> list[Hop]:
    cost, move = workload.coding.get(codec, _FREE), workload.coding.get("identity", _FREE)
    sent = copies * _message_bytes(codec, elements)
    # The weights are copied before and after, and what arrives is added.
    return [
        Hop(sent, 1, elements * (cost.encode_s + 3 * move.encode_s), _HEARD),
        Hop(0, 0, elements * (copies * cost.decode_s + 3 * move.decode_s)),
    ]


def _message_bytes(codec: str, elements: int) -> int:
    return codec_from_name(codec).encoded_bytes((elements,), torch.float32) + HEADER_BYTES


def _ready(algorithm: Algorithm, workload: Workload) -> list[float]:
    """When each bucket can go."""
    if isinstance(algorithm, Decentralised):
        return [0.0] * len(workload.bucket_elements)
    if not algorithm.exchanges_gradients:
        return [workload.compute_s] * len(workload.bucket_elements)
    ready, done = [], 0
    for elements in workload.bucket_elements:
        done += elements
        ready.append(workload.forward_s + workload.backward_s * done / workload.num_elements)
    return ready


def _step_s(algorithm: Algorithm, hops: list[list[Hop]], workload: Workload, network: Network) -> float:
    """Play a step: one thread codes, one link sends; what is ready first goes first."""
    waiting = [(at_s, number, 0) for number, at_s in enumerate(_ready(algorithm, workload))]
    heapq.heapify(waiting)
    thread_s = link_s = end_s = 0.0
    while waiting:
        at_s, number, step = heapq.heappop(waiting)
        if step == len(hops[number]):
            end_s = max(end_s, at_s)
            continue
        hop = hops[number][step]
        thread_s = max(at_s, thread_s) + hop.coding_s
        link_s = max(thread_s, link_s) + hop.sent_bytes / network.bandwidth_bytes_per_s
        latencies = hop.latencies + hop.added_latencies
        heapq.heappush(waiting, (link_s + latencies * network.latency_s, number, step + 1))
    return _ending(algorithm, end_s, workload)


def _ideal_s(
    algorithm: Algorithm, hops: list[list[Hop]], sent: float, workload: Workload, network: Network
) -> float:
    if not any(hops):
        return workload.compute_s
    first_s, transfer_s = _ready(algorithm, workload)[0], sent / network.bandwidth_bytes_per_s
    latencies_s = sum(hop.latencies for hop in hops[0]) * network.latency_s
    if algorithm.exchanges_gradients:
        backward_end_s = workload.forward_s + workload.backward_s
        return max(backward_end_s, first_s + transfer_s) + latencies_s + workload.optimizer_s
    return _ending(algorithm, first_s + transfer_s + latencies_s, workload)


def _ending(algorithm: Algorithm, end_s: float, workload: Workload) -> float:
    """The end of a step whose communication ends then."""
    if not algorithm.exchanges_gradients and not isinstance(algorithm, Decentralised):
        return max(end_s, workload.compute_s)
    return max(end_s, workload.forward_s + workload.backward_s) + workload.optimizer_s
