"""The emulated network: what it lets through, how fast, and what it counts. Needs root."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from capstan.errors import DeviceError
from capstan.transport import Shape
from capstan.transport.emulation import EmulatedNetwork, address_of, require_emulation

_RANK = """
import json, os, time
import torch, torch.distributed as dist
from functools import partial
from capstan.codecs import codec_from_name
from capstan.codecs import Compressor
from capstan.transport import Communicator
from capstan.transport.collectives import average
from capstan.transport.group import Group

torch.set_num_threads(1)
dist.init_process_group("gloo")
sent = lambda: int(open("/sys/class/net/capstan0/statistics/tx_bytes").read())
with Communicator(Group(patience_s=60)) as communicator:
    compressor = Compressor(codec_from_name("identity"))
    dist.barrier()
    before, start_s = sent(), time.monotonic()
    for step in range(2):
        values = torch.ones(1_000_000)
        communicator.submit(partial(average, values=values, compressor=compressor, key="a"), about="a").wait()
    seconds, crossed = time.monotonic() - start_s, sent() - before
    own = f"rank {dist.get_rank()}->"
    traffic = communicator.ledger.traffic
    counted = sum(traffic.on(link) for link in traffic.links if link.startswith(own))
print(json.dumps({"seconds": seconds, "crossed": crossed, "counted": counted}), flush=True)
dist.barrier()
os._exit(0)
"""


def test_addresses_follow_each_other():
    assert [address_of(rank) for rank in (0, 1, 9)] == ["10.77.0.1", "10.77.0.2", "10.77.0.10"]


def test_what_is_missing_is_said():
    with mock.patch.object(os, "geteuid", return_value=1000), pytest.raises(DeviceError, match="root.*Shape"):
        require_emulation()


@pytest.mark.network
def test_ledger_and_interface_agree_within_two_percent_and_no_byte_is_faster_than_the_link():
    shape = Shape(bandwidth_bytes_per_s=12.5e6, latency_s=0.01)
    with EmulatedNetwork(num_ranks=2, shape=shape) as network:
        ranks = [
            subprocess.Popen(
                network.command(rank, [sys.executable, "-c", _RANK]),
                env=os.environ | network.environment(rank) | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        found = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
        counters = network.counters(0)
    for each in found:
        assert each["counted"] == 2 * (4_000_000 + 2 * 32)  # 2 (n-1)/n of 4 MB a step, in two messages
        assert each["counted"] < each["crossed"] < 1.02 * each["counted"]
        assert each["seconds"] >= 2 * (4_000_000 / 12.5e6 + 2 * 0.01)
    assert counters.sent_bytes > found[0]["crossed"]
