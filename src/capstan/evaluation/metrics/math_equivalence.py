"""Whether two answers in LaTeX are the same up to how they are written.

Source: Hendrycks et al. 2021 (MATH), the normalisation that all use who report on it, HELM among them.
"""

import re


def is_equivalent(gold: str | None, answer: str | None) -> float:
    """Equal after units, spacing, and ways to write fractions and roots are evened out."""
    if gold is None or answer is None:
        return float(gold is answer)
    try:
        return float(plain_form(gold) == plain_form(answer))
    except (ValueError, IndexError):  # LaTeX that the rules do not know
        return float(gold == answer)


def is_equivalent_boxed(gold: str, answer: str) -> float:
    """The same of what stands in the last box of two solutions."""
    return is_equivalent(boxed(gold), boxed(answer))


def boxed(text: str | None) -> str | None:
    r"""What stands in the last `\boxed{...}`."""
    whole = last_box(text) if text is not None else None
    head = "\\boxed{"
    return whole[len(head) : -1] if whole is not None and whole.startswith(head) else None


def last_box(text: str) -> str | None:
    r"""The last `\boxed{...}` or `\fbox{...}`, braces inside it matched."""
    start = max(text.rfind("\\boxed"), -1)
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return None
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return text[start : at + 1]
    return None


def plain_form(text: str) -> str:
    """One way of writing for what can be written in several."""
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    text = _without_unit(text).replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "k = 5"
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise ValueError("two units")
    return parts[0]


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + (each if each[0] == "{" else "{" + each[0] + "}" + each[1:]) for each in rest
    )


def _braced_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    done = first
    for each in rest:
        if each[0] != "{":
            if len(each) < 2:
                return text
            below = each[1:] if each[1] == "{" else "{" + each[1] + "}" + each[2:]
            each = "{" + each[0] + "}" + below
        done += "\\frac" + each
    return done


def _slash_as_fraction(text: str) -> str:
    found = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    if found is None or any(str(int(part)) != part for part in found.groups()):
        return text
    return "\\frac{" + found[1] + "}{" + found[2] + "}"
