"""A TCP proxy that tests put between a session and its server: it counts, cuts and falls silent."""

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes on from its `port` to a port of this machine, and counts them by direction."""

    def __init__(self, target_port):
        self._target_port, self._lock = target_port, threading.Lock()
        self.up_bytes = self.down_bytes = self.connections = 0
        self.is_silent = False
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self._target_port))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
            for source, sink, way in ((client, server, "up_bytes"), (server, client, "down_bytes")):
                threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source, sink, way):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.is_silent:
                    continue
                with self._lock:
                    setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        self._end(source, sink)

    @staticmethod
    def _end(*sockets):
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def cut(self):
        """End all connections; new ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        self._end(*sockets)

    def close(self):
        self._end(self._listener)
        self.cut()
