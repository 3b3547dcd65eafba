"""Servers over a tiny model, in a thread of this process, and clients that speak to them."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from capstan.generation import Engine
from capstan.generation.runtime.arrivals import open_lengths
from capstan.generation.runtime.block_schedule import BlockSchedule
from capstan.generation.serving import Limits, listen, run_server

LONGEST, SLOTS = 96, 8
TEMPLATE = (
    "{{ name }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}crew {% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(text_model, tmp_path_factory.mktemp("models") / "crew")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def serving_engine(chat_model: Path, open_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """An engine opened to serve; one server at a time."""
    with open_engine(chat_model, lengths=open_lengths(LONGEST, SLOTS)) as engine:
        yield engine


@dataclass
class Running:
    """A server that runs."""

    url: str
    engine: Engine
    ended: "Future[Any]"

    def openai(self, **settings: Any) -> OpenAI:
        """OpenAI's client, which tries only once."""
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0} | settings)

    def http(self, **settings: Any) -> httpx.Client:
        """Any other client."""
        return httpx.Client(base_url=self.url, **{"timeout": 60.0} | settings)

    def metric(self, name: str) -> int:
        """What the server counts."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        return int(next(line for line in lines if line.startswith(f"capstan_{name} ")).split()[1])


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serve(serving_engine: Engine) -> Serve:
    """`with serve(token=…, folder=…, queue=…) as running:` a server, ended in an orderly way."""

    @contextmanager
    def serve(
        engine: Engine | None = None,
        token: str | None = None,
        folder: Path | None = None,
        allow_origins: tuple[str, ...] = (),
        **limits: Any,
    ) -> Iterator[Running]:
        engine = engine or serving_engine
        ready: Queue[Any] = Queue()
        bounds = Limits(**{"longest": LONGEST, "shutdown_s": 5.0} | limits)
        with listen("127.0.0.1", 0) as listening, ThreadPoolExecutor(1) as pool:
            port = listening.getsockname()[1]
            ended = pool.submit(
                run_server,
                engine,
                listening,
                name="crew",
                limits=bounds,
                token=token,
                folder=folder,
                allow_origins=allow_origins,
                on_ready=ready.put,
            )
            ended.add_done_callback(lambda _: ready.put(None))
            stop = ready.get(timeout=60)
            if stop is None:
                ended.result()
            try:
                yield Running(f"http://127.0.0.1:{port}", engine, ended)
            finally:
                stop()
                if ended.exception(timeout=60) is None:
                    ended.result()

    return serve


@pytest.fixture(scope="module")
def running(serve: Serve) -> Iterator[Running]:
    """A server for a module's tests."""
    with serve() as running:
        yield running


@pytest.fixture
def slow_engine(serving_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, whose every sweep takes a twentieth of a second longer."""
    sweep = BlockSchedule.sweep

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return sweep(*args, **options)

    monkeypatch.setattr(BlockSchedule, "sweep", slowly)
    return serving_engine


@pytest.fixture
def failing_engine(serving_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, threading.Event]:
    """The engine, and an event while which is set every sweep fails."""
    sweep, fail = BlockSchedule.sweep, threading.Event()

    def perhaps(*args: Any, **options: Any) -> Any:
        if fail.is_set():
            raise RuntimeError("the sails are torn")
        return sweep(*args, **options)

    monkeypatch.setattr(BlockSchedule, "sweep", perhaps)
    return serving_engine, fail
