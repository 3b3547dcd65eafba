"""What forked device processes of the tests do; the file is imported once, before they are forked."""

import time

import torch
import torch._dynamo  # the first optimiser of a process imports it

from capstan.cli import main
from capstan.errors import CapstanError
from capstan.federation import device as devices
from capstan.federation.joining import join_run
from capstan.transport.sessions import Session

torch.set_num_threads(1)


def join(port, number):
    """The command line."""
    assert main(["federate", "join", f"127.0.0.1:{port}", "--device", str(number)]) == 0


def join_slowly(port, number, iteration, pause_s):
    """A device that takes a while for its batch of one iteration."""
    work = devices.Device.work

    def slow(self, task):
        if task.iteration == iteration and task.work == 1:
            time.sleep(pause_s)
        return work(self, task)

    devices.Device.work = slow
    join(port, number)


def join_again_and_again(port, number):
    """A device that joins anew whenever it is refused or its server does not answer."""
    while True:
        try:
            with Session(f"127.0.0.1:{port}", name=f"device {number}") as session:
                join_run(session, number)
            return
        except CapstanError as error:
            print(error, flush=True)
            time.sleep(0.1)
