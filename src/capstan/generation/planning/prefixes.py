"""Tokens that all prompts of a job begin with: computed and stored once where that is faster."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from capstan.errors import DoesNotFit
from capstan.generation.planning.job_plan import JobPlan
from capstan.generation.requests import Request
from capstan.plans import Alternative

# A prefix costs a sweep of its own; below this many tokens it saves less.
_LEAST_SHARED = 16

# Measured over predicted seconds of a job whose shared prefix lay away from the device (OPT-6.7B on an H100:
# 340 tokens/s of 1,284). Why is not known yet; until it is, such a plan must be better by that.
_AWAY_FACTOR = 3.8


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


def fitting(ways: Sequence[Callable[[], JobPlan]]) -> list[JobPlan]:
    """The plans that fit, of several ways to make one; the last one's error where none does."""
    plans: list[JobPlan] = []
    for index, planned in enumerate(ways, start=1):
        try:
            plans.append(planned())
        except DoesNotFit:
            if index == len(ways) and not plans:
                raise
    return plans


def price_s(planned: JobPlan) -> float:
    """The seconds of a plan as far as plans of its kind have kept to theirs."""
    return planned.plan.seconds * (_AWAY_FACTOR if _is_away(planned) else 1.0)


def _is_away(planned: JobPlan) -> bool:
    return planned.prefix > 0 and any(tier != "device" for tier in planned.placement.cache)


def weighed(plans: Sequence[JobPlan], prices_s: Sequence[float], common: int) -> JobPlan:
    """The cheaper of plans with and without sharing `common` tokens; it names the other and its price."""
    best = min(range(len(plans)), key=lambda index: prices_s[index])
    others = tuple(
        Alternative(name=_name(plan, common), seconds=prices_s[index], reason=_reason(plan, prices_s[index]))
        for index, plan in enumerate(plans)
        if index != best
    )
    chosen = plans[best]
    return replace(chosen, common=common, plan=replace(chosen.plan, alternatives=others))


def _name(plan: JobPlan, common: int) -> str:
    shared = "once, away from the device" if _is_away(plan) else "once, on the device"
    return f"the first {common} tokens {shared if plan.prefix else 'for each prompt'}"


def _reason(plan: JobPlan, price: float) -> str:
    if price == plan.plan.seconds:
        return "slower"
    return f"slower: {_AWAY_FACTOR} times its forecast, as was measured of such a plan"
