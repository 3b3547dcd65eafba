"""A world of ranks for tests: imports torch once, then forks one process for each rank.

    python world.py FILE FUNCTION SIZE FOLDER ARGUMENTS

FUNCTION of the Python file FILE is called in every rank with (rank, size, ARGUMENTS from JSON), torch's
default group being gloo; what it returns is saved as FOLDER/RANK.pt. Exits with the number of ranks that
failed.
"""

import importlib.util
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import capstan.data_parallel  # noqa: F401  # once, before the processes part


def main() -> int:
    file, function, size, folder, arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("world_cases", file)
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    torch.set_num_threads(1)
    work = getattr(cases, function)
    children = []
    for rank in range(int(size)):
        child = os.fork()
        if child == 0:
            _be(rank, int(size), work, Path(folder), json.loads(arguments))
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    return sum(end != 0 for end in ends)


def _be(rank: int, size: int, work, folder: Path, arguments) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    try:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        torch.save(work(rank, size, arguments), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
