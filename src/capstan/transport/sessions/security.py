"""Who may connect: certificates for both sides and a token; only loopback goes without."""

import hmac
import ipaddress
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError

_HANDSHAKE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Security:
    """One side's certificate and key, the authority that the other side's must be of (all PEM), and a token.

    Either part may be left out where both sides are on one machine.
    """

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given = [path is not None for path in (self.certificate, self.key, self.authority)]
        if any(given) != all(given):
            raise UsageError("A certificate, its key and the authority's certificate are given together.")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise UsageError("A token is printable ASCII and not empty.")

    @property
    def has_certificate(self) -> bool:
        """Whether both sides show certificates."""
        return self.certificate is not None

    def check_address(self, host: str) -> None:
        """Refuse to serve or reach a machine other than this one without certificates and token."""
        if not is_loopback(host) and not (self.has_certificate and self.token):
            raise UsageError(
                f"{host} is not this machine: give --certificate, --key, --ca and --token-file. Only "
                "loopback goes without."
            )

    def server_credentials(self, grpc: Any) -> Any:
        """For gRPC's server; clients must show a certificate of the authority."""
        key, certificate, authority = self._pem()
        return grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=authority, require_client_auth=True
        )

    def channel_credentials(self, grpc: Any) -> Any:
        """For gRPC's client."""
        key, certificate, authority = self._pem()
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a client says to be let in."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def admits(self, metadata: dict[str, str | bytes]) -> bool:
        """Whether a client said the token. Takes equally long however much of it is right."""
        if self.token is None:
            return True
        said = metadata.get("authorization", "")
        found = said if isinstance(said, bytes) else said.encode()
        return hmac.compare_digest(found, f"Bearer {self.token}".encode())

    def check_handshake(self, host: str, port: int) -> None:
        """Find out why there is no connection: gRPC does not say who refuses whom, and goes on trying.

        Raises:
            InputError: this side does not trust the server's certificate, or the server not this side's.
        """
        context, address = self._context(ssl.Purpose.SERVER_AUTH), f"{host}:{port}"
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection((host.strip("[]"), port), _HANDSHAKE_S) as plain,
                context.wrap_socket(plain, server_hostname=host.strip("[]")) as stream,
            ):
                # A server judges the client's certificate when the client's handshake is already done.
                is_closed = not stream.recv(1)
        except ssl.SSLCertVerificationError as error:
            raise InputError(
                f"The certificate of {address} is not trusted: {error.verify_message}. It must be signed by "
                f"{self.authority} and name the host."
            ) from error
        except ssl.SSLError as error:
            raise InputError(
                f"{address} refuses {self.certificate}, or speaks no TLS: {error.reason}."
            ) from error
        except OSError:
            return  # it cannot be reached: that is no matter of certificates
        if is_closed:
            raise InputError(
                f"{address} refuses {self.certificate}: it must be valid today, and signed by the authority "
                "that the server was given."
            )

    def _pem(self) -> tuple[bytes, bytes, bytes]:
        assert self.key is not None
        assert self.certificate is not None
        assert self.authority is not None
        pem = _read(self.key), _read(self.certificate), _read(self.authority)
        self._context(ssl.Purpose.CLIENT_AUTH)
        return pem

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        assert self.certificate is not None
        try:
            context = ssl.create_default_context(purpose, cafile=self.authority)
            context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            raise InputError(
                f"{self.certificate}, {self.key} and {self.authority} are not a certificate, its key and an "
                f"authority's certificate in PEM: {error.reason}."
            ) from error
        return context


def read_token(path: Path) -> str:
    """The token that is all of a file, but for white space around it."""
    try:
        token = _read(path).decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not (token and token.isprintable()):
        raise InputError(f"{path} holds no token: wanted one line of printable ASCII.")
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, that no other can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
