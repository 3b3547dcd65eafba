"""An error of the background is raised once, and never lost."""

import sys
from threading import Thread

import pytest

from capstan.transport.failure import FirstFailure


def test_the_first_error_is_raised_once():
    failure = FirstFailure()
    failure.check()
    failure.keep(KeyError("first"))
    failure.keep(KeyError("second"))
    with pytest.raises(KeyError, match="first"):
        failure.check()
    failure.check()


def test_an_error_that_comes_while_somebody_looks_is_not_lost():
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            failure, raised = FirstFailure(), 0
            keeping = Thread(target=failure.keep, args=(KeyError(),))
            keeping.start()
            while keeping.is_alive():
                try:
                    failure.check()
                except KeyError:
                    raised += 1
            try:
                failure.check()
            except KeyError:
                raised += 1
            assert raised == 1
    finally:
        sys.setswitchinterval(interval_s)
