"""What devices and server say to each other in a session, as bytes: checked, never trusted. NumPy only.

A byte says what it is. Joining is JSON, a task and its result are numbers and packets:

    task    id u64 | work u8 | epoch u32 | iteration u32 | start u32 | stop u32 | dimensions u8 | packets u8
            | each dimension u32 | each packet: bytes u32, packet
    result  id u64 | loss f64 | packets u8 | each packet: bytes u32, packet
"""

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from capstan.errors import InputError
from capstan.federation.tasks import Result, Task, Work

_TASK, _RESULT, _U32 = struct.Struct("<QBIIIIBB"), struct.Struct("<QdB"), struct.Struct("<I")


class Said(IntEnum):
    """What a message is; the first four are a device's."""

    HELLO = 1  # which device it is -> JOB
    FACTS = 2  # what the server may know of it -> TASK, WAIT or END
    READY = 3  # nothing to tell -> the same
    RESULT = 4  # -> the same
    JOB = 5
    TASK = 6
    WAIT = 7  # nothing to do yet: say READY
    END = 8  # and what failed, in UTF-8, if something did


class GivenTask(NamedTuple):
    """A task, and the number under which its result is wanted."""

    number: int
    task: Task


class GivenResult(NamedTuple):
    """A result, and the number of its task."""

    number: int
    result: Result


def write_json(said: Said, record: dict[str, Any]) -> bytes:
    """A message that is JSON."""
    return bytes([said]) + json.dumps(record).encode()


def read_json(message: bytes) -> dict[str, Any]:
    """The inverse."""
    try:
        record = json.loads(message[1:])
    except (ValueError, RecursionError) as error:
        raise InputError("Wanted a JSON object, found something else.") from error
    if not isinstance(record, dict):
        raise InputError(f"Wanted a JSON object, found {type(record).__name__}.")
    return record


def kind_of(message: bytes) -> Said:
    """What a message is.

    Raises:
        InputError: nothing that is known.
    """
    if not message or message[0] not in set(Said):
        raise InputError(f"A message begins with 1 to {len(Said)}, found {message[:1]!r}.")
    return Said(message[0])


def write_task(given: GivenTask) -> bytes:
    """A task as a message."""
    number, task = given
    head = _TASK.pack(
        number,
        task.work,
        task.epoch,
        task.iteration,
        task.start,
        task.stop,
        len(task.shape),
        len(task.packets),
    )
    shape = b"".join(map(_U32.pack, task.shape))
    return bytes([Said.TASK]) + head + shape + _join(task.packets)


def read_task(message: bytes) -> GivenTask:
    """The inverse.

    Raises:
        InputError: `write_task` would not write this.
    """
    number, work, epoch, iteration, start, stop, dimensions, count = _unpack(_TASK, message, 1)
    if work not in set(Work) or start > stop:
        raise InputError(f"There is no work {work} on samples {start} to {stop}.")
    at = 1 + _TASK.size
    shape = tuple(_unpack(_U32, message, at + 4 * each)[0] for each in range(dimensions))
    task = Task(
        work=Work(work),
        epoch=epoch,
        iteration=iteration,
        start=start,
        stop=stop,
        shape=shape,
        packets=_split(message, at + 4 * dimensions, count),
    )
    return GivenTask(number, task)


def write_result(given: GivenResult) -> bytes:
    """A result as a message."""
    number, result = given
    head = _RESULT.pack(number, result.loss, len(result.packets))
    return bytes([Said.RESULT]) + head + _join(result.packets)


def read_result(message: bytes) -> GivenResult:
    """The inverse.

    Raises:
        InputError: `write_result` would not write this.
    """
    number, loss, count = _unpack(_RESULT, message, 1)
    return GivenResult(number, Result(packets=_split(message, 1 + _RESULT.size, count), loss=loss))


def _join(packets: tuple[bytes, ...]) -> bytes:
    return b"".join(part for packet in packets for part in (_U32.pack(len(packet)), packet))


def _split(message: bytes, at: int, count: int) -> tuple[bytes, ...]:
    packets = []
    for _ in range(count):
        (size,) = _unpack(_U32, message, at)
        packets.append(message[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(message):
        raise InputError(f"{at} bytes are announced, found {len(message)}: it was cut off, or more was sent.")
    return tuple(packets)


def _unpack(form: struct.Struct, message: bytes, at: int) -> tuple[Any, ...]:
    if len(message) < at + form.size:
        raise InputError(f"Wanted at least {at + form.size} bytes, found {len(message)}: it was cut off.")
    return form.unpack_from(message, at)
