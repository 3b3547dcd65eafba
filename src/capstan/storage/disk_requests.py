"""A few requests to disks in flight, each with a buffer of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

from capstan.hardware.direct_io import NUM_REQUESTS, request_buffers


class DiskRequests:
    """Threads that may be shared by files, so that many files take no more of them than one."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="capstan disk")
        self._buffers: SimpleQueue[memoryview] = SimpleQueue()
        for buffer in request_buffers():  # no memory is taken before they are used
            self._buffers.put(buffer)

    def move(
        self, move: Callable[[int, memoryview, memoryview], None], pieces: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Call `move(offset, view, buffer)` for all pieces, several at a time.

        Raises the first piece's error. When this returns or raises, nothing is under way any more.
        """

        def with_buffer(offset: int, view: memoryview) -> None:
            buffer = self._buffers.get()
            try:
                move(offset, view, buffer)
            finally:
                self._buffers.put(buffer)

        moves = [self._threads.submit(with_buffer, *piece) for piece in pieces]
        try:
            for each in moves:
                each.result()
        finally:
            for each in moves:
                each.cancel()
            wait(moves)

    def close(self) -> None:
        """End the threads; requests that run end first. Closing again does nothing."""
        self._threads.shutdown(wait=True)
