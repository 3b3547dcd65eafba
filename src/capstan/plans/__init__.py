"""plans: what would it cost, and what did it cost?

A `Plan` predicts seconds, bytes per link and peak memory per device before anything runs. A `Trace` has
the same fields, measured. `explain(plan)` prints the first; `compare(plan, trace)` the two side by side.
"""

from capstan.plans.plan import Alternative, Choice, Phase, Plan, Trace
from capstan.plans.programs import IntegerProgram
from capstan.plans.report import compare, explain
from capstan.plans.sizes import bytes_text, parse_bytes, seconds_text
from capstan.plans.traffic import Traffic, link_name, rank_link

__all__ = [
    "Alternative",
    "Choice",
    "IntegerProgram",
    "Phase",
    "Plan",
    "Trace",
    "Traffic",
    "bytes_text",
    "compare",
    "explain",
    "link_name",
    "parse_bytes",
    "rank_link",
    "seconds_text",
]
