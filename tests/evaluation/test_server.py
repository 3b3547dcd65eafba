"""A model behind a server: its token, its context, what it scores and says, however it shows them."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import toy_data
from capstan.errors import DeviceError, InputError
from capstan.evaluation import AnswerStore, Evaluator, Pair, Request, run_spec_of
from capstan.evaluation.metrics.basic import num_bytes
from capstan.evaluation.server_model import ServerModel
from capstan.evaluation.specs import Chat
from capstan.evaluation.windows import text_windows


class Server:
    """An OpenAI-compatible server over made-up words, in a thread.

    Of its `context`, which it `states` or not, one token is put before every prompt where it `adds_first`; it
    `shows` tokens as they are, "stripped" or "broken".
    """

    def __init__(
        self,
        *,
        context: int = 40,
        token: str = "",
        states: bool = True,
        adds_first: bool = False,
        shows: str = "",
    ) -> None:
        self.context, self.token, self.states = context, token, states
        self.adds_first, self.shows = adds_first, shows
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._vocabulary: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                outer.asked.append((self.path, body))
                code, told = outer.answer(self.path, body, self.headers.get("Authorization"))
                raw = json.dumps(told).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _ids(self, text: str) -> list[int]:
        for word in toy_data.tokens_of(text):
            if word not in self._vocabulary:
                self._vocabulary.append(word)
        return [self._vocabulary.index(word) for word in toy_data.tokens_of(text)]

    def answer(self, path: str, body: Any, authorization: str | None) -> tuple[int, Any]:
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {"error": "no token"}
        if path == "/v1/models":
            card = {"id": "toy"} | ({"max_model_len": self.context} if self.states else {})
            return 200, {"data": [card]}
        if path == "/tokenize":
            first = [10_000] if self.adds_first and body["add_special_tokens"] else []
            return 200, {"tokens": first + self._ids(body["prompt"])}
        if path == "/detokenize":
            return 200, {"prompt": "".join(self._vocabulary[at] for at in body["tokens"])}
        if path == "/v1/chat/completions":
            entry = {"token": "Sure", "logprob": -0.5}
            choice = {
                "message": {"content": "Sure"},
                "logprobs": {"content": [entry]},
                "finish_reason": "length",
            }
            return 200, {"choices": [choice] * body["n"]}
        words = toy_data.tokens_of(body["prompt"])
        if len(words) + self.adds_first + body["max_tokens"] > self.context:
            return 400, {"error": {"code": "context_length_exceeded"}}
        if not body.get("echo"):
            words, text = [" a", " b", " STOP"][: body["max_tokens"]], " a b"
            values: list[float | None] = [-1.0, -2.0, -3.0][: len(words)]
            return 200, {"choices": [self._choice(text, words, values, 0, "stop")] * body["n"]}
        values = [None, *(toy_data.told_logprob(word) for word in words[1:])]
        if self.adds_first:
            words, values = ["<s>", *words], [None, toy_data.told_logprob(words[0]), *values[1:]]
        return 200, {
            "choices": [self._choice(body["prompt"], [*words, " new"], [*values, -9.0], 0, "length")]
        }

    def _choice(
        self, text: str, words: list[str], values: list[float | None], start: int, reason: str
    ) -> dict[str, Any]:
        offsets, at = [], start
        for word in words:
            offsets.append(at)
            at += 0 if word == "<s>" else len(word)
        told: dict[str, Any] = {"tokens": words, "token_logprobs": values, "text_offset": offsets}
        if self.shows == "stripped":
            told |= {"tokens": [word.strip() for word in words]}
        if self.shows == "broken":
            told = {
                "tokens": ["\ufffd" if not word.isascii() else word for word in words],
                "token_logprobs": values,
            }
        return {"text": text, "logprobs": told, "finish_reason": reason}


@pytest.fixture
def serve() -> Iterator[Any]:
    """`serve(context=40)`: a server for the length of a test."""
    servers: list[Server] = []

    def serve(**how: Any) -> Server:
        servers.append(Server(**how))
        return servers[-1]

    yield serve
    for each in servers:
        each.close()


def test_a_server_with_a_token_is_asked_with_it(serve):
    server = serve(token="secret")
    with pytest.raises(InputError, match=r"answered 401.*--api-key, or CAPSTAN_TOKEN"):
        ServerModel(server.url, "toy")
    model = ServerModel(server.url, "toy", token="secret")
    assert next(iter(model.generate([Request(prompt="a", max_tokens=2)])))[1].completions[0].text == " a b"


@pytest.mark.parametrize("adds_first", [False, True])
def test_the_context_is_the_servers_and_the_longest_text_that_fits_is_scored(serve, adds_first):
    server = serve(context=12, adds_first=adds_first)
    model = ServerModel(server.url, "toy")
    assert model.limits.max_request_length == 11 - adds_first
    assert model.notes == ()
    text = " ".join(f"w{at}" for at in range(40))
    windows = list(text_windows(text, model))
    assert max(len(model.encode(window.text)) for window in windows) == model.limits.max_request_length
    scored = dict(model.score_rolling([window.text for window in windows]))
    total = sum(
        num_bytes(scored[at].tokens[window.num_conditioning_tokens :]) for at, window in enumerate(windows)
    )
    assert total == len(text)


def test_a_server_that_does_not_state_its_context_is_noted_and_can_be_told(serve):
    server = serve(states=False)
    assert "2,048 tokens were assumed" in ServerModel(server.url, "toy").notes[0]
    told = ServerModel(server.url, "toy", max_length=30)
    assert (told.limits.max_request_length, told.notes) == (29, ())
    assert ServerModel(serve(context=20).url, "toy", max_length=30).limits.max_request_length == 19
    with pytest.raises(InputError, match="leaves no room"):
        ServerModel(server.url, "toy", max_length=1)


def test_no_server_is_said_before_anything_is_asked():
    with pytest.raises(DeviceError, match="Is the server running"):
        ServerModel("http://127.0.0.1:9/v1", "toy")


@pytest.mark.parametrize("shows", ["", "stripped", "broken"])
@pytest.mark.parametrize("adds_first", [False, True])
def test_tokens_say_the_text_however_a_server_shows_them(serve, shows, adds_first):
    if shows == "broken" and adds_first:
        adds_first = False  # without places nothing tells such a token from the text
    model = ServerModel(serve(shows=shows, adds_first=adds_first).url, "toy")
    text = "Сегодня хорошая погода today"
    scored = dict(model.score_rolling([text]))[0]
    assert "".join(token.text for token in scored.tokens) == text
    assert num_bytes(scored.tokens) == len(text.encode())
    pair = dict(model.score([Pair("Answer:", " great anchor")]))[0]
    assert pair.num_scored == 2
    assert pair.logprob == pytest.approx(toy_data.told_logprob(" great") + toy_data.told_logprob(" anchor"))
    answer = dict(model.generate([Request(prompt="x", max_tokens=3, stop_sequences=(" STOP",))]))[0]
    assert [token.text for token in answer.completions[0].tokens] == [" a", " b"]
    assert answer.completions[0].logprob == -3.0


class Template:
    """A tokenizer with a chat template, as a model's folder has it."""

    bos_token = None

    def __init__(self, server: Server) -> None:
        self._server, self.chat_template = server, "there is one"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": self._server._ids(text)}

    def num_special_tokens_to_add(self) -> int:
        return 0

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"<{each['role']}> {each['content']}" for each in messages) + " <assistant> "


