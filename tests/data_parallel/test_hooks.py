"""The DDP hook does what wrap does: it goes on from a saved state, and knows which ranks share a machine."""

from pathlib import Path

FILE = str(Path(__file__).with_name("hook_cases.py"))
NAMES = ["gradient_allreduce", "bytegrad", "onebit", "topk", "powersgd"]


def test_a_hooks_state_is_loaded_and_goes_on_exactly(in_world):
    for found in in_world(FILE, "resumed", 2, NAMES):
        for name in NAMES:
            whole, halves = found[name]
            assert halves == whole, name


def test_a_hook_that_goes_by_machines_sends_what_wrap_sends(in_world):
    found = in_world(FILE, "by_machine", 4)
    for each in found:
        assert each["hook"] == each["wrap"]
    # Both ways between two machines, in signs: about a bit an element, where float32 has 32.
    assert 0 < sum(each["hook"] for each in found) < 4 * 10_000 * 2 / 8
