"""Which model an evaluation asks: the engine's, transformers' or a server's, and what each can be told."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.evaluation import LanguageModel

_TOKEN_VARIABLE = "CAPSTAN_TOKEN"  # which capstan serve takes, too
_OF_BACKEND = {
    "engine": ("device", "device_memory", "host_memory", "disk", "weight_bits", "cache_bits"),
    "transformers": ("device",),
    "server": ("url", "tokenizer", "api_key", "max_length"),
}


def _require_of_backend(backend: str, how: dict[str, Any]) -> None:
    """Refuse options that a backend would not heed."""
    if backend not in _OF_BACKEND:
        raise UsageError(f"--backend is engine, transformers or server, not {backend!r}.")
    for key, value in how.items():
        if key not in _OF_BACKEND[backend] and value not in (None, "auto"):
            able = ", ".join(each for each, keys in _OF_BACKEND.items() if key in keys)
            raise UsageError(
                f"--{key.replace('_', '-')} is for --backend {able}; {backend} cannot do it. Leave it out, "
                "or choose another backend."
            )


@contextmanager
def opened_model(model: str, backend: str, **how: Any) -> Iterator["LanguageModel"]:
    """The model of a backend while it is used; an option that the backend would not heed is refused."""
    _require_of_backend(backend, how)
    if backend == "server":
        from capstan.evaluation.server_model import ServerModel

        if not how["url"]:
            raise UsageError("A server needs its address: --url http://127.0.0.1:8000/v1")
        yield ServerModel(
            how["url"],
            model,
            tokenizer=how["tokenizer"],
            token=how["api_key"] or os.environ.get(_TOKEN_VARIABLE),
            max_length=how["max_length"],
        )
        return
    from capstan.cli.generate import quieten_transformers

    quieten_transformers()
    if backend == "transformers":
        from capstan.evaluation.transformers_model import TransformersModel

        yield TransformersModel(model, device="cpu" if how["device"] == "auto" else how["device"])
        return
    from capstan.cli.engine_model import EngineModel
    from capstan.generation import Engine

    given = ("device", "device_memory", "host_memory", "disk", "weight_bits", "cache_bits")
    with Engine.open(model, **{key: how[key] for key in given}) as engine:
        yield EngineModel(engine, bits=f"weights {how['weight_bits']}, cache {how['cache_bits']}")
