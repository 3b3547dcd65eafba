"""A picture of a layout: places as rows, stages as columns, what each boundary and each stage costs."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from capstan.allocation.explanation import Priced
from capstan.allocation.layout import Layout
from capstan.allocation.pair_seconds import Numbers
from capstan.plans import Plan, seconds_text

_CELL, _LABEL, _ROW, _TOP = 84, 150, 30, 64
_DOT, _DOTS_IN_LINE = 4, 8
_INK, _PALE, _BINDS = "#1f2933", "#e4e7eb", "#c81e1e"
_PALETTE = ("#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#92400e")


def layout_svg(layout: Layout, places: Numbers, names: Sequence[str], *, plan: Plan, found: Priced) -> str:
    """The map as SVG text.

    A row is a place (devices of one class), a column a stage in pipeline order, a dot a device. Above the
    columns stands what their boundaries cost both ways, below them what their data parallelism costs; the
    dearest of each is red, because the step waits for it.
    """
    stage_s, boundary_s = found.stage_s, [2 * each.seconds for each in found.boundaries]
    rows = {int(place): row for row, place in enumerate(dict.fromkeys(places.tolist()))}
    most = max(
        (sum(places[device] == place for device in group) for group in layout.groups for place in rows),
        default=1,
    )
    height = max(_ROW, 12 + 10 * -(-int(most) // _DOTS_IN_LINE))
    width = _LABEL + _CELL * layout.num_stages + 20
    bottom = _TOP + height * len(rows)
    parts = [_text(12, 20, f"{plan.title}: {seconds_text(plan.seconds)} a step", size=14)]
    for place, row in rows.items():
        parts.append(_text(12, _TOP + height * (row + 0.5) + 4, _label(places, names, place)))
        parts.append(_line(_LABEL, _TOP + height * row, width - 20, _TOP + height * row))
    for stage, group in enumerate(layout.groups):
        left = _LABEL + _CELL * stage
        parts.append(_text(left + _CELL / 2, _TOP - 8, f"stage {stage}", middle=True))
        parts.append(_line(left, _TOP, left, bottom))
        for place, row in rows.items():
            count = sum(int(places[device]) == place for device in group)
            parts += _dots(left + 10, _TOP + height * row + 10, count, _PALETTE[row % len(_PALETTE)])
        ink = _BINDS if stage_s[stage] == max(stage_s) else _INK
        parts.append(_text(left + _CELL / 2, bottom + 18, seconds_text(stage_s[stage]), middle=True, ink=ink))
    for number, seconds in enumerate(boundary_s):
        ink = _BINDS if seconds == max(boundary_s) else _INK
        across = _LABEL + _CELL * (number + 1)
        parts.append(_text(across, _TOP - 26, seconds_text(seconds), middle=True, ink=ink))
    parts.append(_text(12, _TOP - 26, "boundary, both ways"))
    parts.append(_text(12, bottom + 18, "data parallel"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 32}" width="{width}" '
        f'height="{bottom + 32}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _label(places: Numbers, names: Sequence[str], place: int) -> str:
    members = [names[device] for device in range(len(names)) if places[device] == place]
    return members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} more"


def _dots(left: float, top: float, count: int, colour: str) -> list[str]:
    return [
        f'<circle cx="{left + 9 * (each % _DOTS_IN_LINE)}" cy="{top + 10 * (each // _DOTS_IN_LINE)}" '
        f'r="{_DOT}" fill="{colour}"/>'
        for each in range(count)
    ]


def _line(left: float, top: float, right: float, bottom: float) -> str:
    return f'<line x1="{left}" y1="{top}" x2="{right}" y2="{bottom}" stroke="{_PALE}"/>'


def _text(
    left: float, top: float, words: str, *, size: int = 11, middle: bool = False, ink: str = _INK
) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{left}" y="{top}" font-size="{size}"{anchor} fill="{ink}">{escape(words)}</text>'
