"""Sessions: processes that share no group ask a server over any network, and each update is applied once.

    server = SessionServer(handle, port=0)           # handle(peer, request) gives the answer
    with Session(f"127.0.0.1:{server.port}", name="device 3") as session:
        answer = session.ask(request, timeout_s=30)

A session asks one thing at a time and numbers what it asks. When an answer is lost with its connection the
request is repeated under its number, and the server repeats the answer that it has kept instead of applying
the request again. So at most one message a session and direction is under way: that is the bound of all
queues. Streams are gRPC's: it pings silent peers, limits sizes, and speaks TLS.
"""

from capstan.transport.sessions.client import Session
from capstan.transport.sessions.envelope import ENVELOPE_BYTES, Envelope, Kind, seal, unseal
from capstan.transport.sessions.limits import Limits
from capstan.transport.sessions.numbering import NumberedAnswers
from capstan.transport.sessions.security import Security, read_token
from capstan.transport.sessions.server import Peer, SessionServer

__all__ = [
    "ENVELOPE_BYTES",
    "Envelope",
    "Kind",
    "Limits",
    "NumberedAnswers",
    "Peer",
    "Security",
    "Session",
    "SessionServer",
    "read_token",
    "seal",
    "unseal",
]
