"""Averages over ranks equal their definition, cost the bytes of their formula, and end when a rank does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.codecs import codec_from_name
from capstan.transport.collectives import chunk_bounds
from capstan.transport.message import HEADER_BYTES

CASES = str(Path(__file__).with_name("collective_cases.py"))
CODECS = ["identity", "cast:bfloat16", "group8:512:float32", "group4:32:symmetric", "sign:64", "minmax8"]
SIZES = [1000, 4099, 1, 2048]
WORLDS = [2, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))]


def values_of(rank: int, bucket: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * bucket + rank))


def defined_average(name: str, parts: list[torch.Tensor], *, divisor: int | None = None) -> torch.Tensor:
    """y_i = mean_j Q(x_j[i]), then concat_i Q(y_i), in one process."""
    codec, result = codec_from_name(name), torch.empty_like(parts[0])

    def coded(values: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(values))

    for start, end in chunk_bounds(len(parts[0]), len(parts)):
        total = coded(parts[0][start:end]).clone()
        for part in parts[1:]:
            total += coded(part[start:end])
        result[start:end] = coded(total / (divisor or len(parts)))
    return result


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, in_world: Any) -> tuple[int, list[Any]]:
    size = request.param
    return size, in_world(CASES, "averages", size, {"codecs": CODECS, "sizes": SIZES})


@pytest.mark.parametrize("name", CODECS)
def test_an_average_is_its_definition_bit_for_bit_on_every_rank(world, name):
    size, found = world
    for bucket, numel in enumerate(SIZES):
        expected = defined_average(name, [values_of(rank, bucket, numel) for rank in range(size)])
        for rank in range(size):
            assert torch.equal(found[rank][name][bucket], expected)


@pytest.mark.parametrize("name", CODECS)
def test_ledger_bytes_are_the_formulas(world, name):
    size, found = world
    codec = codec_from_name(name)
    chunks = [[end - start for start, end in chunk_bounds(numel, size)] for numel in SIZES]
    for rank in range(size):
        traffic = found[rank][f"{name} traffic"]
        for peer in set(range(size)) - {rank}:
            out, back = traffic[f"rank {rank}->rank {peer}"], traffic[f"rank {peer}->rank {rank}"]
            to_peer = sum(codec.encoded_bytes((each[peer],), torch.float32) for each in chunks)
            own = sum(codec.encoded_bytes((each[rank],), torch.float32) for each in chunks)
            assert (out["scatter"], out["gather"], out["headers"]) == (to_peer, own, 8 * HEADER_BYTES)
            assert (back["scatter"], back["gather"], back["headers"]) == (own, to_peer, 8 * HEADER_BYTES)


def test_between_machines_values_are_coded_and_within_them_not(world):
    size, found = world
    parts = [values_of(rank, 0, 1000) for rank in range(size)]
    sums = [parts[at] + parts[at + 1] if at + 1 < size else parts[at] for at in range(0, size, 2)]
    for name in ("identity", "group8:512:float32"):
        one_machine = len(sums) == 1
        expected = sums[0] / size if one_machine else defined_average(name, sums, divisor=size)
        assert all(torch.equal(each[f"machines {name}"], expected) for each in found)


def test_the_ring_is_pytorchs_bit_for_bit(world):
    _, found = world
    assert all(torch.equal(each["ring"], each["torch"]) for each in found)


def test_a_broadcast_gives_all_the_first_ranks_values(world):
    _, found = world
    assert all(torch.equal(each["broadcast"], values_of(0, 0, 1000)) for each in found)


def test_a_shaped_link_takes_at_least_its_time(in_world):
    # 3 chunks of 4 go out in each of two phases, and each phase ends a latency after its bytes.
    found = in_world(CASES, "shaped", 4, {"rate": 1e6, "latency": 0.05, "numel": 40_000})
    assert min(found) >= 2 * (3 * 40_000 / 1e6 + 0.05)


def test_a_rank_that_is_gone_is_named_with_the_bucket(in_world):
    found = in_world(CASES, "losing", 3, "gone")
    for said in found[:2]:
        assert said.startswith("DeviceError: Rank")
        assert "2" in said.partition("gone")[0]
        assert "bucket 1" in said


def test_a_rank_that_is_silent_is_named_with_the_bucket(in_world):
    found = in_world(CASES, "losing", 2, "silent")
    assert found[0].startswith(
        "TimeoutExpired: Rank 1 of 2 did not answer rank 0 within 2 s (bucket 1, scatter)"
    )
