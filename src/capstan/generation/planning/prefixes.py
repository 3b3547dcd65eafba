"""Tokens that all prompts of a job begin with: worth computing and storing once."""

from collections.abc import Sequence

from capstan.generation.requests import Request

# A prefix costs a sweep of its own; below this many tokens it saves less.
_LEAST_SHARED = 16


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at most all but one of the shortest, whose last token predicts
    its answer. 0 where it is not worth sharing."""
    if len(prompts) < 2:
        return 0
    # What the first and the last in order share, all share that lie between them.
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    pairs = zip(first, last, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(last)))
    shared = min(same, min(map(len, prompts)) - 1)
    return shared if shared >= _LEAST_SHARED else 0


def shared_prefix(requests: Sequence[Request], prompts: Sequence[Sequence[int]] | None = None) -> int:
    """The common prefix of requests, whose prompts are tokens or given apart; none if any of them asks for
    the probabilities of its prompt."""
    if any(request.prompt_logprobs is not None for request in requests):
        return 0
    return common_prefix(prompts or [request.prompt for request in requests])  # type: ignore[misc]
