"""Devices in processes of their own: the same result, to the bit; kills, stragglers, and what is refused."""

import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from capstan.cli.federate import federate
from capstan.errors import InputError, TimeoutExpired, UsageError
from capstan.federation import joining
from capstan.federation.config import JobConfig
from capstan.federation.device import Device
from capstan.federation.joining import DeviceSource, join_run
from capstan.federation.members import flat_state
from capstan.federation.messages import (
    GivenResult,
    GivenTask,
    Said,
    kind_of,
    read_json,
    read_result,
    read_task,
    write_json,
    write_result,
    write_task,
)
from capstan.federation.packets import CutPacket, write_packet
from capstan.federation.runs import load_run, prepare_run
from capstan.federation.serving import serve_run
from capstan.federation.tasks import Result, Task, Work
from capstan.transport.sessions import Session

JOB = {
    "data": {"generate": {"samples": 160, "features": 10, "classes": 4, "noise": 0.3}},
    "model": {
        "layers": [
            {"linear": {"out": 24}},
            "relu",
            {"dropout": {"rate": 0.2}},
            {"linear": {"out": 16}},
            {"dropout": {"rate": 0.1}},
            {"linear": {"out": 4}},
        ],
        "cut": 3,
    },
    "devices": {"count": 3, "batch": 8},
    "wire": {"keep": 0.25},
    "training": {"epochs": 2},
    "sessions": {"deadline_s": 60, "rejoin_s": 60},
}


def config(**sections):
    job = {name: dict(section) for name, section in JOB.items()}
    for name, section in sections.items():
        job[name] |= section
    return JobConfig.model_validate(job)


class Served:
    """A job that a thread serves; `port` is there once it listens."""

    def __init__(self, job, **settings):
        self._listens, self.epochs, self.port = threading.Event(), [], 0
        self._pool = ThreadPoolExecutor(1)
        self._run = self._pool.submit(serve_run, job, on_port=self._note, on_epoch=self._count, **settings)
        assert self._listens.wait(60)

    def _note(self, port):
        self.port = port
        self._listens.set()

    def _count(self, counts, _accuracy):
        self.epochs.append(counts)

    def result(self):
        return self._run.result(240)


def weights(job):
    return torch.cat([flat_state(job.shared_parts), flat_state(job.top)])


def in_one_process(job):
    run = prepare_run(job)
    losses = [run.job.run_epoch().loss for _ in range(job.training.epochs)]
    return run.job, losses


def in_threads(port, *numbers, source=None):
    """Devices in threads of this process; they raise what `join_run` raises."""

    def be(number):
        with Session(f"127.0.0.1:{port}", name=f"device {number}") as session:
            return join_run(session, number, source)

    pool = ThreadPoolExecutor(len(numbers))
    return [pool.submit(be, number) for number in numbers]


def the_same(served, job):
    alone, losses = in_one_process(job)
    over = served.prepared.job
    assert torch.equal(weights(over), weights(alone))
    assert [each.loss for each in served.finished.epochs] == losses
    assert over.ledger.traffic == alone.ledger.traffic
    assert served.finished.trace.traffic == served.prepared.plan.traffic
    assert served.session_bytes > sum(over.ledger.traffic.size_bytes.values())


@pytest.mark.parametrize("wire", [{}, {"downlink": "top-k", "error_feedback": True, "alpha": None}])
def test_three_device_processes_train_what_one_process_trains_to_the_bit(fork, wire):
    job = config(wire=wire)
    served = Served(job)
    processes = [fork("federation/device_process.py", "join", served.port, each) for each in range(3)]
    result = served.result()
    assert [each.wait(60) for each in processes] == [0, 0, 0], processes[0].err
    assert "device 0 did" in processes[0].out
    the_same(result, job)


@pytest.mark.parametrize(
    "algorithm",
    [
        "u-shaped",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("fedavg", "split", "splitfed-v1", "splitfed-v2")
        ),
    ],
)
def test_every_algorithm_is_the_same_over_sessions(fork, algorithm):
    model = {"head": 5} if algorithm == "u-shaped" else {}
    job = config(training={"algorithm": algorithm, "epochs": 1}, model=model)
    served = Served(job)
    for each in range(3):
        fork("federation/device_process.py", "join", served.port, each)
    the_same(served.result(), job)


