"""A message says what it is; what is not the wanted one is refused."""

import pytest
import torch

from capstan.errors import InputError
from capstan.transport.message import HEADER_BYTES, Header, check_header, read_header, write_header

HEADER = Header(source=3, sequence=70_000, step=2, payload_bytes=5, due_ns=123)


def message() -> torch.Tensor:
    made = torch.zeros(HEADER_BYTES + 5, dtype=torch.uint8)
    write_header(made, HEADER)
    return made


def test_a_header_comes_back():
    assert read_header(message()) == HEADER


def test_when_it_is_due_is_not_part_of_what_it_is():
    assert check_header(message(), HEADER._replace(due_ns=0), about="bucket 1").due_ns == 123


@pytest.mark.parametrize("field", ["source", "sequence", "step", "payload_bytes"])
def test_another_message_than_the_wanted_one_is_refused(field):
    wanted = HEADER._replace(**{field: getattr(HEADER, field) + 1})
    with pytest.raises(InputError, match="bucket 1.*same order"):
        check_header(message(), wanted, about="bucket 1")


@pytest.mark.parametrize("place", [0, 4])
def test_what_is_no_message_of_this_version_is_refused(place):
    made = message()
    made[place] += 1
    with pytest.raises(InputError, match="begins with"):
        read_header(made)
