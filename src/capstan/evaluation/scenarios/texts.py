"""Texts whose probability is asked: the Pile, TwitterAAE, ICE, WikiText.

Source: HELM's scenarios of these names; WikiText-2 is ours, for it is at hand.
"""

import re
from collections.abc import Iterator
from typing import Any

from capstan.errors import unknown_name
from capstan.evaluation.instances import TEST, VALID, Instance
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario, required
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."
PILE_SUBSETS = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)


def load_the_pile(data: DataFolder, *, subset: str) -> list[Instance]:
    """A part of the test set. With `indices/<subset>.json`, a list of numbers, only those documents."""
    if subset not in PILE_SUBSETS:
        raise unknown_name("subset of the Pile", subset, PILE_SUBSETS)
    texts = []
    for row in data.jsonl("test.jsonl", '{"text", "meta": {"pile_set_name"}} on each line'):
        text, meta = required(row, "text", "meta", where="test.jsonl")
        if meta.get("pile_set_name") == subset:
            texts.append(text)
    if data.exists(f"indices/{subset}.json"):
        texts = [texts[at] for at in sorted(set(data.json(f"indices/{subset}.json")))]
    return [Instance(input=text, split=TEST) for text in texts]


def load_twitter_aae(data: DataFolder, *, demographic: str = "aa") -> list[Instance]:
    """Tweets in African-American (`aa`) or white (`white`) aligned English."""
    if demographic not in ("aa", "white"):
        raise unknown_name("demographic of twitter_aae", demographic, ("aa", "white"))
    rows = data.rows(f"{demographic}_tweets.csv", "one tweet a row")
    return [Instance(input=row[0], split=TEST) for row in rows if row]


_ICE_FOLDERS = {
    "ind": "ICE India",
    "can": "ICE-CAN",
    "hk": "ICE-HK",
    "ja": "ICE-JA",
    "phi": "ICE Philippines",
    "sin": "ICE SINGAPORE",
    "usa": "ICE-USA",
    "irl": "ICE-IRL/ICE-Ireland version 1.2#6DAE.2/ICE-Ireland txt",
    "ea": "ICE-EA/corpus/retagged for wsmith",
}
_ICE_CORPUS = {"irl": "ICE combined running txt", "ea": "all east africa"}
_WITH_HEADERS = ("ind", "usa")  # whose speakers' gender stands in .hdr files; others have spreadsheets


def load_ice(
    data: DataFolder, *, subset: str | None = None, gender: str | None = None, category: str = "all"
) -> list[Instance]:
    """Spoken (S) and written (W) English of several countries, freed of mark-up. `category` may be "S1".

    Differs: `gender` works where it stands in .hdr files (India, USA), not in spreadsheets.
    """
    if subset is not None and subset not in _ICE_FOLDERS:
        raise unknown_name("subset of ICE", subset, _ICE_FOLDERS)
    subsets = (subset,) if subset else _WITH_HEADERS if gender else tuple(_ICE_FOLDERS)
    if gender is not None and not set(subsets) <= set(_WITH_HEADERS):
        raise unknown_name("subset of ICE with gender", str(subset), _WITH_HEADERS)
    return [
        Instance(input=text, split=TEST)
        for each in subsets
        for text in _ice_texts(data, each, gender, category)
    ]


def _ice_texts(data: DataFolder, subset: str, gender: str | None, category: str) -> Iterator[str]:
    base = _ICE_FOLDERS[subset]
    folders = [_ICE_CORPUS.get(subset, ""), "Corpus", "CORPUS", "corpus"]
    corpus = next((f"{base}/{each}" for each in folders if each and data.exists(f"{base}/{each}")), None)
    corpus = corpus or f"{base}/Corpus"
    for name in data.names(corpus, "the corpus as it comes from its project, texts of S1A-001 and so on"):
        if category != "all" and not name.upper().startswith(category.upper()):
            continue
        if gender is not None and not _ice_gender(data, base, name, gender):
            continue
        raw = data.path(f"{corpus}/{name}").read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("iso-8859-1")
        parts = re.split("[WS]\\d[A-F]\\d{3}[A-Z]*[KT]\n", text) if subset == "ea" else [text]
        yield from (without_markup(part) for part in parts if part)


def _ice_gender(data: DataFolder, base: str, name: str, gender: str) -> bool:
    header = f"{base}/Headers/{name.rsplit('.', 1)[0]}.hdr"
    if not data.exists(header):
        return False
    found = re.findall(r"(?<=<gender>)\w+(?=</gender>)", data.path(header).read_text("iso-8859-1"))
    wanted = {"male": {"m", "male"}, "female": {"f", "female"}}[gender]
    return bool(found) and all(each.lower() in wanted for each in found)