# --- who dies, and who is late ---------------------------------------------------------------------------

PLAIN = {"layers": [{"linear": {"out": 24}}, "relu", {"linear": {"out": 4}}], "cut": 2}


def until(condition):
    end_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_killed_device_loses_at_most_its_batch_in_flight_and_goes_on_when_it_is_back(fork):
    served = Served(config(model=PLAIN, training={"epochs": 12}))
    join = ("federation/device_process.py", "join", served.port)
    others, victim = [fork(*join, each) for each in range(2)], fork(*join, 2)
    for kill in range(2):
        until(lambda kill=kill: len(served.epochs) > 3 * kill)
        victim.kill()
        victim.wait(60)
        victim = fork(*join, 2)
    result = served.result()
    assert [each.wait(60) for each in (*others, victim)] == [0, 0, 0]
    # All are waited for: so only what was in flight when it was killed is lost.
    assert sum(each.lost_batches for each in result.finished.epochs) <= 2
    assert result.finished.accuracy[-1] > 0.8
    assert result.prepared.job.exchange.members[2].version >= 0


def test_a_straggler_is_dropped_at_the_deadline_and_counted(fork):
    served = Served(
        config(model=PLAIN, training={"epochs": 2, "quorum": 0.6}, sessions={"deadline_s": 0.5}),
    )
    join = ("federation/device_process.py", "join", served.port)
    processes = [fork(*join, 0), fork(*join, 1)]
    processes.append(fork("federation/device_process.py", "join_slowly", served.port, 2, 1, 1.5))
    result = served.result()
    assert [each.wait(60) for each in processes] == [0, 0, 0], processes[2].err
    assert result.late_results >= 1
    assert sum(each.lost_batches for each in result.finished.epochs) >= 1
    assert sum(each.skipped_iterations for each in result.finished.epochs) == 0


def test_without_its_devices_a_server_gives_up_and_says_who_is_missing():
    served = Served(config(sessions={"rejoin_s": 1}))
    (device,) = in_threads(served.port, 1)
    with pytest.raises(TimeoutExpired, match="Wanted 3 devices, found 1 after 1 s. Not there: 0, 2"):
        served.result()
    with pytest.raises(InputError, match="The server gave up: Wanted 3 devices"):
        device.result(60)


def test_who_joins_as_another_takes_its_place():
    served = Served(config(model=PLAIN, training={"epochs": 1}))
    first, *_ = in_threads(served.port, 0, 1)
    time.sleep(0.5)
    in_threads(served.port, 0, 2)
    with pytest.raises(InputError, match="Another one has joined as device 0|no device of this job"):
        first.result(60)
    assert sum(each.lost_batches for each in served.result().finished.epochs) <= 1


# --- what is refused -------------------------------------------------------------------------------------


