"""`make test ROOM=generation` runs the tests of generation and of what it stands on."""

import subprocess
import sys

import rooms


def test_a_room_stands_on_every_package_that_it_imports_however_indirectly() -> None:
    floors = {"errors", "hardware", "plans", "codecs", "storage", "transport"}
    assert floors <= rooms.stands_on("generation")
    assert "data_parallel" not in rooms.stands_on("generation")
    assert {"generation", "data_parallel", "evaluation"} < rooms.stands_on("cli")
    assert rooms.stands_on("errors") == {"errors"}


def test_a_room_that_is_not_there_is_refused_and_nothing_is_everything() -> None:
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, rooms.__file__, *words], capture_output=True, text=True, check=False
        )

    refused = ran("generatoin")
    assert refused.returncode == 1
    assert refused.stderr.startswith("There is no room 'generatoin'. There are: ")
    assert ", generation, " in refused.stderr
    assert (ran().returncode, ran().stdout) == (0, "")
    assert ran("plans").stdout.split()[0] == "tests/plans"
