# Every target does its own set-up: a machine with make and Python 3.11 or newer is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# tritonserver and its Python backend need numpy<2
TRITON_VENV := .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.installed
JOBS ?= auto

.PHONY: help setup demo test soak lint format clean

help:
	@echo "make demo    lower a small exported DeepSeek-V3 and generate with it"
	@echo "make test    run the tests"
	@echo "make soak    64 clients of a tritonserver for two minutes"
	@echo "make lint    ruff and mypy"
	@echo "make setup   only create .venv and .venv-triton and install into them (PYTHON=python3.12 chooses another Python)"
	@echo "make clean   remove .venv, .venv-triton and everything that was built"

setup: $(STAMP) $(TRITON_STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed; set PYTHON=, as in: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks venv and ensurepip; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev,kernels]'
	@touch $@

# The tests of Triton skip without it, with pip's reason.
$(TRITON_STAMP): pyproject.toml | $(STAMP)
	$(PYTHON) -m venv --clear $(TRITON_VENV)
	-$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[triton]' 2>$(TRITON_VENV)/error.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m mla_trt.demo

test: $(STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

soak: $(STAMP) $(TRITON_STAMP)
	MLA_TRT_SOAK_SECONDS=120 $(BIN)/python -m pytest -n 0 -q tests/test_soak.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(TRITON_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
