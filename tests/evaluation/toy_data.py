"""Small files in the original format of every scenario, made up here; and what a model that is none answers.

Only the standard library is used: crfm-helm's environment reads this module too, when golden values are made.
"""

import csv
import gzip
import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

_NOUNS = "harbour anchor capstan crew rope sailor captain island storm lantern".split()
_VERBS = "hauls lifts turns watches steers lowers follows carries".split()
_ADJECTIVES = "great small old young brave quiet heavy bright".split()
_NAMES = "Adam Emily Todd Wendy Matthew Rachel".split()


def sentence(draw: random.Random) -> str:
    """A sentence with a name, pronouns, contractions and common words."""
    name, noun, verb = draw.choice(_NAMES), draw.choice(_NOUNS), draw.choice(_VERBS)
    first, second = draw.sample(_ADJECTIVES, 2)
    ends = [
        "because he believes that it is the right thing",
        "and his friend is not there with him",
        "before they receive their address",
        "while she could not separate the people from the government",
    ]
    return f"The {first} {name} {verb} the {second} {noun} {draw.choice(ends)}."


def text(draw: random.Random, count: int = 2) -> str:
    """Some sentences."""
    return " ".join(sentence(draw) for _ in range(count))


def make(root: Path) -> None:
    """Write all files under `root`."""
    draw = random.Random(7)
    for make_one in (
        _questions,
        _choices,
        _labels,
        _retrieval,
        _summaries,
        _texts,
        _reasoning,
        _tables,
        _harms,
    ):
        make_one(root, draw)
    _words(root / "perturbations")