def packet(**changes):
    """Activations of device 2 for iteration 1."""
    shape = {"rows": 8, "width": 24, "index": "elias-fano", "value_type": "float16", "is_even": True}
    shape |= changes
    kept = shape["rows"] * 6
    return write_packet(
        CutPacket(
            device=2,
            step=1,
            values=np.ones(kept),
            positions=np.arange(kept) * (shape["width"] // 6),
            **shape,
        )
    )[0]


def with_activations(message):
    return lambda result, _before: replace(result, packets=(message, *result.packets[1:]))


WRONG = {
    "replayed": (lambda _, before: before, "step 1, found 0"),
    "truncated": (
        lambda result, _: replace(result, packets=(result.packets[0][:-1], *result.packets[1:])),
        "announced",
    ),
    "oversized": (with_activations(packet(rows=9000)), "samples in a batch, found 9000"),
    "another cut": (with_activations(packet(width=48)), "Wanted 24 elements a sample at this cut, found 48"),
    "too few": (lambda result, _: replace(result, packets=result.packets[:1]), "Wanted 2 packets, found 1"),
    "noise": (with_activations(b"noise" * 20), "begins with"),
    "swapped": (lambda result, _: replace(result, packets=result.packets[::-1]), "elements a sample"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_packet_is_refused_the_server_stays_and_the_others_go_on(kind, monkeypatch):
    change, said = WRONG[kind]
    before = []

    class Wrong(Device):
        def work(self, task):
            result = super().work(task)
            if self.number == 2 and task.work is Work.FORWARD:
                before.append(result)
                if len(before) == 2:
                    return change(result, before[0])
            return result

    monkeypatch.setattr(joining, "Device", Wrong)
    served = Served(config(model=PLAIN, training={"epochs": 1, "quorum": 0.6}))
    good, _, bad = in_threads(served.port, 0, 1, 2)
    with pytest.raises(InputError, match=said):
        bad.result(60)
    epochs = served.result().finished.epochs
    assert good.result(60) > 0
    assert epochs[0].skipped_iterations == 0
    assert 1 <= epochs[0].lost_batches < epochs[0].iterations


def asked(port, *messages):
    with Session(f"127.0.0.1:{port}", name="a stranger") as session:
        return [session.ask(message, timeout_s=30) for message in messages]


HELLO = write_json(Said.HELLO, {"device": 0})
FACTS = {"num_samples": 3, "cut_shape": [24], "is_shared": True}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([b""], "begins with 1 to 8"),
        ([b"\x63"], "begins with 1 to 8"),
        ([write_json(Said.HELLO, {"device": 3})], "numbered from 0 to 2, found 3"),
        ([write_json(Said.HELLO, {"device": True})], "numbered from 0 to 2, found True"),
        ([bytes([Said.HELLO]) + b"["], "JSON object"),
        ([bytes([Said.HELLO]) + b"[" * 100_000], "JSON object"),
        ([bytes([Said.READY])], "no device of this job"),
        ([HELLO, bytes([Said.READY])], "has not said what it has"),
        ([HELLO, bytes([Said.JOB])], "do not say JOB"),
        ([HELLO, write_json(Said.FACTS, FACTS | {"cut_shape": [2**20, 2**20]})], "shape of the cut"),
        ([HELLO, write_json(Said.FACTS, FACTS | {"num_samples": -1})], "samples"),
        (
            [HELLO, write_json(Said.FACTS, FACTS), write_json(Said.FACTS, FACTS | {"num_samples": 4})],
            "came back",
        ),
        ([HELLO, write_json(Said.FACTS, FACTS), bytes([Said.RESULT, 0])], "cut off"),
    ],
)
def test_what_no_device_says_is_refused(messages, said, served_forever):
    with pytest.raises(InputError, match=said):
        asked(served_forever, *messages)


@pytest.fixture(scope="module")
def served_forever():
    """The port of a server that waits for its devices."""
    from capstan.federation.remote_fleet import RemoteFleet
    from capstan.transport.sessions import SessionServer

    fleet = RemoteFleet(3, {}, deadline_s=1, rejoin_s=1)
    with SessionServer(fleet.handle, on_lost=fleet.on_lost) as server:
        yield server.port


def test_devices_bring_samples_of_their_own_and_train_the_same(tmp_path):
    job = config(model=PLAIN, training={"epochs": 1})
    served = Served(job)
    for number, part in enumerate(load_run(job).device_samples(job)):
        np.savez(tmp_path / f"{number}.npz", inputs=part.inputs, labels=part.labels)
        in_threads(served.port, number, source=DeviceSource(tmp_path / f"{number}.npz"))
    the_same(served.result(), job)


@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (np.ones((5, 10)), np.array(["ant", "bee", "ant", "bee", "ant"]), "from 0 to 3, .* found 'ant'"),
        (np.ones((5, 10)), np.array([0, 1, 2, 3, 4]), "found 4"),
        (np.ones((5, 10)), np.array([0, 1, 2, 3, 0.5]), "found 0.5"),
        (np.ones((5, 9)), np.arange(5) % 4, r"shape \(10,\), device 0 has \(9,\)"),
    ],
)
def test_samples_that_do_not_go_with_the_job_are_refused_by_their_device(inputs, labels, said, tmp_path):
    served = Served(config(sessions={"rejoin_s": 0.5}))
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
    (device,) = in_threads(served.port, 0, source=DeviceSource(tmp_path / "a.npz"))
    with pytest.raises(InputError, match=said):
        device.result(60)
    with pytest.raises(TimeoutExpired):
        served.result()


