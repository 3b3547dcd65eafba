"""Ways to write a key. Functions of one group compute the same in the same steps; groups differ."""

import datetime
import functools
import operator
import re
import time
from collections import namedtuple
from dataclasses import dataclass
from datetime import date
from re import match as match_start

from capstan.partitioning import read_key


@dataclass
class Order:
    okey: int
    url: str
    day: date

    def site(self):
        return self.url.split("/")[2].lower()

    @property
    def hour(self):
        return self.okey // 3600

    def bucket(self, size=10):
        return self.okey // size

    @staticmethod
    def fold(text):
        return text.casefold()

    def folded(self):
        return self.fold(self.url)


Line = namedtuple("Line", "okey url")


def site_of(row):
    return row["url"].split("/")[2].lower()


def site_in_steps(line):
    """Names and steps differ, the computation does not."""
    url = line["url"]
    parts = url.split("/")
    host = parts[2]
    return host.lower()


def lower_host(url):
    return url.split("/")[2].lower()


def site_through_a_function(row):
    return lower_host(row["url"])


def known_or_other(row):
    if row["a"] is None:
        return row["b"]
    return row["a"]


def known_or_other_else(row):
    absent = row["a"] is None
    if absent:
        key = row["b"]
        return key  # noqa: RET504 - a name more, on purpose
    else:  # noqa: RET505
        pass
    return row["a"]


def seconds_in(hours):
    return lambda row: row["time"] // (hours * 3600)


def by(row, *, step):
    return row["okey"] // step


