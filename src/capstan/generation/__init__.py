"""generation: high-throughput generation from models larger than the accelerator (FlexGen).

with Engine.open("models/llama", device_memory="8GiB", host_memory="32GiB") as engine:
    for completion in engine.generate([Request(prompt="Once upon a time")]):
        print(completion.text)
"""

from capstan.errors import require_extra

require_extra("generation", "torch", "transformers", "safetensors", "tokenizers")

from capstan.generation.engine import Engine  # noqa: E402
from capstan.generation.planning.opening import plan_for  # noqa: E402
from capstan.generation.requests import Answer, Completion, Request, Score, TokenLogprob  # noqa: E402

__all__ = ["Answer", "Completion", "Engine", "Request", "Score", "TokenLogprob", "plan_for"]
