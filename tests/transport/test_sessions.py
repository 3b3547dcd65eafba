"""Sessions: asked once, applied once, over losses, repeats and restarts; limits; what is wrong is named."""

import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DeviceError, InputError, TimeoutExpired, UsageError
from capstan.transport.sessions import (
    ENVELOPE_BYTES,
    Envelope,
    Kind,
    Limits,
    NumberedAnswers,
    Security,
    Session,
    SessionServer,
    read_token,
    seal,
    unseal,
)
from tcp_proxy import Proxy

# --- the envelope ----------------------------------------------------------------------------------------

ENVELOPES = st.builds(Envelope, st.sampled_from(Kind), st.integers(1, 2**64 - 1), st.binary(max_size=200))


@given(ENVELOPES)
def test_an_envelope_comes_out_as_it_went_in(envelope):
    message = seal(envelope)
    assert len(message) == ENVELOPE_BYTES + len(envelope.payload)
    assert unseal(message, sender="it") == envelope


@given(ENVELOPES, st.data())
def test_a_changed_or_shortened_envelope_is_refused(envelope, data):
    message = seal(envelope)
    at = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[at] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(changed), message[:at], message + b"\0"):
        with pytest.raises(InputError, match="device 3"):
            unseal(wrong, sender="device 3")


@given(st.binary(max_size=100))
def test_bytes_that_are_no_envelope_are_refused(noise):
    with pytest.raises(InputError):
        unseal(noise, sender="it")


def test_an_unknown_version_is_refused():
    message = bytearray(seal(Envelope(Kind.REQUEST, 1, b"")))
    message[4] = 9
    with pytest.raises(InputError, match="version 1, device 3 has 9: update"):
        unseal(bytes(message), sender="device 3")


# --- numbers ---------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["arrives", "request lost", "answer lost", "sent twice", "client restarts"])))
@settings(max_examples=200)
def test_each_update_is_applied_once_over_losses_repeats_and_restarts(events):
    sessions = [NumberedAnswers()]
    applied, answered, number, update = [], [], 1, 0

    def send():
        def apply():
            applied.append(update)
            return f"answer {update}"

        return sessions[-1].answer(number, apply, 1)

    for event in events:
        if event == "client restarts":  # its update may have been applied: it goes on with the next
            sessions.append(NumberedAnswers())
            number, update = 1, update + 1
            continue
        if event == "request lost":
            continue
        answer = send()
        if event == "sent twice":
            assert send() == answer
        if event != "answer lost":
            answered.append(answer)
            number, update = number + 1, update + 1
    assert applied == sorted(set(applied))
    assert answered == [f"answer {each}" for each in sorted(int(a.split()[1]) for a in answered)]
    assert {int(each.split()[1]) for each in answered} <= set(applied)


def test_numbers_of_before_and_of_later_are_refused():
    answers = NumberedAnswers()
    for number in (1, 2):
        answers.answer(number, lambda: "done", 1)
    for number in (0, 1, 4):
        with pytest.raises(InputError, match="Wanted request 3, or 2 again"):
            answers.answer(number, lambda: pytest.fail("applied"), 1)
    with pytest.raises(InputError, match="Wanted request 1"):
        NumberedAnswers().answer(0, lambda: pytest.fail("applied"), 1)


def test_a_repeat_waits_for_the_first_application_and_gets_its_answer():
    answers, begun, go = NumberedAnswers(), threading.Event(), threading.Event()

    def apply():
        begun.set()
        go.wait(30)
        return "done"

    first = threading.Thread(target=answers.answer, args=(1, apply, 30))
    first.start()
    begun.wait(30)
    with pytest.raises(TimeoutExpired, match="Request 1 is not answered"):
        answers.answer(1, lambda: pytest.fail("applied twice"), 0.01)
    go.set()
    assert answers.answer(1, lambda: pytest.fail("applied twice"), 30) == "done"
    first.join(30)


def test_a_failed_application_fails_again_and_is_not_tried_again():
    answers = NumberedAnswers()

    def fail():
        raise DeviceError("broken")

    for apply in (fail, lambda: pytest.fail("applied twice")):
        with pytest.raises(DeviceError, match="broken"):
            answers.answer(1, apply, 1)


# --- over a network --------------------------------------------------------------------------------------


@pytest.fixture
def opened():
    """Enters contexts, and leaves them after the test."""
    with ExitStack() as stack:
        yield stack.enter_context