_DELETE = (
    "[WS]\\d[A-F]-\\d{3} *",
    " <l> ",
    "<#> ",
    "BBB\\S+ \\S+RRR *",
    "BBB\\S+ *",
    "RRR\\S+ *",
    "UUU",
    "III\\S+ *",
)
_REPLACE = (
    ("<\\/*mention>", '"'),
    ("</\\*\\*>", "*"),
    ("</\\*\\*/>", "*"),
    ("&eacute;", "é"),
    (" <,+>", ","),
    ("&ersand;", "&"),
    ("&obrack;", "("),
    ("&cbrack;", ")"),
    ("&percent;", "%"),
    ("&hash;", "#"),
    ("&dash", "-"),
    ("&ldquo;", '"'),
    ("&atsign;", "@"),
    ("\\n+[\\n ]+", "\n\n"),
    ("\\S+><\\+_(\\S+)>", "\\1"),
)
_UNTAG = (
    "I|ICE.+|[\\[\\]\\{\\}]\\d*|X|@|quote|foreign|indig|smallcaps|roman|sb|ss|footnote|p|h|bold|it|ul|\\+|\\=|\\?|sp|}|"
    "ea|slang"
)
_REMOVED = ("O", "-", "&", ".", "fnr", "marginalia", "del", "w")


def without_markup(text: str) -> str:
    """A text of ICE as people would read it: marks of speakers and pauses, deletions and tags taken out."""
    text = text.strip()
    for pattern in _DELETE:
        text = re.sub(pattern, "", text)
    for pattern, replacement in _REPLACE:
        text = re.sub(pattern, replacement, text)
    text = re.sub(f"<\\/*({_UNTAG})>", "", text)
    for tag in _REMOVED:
        closing = f"</{tag}>"
        while (end := text.find(closing)) >= 0:
            start = text[:end].rfind(f"<{tag}>")
            text = text[: end if start == -1 else start] + text[end + len(closing) :]
    return text.strip()


def load_wikitext(data: DataFolder) -> list[Instance]:
    """WikiText's articles, headings beginning a new one."""
    instances = []
    for split, name in ((VALID, "valid.txt"), (TEST, "test.txt")):
        if split == VALID and not data.exists(name):
            continue
        article: list[str] = []
        for line in data.lines(name, "WikiText, tokens separated by spaces"):
            if re.fullmatch(r" = [^=].*[^=] = \n?", line) and article:
                instances.append(Instance(input="".join(article).strip(), split=split))
                article = []
            article.append(line)
        if "".join(article).strip():
            instances.append(Instance(input="".join(article).strip(), split=split))
    return [each for each in instances if each.input]


def _spec(name: str, class_name: str, args: dict[str, Any], groups: tuple[str, ...]) -> RunSpec:
    shown = ",".join(f"{key}={value}" for key, value in sorted(args.items()))
    return RunSpec(
        name=name + (f":{shown}" if shown else ""),
        scenario_spec=ScenarioSpec(class_name=class_name, args=args),
        adapter_spec=asking.language_modeling(),
        metric_specs=asking.texts(),
        groups=groups,
    )


_PILE = _HELM + "the_pile_scenario.ThePileScenario"
_TWITTER = _HELM + "twitter_aae_scenario.TwitterAAEScenario"
_ICE = _HELM + "ice_scenario.ICEScenario"
_WIKITEXT = "capstan.evaluation.scenarios.texts.WikiTextScenario"

SCENARIOS = (
    Scenario(
        name="the_pile",
        folder="the_pile",
        class_name=_PILE,
        description="Text of 22 kinds (Gao et al. 2020)",
        load=load_the_pile,
        run_spec=lambda subset: _spec("the_pile", _PILE, {"subset": subset}, ("the_pile",)),
        main_metric="bits_per_byte",
        page="pile.eleuther.ai (its test part; the old host is gone)",
    ),
    Scenario(
        name="twitter_aae",
        folder="twitter_aae",
        class_name=_TWITTER,
        description="Tweets of two varieties of English (Blodgett et al. 2016)",
        load=load_twitter_aae,
        run_spec=lambda demographic="aa": _spec(
            "twitter_aae",
            _TWITTER,
            {"demographic": demographic},
            ("twitter_aae", f"twitter_aae_{demographic}"),
        ),
        main_metric="bits_per_byte",
        page="slanglab.cs.umass.edu/TwitterAAE",
    ),
    Scenario(
        name="ice",
        folder="ice",
        class_name=_ICE,
        description="English of several countries (Greenbaum 1991); licensed, to be asked for",
        load=load_ice,
        run_spec=lambda **args: _spec("ice", _ICE, args, ("ice",)),
        main_metric="bits_per_byte",
        page="ice-corpora.net",
    ),
    Scenario(
        name="wikitext",
        folder="wikitext2",
        class_name=_WIKITEXT,
        description="Articles of Wikipedia (Merity et al. 2016)",
        load=load_wikitext,
        run_spec=lambda: _spec("wikitext", _WIKITEXT, {}, ("wikitext",)),
        main_metric="bits_per_byte",
        page="huggingface.co/datasets/Salesforce/wikitext",
    ),
)
