"""The text of explain() and compare(), to the letter."""

import pytest

from capstan.plans import Alternative, Choice, Phase, Plan, Trace, Traffic, compare, explain

PLAN = Plan(
    system="generation",
    title="opt-1.3b, 4 x 16 prompts",
    machine="atlas",
    phases=(
        Phase(
            name="prefill",
            seconds=2.0,
            busy_s={"host->device": 1.5, "device compute": 0.5},
            traffic=Traffic({("host->device", "weights"): 3 * 2**30, ("host->device", "cache"): 2**29}),
            counts={"tokens": 512},
        ),
        Phase(
            name="decode",
            seconds=90.0,
            busy_s={"device->host": 0.0455, "host->device": 80.0},
            traffic=Traffic({("host->device", "weights"): 2**31, ("device->host", "cache"): 1500}),
            counts={"tokens": 2048},
        ),
    ),
    choices=(
        Choice(name="weights", value="20% device, 80% host", reason="the device has room for no more"),
        Choice(name="codec", value="identity"),
    ),
    peak_bytes={"device": 1000, "host": 5 * 2**30},
    budget_bytes={"device": 8 * 2**30, "host": 6 * 2**30, "disk": 0},
)
TRACE = Trace(
    system="generation",
    title="opt-1.3b, measured",
    machine="borealis",
    phases=(
        Phase(
            name="prefill",
            seconds=2.5,
            busy_s={"host->device": 1.5, "disk->host": 0.25},
            traffic=Traffic({("host->device", "weights"): 7 * 2**29, ("disk->host", "weights"): 12}),
        ),
        Phase(
            name="decode",
            seconds=45.0,
            busy_s={"device->host": 0.091, "host->device": 40.0},
            traffic=Traffic({("host->device", "weights"): 2**30, ("device->host", "cache"): 1500}),
        ),
    ),
    peak_bytes={"device": 900, "host": 4 * 2**30},
    notes=("one run", "the disk was busy"),
)

EXPLAINED = """\
generation on atlas · opt-1.3b, 4 x 16 prompts
choice    value                  because
────────────────────────────────────────────────────────────────
weights   20% device, 80% host   the device has room for no more
codec     identity
phase     resource                         bytes    predicted   share
─────────────────────────────────────────────────────────────────────────────────
prefill   wall time  (256.0 tokens/s)                  2.00 s
          device compute                            500.00 ms   25%
          host->device                  3.50 GiB       1.50 s   75% <- bottleneck
decode    wall time  (22.8 tokens/s)               1 min 30 s
          device->host                  1.46 KiB     45.50 ms   0%
          host->device                  2.00 GiB   1 min 20 s   89% <- bottleneck
memory    granted   predicted peak
──────────────────────────────────
device   8.00 GiB           1000 B
disk          0 B                -
host     6.00 GiB         5.00 GiB
"""
COMPARED = """\
generation on borealis · opt-1.3b, measured
phase     resource                       bytes    predicted    measured   ratio
───────────────────────────────────────────────────────────────────────────────
prefill   wall time                                  2.00 s      2.50 s    1.25
          device compute                          500.00 ms     0.00 ms    0.00
          disk->host                0 B / 12 B      0.00 ms   250.00 ms
          host->device                3.50 GiB       1.50 s      1.50 s    1.00
decode    wall time                              1 min 30 s     45.00 s    0.50
          device->host                1.46 KiB     45.50 ms    91.00 ms    2.00
          host->device     2.00 GiB / 1.00 GiB   1 min 20 s     40.00 s    0.50
memory    granted   predicted peak   measured peak
──────────────────────────────────────────────────
device   8.00 GiB           1000 B           900 B
disk          0 B                -               -
host     6.00 GiB         5.00 GiB        4.00 GiB
note: one run
note: the disk was busy
"""


def _plain(title: str, **rest) -> Plan:
    return Plan(system="generation", title=title, machine="atlas", **rest)


def test_explain_prints_this_text():
    assert explain(PLAN) == EXPLAINED


def test_compare_prints_this_text():
    assert compare(PLAN, TRACE) == COMPARED


@pytest.mark.parametrize("name", ["COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_the_text_does_not_depend_on_the_terminal(monkeypatch, name):
    monkeypatch.setenv(name, "20")
    assert explain(PLAN) == EXPLAINED


def test_the_text_is_returned_in_a_notebook_too(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert explain(PLAN) == EXPLAINED


def test_a_long_reason_is_wrapped_and_not_cut():
    words = [f"reason{number}" for number in range(60)]
    text = explain(_plain("tiny", choices=(Choice(name="codec", value="identity", reason=" ".join(words)),)))
    assert [word for word in text.split() if word.startswith("reason")] == words
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("title", ["stage [last]", "cut at [/]", "shards a:b:c", "a :smile: ends it"])
def test_names_are_printed_as_they_are_and_not_read_as_markup(title):
    plan = _plain(title, choices=(Choice(name=title, value="identity"),))
    trace = Trace(system="generation", title="t", machine="atlas", notes=(title,))
    assert f"generation on atlas · {title}\n" in explain(plan)
    assert f"\n{title}   identity\n" in explain(plan)
    assert f"\nnote: {title}\n" in compare(plan, trace)


def test_a_phase_without_tokens_says_nothing_about_tokens():
    assert "tokens/s" not in explain(_plain("tiny", phases=(Phase(name="load weights", seconds=0.5),)))


def test_a_phase_of_no_duration_has_neither_speed_nor_share():
    text = explain(
        _plain(
            "tiny", phases=(Phase(name="nothing", seconds=0.0, busy_s={"host": 0.0}, counts={"tokens": 3}),)
        )
    )
    assert "tokens/s" not in text
    assert "%" not in text


def test_compare_leaves_out_phases_that_were_not_run():
    prefill_only = Trace(system="generation", title="t", machine="atlas", phases=TRACE.phases[:1])
    text = compare(PLAN, prefill_only)
    assert "prefill" in text
    assert "decode" not in text


def test_a_ratio_to_a_prediction_of_zero_is_left_out():
    plan = _plain("tiny", phases=(Phase(name="decode", seconds=0.0),))
    trace = Trace(
        system="generation", title="t", machine="atlas", phases=(Phase(name="decode", seconds=2.0),)
    )
    (line,) = [line for line in compare(plan, trace).splitlines() if line.startswith("decode")]
    assert line.split() == ["decode", "wall", "time", "0.00", "ms", "2.00", "s"]


def test_explain_says_what_binds_and_what_else_was_weighed():
    plan = _plain(
        "tiny",
        bound="the link to Tokyo",
        alternatives=(Alternative(name="contiguous", seconds=2.5, reason="data parallel crosses regions"),),
    )
    text = explain(plan)
    assert "bound: the link to Tokyo\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("contiguous")]
    assert line.split(maxsplit=3) == ["contiguous", "2.50", "s", "data parallel crosses regions"]


def test_speeds_are_told_in_what_was_counted():
    phase = Phase(name="epoch", seconds=2.0, counts={"rows": 300, "samples": 10, "tokens": 0})
    assert "epoch   wall time  (150.0 rows/s, 5.0 samples/s)" in explain(_plain("tiny", phases=(phase,)))


def test_compare_shows_a_phase_that_nobody_planned():
    trace = Trace(
        system="generation", title="t", machine="atlas", phases=(Phase(name="repair", seconds=2.0),)
    )
    (line,) = [line for line in compare(_plain("tiny"), trace).splitlines() if line.startswith("repair")]
    assert line.split() == ["repair", "wall", "time", "0.00", "ms", "2.00", "s"]
