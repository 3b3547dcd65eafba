"""What a planner is asked, what it weighs, and what it decides for a job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capstan.generation.planning.batching import BlockShape, Length
from capstan.generation.planning.placement import Placement
from capstan.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be planned; what is fixed of it."""

    lengths: Sequence[Length]
    opened: Placement | None
    keeps_cache: bool
    prefix: int


class Candidate(NamedTuple):
    """A block with a placement, and the job's seconds with it."""

    seconds: float
    shape: BlockShape
    placement: Placement


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A plan and the decisions behind it, as the engine runs them.

    `prefix` tokens are computed and stored once, of the `common` ones that all prompts begin with.
    """

    plan: Plan
    lengths: Sequence[Length]
    prefix: int
    common: int
    placement: Placement
    shape: BlockShape
    logit_rows: int
