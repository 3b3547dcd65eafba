"""The rank map: written as planned, read back, refused where it is none, and obeyed by torchrun."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capstan.allocation import Layout, RankMap, read_rank_map
from capstan.errors import InputError

NAMES = ("a", "b", "c", "d", "e", "f")
LAYOUT = Layout(groups=((4, 1, 2), (0, 5, 3)))


def test_ranks_run_along_pipelines_and_groups_are_those_of_rooms() -> None:
    ranks = RankMap.of(LAYOUT, NAMES)
    assert ranks.devices == ("e", "a", "b", "f", "c", "d")
    assert ranks.pipeline_groups == ((0, 1), (2, 3), (4, 5))
    assert ranks.data_parallel_groups == ((0, 2, 4), (1, 3, 5))
    for stage, group in enumerate(ranks.data_parallel_groups):
        assert [NAMES.index(ranks.devices[rank]) for rank in group] == list(LAYOUT.groups[stage])


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    ranks = RankMap.of(LAYOUT, NAMES, {"layers": [3, 1], "schedule": "1f1b"})
    path = tmp_path / "ranks.json"
    path.write_text(ranks.to_json())
    assert read_rank_map(path) == ranks
    third = json.loads(ranks.to_json())["ranks"][3]
    assert third == {"rank": 3, "host": "f", "stage": 1, "replica": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "no rank map of version 1; version"),
        ({"format": "capstan.layout"}, "format"),
        ({"stages": 3}, "should have the ranks 0 to 8 in order"),
        ({"stages": 0}, "stages"),
        ({"more": 1}, "more: Extra inputs"),
        ({"ranks": [{"rank": 0, "host": "a", "stage": 0, "replica": 0}] * 6}, "should have the ranks 0 to 5"),
    ],
)
def test_what_is_no_map_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(json.loads(RankMap.of(LAYOUT, NAMES).to_json()) | change))
    with pytest.raises(InputError, match=message):
        read_rank_map(path)


def test_a_device_twice_and_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(RankMap.of(LAYOUT, NAMES).to_json().replace('"host": "f"', '"host": "a"'))
    with pytest.raises(InputError, match="has a device twice"):
        read_rank_map(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_rank_map(tmp_path / "none.json")


def test_a_name_is_one_word_of_the_command() -> None:
    line = RankMap(stages=1, devices=("a b; rm",)).torchrun_lines()[0]
    assert "--master-addr=a b; rm" in shlex.split(line.removeprefix("a b; rm: "))


@pytest.mark.slow
def test_torchrun_gives_every_device_its_rank(tmp_path: Path) -> None:
    """Each line in a process of its own, as if on its device; all meet at the first."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "everyone = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(everyone, (dist.get_rank(), os.environ['DEVICE']))\n"
        "if dist.get_rank() == 0: print(everyone)\n"
        "dist.destroy_process_group()\n"
    )
    ranks = RankMap.of(Layout(groups=((2, 1), (0, 3))), NAMES[:4])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for line in ranks.torchrun_lines(script=str(script), port=port):
        host, command = line.split(": torchrun ")
        words = re.sub(r"--master-addr=\S+", "--master-addr=127.0.0.1", command).split()
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                env=os.environ | {"DEVICE": host, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [each.communicate(timeout=120)[0] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0] * 4
    assert str(list(enumerate(ranks.devices))) in "".join(told)
