# Each target sets everything up by itself: a .venv from the pinned lock file, then its own work.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# In the .venv that is made here byte code is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all check format bench clean

help:
	@echo "make demo      the miniature, end to end, with a picture"
	@echo "make test      the tests, on a CPU, without network, in minutes"
	@echo "make test-all  the slow ones too"
	@echo "make check     format, lint, types, spelling, tests: what CI runs"
	@echo "make bench     every benchmark, one JSON line each"

$(READY): requirements.lock pyproject.toml
	@echo "setting up $(VENV) from requirements.lock"
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "fewstep needs Python 3.11, 3.12 or 3.13; run: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first and alone: what follows then keeps this build. On Linux the default one brings CUDA (gigabytes); set
	@# PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, or PIP_FIND_LINKS to a folder with one, to spare them.
	@# Nothing is compiled ahead: of 11,000 files some 2,500 are ever imported, and Python compiles those when they are.
	$(INSTALL) --no-compile "$$(grep '^torch==' requirements.lock)"
	$(INSTALL) --no-compile -r requirements.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/fewstep demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --hypothesis-profile default

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(MAKE) test
	FEWSTEP_HOSTILE=2000 $(BIN)/python -m pytest -m slow tests/hostile/test_hostile.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	@for file in benchmarks/*.py; do $(BIN)/python $$file | tail -n 1; done

clean:
	rm -rf $(VENV) checkpoints demo build *.egg-info
