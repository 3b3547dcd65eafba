"""A Gantt chart of a simulated step: one row a resource, one bar a work."""

from xml.sax.saxutils import escape

from capstan.allocation.step_simulation import StepSimulation
from capstan.allocation.virtual_time import Interval
from capstan.plans import seconds_text

_LABEL, _WIDTH, _ROW, _TOP = 180, 900, 18, 34
_COLOURS = {"forward": "#2563eb", "backward": "#d97706", "share": "#059669", "sum": "#7c3aed"}
_KEY = {"share": "gradients there", "sum": "sums back"}


def gantt_svg(simulation: StepSimulation) -> str:
    """The step as SVG text: blue is forward, orange backward, green and violet the exchange of gradients.

    Messages have the colour of what they carry. A bar ends when its link is free again; the latency that
    follows is a gap before what waits for it.
    """
    scale = _WIDTH / simulation.seconds if simulation.seconds else 0.0
    rows = {
        name: row for row, name in enumerate(dict.fromkeys(each.resource for each in simulation.intervals))
    }
    parts = [_text(8, 20, f"one step: {seconds_text(simulation.seconds)}")]
    used = {_kind(each) for each in simulation.intervals}
    for number, kind in enumerate(kind for kind in _COLOURS if kind in used):
        parts.append(_text(_LABEL + 140 * number, 20, _KEY.get(kind, kind), colour=_COLOURS[kind]))
    parts += [_text(8, _TOP + _ROW * row + 12, name) for name, row in rows.items()]
    parts += [_bar(each, rows[each.resource], scale) for each in simulation.intervals]
    height = _TOP + _ROW * len(rows) + 10
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LABEL + _WIDTH + 10} {height}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )


def _bar(each: Interval, row: int, scale: float) -> str:
    left, width = _LABEL + each.start_s * scale, (each.end_s - each.start_s) * scale
    told = f"{each.name}: {seconds_text(each.start_s)} to {seconds_text(each.end_s)}"
    return (
        f'<rect x="{left:.2f}" y="{_TOP + _ROW * row}" width="{width:.2f}" height="{_ROW - 3}" '
        f'fill="{_COLOURS[_kind(each)]}" stroke="white" stroke-width="0.5">'
        f"<title>{escape(told)}</title></rect>"
    )


def _kind(each: Interval) -> str:
    return each.name.split()[0]


def _text(left: float, top: float, words: str, *, colour: str = "#1f2933") -> str:
    return f'<text x="{left}" y="{top}" fill="{colour}">{escape(words)}</text>'
