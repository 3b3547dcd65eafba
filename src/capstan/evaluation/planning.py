"""What an evaluation will ask, before anything is asked: requests, tokens, what prompts share; what it did.

saved = sum over groups of (prompts in the group - 1) * tokens that they share
"""

from collections.abc import Sequence
from typing import NamedTuple

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.models import LanguageModel
from capstan.evaluation.running import Evaluated, Prepared
from capstan.evaluation.shared_prefixes import groups_of
from capstan.plans import Choice, Phase, Plan, Trace


class Asked(NamedTuple):
    """What a run asks: requests of each kind, tokens in, tokens out at most, tokens computed once for
    many.
    """

    run: str
    num_instances: int
    num_scored: int
    num_generated: int
    tokens_in: int
    tokens_out: int
    tokens_shared: int

    @property
    def num_requests(self) -> int:
        return self.num_scored + self.num_generated

    @property
    def words(self) -> str:
        """In a line."""
        share = self.tokens_shared / self.tokens_in if self.tokens_in else 0.0
        return (
            f"{self.num_requests:,} requests ({self.num_scored:,} scored), {self.tokens_in:,} tokens in "
            f"({share:.0%} of them shared), up to {self.tokens_out:,} out"
        )


def asked_by(run: Prepared | Evaluated, model: LanguageModel) -> Asked:
    """What a run asks, or has asked; the same request twice is one."""
    distinct: dict[object, RequestState] = {state.request: state for state in run.states}
    states = list(distinct.values())
    prompts = [model.encode(state.request.prompt) for state in states]
    groups = groups_of(prompts, [max(0, len(prompt) - 1) for prompt in prompts])
    return Asked(
        run=run.spec.name,
        num_instances=len({state.instance for state in states}),
        num_scored=sum(state.request.is_scored for state in states),
        num_generated=sum(not state.request.is_scored for state in states),
        tokens_in=sum(map(len, prompts)),
        tokens_out=sum(each.request.max_tokens * each.request.num_completions for each in states),
        tokens_shared=sum((len(group.indices) - 1) * group.prefix for group in groups),
    )


def plan_evaluation(
    asked: Sequence[Asked], *, model: str, machine: str, seconds: float | None = None
) -> Plan:
    """The plan of all runs together; `seconds` where the model can tell."""
    choices = [Choice(name=each.run, value=each.words) for each in asked]
    counts = {
        "requests": sum(each.num_requests for each in asked),
        "tokens in": sum(each.tokens_in for each in asked),
        "tokens out": sum(each.tokens_out for each in asked),
    }
    phase = Phase(name="asking", seconds=seconds or 0.0, counts=counts)
    return Plan(
        system="evaluation",
        title=f"{model} · {len(asked)} runs, {sum(each.num_requests for each in asked):,} requests",
        machine=machine,
        choices=tuple(choices),
        phases=(phase,),
    )


def trace_evaluation(done: Sequence[Evaluated], model: LanguageModel, *, machine: str) -> Trace:
    """What runs took. Requests and tokens in are those of the plan; tokens out are those that came, of which
    the plan knows the most. Requests that were known from before took no time."""
    answers = {state.request: state.result for each in done for state in each.states}
    tokens_out = sum(
        len(completion.tokens)
        for request, result in answers.items()
        if result is not None and not request.is_scored
        for completion in result.completions
    )
    asked = [asked_by(each, model) for each in done]
    counts = {
        "requests": sum(each.num_requests for each in asked),
        "tokens in": sum(each.tokens_in for each in asked),
        "tokens out": tokens_out,
    }
    num_known = sum(each.num_known for each in done)
    return Trace(
        system="evaluation",
        title=f"{model.name} · {len(done)} runs",
        machine=machine,
        phases=(Phase(name="asking", seconds=sum(each.seconds for each in done), counts=counts),),
        notes=(f"{num_known:,} answers were known from before",) if num_known else (),
    )