def test_a_conversation_goes_by_the_chat_route(serve, monkeypatch, tmp_path, toy_root):
    server = serve(context=400)
    with pytest.raises(InputError, match="give --tokenizer"):
        ServerModel(server.url, "toy").chat_text([{"role": "user", "content": "x"}])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: Template(server))
    model = ServerModel(server.url, "toy", tokenizer=tmp_path)
    spec = replace(run_spec_of("boolq:max_eval_instances=2"), chat=Chat(system_instruction="Be brief."))
    with AnswerStore(tmp_path / "a.jsonl") as store:
        done = Evaluator(model=model, store=store, root=toy_root).run(spec)
    asked = [body for path, body in server.asked if path == "/v1/chat/completions"]
    assert len(asked) == 2
    assert [each["role"] for each in asked[0]["messages"]] == ["system", "user"]
    assert asked[0]["messages"][1]["content"].endswith("Answer:")
    assert done.states[0].result.completions[0].logprob == -0.5
    kept = [each.to_dict(done.spec.adapter_spec)["request"]["messages"] for each in done.states]
    assert sorted(map(str, kept)) == sorted(str(each["messages"]) for each in asked)  # asked side by side


def test_prompts_that_were_cut_are_counted(serve, tmp_path, toy_root):
    from capstan.evaluation.run_folder import report_of

    model = ServerModel(serve(context=24).url, "toy")
    with AnswerStore(tmp_path / "a.jsonl") as store:
        done = Evaluator(model=model, store=store, root=toy_root).run(
            run_spec_of("boolq:max_eval_instances=3")
        )
    assert report_of(done)["num_prompts_cut"] == 3
    assert "3 of 3 prompts did not fit and were cut" in done.notes
