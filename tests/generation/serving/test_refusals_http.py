"""What the server does not answer, and how it says so; clients that are slow, rude or gone."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

TOKEN = "a rope of eight bars"
GOOD: dict[str, Any] = {"prompt": "the crew", "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(serve: Callable[..., Any]) -> Iterator[Any]:
    """A server with a token and tight bounds."""
    with serve(token=TOKEN, body_bytes=20_000, header_s=0.5, body_s=0.5, write_s=0.5) as running:
        yield running


def _headers(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}


def _until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s, "this should have come about long ago"
        time.sleep(0.01)


def _error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


# --- who may ask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/models", "/v1/files", "/metrics", "/nowhere"])
def test_without_the_token_no_route_but_health_answers(locked: Any, given: str | None, route: str) -> None:
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    with locked.http() as client:
        response = client.request("POST" if "compl" in route else "GET", route, headers=headers, json=GOOD)
        assert _error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/health").json() == {"status": "ok"}


def test_with_the_token_all_is_answered(locked: Any) -> None:
    assert locked.openai(api_key=TOKEN).completions.create(model="crew", **GOOD).choices
    with pytest.raises(openai.AuthenticationError, match="wants its token"):
        locked.openai(api_key="wrong").completions.create(model="crew", **GOOD)


def test_without_a_token_only_this_machines_names_are_answered(running: Any) -> None:
    with running.http() as client:
        port = running.url.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "LOCALHOST"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "[::1]:x"):
            _error(client.get("/v1/models", headers={"Host": host}), 403)


# --- what is malformed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[" * 9000, "nested too deeply"),
        (b"[1]", "must be a JSON object, not list"),
        (b"{}", "either 'prompt' or 'messages'"),
        (b'{"prompt": []}', "prompt is empty"),
        (b'{"prompt": [999999]}', "outside"),
        (b'{"prompt": [-1]}', "outside"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"prompt": 7}', "prompt"),
        (b'{"prompt": ["a", 7]}', "prompt"),
        (b'{"prompt": [["a"]]}', "prompt"),
        (b'{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": -1}', "temperature"),
        (b'{"prompt": "a", "top_p": 0}', "top_p"),
        (b'{"prompt": "a", "n": 0}', "n from 1"),
        (b'{"prompt": "a", "n": 129}', "n from 1"),
        (b'{"prompt": "a", "logprobs": 101}', "logprobs"),
        (b'{"prompt": "a", "stop": [""]}', "stop"),
        (b'{"prompt": "a", "stop": %s}' % json.dumps(["x"] * 17).encode(), "16 stop texts"),
        (b'{"prompt": "a", "stream": "yes"}', "stream"),
        (b'{"prompt": "a", "stream": true, "prompt_logprobs": 1}', "stream"),
        (b'{"prompt": "a", "best_of": 3}', "best_of"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
        (b'{"prompt": "a", "presence_penalty": 3}', "presence_penalty"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: 'x' is not a token id"),
        (b'{"prompt": "a", "logit_bias": {"99999": 1}}', "logit_bias has token ids outside"),
        (b'{"prompt": "a", "min_p": "0.1"}', "min_p"),
        (b'{"prompt": "a", "max_token": 3}', "'max_token' is not a parameter"),
        (b'{"prompt": "\\ud800"}', ""),
    ],
)
def test_a_malformed_request_gets_400_and_a_reason(running: Any, body: bytes, named: str) -> None:
    with running.http() as client:
        response = client.post("/v1/completions", content=body, headers=_headers())
        assert named in _error(response, 400)["message"]
        assert client.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": []}, ""),
        ({"messages": "hi"}, "messages"),
        ({"messages": [7]}, "messages"),
        ({"prompt": "a"}, "/v1/chat/completions takes 'messages'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": [{}]}, "tools"),
    ],
)
def test_a_malformed_chat_gets_400_and_a_reason(running: Any, body: dict[str, Any], named: str) -> None:
    with running.http() as client:
        assert named in _error(client.post("/v1/chat/completions", json=body), 400)["message"]


def test_other_mistakes_have_their_own_statuses(running: Any) -> None:
    with running.http() as client:
        _error(client.get("/v1/nowhere"), 404)
        assert _error(client.post("/v1/completions", json=GOOD | {"model": "gpt"}), 404)["param"] == "model"
        _error(client.get("/v1/completions"), 405)
        _error(client.post("/v1/completions", data={"prompt": "a"}), 415)
        _error(client.post("/v1/completions", content=json.dumps(GOOD)), 415)
        long = client.post("/v1/completions", json={"prompt": [5] * 90, "max_tokens": 7})
        assert _error(long, 400)["code"] == "context_length_exceeded"
        _error(client.post("/v1/files", content=b""), 501)
        _error(client.get("/v1/batches"), 501)
        _error(client.post("/detokenize", json={"tokens": [999_999]}), 400)
        _error(client.post("/tokenize", json={}), 400)


# --- what is too large, too slow, too many ---------------------------------------------------------------


def test_a_request_that_is_too_large_gets_413_said_or_not(locked: Any) -> None:
    large = json.dumps({"prompt": "a" * 30_000}).encode()
    with locked.http() as client:
        assert _error(client.post("/v1/completions", content=large, headers=_headers()), 413)
        pieces = (large[at : at + 1000] for at in range(0, len(large), 1000))  # chunked: no length is stated
        assert _error(client.post("/v1/completions", content=pieces, headers=_headers()), 413)
        assert client.post("/v1/completions", json=GOOD, headers=_headers()).status_code == 200


def _connection(running: Any) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def _is_closed(connection: socket.socket, *, sending: bytes = b"") -> bool:
    """Whether the server has ended it, which sends nothing any more."""
    try:
        connection.sendall(sending)
        return connection.recv(1000) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _received(connection: socket.socket, wanted: bytes) -> bool:
    """Whether this comes before the connection ends."""
    data = b""
    while wanted not in data and (more := connection.recv(10_000)):
        data += more
    return wanted in data


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: 1\r\n"]
)
def test_a_connection_that_does_not_finish_its_headers_is_closed(locked: Any, sent: bytes) -> None:
    with _connection(locked) as connection:
        connection.sendall(sent)
        assert _is_closed(connection)


def test_a_connection_that_drips_its_second_request_is_closed(locked: Any) -> None:
    with _connection(locked) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert _received(connection, b'"ok"')
        connection.settimeout(0.05)
        _until(lambda: _is_closed(connection, sending=b"X"))


def test_a_body_that_does_not_come_gets_408(locked: Any) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with _connection(locked) as connection:
        connection.sendall(head.encode())
        assert _received(connection, b" 408 ")


def test_what_is_no_http_is_refused_and_the_server_lives(locked: Any) -> None:
    with _connection(locked) as connection:
        connection.sendall(b"\x16\x03\x01\x00 this is no request\r\n\r\n")
        assert _received(connection, b" 400 ")
    with locked.http() as client:
        assert client.get("/health").status_code == 200


def test_when_the_queue_is_full_clients_are_asked_to_come_back(serve: Callable[..., Any]) -> None:
    endless = {"prompt": [5, 6], "max_tokens": 94, "ignore_eos": True, "n": 6}
    statuses: list[int] = []

    def ask(running: Any) -> None:
        with running.http() as client:
            statuses.append(client.post("/v1/completions", json=endless).status_code)

    with serve(queue=4) as running, running.http() as client:
        threads = [threading.Thread(target=ask, args=(running,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # 8 slots and 4 who wait: two such requests at a time.
        assert set(statuses) == {200, 429}
        assert running.metric("requests_refused_total") == statuses.count(429)
        assert client.post("/v1/completions", json=endless | {"n": 13}).status_code == 400
        with client.stream("POST", "/v1/completions", json=endless | {"stream": True}) as one:
            with client.stream("POST", "/v1/completions", json=endless | {"stream": True}) as other:
                refused = client.post("/v1/completions", json=GOOD)
                other.read()
            one.read()
        if refused.status_code != 200:  # unless both ended before it came
            assert _error(refused, 429)["code"] == "queue_full"
            assert 1 <= int(refused.headers["Retry-After"]) <= 120
        assert client.post("/v1/completions", json=GOOD).status_code == 200


# --- who is gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_disconnects_frees_its_slots(
    serve: Callable[..., Any], slow_engine: Any, streams: bool
) -> None:
    body = {"prompt": [5, 6], "max_tokens": 94, "ignore_eos": True, "n": 12, "stream": streams}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    with serve(engine=slow_engine) as running:
        with _connection(running) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            _until(lambda: running.metric("sequences_running") == 8)
            assert running.metric("sequences_waiting") == 4
        _until(lambda: running.metric("sequences_dropped_total") == 12)
        with running.http() as client:
            assert client.post("/v1/completions", json=GOOD).status_code == 200
        assert running.metric("sequences_running") == running.metric("sequences_waiting") == 0
        assert running.metric("sequences_finished_total") == 1


def test_a_server_that_is_stopped_lets_what_runs_end(serve: Callable[..., Any], slow_engine: Any) -> None:
    answers: list[int] = []

    def ask(url: str) -> None:
        with running.http() as client:
            body = {"prompt": [5], "max_tokens": 20, "ignore_eos": True}
            answers.append(client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"])

    with serve(engine=slow_engine) as running:
        thread = threading.Thread(target=ask, args=(running.url,))
        thread.start()
        _until(lambda: running.metric("sequences_running") == 1)
    thread.join()
    assert answers == [20]


def test_when_the_time_to_end_is_over_the_rest_is_dropped(
    serve: Callable[..., Any], slow_engine: Any
) -> None:
    with serve(engine=slow_engine, shutdown_s=1.0) as running, _connection(running) as connection:
        body = json.dumps({"prompt": [5], "max_tokens": 95, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        _until(lambda: running.metric("sequences_running") == 1)
    assert running.ended.result().finished == 0


# --- an engine that fails --------------------------------------------------------------------------------


def test_an_engine_that_fails_once_is_started_again_and_one_that_fails_again_ends_the_server(
    serve: Callable[..., Any], failing_engine: Any, tmp_path: Path
) -> None:
    engine, fail = failing_engine
    with serve(engine=engine) as running, running.http() as client:
        assert client.post("/v1/completions", json=GOOD).status_code == 200
        fail.set()
        assert "sails" in _error(client.post("/v1/completions", json=GOOD), 503)["message"]
        fail.clear()
        assert client.post("/v1/completions", json=GOOD).status_code == 200
        fail.set()
        _error(client.post("/v1/completions", json=GOOD), 503)
        _error(client.post("/v1/completions", json=GOOD), 503)
        running.ended.exception(timeout=60)
    assert "Nothing could be answered any more" in str(running.ended.exception())
