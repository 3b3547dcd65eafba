"""serving: OpenAI's HTTP API over the generation engine.

limits = Limits(longest=2048)
with Engine.open("models/llama", lengths=open_lengths(limits.longest, slots=64)) as engine:
    run_server(engine, listen("127.0.0.1", 8000), name="llama", limits=limits)
"""

from capstan.errors import require_extra

require_extra("serve", "fastapi", "uvicorn", "python_multipart")

from capstan.generation.serving.app import Served, build_app  # noqa: E402
from capstan.generation.serving.limits import Limits  # noqa: E402
from capstan.generation.serving.server import is_loopback, listen, run_server  # noqa: E402

__all__ = ["Limits", "Served", "build_app", "is_loopback", "listen", "run_server"]
