"""What ranks do for test_group.py, with torchrun's variables."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from capstan.errors import CapstanError
from capstan.transport.group import join


def tell(fate: str, end: str) -> None:
    """When all have heard from all, the others go away or fall silent while rank 0 waits for rank 1.

    Those that are silent stay until rank 0 has given up, and so has made the file `end`.
    """
    group = join("cpu", patience_s=2.0)
    assert group is not None
    assert join("cpu", patience_s=2.0) is group
    told: dict[str, Any] = {
        "gathered": group.gather({"rank": group.rank}),
        "shared": group.share([group.rank, "first"]),
    }
    following = (group.rank + 1) % group.size
    before = (group.rank - 1) % group.size
    arrived = [torch.empty(2, dtype=torch.bfloat16) for _ in range(2)]
    receiving = [group.receive(each, before) for each in arrived]
    values = [torch.full((2,), group.rank + at / 2, dtype=torch.bfloat16) for at in (0, 1)]
    sending = [group.send(each, following) for each in values]
    for transfer in (*receiving, *sending):
        transfer.wait()
    told["arrived"] = [each.tolist() for each in arrived]
    group.gather(None)
    if group.rank == 0:
        started_s = time.monotonic()
        try:
            group.receive(torch.empty(1), 1).wait()
        except CapstanError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        told["waited_s"] = time.monotonic() - started_s
        Path(end).touch()
    while fate == "silent" and not Path(end).exists():
        time.sleep(0.01)
    print(json.dumps(told), flush=True)
    os._exit(0)
