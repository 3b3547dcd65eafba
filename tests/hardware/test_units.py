import pytest

from capstan.hardware.units import gb_per_s, gib, short_time, tflop_per_s


def test_memory_is_binary_and_rates_are_decimal() -> None:
    assert gib(2**30) == "1.00 GiB"
    assert gb_per_s(1e9) == "1.00 GB/s"


def test_slow_rates_keep_their_digits() -> None:
    assert gb_per_s(45e6) == "45 MB/s"
    assert tflop_per_s(790e12) == "790.00 TFLOP/s"
    assert tflop_per_s(2.5e9) == "2.5 GFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (2.5, "2.5 s"), (0.067, "67 ms"), (8e-6, "8 us"), (3e-9, "3 ns")]
)
def test_times_choose_their_unit(seconds: float, text: str) -> None:
    assert short_time(seconds) == text
