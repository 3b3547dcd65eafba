# The two commands a newcomer needs are `make demo` and `make test`; both set everything up first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow test-network lint fix bench bench-check clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Capstan needs Python 3.11 or newer; '$(PYTHON)' is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/capstan demo

# Two at a time; a file's tests share what they made, so they stay together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# All default tests, or those of one room and of what it stands on: make test ROOM=generation
test: $(READY)
	folders=$$($(BIN)/python tests/rooms.py $(ROOM)) && $(PYTEST) $$folders

test-slow: $(READY)
	$(PYTEST) -m slow

# Needs root.
test-network: $(READY)
	$(BIN)/python -m pytest -m network

lint: $(READY)
	$(BIN)/ruff check --no-cache . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

fix: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/generation/throughput.py --model opt-125m --device-memory 400MiB --host-memory 1GiB --sequences 8 --prompt 64 --new 8

bench-check: $(READY)
	$(BIN)/python benchmarks/check_records.py

clean:
	rm -rf $(VENV) demo build dist