def echo(_peer, request):
    return request[::-1]


def session(port, name="device 3", **settings):
    return Session(f"127.0.0.1:{port}", name=name, **settings)


def raw_stream(port, *, name="device 3", identity="0" * 32):
    """gRPC's own stream: what a stranger can send."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    converse = channel.stream_stream("/capstan.Sessions/Converse")
    return lambda *messages: converse(
        iter(messages), metadata=(("capstan-session", identity), ("capstan-name", name)), timeout=30
    )


def test_importing_sessions_imports_no_torch():
    said = "import sys, capstan.transport.sessions; print('torch' in sys.modules, 'grpc' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_without_grpc_the_extra_to_install_is_named(monkeypatch):
    from capstan import errors

    monkeypatch.setattr(errors, "_can_import", lambda module: module != "grpc")
    for use in (lambda: SessionServer(echo), lambda: session(1)):
        with pytest.raises(errors.MissingExtra, match=r"grpc.*capstan-ml\[federation\]"):
            use()


def test_answers_come_back_and_both_ledgers_agree(opened):
    server = opened(SessionServer(echo))
    asking = opened(session(server.port))
    for request in (b"", b"abc", bytes(range(256)) * 1000):
        assert asking.ask(request, timeout_s=30) == request[::-1]
    assert asking.ledger.traffic == server.ledger.traffic
    sent = 3 + 256_000 + 3 * ENVELOPE_BYTES
    for link in ("device 3->server", "server->device 3"):
        assert asking.ledger.traffic.on(link) == sent


def test_the_ledger_is_within_two_percent_of_the_bytes_of_the_socket(opened):
    server = opened(SessionServer(echo))
    proxy = Proxy(server.port)
    with session(proxy.port) as asking:
        for _ in range(20):
            asking.ask(bytes(200_000), timeout_s=30)
    counted = asking.ledger.traffic
    proxy.close()
    for found, link in ((proxy.up_bytes, "device 3->server"), (proxy.down_bytes, "server->device 3")):
        assert counted.on(link) <= found <= 1.02 * counted.on(link)


@given(cuts=st.lists(st.sampled_from(["before", "during", "after", "none"]), min_size=1, max_size=5))
@settings(max_examples=6, deadline=None)
def test_a_connection_that_is_cut_anywhere_neither_loses_nor_repeats_an_update(cuts):
    applied = []

    def apply(_peer, request):
        applied.append(request)
        if cuts[len(applied) - 1] == "during":
            proxy.cut()
        return request + b" done"

    with SessionServer(apply) as server:
        proxy = Proxy(server.port)
        with session(proxy.port) as asking:
            for number, cut in enumerate(cuts):
                if cut == "before":
                    proxy.cut()
                assert asking.ask(b"%d" % number, timeout_s=30) == b"%d done" % number
                if cut == "after":
                    proxy.cut()
        proxy.close()
    assert applied == [b"%d" % number for number in range(len(cuts))]


def test_a_server_that_was_started_anew_does_not_take_the_old_numbers(opened):
    first = SessionServer(echo)
    asking = opened(session(first.port))
    asking.ask(b"1", timeout_s=30)
    first.close(0)
    opened(SessionServer(echo, port=first.port))
    with pytest.raises(InputError, match="server was started anew. Begin a new session"):
        asking.ask(b"2", timeout_s=30)
    assert opened(session(first.port)).ask(b"12", timeout_s=30) == b"21"


def test_a_silent_network_is_noticed_and_a_peer_that_does_not_answer_is_named(opened):
    lost = threading.Event()
    server = opened(
        SessionServer(
            echo, limits=Limits(beat_s=0.2), on_lost=lambda peer: lost.set() if peer.name == "x" else 0
        )
    )
    proxy = Proxy(server.port)
    asking = opened(session(proxy.port, "x", limits=Limits(beat_s=0.2)))
    asking.ask(b"1", timeout_s=30)
    proxy.is_silent = True
    assert lost.wait(60)
    with pytest.raises(TimeoutExpired, match=rf"127.0.0.1:{proxy.port} did not answer x within 1 s"):
        asking.ask(b"2", timeout_s=1)
    proxy.close()


def test_a_server_that_takes_long_is_waited_for_no_longer_than_asked(opened):
    go = threading.Event()
    server = opened(SessionServer(lambda peer, request: (go.wait(30), request)[1]))
    with pytest.raises(TimeoutExpired, match="did not answer"):
        opened(session(server.port)).ask(b"1", timeout_s=0.2)
    go.set()


def test_a_session_that_asks_nothing_is_closed(opened):
    lost = threading.Event()
    server = opened(SessionServer(echo, limits=Limits(idle_s=0.1), on_lost=lambda _: lost.set()))
    asking = opened(session(server.port))
    asking.ask(b"1", timeout_s=30)
    assert lost.wait(60)
    assert asking.ask(b"12", timeout_s=30) == b"21"  # it connects again


def test_what_a_handler_raises_is_told_and_the_session_goes_on(opened):
    def handle(_peer, request):
        if request == b"bad":
            raise InputError("Wanted a good one, found a bad one.")
        if request == b"bug":
            raise KeyError("bug")
        return request

    asking = opened(session(opened(SessionServer(handle)).port))
    with pytest.raises(InputError, match="refuses device 3: Wanted a good one"):
        asking.ask(b"bad", timeout_s=30)
    with pytest.raises(InputError, match="failed at request 2: KeyError"):
        asking.ask(b"bug", timeout_s=30)
    assert asking.ask(b"good", timeout_s=30) == b"good"


def test_messages_over_the_limit_are_refused_on_either_side(opened):
    server = opened(SessionServer(lambda _, request: request * 2, limits=Limits(max_message_bytes=1000)))
    small = opened(session(server.port, limits=Limits(max_message_bytes=1000)))
    with pytest.raises(InputError, match="may have 1000 bytes, found 1001"):
        small.ask(bytes(1001 - ENVELOPE_BYTES), timeout_s=30)
    with pytest.raises(InputError, match="The answer has 1200 bytes"):
        small.ask(bytes(600), timeout_s=30)
    with pytest.raises(InputError, match="larger than max"):
        opened(session(server.port)).ask(bytes(5000), timeout_s=30)
    assert small.ask(b"1", timeout_s=30) == b"11"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([b"noise"], "is cut off"),
        ([seal(Envelope(Kind.REQUEST, 1, b"abc"))[:-1]], "is cut off"),
        ([seal(Envelope(Kind.ANSWER, 1, b""))], "answer where requests come from"),
        ([seal(Envelope(Kind.REQUEST, 2, b""))], "Wanted request 1"),
        ([seal(Envelope(Kind.REQUEST, number, b"")) for number in (1, 2, 1)], "Wanted request 3, or 2 again"),
    ],
)
def test_a_stream_that_sends_something_else_ends_and_the_server_stays(opened, messages, said):
    server = opened(SessionServer(echo))
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(server.port)(*messages))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()
    assert opened(session(server.port)).ask(b"12", timeout_s=30) == b"21"


def test_a_stream_without_a_name_is_refused(opened):
    server = opened(SessionServer(echo))
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(server.port, name="")(seal(Envelope(Kind.REQUEST, 1, b""))))
    assert "name" in caught.value.details()


def test_old_sessions_are_forgotten_and_connected_ones_are_not(opened):
    server = opened(SessionServer(echo, limits=Limits(max_sessions=2)))
    for number in range(4):
        with session(server.port, f"gone {number}") as gone:
            gone.ask(b"1", timeout_s=30)
    kept = [opened(session(server.port, f"kept {number}")) for number in range(2)]
    for each in (*kept, *kept):
        each.ask(b"1", timeout_s=30)
    with pytest.raises((InputError, TimeoutExpired)):
        opened(session(server.port, "one more")).ask(b"1", timeout_s=2)


# --- who may connect -------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_the_right_one_goes_on(opened, tmp_path):
    (tmp_path / "token").write_text("abracadabra\n")
    right = Security(token=read_token(tmp_path / "token"))
    server = opened(SessionServer(echo, security=right))
    for wrong in (Security(), Security(token="abracadabrb"), Security(token="a")):
        with pytest.raises(InputError, match="refuses device 3: The token is not the server's"):
            opened(session(server.port, security=wrong)).ask(b"1", timeout_s=30)
    assert opened(session(server.port, security=right)).ask(b"12", timeout_s=30) == b"21"
    assert "abracadabra" not in repr(right)


def test_a_file_without_a_token_is_named(tmp_path):
    for content in (b"", b" \n", b"\xff\xfe", b"a\x00b"):
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(InputError, match="holds no token"):
            read_token(tmp_path / "token")
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "none")
    with pytest.raises(UsageError, match="printable"):
        Security(token="two\nlines")


CERTIFICATES = Path(__file__).parent / "certificates"


def shown(certificate, token="abracadabra", authority="authority"):
    return Security(
        certificate=CERTIFICATES / f"{certificate}.pem",
        key=CERTIFICATES / f"{certificate}.key",
        authority=CERTIFICATES / f"{authority}.pem",
        token=token,
    )


def test_with_certificates_and_token_sessions_are_served_at_any_address(opened):
    server = opened(SessionServer(echo, host="0.0.0.0", security=shown("member")))
    asking = opened(session(server.port, security=shown("member")))
    assert asking.ask(b"12", timeout_s=30) == b"21"
    with pytest.raises(InputError, match="The token is not the server's"):
        opened(session(server.port, security=shown("member", token="another"))).ask(b"1", timeout_s=30)


@pytest.mark.parametrize(
    ("of_server", "of_client", "said"),
    [
        ("member", "expired", "refuses .*expired.pem"),
        ("member", "foreign", "refuses .*foreign.pem"),
        ("expired", "member", "certificate of .* is not trusted: certificate has expired"),
        ("foreign", "member", "certificate of .* is not trusted: .*local issuer"),
    ],
)
def test_a_certificate_that_is_not_valid_is_refused_at_once_and_the_server_stays(
    of_server, of_client, said, opened
):
    server = opened(SessionServer(echo, security=shown(of_server)))
    with pytest.raises(InputError, match=said):
        opened(session(server.port, security=shown(of_client))).ask(b"1", timeout_s=20)
    if of_server == "member":
        assert opened(session(server.port, security=shown("member"))).ask(b"12", timeout_s=30) == b"21"


def test_no_certificate_or_no_tls_at_all_is_refused(opened):
    server = opened(SessionServer(echo, security=shown("member")))
    with pytest.raises(TimeoutExpired, match=f"127.0.0.1:{server.port} did not answer"):
        opened(session(server.port, security=Security(token="abracadabra"))).ask(b"1", timeout_s=1)
    plain = opened(SessionServer(echo, security=Security(token="abracadabra")))
    with pytest.raises(InputError, match="refuses"):
        opened(session(plain.port, security=shown("member"))).ask(b"1", timeout_s=20)


def test_a_server_that_is_not_there_is_waited_for_also_with_certificates(opened):
    server = SessionServer(echo, security=shown("member"))
    server.close(0)
    with pytest.raises(TimeoutExpired):
        opened(session(server.port, security=shown("member"))).ask(b"1", timeout_s=0.5)


def test_files_that_are_no_certificates_are_named(tmp_path):
    member = CERTIFICATES / "member.pem"
    (tmp_path / "a.pem").write_text("nothing")
    for certificate, key in (
        (member, CERTIFICATES / "foreign.key"),
        (tmp_path / "a.pem", tmp_path / "a.pem"),
    ):
        wrong = Security(certificate=certificate, key=key, authority=CERTIFICATES / "authority.pem")
        for use in (lambda s=wrong: SessionServer(echo, security=s), lambda s=wrong: session(1, security=s)):
            with pytest.raises(InputError, match="are not a certificate, its key"):
                use()
    with pytest.raises(InputError, match="none.key cannot be read"):
        session(1, security=Security(certificate=member, key=tmp_path / "none.key", authority=member))
    with pytest.raises(UsageError, match="given together"):
        Security(certificate=member)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "[::]", "example.org"])
def test_other_machines_are_not_served_or_reached_without_certificates_and_token(host):
    for security in (None, Security(token="abc")):
        with pytest.raises(UsageError, match="is not this machine"):
            SessionServer(echo, host=host, security=security)
        with pytest.raises(UsageError, match="is not this machine"):
            Session(f"{host}:5000", name="x", security=security)


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":5000", "localhost:0", "localhost:x", "a:70000"]
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(UsageError, match="HOST:PORT"):
        Session(address, name="x")


def test_a_port_that_is_taken_is_named(opened):
    server = opened(SessionServer(echo))
    with pytest.raises(DeviceError, match=f"127.0.0.1:{server.port} cannot be served"):
        SessionServer(echo, port=server.port)


def test_limits_of_nothing_are_refused():
    with pytest.raises(UsageError, match="above 0"):
        Limits(beat_s=0)
