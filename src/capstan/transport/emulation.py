"""A slow network on one machine, with real packets: a network namespace for each rank, and a relay
between them.

Every rank has a link of its own to a switch, with a rate in each direction and a delay. TCP runs over it
as it does over a cable, so slow starts, windows and headers are real. Needs root, network namespaces,
/dev/net/tun and a C compiler; elsewhere there is the shaped link (`Communicator(shape=...)`).

The delay is made here, in user space, because many kernels come without netem.
"""

import ctypes
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from capstan.errors import DeviceError
from capstan.hardware.compiler import compiled
from capstan.transport.shaping import Shape

_SOURCE = Path(__file__).with_name("relay.c")
_DEVICE = "capstan0"
_BASE = 0x0A4D0001  # 10.77.0.1
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_PATIENCE_S = 20.0
_QUEUE_S = 0.05


class Counters(NamedTuple):
    """What a rank's interface has sent and received, packets' headers included."""

    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class EmulatedNetwork:
    """Namespaces of ranks. Use as a context manager; start each rank by `command`, in `environment`."""

    num_ranks: int
    shape: Shape
    mtu_bytes: int = 9000

    def __enter__(self) -> Self:
        require_emulation()
        for name in self._names:
            _run("ip", "netns", "add", name)
        relay = [sys.executable, "-m", "capstan.transport.emulation", *self._relay_arguments]
        process = subprocess.Popen(relay, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
        object.__setattr__(self, "_relay", process)
        try:
            if process.stdout is None or not process.stdout.readline():
                raise DeviceError("The relay between the namespaces did not start.")
            for rank, name in enumerate(self._names):
                _run("ip", "-n", name, "addr", "add", f"{address_of(rank)}/24", "dev", _DEVICE)
                _run("ip", "-n", name, "link", "set", _DEVICE, "mtu", str(self.mtu_bytes))
                _run("ip", "-n", name, "link", "set", _DEVICE, "txqueuelen", "10000", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process: subprocess.Popen[bytes] = self._relay  # type: ignore[attr-defined]
        process.kill()
        process.wait(timeout=_PATIENCE_S)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """The command that runs another one in a rank's namespace."""
        return ["ip", "netns", "exec", self._names[rank], *command]

    def environment(self, rank: int) -> dict[str, str]:
        """What torch.distributed needs to know to speak over this network."""
        return {
            "MASTER_ADDR": address_of(0),
            "MASTER_PORT": "29400",
            "GLOO_SOCKET_IFNAME": _DEVICE,
            "WORLD_SIZE": str(self.num_ranks),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
        }

    def counters(self, rank: int) -> Counters:
        """What has crossed a rank's interface so far."""
        said = _run("ip", "-n", self._names[rank], "-s", "-j", "link", "show", _DEVICE)
        found = json.loads(said)[0]["stats64"]
        return Counters(found["tx"]["bytes"], found["rx"]["bytes"])

    @property
    def _names(self) -> list[str]:
        return [f"capstan-{os.getpid()}-{rank}" for rank in range(self.num_ranks)]

    @property
    def _relay_arguments(self) -> list[str]:
        rate, delay = self.shape.bandwidth_bytes_per_s, self.shape.latency_s
        limit_s = max(_QUEUE_S + 2 * delay, 10 * self.mtu_bytes / rate)
        return [repr(1e9 / rate), str(round(1e9 * delay)), str(round(1e9 * limit_s)), *self._names]


def address_of(rank: int) -> str:
    """A rank's address."""
    return ".".join(str(each) for each in (_BASE + rank).to_bytes(4, "big"))


def require_emulation() -> None:
    """Raise `DeviceError`, saying what is missing, unless a network can be emulated here."""
    missing = [
        what
        for what, is_there in (
            ("root", os.geteuid() == 0),
            ("the command ip (iproute2)", shutil.which("ip") is not None),
            ("/dev/net/tun", os.access("/dev/net/tun", os.R_OK | os.W_OK)),
        )
        if not is_there
    ]
    if not missing and compiled(_SOURCE, {}) is None:
        missing = ["a C compiler"]
    if missing:
        raise DeviceError(
            f"Emulating a network needs {', '.join(missing)}. Without it, pretend a slower link: "
            "wrap(..., shape=Shape(...))."
        )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    if done.returncode != 0:
        raise DeviceError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


# --- the relay's own process ------------------------------------------------------------------------------


def _open_device(namespace: str) -> int:
    """A TUN device in a namespace; this process stays there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as handle:
        if libc.setns(handle.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _TUN_WITHOUT_HEADER))
    return device


def _relay(arguments: list[str]) -> int:
    library = compiled(_SOURCE, {})
    assert library is not None
    devices = [_open_device(name) for name in arguments[3:]]
    print("ready", flush=True)
    library.capstan_relay.restype = ctypes.c_int
    return int(
        library.capstan_relay(
            (ctypes.c_int * len(devices))(*devices),
            len(devices),
            ctypes.c_uint32(_BASE),
            ctypes.c_double(float(arguments[0])),
            ctypes.c_int64(int(arguments[1])),
            ctypes.c_int64(int(arguments[2])),
        )
    )


if __name__ == "__main__":
    sys.exit(_relay(sys.argv[1:]))
