"""What a server allows: sizes, counts and waits, each of which bounds what a client can hold."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on requests and connections.

    Args:
        longest: tokens of a prompt and its answer together.
        queue: sequences that may wait for a slot; beyond that, clients are asked to come back.
        max_tokens: new tokens for requests that do not say how many.
        body_bytes: of a request.
        file_bytes: of an uploaded file.
        stop_texts: of one request; each is looked for after every token.
        connections: open at the same time.
        header_s: until a connection has sent a request's headers.
        body_s: until it has sent a request's body; a file has ten times as long.
        write_s: for which a client may leave what was sent to it unread.
        shutdown_s: for which requests that run may go on when the server is told to stop.
    """

    longest: int
    queue: int = 1024
    max_tokens: int = 128
    body_bytes: int = 4 << 20
    file_bytes: int = 256 << 20
    stop_texts: int = 16
    connections: int = 1024
    header_s: float = 10.0
    body_s: float = 60.0
    write_s: float = 60.0
    shutdown_s: float = 30.0
