"""What tests have forked processes do as programs; see world.py, whose parent imports this file once."""

import runpy
import sys

import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import capstan.evaluation.transformers_model
import capstan.generation.batch.job
from capstan.cli import main

_kept: list[object] = []


def capstan(*words: str) -> None:
    """The command line, as the installed command calls it."""
    sys.exit(main(list(words)))


def script(path: str) -> None:
    """A Python script, as `python path` runs it."""
    sys.argv = [path]
    # The names are kept: a DDP model that is dropped before the process ends can wait for ever for a thread
    # of gloo's that waits for Python.
    _kept.append(runpy.run_path(path, run_name="__main__"))