# Group name -> functions of that group.
FORMS = {
    "item": [lambda o: o["okey"], lambda line: line["okey"], operator.itemgetter("okey"), "okey"],
    "attribute": [lambda o: o.okey, operator.attrgetter("okey")],
    "other item": [lambda o: o["pkey"]],
    "number item": [lambda o: o[0], operator.itemgetter(0)],
    "get": [lambda o: o.get("okey")],
    "get or": [lambda o: o.get("okey", 0)],
    "nested items": [lambda o: o["user"]["id"]],
    "nested attributes": [lambda o: o.user.id, operator.attrgetter("user.id")],
    "two items": [lambda o: (o["a"], o["b"]), operator.itemgetter("a", "b")],
    "chain": [
        lambda o: o["url"].split("/")[2].lower(),
        site_of,
        site_in_steps,
        site_through_a_function,
        lambda o: lower_host(o["url"]),
    ],
    "strip": [lambda o: o["name"].strip().lower()],
    "prefix": [lambda o: o["zip"][:3], lambda o: o["zip"][0:3]],
    "suffix": [lambda o: o["zip"][-3:]],
    "hour": [lambda o: o["time"] // 3600, seconds_in(1), lambda o: o["time"] // (60 * 60)],
    "two hours": [seconds_in(2)],
    "modulo": [lambda o: o["okey"] % 16],
    "arithmetic": [lambda o: o["a"] * 1000 + o["b"]],
    "float": [lambda o: round(o["lat"], 1)],
    "text": [lambda o: str(o["okey"])],
    "number": [lambda o: int(o["okey"])],
    "f-string": [lambda o: f"{o['a']}-{o['b']}"],
    "f-string with width": [lambda o: f"{o['a']:04d}-{o['b']}"],
    "concatenation": [lambda o: o["a"] + "-" + o["b"]],
    "equal": [lambda o: o["a"] == o["b"], lambda o: o["b"] == o["a"]],
    "less": [lambda o: o["a"] < 5, lambda o: o["a"] < 5],
    "either": [lambda o: o["a"] or o["b"]],
    "conditional": [
        lambda o: o["a"] if o["a"] is not None else o["b"],
        lambda o: o["b"] if o["a"] is None else o["a"],
        known_or_other,
        known_or_other_else,
    ],
    "member of": [lambda o: o["kind"] in ("a", "b")],
    "regex": [
        lambda o: re.match(r"(\w+)@", o["mail"]).group(1),
        lambda o: match_start(r"(\w+)@", o["mail"]).group(1),
    ],
    "regex removal": [lambda o: re.sub(r"\D", "", o["phone"])],
    "year": [lambda o: o["day"].year],
    "year and month": [lambda o: (o["day"].year, o["day"].month)],
    "weekday": [lambda o: o["day"].weekday()],
    "day of time": [lambda o: o["at"].date()],
    "month as text": [lambda o: o["day"].strftime("%Y-%m")],
    "date from text": [
        lambda o: datetime.date.fromisoformat(o["day"]).year,
        lambda o: date.fromisoformat(o["day"]).year,
    ],
    "length": [lambda o: len(o["name"])],
    "words": [lambda o: o["name"].split(" ")[0]],
    "line of text": [lambda line: line.split(",")[1]],
    "partial": [functools.partial(by, step=100), lambda o: o["okey"] // 100],
    "bits": [lambda o: o["okey"] >> 8 & 255],
    "one of a set": [lambda o: o["kind"] in {"a", "b"}, lambda o: o["kind"] in {"b", "a"}],
    "table of names": [lambda o: {"a": 1, "b": 2}.get(o["kind"], 0)],
    "format": [lambda o: "{}-{}".format(o["a"], o["b"])],
    "percent": [lambda o: "%s-%s" % (o["a"], o["b"])],  # noqa: UP031
    "negated": [lambda o: -o["okey"]],
    "default": [lambda o, size=7: o["okey"] // size],
}

# Of a dataclass whose methods and properties are read through.
CLASS_FORMS = {
    "method": [lambda o: o.site(), Order.site, lambda o: o.url.split("/")[2].lower()],
    "property": [lambda o: o.hour, Order.hour, lambda o: o.okey // 3600],
    "method with default": [lambda o: o.bucket(), lambda o: o.okey // 10],
    "method with argument": [lambda o: o.bucket(5), lambda o: o.bucket(size=5), lambda o: o.okey // 5],
    "static method": [lambda o: o.folded(), lambda o: o.url.casefold()],
    "field": [lambda o: o.okey],
    "conditional method": [lambda o: o.site() if o.url else None],
}

# Pairs that look alike and are not the same.
LOOK_ALIKES = [
    (lambda o: o["a"], lambda o: o.a),
    (lambda o: o["a"], lambda o: o.get("a")),
    (lambda o: o["a"], lambda o: o["A"]),
    (lambda o: o[0], lambda o: o["0"]),
    (lambda o: o[1], lambda o: o[True]),
    (lambda o: o["a"] // 3600, lambda o: o["a"] / 3600),
    (lambda o: o["a"] // 3600, lambda o: o["a"] // 3600.0),
    (lambda o: o["a"] // 3600, lambda o: o["a"] // 360),
    (lambda o: o["a"] - o["b"], lambda o: o["b"] - o["a"]),
    (lambda o: o["a"] + o["b"], lambda o: o["b"] + o["a"]),
    (lambda o: (o["a"], o["b"]), lambda o: (o["b"], o["a"])),
    (lambda o: (o["a"], o["b"]), lambda o: [o["a"], o["b"]]),
    (lambda o: ((o["a"], o["b"]), o["c"]), lambda o: (o["a"], (o["b"], o["c"]))),
    (lambda o: o["a"] < o["b"], lambda o: o["a"] <= o["b"]),
    (lambda o: o["a"] < o["b"], lambda o: o["b"] < o["a"]),
    (lambda o: o["a"] == o["b"], lambda o: o["a"] != o["b"]),
    (lambda o: o["a"] == o["b"], lambda o: o["a"] is o["b"]),
    (lambda o: o["a"] and o["b"], lambda o: o["b"] and o["a"]),
    (lambda o: o["a"] or o["b"], lambda o: o["a"] and o["b"]),
    (lambda o: o["a"] or o["b"], lambda o: o["a"] if o["a"] is not None else o["b"]),
    (lambda o: o["s"].lower(), lambda o: o["s"].upper()),
    (lambda o: o["s"].lower(), lambda o: o["s"].casefold()),
    (lambda o: o["s"].lower, lambda o: o["s"].lower()),
    (lambda o: o["s"].split("/")[2], lambda o: o["s"].split("/")[-2]),
    (lambda o: o["s"].split("/")[0], lambda o: o["s"].split("/", 1)[0]),
    (lambda o: o["s"].split("/", maxsplit=1)[0], lambda o: o["s"].split("/", maxsplit=2)[0]),
    (lambda o: o["s"].split(" "), lambda o: o["s"].split()),
    (lambda o: o["s"][:3], lambda o: o["s"][3:]),
    (lambda o: o["s"][:3], lambda o: o["s"][3]),
    (lambda o: o["s"][::2], lambda o: o["s"][:2]),
    (lambda o: f"{o['a']}-{o['b']}", lambda o: f"{o['a']}{o['b']}"),
    (lambda o: f"{o['a']}", lambda o: f"{o['a']!r}"),
    (lambda o: f"{o['a']:>4}", lambda o: f"{o['a']:<4}"),
    (lambda o: re.match("a", o["s"]).group(0), lambda o: re.search("a", o["s"]).group(0)),
    (lambda o: re.match("a", o["s"]).group(0), lambda o: re.match("a", o["s"], re.I).group(0)),
    (lambda o: re.match("(a)(b)", o["s"]).group(1), lambda o: re.match("(a)(b)", o["s"]).group(2)),
    (lambda o: o["d"].year, lambda o: o["d"].month),
    (lambda o: o["d"].weekday(), lambda o: o["d"].isoweekday()),
    (lambda o: int(o["a"]), lambda o: round(o["a"])),
    (lambda o: str(o["a"]), lambda o: o["a"]),
    (lambda o: o["a"] if o["c"] else o["b"], lambda o: o["b"] if o["c"] else o["a"]),
    (lambda o: o["a"] in ("x", "y"), lambda o: o["a"] not in ("x", "y")),
    (lambda o: o["a"] + 0.0, lambda o: o["a"] + -0.0),
    (lambda o: o["a"] == "1", lambda o: o["a"] == 1),
    (lambda o: not o["a"], lambda o: o["a"]),
    (lambda o: -o["a"], lambda o: ~o["a"]),
    (lambda o: o["a"] % 4, lambda o: o["a"] & 4),
    (lambda o: 2 ** o["a"], lambda o: o["a"] ** 2),
    (lambda o: o["a"] in {"x", "y"}, lambda o: o["a"] in {"x", "z"}),
    (lambda o: {"a": 1}.get(o["a"]), lambda o: {"a": 2}.get(o["a"])),
    (lambda o: o["a"]["b"], lambda o: o["b"]["a"]),
    (lambda o: o["ab"]["c"], lambda o: o["a"]["bc"]),
]

STATE = {"offset": 1}
LAUNCH = datetime.datetime(2020, 1, 1)
DIGITS = re.compile(r"\d+")
OFFSET = 1
SEEN = []


def counts_rows(row):
    SEEN.append(row)
    return row["a"]


def changes_row(row):
    row["a"] = 1
    return row["a"]


def sets_a_global(row):
    global OFFSET
    OFFSET = row["a"]
    return OFFSET


def loops(row):
    total = 0
    for each in row["parts"]:
        total = total + each
    return total


def catches(row):
    try:
        return row["a"]
    except KeyError:
        return row["b"]


# What no term may stand for: (function, whether its code says all there is to know about it).
OPAQUE = {
    "global number": (lambda o: o["a"] + OFFSET, True),
    "global dict": (lambda o: o["a"] + STATE["offset"], False),
    "global pattern": (lambda o: DIGITS.match(o["s"]).group(0), True),
    "global date": (lambda o: (o["a"], LAUNCH.date()), False),
    "clock": (lambda o: (o["a"], time.time()), False),
    "salted hash": (lambda o: hash(o["a"]), False),
    "output": (lambda o: print(o["a"]), False),
    "unknown method": (lambda o: o.site(), False),
    "pops": (lambda o: o["parts"].pop(), False),
    "appends": (lambda o: o["parts"].append(1), True),
    "keeps rows": (counts_rows, False),
    "changes its row": (changes_row, True),
    "sets a global": (sets_a_global, False),
    "loop": (loops, True),
    "exception": (catches, True),
    "comprehension": (lambda o: tuple(each for each in o["parts"]), True),
    "class of the row": (lambda o: type(o).__name__, False),
    "its own class": (lambda o: o.__class__, True),
    "C function": (time.ctime, False),
}

ALL = [(group, each) for group, functions in FORMS.items() for each in functions]
IDENTITIES = {group: {read_key(each).identity for each in functions} for group, functions in FORMS.items()}