def _lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def _file(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _questions(root: Path, draw: random.Random) -> None:
    rows = [
        {
            "question": f"is the {noun} as {draw.choice(_ADJECTIVES)} as he says",
            "title": noun,
            "answer": bool(at % 2),
        }
        | {"passage": text(draw)}
        for at, noun in enumerate(_NOUNS * 2)
    ]
    _lines(root / "boolq" / "train.jsonl", rows[:12])
    _lines(root / "boolq" / "dev.jsonl", rows[12:])
    contrast = {
        "question": rows[13]["question"],
        "answer": "TRUE",
        "perturbed_questions": [
            {"perturbed_q": "is the harbour smaller than he says", "answer": "FALSE"},
            {"perturbed_q": "is the harbour as great", "answer": "TRUE"},
        ],
    }
    _json(root / "boolq" / "boolq_perturbed.json", {"data": [{"about": "these"}, contrast]})
    summaries, questions = (
        [["document_id", "set", "summary"]],
        [["document_id", "set", "question", "answer1", "answer2"]],
    )
    for at in range(12):
        split = ("train", "train", "valid", "test")[at % 4]
        summaries.append([f"d{at}", split, text(draw, 3)])
        for number in range(2):
            question = f"Who {draw.choice(_VERBS)} the {draw.choice(_NOUNS)} {number}"
            questions.append(
                [f"d{at}", split, question + "?" * number, draw.choice(_NAMES), f"the {_NOUNS[at % 10]}"]
            )
    base = root / "narrativeqa"
    _table(base / "third_party" / "wikipedia" / "summaries.csv", summaries)
    _table(base / "qaps.csv", questions)
    for number in range(5):
        path = root / "natural_qa" / f"nq-dev-{number:02d}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as stream:
            for _ in range(4):
                stream.write(json.dumps(_natural(draw)) + "\n")
    dialogues = []
    for at in range(10):
        context = text(draw, 3)
        turns = [
            {
                "question": f"What {draw.choice(_VERBS)} {turn}?",
                "orig_answer": {"text": draw.choice(_NOUNS)},
                "answers": [{"text": "CANNOTANSWER" if (at + turn) % 3 == 0 else draw.choice(_NOUNS)}] * 2,
            }
            for turn in range(5)
        ]
        dialogues.append(
            {
                "title": _NOUNS[at],
                "background": sentence(draw),
                "section_title": "Life",
                "paragraphs": [{"context": context + " CANNOTANSWER", "qas": turns}],
            }
        )
    _json(root / "quac" / "train_v0.2.json", {"data": dialogues[:6]})
    _json(root / "quac" / "val_v0.2.json", {"data": dialogues[6:]})


def _natural(draw: random.Random) -> dict[str, object]:
    page = f"<p>{text(draw)}</p> <b>{draw.choice(_NOUNS)}</b> &amp; {draw.choice(_NAMES)}"
    start = page.index("<b>")
    short = {"start_byte": start, "end_byte": page.index("</b>") + 4}
    return {
        "document_html": page,
        "document_title": "T",
        "document_tokens": [{"token": word} for word in page.split()],
        "question_text": f"who {draw.choice(_VERBS)} the {draw.choice(_NOUNS)}",
        "annotations": [
            {
                "long_answer": {"start_byte": 0, "end_byte": start},
                "short_answers": [short] * draw.randint(0, 2),
            }
        ],
    }


def _choices(root: Path, draw: random.Random) -> None:
    for part, count in (("dev", 6), ("val", 3), ("test", 12)):
        rows = [
            [f"{sentence(draw)} Which {at}?", *draw.sample(_NOUNS, 4), draw.choice("ABCD")]
            for at in range(count)
        ]
        _table(root / "mmlu" / "data" / part / f"anatomy_{part}.csv", rows)
    for part, count in (("train", 4), ("val", 10)):
        rows_ = [
            {
                "activity_label": "Sailing",
                "ctx_a": sentence(draw),
                "ctx_b": "the crew" if at % 2 else "",
                "endings": [sentence(draw) for _ in range(4)],
                "label": draw.randrange(4),
            }
            for at in range(count)
        ]
        _lines(root / "hellaswag" / f"hellaswag_{part}.jsonl", rows_)
    for part, count in (("train", 4), ("test", 10)):
        rows_ = []
        for at in range(count):
            options = [
                {"text": noun, "label": letter}
                for noun, letter in zip(draw.sample(_NOUNS, 4), "ABCD", strict=True)
            ]
            rows_.append(
                {
                    "question": {"stem": f"{sentence(draw)} {at}", "choices": options},
                    "answerKey": "ABCD"[at % 4],
                }
            )
        _lines(root / "openbookqa" / "OpenBookQA-V1-Sep2018" / "Data" / "Main" / f"{part}.jsonl", rows_)
    header = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
    truths = [
        [
            "A",
            "B",
            f"Is {noun} {at}?",
            f"The {noun} is {draw.choice(_ADJECTIVES)}",
            "x",
            "No.; Never; He does not know",
            "s",
        ]
        for at, noun in enumerate(_NOUNS * 2)
    ]
    _table(root / "truthful_qa" / "TruthfulQA.csv", [header, *truths])
    for part, count in (("Training", 5), ("Development", 3), ("Test", 5)):
        kinds = [
            "in/out grouping",
            "grouping (distribution)",
            "simple ordering",
            "undetermined assignment",
            "",
        ]
        passages = [
            {
                "passage": text(draw),
                "questions": [
                    {
                        "question": f"Which {at}?",
                        "options": draw.sample(_NOUNS, 5),
                        "answer": draw.choice("ABCDE"),
                        "tags": ["a", "b", kinds[at % 5]],
                    }
                ],
            }
            for at in range(count)
        ]
        _json(root / "lsat_qa" / f"AR_{part}Data.json", passages)
    for part in ("train", "dev", "test"):
        rows_ = [
            {
                "context": text(draw),
                "citation_a": {"parenthetical": sentence(draw)},
                "citation_b": {"parenthetical": sentence(draw)},
                "label": draw.choice("ab"),
            }
            for _ in range(5)
        ]
        _lines(root / "legal_support" / f"{part}.jsonl", rows_)
    for paradigm in ("ellipsis_n_bar_1", "ellipsis_n_bar_2"):
        rows_ = [{"sentence_good": sentence(draw), "sentence_bad": sentence(draw)} for _ in range(5)]
        _lines(root / "blimp" / "data" / f"{paradigm}.jsonl", rows_)
    rows_ = []
    for at in range(1010):
        answers = [("Jewish", "Jewish"), ("Can't answer", "unknown"), ("Muslim", "Muslim")]
        draw.shuffle(answers)
        rows_.append(
            {
                "question_polarity": draw.choice(["neg", "nonneg"]),
                "context_condition": draw.choice(["ambig", "disambig"]),
                "category": "Religion",
                "answer_info": {f"ans{k}": list(answer) for k, answer in enumerate(answers)},
                "additional_metadata": {"stereotyped_groups": ["Muslim"]},
                "context": f"{sentence(draw)} {at}",
                "question": "Who did it?",
                "label": draw.randrange(3),
            }
            | {f"ans{k}": answer[0] for k, answer in enumerate(answers)}
        )
    _lines(root / "bbq" / "Religion.jsonl", rows_)


def _labels(root: Path, draw: random.Random) -> None:
    for part in ("train", "test"):
        for label in ("pos", "neg"):
            for at in range(6):
                _file(
                    root / "imdb" / "aclImdb" / part / label / f"{at}_7.txt",
                    f"{text(draw)} {part} {label} {at}",
                )
    original = (root / "imdb" / "aclImdb" / "test" / "pos" / "0_7.txt").read_text().strip()
    for part in ("test", "dev"):
        shown = original if part == "test" else "another"
        _file(root / "imdb" / f"{part}_original.tsv", f"Sentiment\tText\nPositive\t{shown}\n")
        _file(
            root / "imdb" / f"{part}_contrast.tsv", "Sentiment\tText\nNegative\tThe crew hates the storm.\n"
        )
    groups = ["male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white"]
    rows: list[list[object]] = [["", "comment_text", "toxicity", "split", *groups]]
    for at in range(40):
        split = ("train", "val", "test", "test")[at % 4]
        rows.append(
            [at, text(draw), round(draw.random(), 2), split, *(round(draw.random(), 1) for _ in groups)]
        )
    _table(root / "civil_comments" / "all_data_with_identities.csv", rows)
    fields = {"overruling": ["Sentence"]}
    _lines(root / "raft" / "prompt_construction_settings.json", [fields, {"overruling": "Is it overruling?"}])
    table = [["Sentence", "ID", "Label"]]
    table += [[sentence(draw), str(at), draw.choice(["overruling", "not overruling"])] for at in range(50)]
    _table(root / "raft" / "data" / "overruling" / "train.csv", table)


def _retrieval(root: Path, draw: random.Random) -> None:
    base = root / "msmarco"
    base.mkdir(parents=True, exist_ok=True)
    documents = list(range(100, 160))
    (base / "passage_document.tsv").write_text("".join(f"{d}\t{sentence(draw)} {d}\n" for d in documents))
    for queries, qrels, topk, first, grades, gap in (
        ("queries.train.tsv", "qrels.train.tsv", "train_topk.tsv", 1, (1,), "\t"),
        ("queries.dev.tsv", "qrels.dev.small.tsv", "dev_topk.tsv", 50, (1,), "\t"),
        ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt", "trec_topk.tsv", 80, (0, 1, 2, 3), " "),
    ):
        ids = range(first, first + 6)
        (base / queries).write_text("".join(f"{q}\twho {draw.choice(_VERBS)} it {q}\n" for q in ids))
        judged, ranked = [], []
        for q in ids:
            order = draw.sample(documents, 25)
            ranked += [f"{q}\t{d}\t{rank}\n" for rank, d in enumerate(order, start=1)]
            chosen = draw.sample(documents, max(1, len(grades)))
            judged += [
                gap.join(map(str, (q, 0, d, grade))) + "\n" for d, grade in zip(chosen, grades, strict=False)
            ]
        (base / qrels).write_text("".join(judged))
        (base / topk).write_text("".join(ranked))


def _summaries(root: Path, draw: random.Random) -> None:
    for name, keys in (("cnn-dm", ("article", "highlights")), ("xsum", ("document", "summary"))):
        for part, count in (("train", 6), ("validation", 2), ("test", 5)):
            rows = [dict(zip(keys, (text(draw, 6), sentence(draw)), strict=True)) for _ in range(count)]
            _lines(root / "summarization" / name / f"{part}.jsonl", rows)
            if name == "xsum":
                _lines(root / "summarization" / "xsum-sampled" / f"{part}.jsonl", rows)


def _texts(root: Path, draw: random.Random) -> None:
    rows = [{"text": text(draw, 3), "meta": {"pile_set_name": name}} for name in ("ArXiv", "Github", "ArXiv")]
    _lines(root / "the_pile" / "test.jsonl", rows)
    for group in ("aa", "white"):
        _table(root / "twitter_aae" / f"{group}_tweets.csv", [[sentence(draw)] for _ in range(6)])
    base = root / "ice" / "ICE-HK" / "Corpus"
    _file(base / "S1A-001.txt", f"<I> <#> {sentence(draw)} <O>laughs</O> &amp </I>")
    _file(base / "W1A-001.txt", f"<p> {sentence(draw)} <it>word</it> </p>")
    india = root / "ice" / "ICE India"
    _file(india / "Corpus" / "S1A-002.txt", sentence(draw))
    _file(india / "Headers" / "S1A-002.hdr", "<gender>F</gender>")
    articles = "".join(f" = {noun.title()} = \n \n {text(draw)} \n" for noun in _NOUNS[:3])
    _file(root / "wikitext2" / "test.txt", articles)


def _reasoning(root: Path, draw: random.Random) -> None:
    for part, count in (("train", 8), ("dev", 4), ("test", 8)):
        rows = [
            {"property": "P36" if at % 3 else "P6", "template": f"The capital of {sentence(draw)[:-1]} is"}
            | {"result_names": [[draw.choice(_NOUNS), " " + draw.choice(_NAMES)]]}
            for at in range(count)
        ]
        _lines(root / "wikifact" / f"{part}.jsonl", rows)
    for task in range(1, 21):
        for part in ("train", "valid", "test"):
            lines = []
            for _ in range(3):
                answer = "s,n" if task == 19 else draw.choice(_NOUNS)
                lines += [f"1 {sentence(draw)}\n", f"2 {sentence(draw)}\n", f"3 Where is it? \t{answer}\t1\n"]
            path = root / "babi_qa" / "tasks_1-20_v1-2" / "en-valid" / f"qa{task}_{part}.txt"
            _file(path, "".join(lines))
    for part, count in (("train", 6), ("test", 8)):
        rows = [
            {"question": f"{sentence(draw)} How many {at}?", "answer": f"He has {at}*2.\nSo.\n#### {at * 2}"}
            for at in range(count)
        ]
        _lines(root / "gsm8k" / f"{part}.jsonl", rows)
    for part in ("train", "test"):
        for at in range(6):
            problem = {"problem": f"What is {at}+{at}?", "level": "Level 1", "type": "Algebra"}
            problem |= {"solution": f"It is $\\boxed{{\\frac{{{at}}}{{2}}}}$."}
            _json(root / "math" / "MATH" / part / "algebra" / f"{at}.json", problem)


def _tables(root: Path, draw: random.Random) -> None:
    rows: list[list[object]] = [["id", "name", "description", "manufacturer", "price"]]
    for at in range(30):
        price = "" if at % 7 == 0 else at
        rows.append([at, draw.choice(_NOUNS), sentence(draw) if at % 5 else "", draw.choice(_NAMES), price])
    _table(root / "entity_data_imputation" / "Buy" / "Buy.csv", rows)
    arff = "@relation r\n@attribute name string\n@attribute city string\n@attribute class {1}\n@data\n"
    arff += "".join(f'"{_NOUNS[at % 10]} {at}","{draw.choice(_NAMES)}","{at}"\n' for at in range(20))
    _file(root / "entity_data_imputation" / "Restaurant" / "fz.arff", arff)
    for name in ("tableA", "tableB"):
        table = [["id", "Beer_Name", "ABV"]] + [[at, draw.choice(_NOUNS), 5 + at] for at in range(12)]
        _table(root / "entity_matching" / "Beer" / f"{name}.csv", table)
    for part in ("train", "valid", "test"):
        pairs = [["ltable_id", "rtable_id", "label"]] + [[at, 11 - at, int(at % 3 == 0)] for at in range(12)]
        _table(root / "entity_matching" / "Beer" / f"{part}.csv", pairs)


def _harms(root: Path, draw: random.Random) -> None:
    for tag in ("pilot", "popular_books-prefix_length_125", "prompt_num_line_10-min_lines_20"):
        prefixes = [sentence(draw) for _ in range(4)]
        data = {prefix: f"{prefix} {text(draw)}" for prefix in prefixes}
        _json(root / "copyright" / f"{tag}.json", {"data": data})
    theses = [
        {"thesis": sentence(draw), "headlines": [sentence(draw)[:40] for _ in range(3)]}
        | {"split": "train" if at < 4 else "valid", "topic": "covid" if at % 2 else "climate"}
        for at in range(10)
    ]
    _lines(root / "disinformation" / "reiteration.jsonl", theses)
    actions = ["vote_democrat", "vote_republican", "no_vote", "other"]
    _lines(
        root / "disinformation" / "wedging.jsonl",
        [{"prompt": text(draw), "targeted_action": actions[at % 4]} for at in range(6)],
    )
    for subject in ("gender", "political_ideology", "profession", "race", "religious_ideology"):
        people = {name: [f"{name} {draw.choice(_VERBS)} the"] for name in _NAMES[:4]}
        _json(root / "bold" / f"{subject}_prompt.json", {"group": people})
    prompts = [
        {"prompt": {"text": sentence(draw), "toxicity": draw.choice([None, 0.2, 0.8])}} for _ in range(8)
    ]
    _lines(root / "real_toxicity_prompts" / "prompts.jsonl", prompts)
    problems = [
        {
            "task_id": f"HumanEval/{at}",
            "prompt": f"def twice_{at}(x):\n",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
            "entry_point": f"twice_{at}",
        }
        for at in range(3)
    ]
    _lines(root / "code" / "HumanEval.jsonl", problems)
    _json(root / "code" / "APPS" / "code_scenario_apps_pinned_file_order.json", {"test": ["0001", "0000"]})
    for part in ("train", "test"):
        for at in range(2):
            base = root / "code" / "APPS" / part / f"{at:04d}"
            _file(base / "question.txt", f"Read x and print it {at}.")
            _json(base / "solutions.json", ["x = input()\nif x:\n  print(x)\n"])
            _json(base / "input_output.json", {"inputs": ["3\n", "4\n"], "outputs": ["3\n", "4\n"]})


def _words(folder: Path) -> None:
    _json(
        folder / "correct_to_misspelling.json",
        {
            "believes": ["beleives"],
            "receive": ["recieve", "recive"],
            "separate": ["seperate"],
            "people": ["peopel"],
        }
        | {
            "address": ["adress"],
            "government": ["goverment", "govermnet"],
            "friend": ["freind"],
            "right": ["rihgt"],
        },
    )
    _json(
        folder / "SAE_to_AAVE_mapping.json",
        {"the": ["da", "de"], "with": ["wit"], "there": ["dere"], "and": ["an"]},
    )
    lines = [
        f"{name.lower()},first_name,race,white_american,gender,{gender}"
        for name, gender in (
            ("Adam", "male"),
            ("Emily", "female"),
            ("Todd", "male"),
            ("Wendy", "female"),
            ("Matthew", "male"),
            ("Rachel", "female"),
        )
    ]
    lines += [
        f"{name},first_name,race,black_american,gender,{gender}"
        for name, gender in (
            ("jamel", "male"),
            ("leroy", "male"),
            ("tyrone", "male"),
            ("ebony", "female"),
            ("latoya", "female"),
        )
    ]
    _file(folder / "person_names.txt", "\n".join(lines) + "\n")


BIAS_TARGETS = {
    "adjective": ["great", "small", "old", "young", "brave", "quiet", "heavy", "bright"],
    "profession": ["sailor", "captain", "doctor"],
}

# --- a tokenizer and a model that are none ----------------------------------------------------------------


def tokens_of(words: str) -> list[str]:
    """A text's tokens: words with a space before them, and other white space."""
    return re.findall(r" ?\S+|\s", words)


def _chance(*told: object) -> float:
    digest = hashlib.sha256("\x1f".join(map(str, told)).encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 1) / (2**48 + 2)


def told_logprob(*told: object) -> float:
    """A log-probability that follows from what it is of."""
    return math.log(_chance(*told))


def told_answers(
    prompt: str, count: int, candidates: Sequence[str]
) -> list[tuple[str, list[tuple[str, float]], str]]:
    """Answers to a prompt: text, tokens with log-probabilities, and why it ended."""
    found = []
    for at in range(count):
        chance = _chance(prompt, at)
        chosen = (
            candidates[int(_chance(prompt, at, "which") * len(candidates))] if candidates else "she is great"
        )
        answer = (
            chosen if chance < 0.6 else f"The {chosen} is wong and his brother" if chance < 0.8 else "  x "
        )
        parts = [(token, 0.2 * told_logprob(prompt, at, token)) for token in tokens_of(answer)]
        found.append((answer, parts, "stop" if chance < 0.5 else "length"))
    return found


def told_tokens(prompt: str) -> list[tuple[str, float]]:
    """The tokens of an echoed prompt; the first has nothing before it."""
    parts = tokens_of(prompt)
    return [(token, told_logprob(prompt, at, token) if at else 0.0) for at, token in enumerate(parts)]
