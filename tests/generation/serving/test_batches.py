"""Files and batches: the openai client's round trip, bad lines, cancelling, damage, large files."""

import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from capstan.generation import Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def keeping(serve: Callable[..., Any], folder: Path) -> Iterator[Any]:
    """A server that keeps files."""
    with serve(folder=folder, file_bytes=40 << 20, write_s=0.5) as running:
        yield running


def _lines(count: int, **settings: Any) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"line {index}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "the crew " * (1 + index % 4), "max_tokens": 1 + index % 7, **settings},
        }
        for index in range(count)
    ]


def _upload(client: openai.OpenAI, lines: list[Any]) -> str:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def _start(client: openai.OpenAI, lines: list[Any], endpoint: Any = "/v1/completions") -> Any:
    return client.batches.create(
        input_file_id=_upload(client, lines),
        endpoint=endpoint,
        completion_window="24h",
        metadata={"for": "a test"},
    )


def _ended(client: openai.OpenAI, identity: str) -> Any:
    deadline_s = time.monotonic() + 60
    while (batch := client.batches.retrieve(identity)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline_s, f"still {batch.status}"
        time.sleep(0.02)
    return batch


def _content(client: openai.OpenAI, identity: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(identity).text.splitlines()]


def test_a_batch_answers_every_line_once_and_says_which_were_bad(keeping: Any) -> None:
    client = keeping.openai()
    lines: list[Any] = _lines(40)
    lines += [{"custom_id": "too long", "body": {"prompt": "x", "max_tokens": 500}}]
    lines += [{"custom_id": "longer than a slot", "body": {"prompt": [5], "max_tokens": 99}}]
    lines += [{"custom_id": "a chat", "body": {"messages": [{"role": "user", "content": "hi"}]}}, [7]]
    batch = _start(client, lines)
    assert batch.metadata == {"for": "a test"}
    batch = _ended(client, batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed) == (44, 40)
    assert batch.request_counts.failed == 4
    answers = {line["custom_id"]: line for line in _content(client, batch.output_file_id)}
    assert len(_content(client, batch.output_file_id)) == len(answers) == 40
    asked = [Request(**line["body"], id=line["custom_id"]) for line in lines[:40]]
    for done in keeping.engine.generate(asked):
        body = answers[done.id]["response"]["body"]
        assert body["choices"][0]["text"] == done.text
    errors = {line["custom_id"]: line["error"]["message"] for line in _content(client, batch.error_file_id)}
    assert set(errors) == {"too long", "longer than a slot", "a chat", "line-44"}
    assert "--max-length" in errors["longer than a slot"]
    assert batch.id in [each.id for each in client.batches.list()]


def test_those_who_wait_are_answered_while_a_batch_runs(keeping: Any) -> None:
    client = keeping.openai()
    batch = _start(client, _lines(300, ignore_eos=True))
    done = client.completions.create(model="crew", prompt="the rope", max_tokens=2)
    assert done.choices
    status = client.batches.retrieve(batch.id).status
    assert _ended(client, batch.id).request_counts.completed == 300
    assert status in ("validating", "in_progress"), "the batch was over before; take more lines"


def test_a_cancelled_batch_keeps_what_was_answered(
    serve: Callable[..., Any], slow_engine: Any, tmp_path: Path
) -> None:
    with serve(engine=slow_engine, folder=tmp_path) as running:
        client = running.openai()
        batch = _start(client, _lines(200))
        while not client.batches.retrieve(batch.id).request_counts.completed:
            time.sleep(0.02)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = _ended(client, batch.id)
        assert batch.status == "cancelled"
        assert len(_content(client, batch.output_file_id)) == batch.request_counts.completed
        assert 0 < batch.request_counts.completed < 200
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def test_a_batch_that_a_stop_cut_short_is_finished_by_the_next_server(
    serve: Callable[..., Any], slow_engine: Any, tmp_path: Path
) -> None:
    with serve(engine=slow_engine, folder=tmp_path) as running:
        client = running.openai()
        batch = _start(client, _lines(60))
        while not client.batches.retrieve(batch.id).request_counts.completed:
            time.sleep(0.02)
    (journal,) = (tmp_path / "batches").glob("*.jsonl")
    before = journal.read_text().splitlines()
    assert 0 < len(before) < 60
    with serve(folder=tmp_path) as running:
        client = running.openai()
        assert _ended(client, batch.id).status == "completed"
        answers = _content(client, client.batches.retrieve(batch.id).output_file_id)
    assert answers[: len(before)] == [json.loads(line) for line in before]
    assert sorted(line["custom_id"] for line in answers) == sorted(line["custom_id"] for line in _lines(60))


@pytest.mark.parametrize(("data", "named"), [(b"", "no request"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_that_is_no_batch_makes_it_fail_with_the_reason(keeping: Any, data: bytes, named: str) -> None:
    client = keeping.openai()
    identity = client.files.create(file=("in.jsonl", data), purpose="batch").id
    made = client.batches.create(input_file_id=identity, endpoint="/v1/completions", completion_window="24h")
    batch = _ended(client, made.id)
    assert batch.status == "failed"
    assert named in batch.errors.data[0].message


def test_a_damaged_journal_makes_the_batch_fail_and_the_server_live(
    serve: Callable[..., Any], slow_engine: Any, tmp_path: Path
) -> None:
    with serve(engine=slow_engine, folder=tmp_path) as running:
        batch = _start(running.openai(), _lines(60))
        while not running.openai().batches.retrieve(batch.id).request_counts.completed:
            time.sleep(0.02)
    (journal,) = (tmp_path / "batches").glob("*.jsonl")
    journal.write_text("this is no answer\n" + journal.read_text())
    (tmp_path / "batches" / "batch-0.json").write_text("{")
    with serve(folder=tmp_path) as running:
        ended = _ended(running.openai(), batch.id)
        assert ended.status == "failed"
        assert "cannot be gone on with: it is damaged" in ended.errors.data[0].message
        assert str(tmp_path) not in ended.errors.data[0].message
        assert running.openai().completions.create(model="crew", prompt="the rope", max_tokens=1)


def test_files_are_kept_listed_given_back_and_removed(keeping: Any) -> None:
    client = keeping.openai()
    made = client.files.create(file=("../../evil/in.jsonl", b"some bytes"), purpose="batch")
    assert made.filename == "in.jsonl"
    assert made.bytes == 10
    assert client.files.content(made.id).read() == b"some bytes"
    assert made.id in [each.id for each in client.files.list()]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with keeping.http() as http:
        first, second = (each["id"] for each in http.get("/v1/files", params={"limit": 2}).json()["data"])
        page = http.get("/v1/files", params={"limit": 1, "after": first}).json()
        assert page["data"][0]["id"] == second
        assert http.get("/v1/files", params={"limit": 0}).status_code == 400


@pytest.mark.parametrize(
    "path", ["file-%2e%2e%2fbatches", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 24, "batch-" + "0" * 24, "x"]
)
def test_a_name_that_is_no_files_never_becomes_a_path(keeping: Any, path: str) -> None:
    with keeping.http() as http:
        for suffix in ("", "/content"):
            assert http.get(f"/v1/files/{path}{suffix}").status_code == 404
        assert http.delete(f"/v1/files/{path}").status_code == 404
        assert http.get(f"/v1/batches/{path}").status_code == 404


def test_an_upload_is_checked_before_it_is_kept(keeping: Any, folder: Path) -> None:
    before = sorted((folder / "files").iterdir())
    with keeping.http() as http:

        def status(**form: Any) -> int:
            return int(http.post("/v1/files", **form).status_code)

        file = {"file": ("in.jsonl", b"{}")}
        assert status(files=file, data={"purpose": "fine-tune"}) == 400
        assert status(files=file) == 400
        assert status(data={"purpose": "batch"}, files={"other": ("x", b"")}) == 400
        assert status(content=b"{}") == 415
        large = {"file": ("in.jsonl", io.BytesIO(bytes((40 << 20) + 1000)))}
        assert status(files=large, data={"purpose": "batch"}) == 413
        body = {"input_file_id": "file-" + "0" * 24, "endpoint": "/v1/completions"}
        assert http.post("/v1/batches", json=body).status_code == 404
        assert http.post("/v1/batches", json=body | {"endpoint": "/v1/embeddings"}).status_code == 400
    assert sorted((folder / "files").iterdir()) == before


def test_a_client_that_does_not_read_is_cut_off(keeping: Any) -> None:
    size = 32 << 20
    made = keeping.openai().files.create(file=("large.jsonl", bytes(size)), purpose="batch")
    host, port = keeping.url.removeprefix("http://").split(":")
    received = 0
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"GET /v1/files/{made.id}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(1.5)  # three times what it is given
        try:
            while data := connection.recv(1 << 20):
                received += len(data)
        except ConnectionResetError:
            pass
    assert received < size
    assert keeping.openai().files.content(made.id).read() == bytes(size)


def test_lines_for_another_model_are_bad_ones(keeping: Any) -> None:
    client = keeping.openai()
    lines = _lines(2)
    lines[1]["body"]["model"] = "another"
    ended = _ended(client, _start(client, lines).id)
    assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 1)
    (bad,) = _content(client, ended.error_file_id)
    assert "there is no model 'another' here" in bad["response"]["body"]["error"]["message"]


def test_a_file_that_is_no_text_is_named_as_the_client_knows_it(keeping: Any, folder: Path) -> None:
    client = keeping.openai()
    made = client.files.create(file=("in.jsonl", b"\xff\xfe\x00"), purpose="batch")
    batch = client.batches.create(input_file_id=made.id, endpoint="/v1/completions", completion_window="24h")
    ended = _ended(client, batch.id)
    assert ended.status == "failed"
    assert f"The file {made.id} is not UTF-8 text" in ended.errors.data[0].message
    assert str(folder) not in ended.errors.data[0].message
