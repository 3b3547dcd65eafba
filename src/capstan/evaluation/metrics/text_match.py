"""How well an answer matches a right one: exact, up to articles and case, by words, by n-grams.

Every measure takes the right text and the answer, and gives 0 to 1.

Source: HELM, `metrics/evaluate_reference_metrics.py`; where it departs from what others call by the same
name, so do we: F1 is over *sets* of words (SQuAD's counts repetitions), BLEU-4 weighs 4-grams alone.
"""

import re
import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from capstan.errors import require_extra
from capstan.evaluation.metrics.math_equivalence import is_equivalent, is_equivalent_boxed

Measure = Callable[[str, str], float]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str, *, drops_articles: bool = True) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    text = text.lower().translate(_PUNCTUATION)
    if drops_articles:
        text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def exact_match(gold: str, answer: str | None) -> float:
    """Equal but for spaces around; an empty answer never is."""
    return float(bool(answer) and gold.strip() == (answer or "").strip())


def quasi_exact_match(gold: str, answer: str | None) -> float:
    """Equal when normalised."""
    return float(bool(answer) and normalised(gold) == normalised(answer or ""))


def quasi_leave_articles_exact_match(gold: str, answer: str | None) -> float:
    """Equal when normalised, articles counting."""
    if not answer:
        return 0.0
    return float(normalised(gold, drops_articles=False) == normalised(answer, drops_articles=False))


def prefix_exact_match(gold: str, answer: str | None) -> float:
    """The answer begins with the right text."""
    return float(bool(answer) and (answer or "").strip().startswith(gold.strip()))


def quasi_prefix_exact_match(gold: str, answer: str | None) -> float:
    """The answer begins with the right text, both normalised."""
    return float(bool(answer) and normalised(answer or "").startswith(normalised(gold)))


def f1_score(gold: str, answer: str) -> float:
    """F1 of the sets of normalised words."""
    wanted, given = set(normalised(gold).split()), set(normalised(answer).split())
    common = len(wanted & given)
    if not wanted or not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 1.0 / (0.5 / precision + 0.5 / recall)


def exact_match_indicator(gold: str, answer: str) -> float:
    """The last words are equal."""
    return exact_match(gold.split(" ")[-1].strip(), answer.split(" ")[-1].strip())


def final_number_exact_match(gold: str, answer: str) -> float:
    """The last numbers are equal, commas aside. As in HELM any character may stand before the decimals."""
    return exact_match(_last_number(gold), _last_number(answer))


def _last_number(text: str) -> str:
    found = re.findall(r"-?[\d,]+(?:.\d+)?", text)
    return found[-1].replace(",", "") if found else ""


_STATED = re.compile(r"(?:####|The answer is) (-?[\d.,]+)")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def gsm8k_strict_match(gold: str, answer: str) -> float:
    """The first number stated as the answer ("#### 72") equals the right one; 72.00 and $72 do not.

    Source: GSM8K, `grade_school_math/dataset.py`. Differs: "The answer is", which HELM's prompts have for its
    mark, is one too, and its full stop is none of the number's.
    """
    stated = _stated(answer)
    return float(bool(stated) and stated == _stated(gold))


def gsm8k_flexible_match(gold: str, answer: str) -> float:
    """The last number of the answer, wherever it stands and however it is written, is the right one.

    Source: lm-evaluation-harness 0.4, `gsm8k` (flexible-extract), which stops at a new question. Differs:
    72.00 is 72.
    """
    own = re.split(r"\n\s*(?:Q|Question):", answer)[0]
    found = _NUMBER.findall(own)
    return float(bool(found) and _shortest(found[-1].replace(",", "")) == _shortest(_stated(gold)))


def _stated(text: str) -> str:
    found = _STATED.search(text)
    return found[1].replace(",", "").rstrip(".") if found else ""


def _shortest(number: str) -> str:
    """A number without a currency and without zeros after the point."""
    plain = number.replace("$", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def absolute_value_difference(gold: str, answer: str) -> float:
    """The distance of two whole numbers; what is none counts as 0."""
    return abs(_whole_number(gold) - _whole_number(answer))


def _whole_number(text: str) -> float:
    try:
        return int(text.replace(",", ""))
    except ValueError:
        return 0.0


# --- sets: "Anna is big and green." -----------------------------------------------------------------------


def _as_set(text: str) -> set[str]:
    if text == "Nothing.":
        return set()
    return set(text.replace(".", "").split(" is ")[-1].split(" and "))


def exact_set_match(gold: str, answer: str) -> float:
    """The same set."""
    return float(_as_set(gold) == _as_set(answer.split("\n")[0]))


def iou_set_match(gold: str, answer: str) -> float:
    """Intersection over union of two sets; of an empty right set, whether the answer is empty."""
    wanted, given = _as_set(gold), _as_set(answer.split("\n")[0])
    return len(wanted & given) / len(wanted | given) if wanted else float(wanted == given)


def f1_set_match(gold: str, answer: str) -> float:
    """F1 of two sets; of an empty right set, whether the answer is empty."""
    wanted, given = _as_set(gold), _as_set(answer.split("\n")[0])
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted else float(wanted == given)


# --- n-grams ----------------------------------------------------------------------------------------------


@cache
def _rouge(kind: str) -> Any:
    require_extra("evaluation", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def rouge(kind: str) -> Measure:
    """ROUGE's F-measure with stemming; `kind` is "rouge1", "rouge2" or "rougeL"."""
    return lambda gold, answer: float(_rouge(kind).score(gold, answer)[kind].fmeasure)


def words(text: str) -> list[str]:
    """A text's words as nltk's tokenizer cuts them, taken as one sentence.

    Differs: HELM first cuts sentences with a model that nltk downloads, so there a full stop inside a text is
    a token of its own.
    """
    require_extra("evaluation", "nltk")
    from nltk.tokenize import word_tokenize

    return list(word_tokenize(text, preserve_line=True))


def bleu(weights: Sequence[float]) -> Measure:
    """BLEU of one sentence with these weights of 1- to 4-grams."""

    def measure(gold: str, answer: str) -> float:
        require_extra("evaluation", "nltk")
        import warnings

        from nltk.translate.bleu_score import sentence_bleu

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no 4-gram matches is an answer, not a fault
            return float(sentence_bleu([words(gold)], words(answer), weights=tuple(weights)))

    return measure


MEASURES: dict[str, Measure] = {
    "exact_match": exact_match,
    "quasi_exact_match": quasi_exact_match,
    "quasi_leave_articles_exact_match": quasi_leave_articles_exact_match,
    "prefix_exact_match": prefix_exact_match,
    "quasi_prefix_exact_match": quasi_prefix_exact_match,
    "exact_match_indicator": exact_match_indicator,
    "final_number_exact_match": final_number_exact_match,
    "gsm8k_strict_match": gsm8k_strict_match,
    "gsm8k_flexible_match": gsm8k_flexible_match,
    "exact_set_match": exact_set_match,
    "iou_set_match": iou_set_match,
    "f1_set_match": f1_set_match,
    "math_equiv": is_equivalent,
    "math_equiv_chain_of_thought": is_equivalent_boxed,
    "f1_score": f1_score,
    "rouge_1": rouge("rouge1"),
    "rouge_2": rouge("rouge2"),
    "rouge_l": rouge("rougeL"),
    "bleu_1": bleu((1, 0, 0, 0)),
    "bleu_4": bleu((0, 0, 0, 1)),
    "absolute_value_difference": absolute_value_difference,
}
