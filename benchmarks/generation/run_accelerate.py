"""One run of transformers with accelerate's offloading: a `Job` as JSON in, a JSON line out.

It is used as its documentation says: `device_map="auto"` with `max_memory`. What does not fit on the device
is in host memory, and with `--peer-offload disk` what does not fit there is on disk. On a processor alone
there is no device: what does not fit in the memory of both shares is on disk.

A larger batch shares each streaming of the weights among more sequences, so the largest batch that fits comes
first: its cache and workspace are taken off the cap, the weights get the rest of it. When memory runs out the
whole job starts again with half as many; only the run that ended is timed.
"""

import gc
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging
from workload import FIRST_TOKEN, Job, Outcome, forget_files, prompts_of, run, settled

# The device also holds some layers that are on their way: accelerate keeps room for the largest by itself.
HEADROOM = 1.15


def generate(job: Job) -> Outcome:
    prompts = prompts_of(job)
    config = AutoConfig.from_pretrained(job.folder)
    tried = []
    for batch in _batches(job, config, max(map(len, prompts))):
        tried.append(batch)
        try:
            return _generate(job, config, prompts, batch, tried)
        except torch.OutOfMemoryError as error:
            print(f"a batch of {batch} does not fit: {str(error)[:120]}", flush=True)
        gc.collect()  # outside the handler, whose traceback holds on to the model
        torch.cuda.empty_cache()
    raise SystemExit(f"No batch fits; tried {tried}.")


def _generate(job: Job, config: Any, prompts: list[list[int]], batch: int, tried: list[int]) -> Outcome:
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start_s = settled(job.device)
    model = _open(job, _weights_bytes(job, config, max(map(len, prompts)), batch))
    opened_s = settled(job.device)
    clock = _Clock(job)
    tokens: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        tokens += _answer(model, prompts[first : first + batch], job, clock)
    seconds = settled(job.device) - opened_s
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    return Outcome(
        tokens=tokens,
        opening_s=opened_s - start_s,
        seconds=seconds,
        prefill_s=clock.prefill_s,
        decode_s=seconds - clock.prefill_s,
        details={
            "batch": batch,
            "tried": list(tried),
            "dtype": str(model.dtype),
            "modules": {place: places.count(place) for place in sorted(set(places))},
        },
    )


def _open(job: Job, device_weights_bytes: int) -> Any:
    limits: dict[int | str, int] = {"cpu": job.host_memory}
    if job.device == "cuda":
        limits = {0: device_weights_bytes, "cpu": job.host_memory}
    else:  # device and host are two shares of one memory
        limits = {"cpu": job.host_memory + job.device_memory}
    disk = {"offload_folder": job.disk} if job.peer_offload == "disk" else {}
    dtype = getattr(torch, job.peer_dtype or job.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=dtype, device_map="auto", max_memory=limits, **disk
    )
    return model.eval()


class _Clock(LogitsProcessor):
    """Called once a step: notes how long prefill took, and keeps streamed files out of the page cache.

    Memory that cannot hold the weights cannot hold their files either. The machine that plays a smaller one
    has room for them, so their pages are dropped after each sweep over the weights, as they would be there.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._forgets = job.peer_offload == "disk" and not job.keep_file_cache
        self._start_s: float | None = None
        self.prefill_s = 0.0

    def start(self) -> None:
        self._start_s = settled(self._job.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start_s is not None:
            self.prefill_s += settled(self._job.device) - self._start_s
            self._start_s = None
        if self._forgets:
            forget_files(Path(self._job.folder))
        return scores


def _answer(model: Any, prompts: list[list[int]], job: Job, clock: _Clock) -> list[list[int]]:
    """Greedy answers to one batch, shorter prompts padded on the left."""
    longest = max(map(len, prompts))
    rows = [[FIRST_TOKEN] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    more = {"cache_implementation": "offloaded"} if job.peer_cache == "offloaded" else {}
    clock.start()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor(rows, device=job.device),
            attention_mask=torch.tensor(mask, device=job.device),
            max_new_tokens=job.new,
            do_sample=False,
            use_cache=True,
            pad_token_id=FIRST_TOKEN,
            logits_processor=LogitsProcessorList([clock]),
            **more,
        )
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


# --- what fits ------------------------------------------------------------------------------------------


def _batches(job: Job, config: Any, longest: int) -> Iterator[int]:
    if job.peer_batches:
        yield from job.peer_batches
        return
    batch = job.sequences
    if job.device == "cuda":
        room = job.device_memory - _least_weights_bytes(job, config)
        batch = max(1, min(job.sequences, int(room / _sequence_bytes(job, config, longest))))
    while True:
        yield ceil(job.sequences / ceil(job.sequences / batch))  # batches of one size
        if batch == 1:
            return
        batch //= 2


def _weights_bytes(job: Job, config: Any, longest: int, batch: int) -> int:
    """What the weights may take of the device beside a batch."""
    rest = job.device_memory - int(batch * _sequence_bytes(job, config, longest))
    return max(rest, _least_weights_bytes(job, config))


def _least_weights_bytes(job: Job, config: Any) -> int:
    """Room for three layers and for the embedding and output matrices."""
    hidden, itemsize = config.hidden_size, _itemsize(job)
    experts = getattr(config, "num_local_experts", 1)
    layer = (4 * hidden * hidden + 3 * experts * hidden * _ffn(config)) * itemsize
    return 3 * layer + 2 * config.vocab_size * hidden * itemsize


def _sequence_bytes(job: Job, config: Any, longest: int) -> float:
    """Cache, and the widest moment of prefill, of one sequence."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * (longest + job.new)
    if job.peer_cache == "offloaded":
        cache = cache * 3 // config.num_hidden_layers
    workspace = longest * (8 * config.hidden_size + 3 * _ffn(config)) + 4 * config.vocab_size
    return HEADROOM * (cache + workspace) * _itemsize(job)


def _ffn(config: Any) -> int:
    width: int = getattr(config, "intermediate_size", None) or config.ffn_dim
    return width


def _itemsize(job: Job) -> int:
    dtype: torch.dtype = getattr(torch, job.peer_dtype or job.dtype)
    return dtype.itemsize


if __name__ == "__main__":
    logging.disable_progress_bar()
    run(generate, "accelerate", "transformers", "safetensors")
