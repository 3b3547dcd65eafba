"""Weights and cache in fewer bits: what the codecs do to the numbers, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capstan.codecs import Cast, Codec, GroupQuantised
from capstan.errors import UsageError
from capstan.generation import Engine, Request

MIXED = ["weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 activations=host"]
PLACES = {
    "device": "weights=device cache=device",
    "host": "weights=host cache=host attention=device",
    "disk": "weights=disk cache=disk attention=device",
    "host-attention": "weights=host cache=host attention=host",
    "host-attention-over-disk": "weights=disk cache=disk attention=host",
}


def _through(codec: Codec, values: Tensor) -> Tensor:
    return codec.decode(codec.encode(values.contiguous())).to(values.dtype)


def _weight_codec(name: str, values: Tensor, bits: int) -> Codec | None:
    """The promise of `list_weights`, once more: matrices inside layers that have no side below 64 are
    quantised, every other matrix is stored in 16 bits; vectors and positions stay as they are."""
    if "wpe" in name:
        return None
    inside = ".layers." in name or ".h." in name
    if bits < 16 and inside and values.dim() >= 2 and min(values.shape[-2:]) >= 64:
        return GroupQuantised(num_bits=bits, group_size=64, scale_dtype=torch.float16)
    return Cast(dtype=torch.float16) if values.dim() >= 2 else None


def _quantise(reference: Any, bits: int) -> int:
    """Send the weights of a transformers model through the codecs; how many were quantised in groups."""
    num_grouped = 0
    with torch.no_grad():
        for name, values in reference.model.named_parameters():
            codec = _weight_codec(name, values, bits)
            if codec is not None:
                values.copy_(_through(codec, values))
                num_grouped += isinstance(codec, GroupQuantised)
    return num_grouped


@pytest.mark.covering(1)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"], indirect=True)
def test_weights_in_fewer_bits_answer_as_transformers_with_weights_sent_through_the_same_codec(
    family: str,
    bits: int,
    requests: list[Request],
    model_folder: Callable[[str], Path],
    load_reference: Callable[[Path], Any],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    reference = load_reference(model_folder(family))
    text = requests[1].prompt
    exact = reference.logprobs(text)
    assert (_quantise(reference, bits) > 0) == (bits < 16)
    wanted = reference.logprobs(text)
    # The codecs change the numbers by far more than the tolerance below, else this would test nothing.
    assert (wanted - exact).abs().max() > 4e-4
    with open_engine(model_folder(family), weight_bits=bits, place=MIXED) as engine:
        answers = answers_of(engine, requests)
        check_promises(engine)
        scores = engine.score([text])[0].logprobs
        check_promises(engine)
    assert answers == [reference.greedy(each.prompt, each.max_tokens) for each in requests]
    # As in test_scores.py: float32 in another order of summation.
    wanted_scores = wanted[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0].tolist()
    assert list(scores) == pytest.approx(wanted_scores, abs=1e-4)


def _coded_cache(codec: Codec) -> Any:
    """A transformers cache that stores through a codec: a prompt attends to its own exact keys, every
    later token to the stored ones, its own included."""
    from transformers import DynamicCache

    class CodedCache(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
            stored = super().update(_through(codec, keys), _through(codec, values), *where, **options)
            return (keys, values) if keys.shape[2] > 1 else stored

    return CodedCache()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_in_fewer_bits_answers_as_transformers_with_a_cache_of_the_same_codec(
    bits: int,
    requests: list[Request],
    model_folder: Callable[[str], Path],
    open_reference: Callable[[Path], Any],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    # A head has 16 elements: one group.
    codec = Cast(dtype=torch.float16) if bits == 16 else GroupQuantised(num_bits=bits, group_size=16)
    reference = open_reference(model_folder("llama"))
    with open_engine(model_folder("llama"), cache_bits=bits, place=MIXED) as engine:
        answers = answers_of(engine, requests)
    assert answers == [
        reference.greedy(each.prompt, each.max_tokens, past_key_values=_coded_cache(codec))
        for each in requests
    ]


@pytest.mark.covering(1)
@pytest.mark.parametrize("cache_bits", [16, 8, 4])
@pytest.mark.parametrize("weight_bits", [16, 8, 4])
def test_with_fewer_bits_placement_changes_no_token_and_no_logprob(
    weight_bits: int,
    cache_bits: int,
    requests: list[Request],
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
) -> None:
    asked = [Request(prompt=each.prompt, max_tokens=each.max_tokens, logprobs=0) for each in requests]
    force_shape(slots=2, batches=2)
    outcomes = {}
    for name, place in PLACES.items():
        with open_engine(
            model_folder("llama"), weight_bits=weight_bits, cache_bits=cache_bits, place=[place]
        ) as engine:
            outcomes[name] = {each.id: each.answers[0].logprobs for each in engine.generate(asked)}
            check_promises(engine)
    for name, outcome in outcomes.items():
        # The same operations on the same numbers, wherever they came from: equal bit for bit.
        assert outcome == outcomes["device"], name


@pytest.mark.parametrize(("weight_bits", "limit"), [(16, 0.52), (8, 0.45), (4, 0.35)])
def test_fewer_bits_move_fewer_bytes(
    weight_bits: int, limit: float, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    # Of the layers' bytes, 3/11 are key and value projections too narrow to quantise, hence in 16 bits.
    # 8 bits: (8 + 32 / 64) / 32 = 0.27 of the others; 4 bits: 0.14. Row ends in half groups cost the rest.
    sizes = []
    for bits in (None, weight_bits):
        with open_engine(
            model_folder("llama"), weight_bits=bits, place=["weights=host cache=device"]
        ) as engine:
            list(engine.generate([Request(prompt=[1, 2, 3], max_tokens=2)]))
            sizes.append(engine.trace.traffic.of("weights").on("host->device"))
    assert 0 < sizes[1] < limit * sizes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_computed_in_float32_differs_only_by_its_cache(
    dtype: torch.dtype,
    requests: list[Request],
    family_config: Callable[..., Any],
    save_model: Callable[..., Path],
    load_reference: Callable[[Path], Any],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    folder = save_model(family_config("llama"), dtype=dtype)
    reference = load_reference(folder)
    with open_engine(folder, place=MIXED) as engine:  # this machine multiplies float32 fastest
        assert engine.model.meta_model.compute_dtype == torch.float32
        answers = answers_of(engine, requests)
        check_promises(engine)
    assert answers == [
        reference.greedy(each.prompt, each.max_tokens, past_key_values=_coded_cache(Cast(dtype=dtype)))
        for each in requests
    ]


def test_half_precision_computed_as_stored_gives_the_same_numbers_in_every_place(
    requests: list[Request],
    family_config: Callable[..., Any],
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
    force_shape: Callable[..., None],
) -> None:
    folder = save_model(family_config("gemma2"), dtype=torch.bfloat16)
    asked = [Request(prompt=each.prompt, max_tokens=each.max_tokens, logprobs=0) for each in requests]
    force_shape(slots=2, batches=2)
    outcomes = []
    for place in (PLACES["device"], PLACES["disk"], MIXED[0]):
        with open_engine(folder, dtype=torch.bfloat16, place=[place]) as engine:
            outcomes.append({each.id: each.answers[0].logprobs for each in engine.generate(asked)})
    assert outcomes[1] == outcomes[0]
    assert outcomes[2] == outcomes[0]


@pytest.mark.parametrize("setting", ["weight_bits", "cache_bits"])
def test_other_numbers_of_bits_are_refused(
    setting: str, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(UsageError, match="stored in 16, 8, 4 bits, not in 5"):
        open_engine(model_folder("llama"), **{setting: 5})
