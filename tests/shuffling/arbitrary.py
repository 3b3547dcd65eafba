"""Random orders for the tests of this room."""

from hypothesis import strategies as st

from capstan.shuffling.order import STRATEGIES, Order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Up to 24 blocks of up to 9 rows, empty ones among them, in up to 12 streams."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=24).filter(any))
    return Order(
        sizes=tuple(sizes),
        seed=draw(st.integers(0, 2**64)),
        epoch=draw(st.integers(0, 3)),
        strategy=draw(st.sampled_from(sorted(STRATEGIES))),
        buffer_blocks=draw(st.integers(1, 30)),
        num_streams=draw(st.integers(1, 12)),
    )