# --- messages --------------------------------------------------------------------------------------------

U32 = st.integers(0, 2**32 - 1)
PACKETS = st.lists(st.binary(max_size=40), max_size=3).map(tuple)


@given(st.sampled_from(Work), U32, U32, U32, U32, st.lists(U32, max_size=3).map(tuple), PACKETS, st.data())
def test_tasks_and_results_come_out_as_they_went_in(work, epoch, iteration, one, other, shape, packets, data):
    task = Task(
        work=work,
        epoch=epoch,
        iteration=iteration,
        start=min(one, other),
        stop=max(one, other),
        shape=shape,
        packets=packets,
    )
    given_task, given_result = GivenTask(7, task), GivenResult(8, Result(packets=packets, loss=0.25))
    for message, read, write in (
        (write_task(given_task), read_task, write_task),
        (write_result(given_result), read_result, write_result),
    ):
        assert write(read(message)) == message
        at = data.draw(st.integers(1, len(message) - 1))
        for wrong in (message[:at], message + b"\0"):
            with pytest.raises(InputError):
                read(wrong)


@given(st.binary(max_size=60))
def test_noise_is_refused_or_reads_as_what_would_be_written(noise):
    for read, write in ((read_task, write_task), (read_result, write_result)):
        try:
            given_one = read(noise)
        except InputError:
            continue
        assert write(given_one)[1:] == noise[1:] or np.isnan(given_one.result.loss)
    for read in (kind_of, read_json):
        try:
            read(noise)
        except InputError:
            continue


# --- minutes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_starts_the_processes_itself(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    said = [
        CliRunner().invoke(federate, ["run", str(path), "--json", *more]) for more in ([], ["--processes"])
    ]
    alone, over = [json.loads(each.stdout) for each in said]
    assert over["accuracy"] == alone["accuracy"]
    assert [each["loss"] for each in over["epochs"]] == [each["loss"] for each in alone["epochs"]]
    assert over["late_results"] == 0


def test_processes_do_not_go_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    words = ["run", str(path), "--processes", "--checkpoint", str(tmp_path / "job.pt")]
    with pytest.raises(UsageError, match="leave out --checkpoint"):
        CliRunner().invoke(federate, words, catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize("quorum", [0.5, 1.0])
def test_eight_devices_of_which_a_tenth_is_killed_an_iteration_do_not_hang_a_hundred_iterations(fork, quorum):
    job = config(
        model=PLAIN,
        data={"generate": {"samples": 1200, "features": 10, "classes": 4, "noise": 0.3}},
        devices={"count": 8, "batch": 5},
        training={"epochs": 5, "quorum": quorum},
        sessions={"deadline_s": 20},
    )
    served = Served(job)

    def start(number):
        return fork("federation/device_process.py", "join", served.port, number)

    processes, kills, rng = [start(number) for number in range(8)], 0, random.Random(3)
    until(lambda: len(served.epochs) > 0)
    rounds = itertools.count()
    while len(served.epochs) < 4 and next(rounds) < 200:
        time.sleep(0.05)
        for number in range(8):
            if rng.random() < 0.1:
                processes[number].kill()
                processes[number].wait(60)
                processes[number], kills = start(number), kills + 1
    epochs = served.result().finished.epochs
    assert kills >= 10
    assert sum(each.iterations for each in epochs) >= 100
    skipped = sum(each.skipped_iterations for each in epochs)
    assert skipped <= kills
    if quorum == 1:  # all are waited for: nothing but what was in flight is lost
        assert sum(each.lost_batches for each in epochs) <= kills
