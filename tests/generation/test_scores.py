"""Log-probabilities, of whole texts and beside generated tokens, are those of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.generation import Engine, Request, TokenLogprob

MIXED = ["weights=device:0.3,host:0.4,disk:0.3 activations=host"]
# float32 has 24 bits, log-probabilities of 128 random tokens are below 2**4, and about 2**9 terms are added
# in another order: 2**4 * 2**-24 * 2**4.5 (random signs) is 2e-5; a row of layers makes it a few times that.
TOLERANCE = 1e-4


def _texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 128, (length,), generator=generator).tolist() for length in lengths]


def test_scores_equal_transformers_for_mixed_lengths_down_to_one_token(
    family: str,
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
) -> None:
    texts = _texts(1, 14, 6, 2, 9, 1, 20)
    reference = open_reference(model_folder(family))
    with open_engine(model_folder(family), place=MIXED) as engine:
        force_shape(slots=2, batches=2)
        scores = engine.score(texts)
        check_promises(engine)
        greedy = reference.greedy(texts[1], 3)
        continued = engine.score([texts[1] + greedy], likeliest=True)[0]
    assert continued.likeliest[-4:] == (
        continued.tokens[-4] == reference.greedy(texts[1][:-1], 1)[0],
        *[True] * 3,
    )
    assert [list(score.tokens) for score in scores] == texts
    for text, score in zip(texts, scores, strict=True):
        assert score.likeliest == ()
        wanted = reference.logprobs(text)[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0]
        assert list(score.logprobs) == pytest.approx(wanted.tolist(), abs=TOLERANCE)
        assert score.total == pytest.approx(float(wanted.sum()), abs=len(text) * TOLERANCE)


def test_scores_do_not_change_with_the_texts_beside_them(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine], force_shape: Callable[..., None]
) -> None:
    texts = _texts(8, 3, 12)
    with open_engine(model_folder("gemma2")) as engine:
        alone = [engine.score([text])[0] for text in texts]
        force_shape(slots=3, batches=1)
        together = engine.score(texts)
    for one, other in zip(alone, together, strict=True):
        assert list(one.logprobs) == pytest.approx(list(other.logprobs), abs=TOLERANCE)


def test_scoring_nothing_gives_nothing(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with open_engine(model_folder("llama")) as engine:
        assert engine.score([]) == []
        assert list(engine.generate([])) == []


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"], indirect=True)
@pytest.mark.usefixtures("block")
def test_logprobs_of_prompt_and_answer_equal_transformers_with_their_top_lists(
    family: str,
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
) -> None:
    counts = [(3, 2), (0, 0), (None, None), (1, 128 - 28), (None, 1), (2, None)]
    requests = [
        Request(prompt=prompt, max_tokens=3, logprobs=ours, prompt_logprobs=its)
        for prompt, (ours, its) in zip(_texts(6, 9, 1, 12, 2, 5), counts, strict=True)
    ]
    reference = open_reference(model_folder(family))
    with open_engine(model_folder(family), place=MIXED) as engine:
        done = {completion.id: completion for completion in engine.generate(requests)}
    for index, request in enumerate(requests):
        completion, answer = done[str(index)], done[str(index)].answers[0]
        tokens = [*request.prompt, *answer.tokens]
        wanted, start = reference.logprobs(tokens), len(request.prompt)
        if request.logprobs is None:
            assert answer.logprobs is None
        else:
            _check(answer.logprobs, tokens[start:], wanted[start - 1 : -1], request.logprobs)
        if request.prompt_logprobs is None:
            assert completion.prompt_logprobs is None
        else:
            assert completion.prompt_logprobs[0] is None, "nothing comes before the first token"
            _check(
                completion.prompt_logprobs[1:], tokens[1:start], wanted[: start - 1], request.prompt_logprobs
            )


def _check(entries: tuple[TokenLogprob, ...], tokens: list[int], wanted: torch.Tensor, num_top: int) -> None:
    """`wanted[i]` are the reference's log-probabilities of all tokens at the place of `tokens[i]`."""
    assert [entry.token for entry in entries] == tokens
    for entry, row in zip(entries, wanted, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=TOLERANCE)
        best = row.topk(num_top).values.tolist() if num_top else []
        assert [value for _, value in entry.top] == pytest.approx(best, abs=TOLERANCE)
        assert [float(row[token]) for token, _ in entry.top] == pytest.approx(best, abs=TOLERANCE)
