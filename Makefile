# `make run` and `make test` are each sufficient on a fresh machine with Python 3.11+, pip, make and a C compiler.
PYTHON := $(shell sh tools/find-python.sh $(PYTHON))
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := pyproject.toml setup.py $(shell find src -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.c')

.PHONY: run test soak bench lint clean

run: $(VENV)/.cli $(if $(findstring --plot,$(ARGS)),$(VENV)/.plot)
	$(BIN)/pagecore migrate $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

# Long random runs of source and destination against plain sets, then threads, then at least five million faults from
# eight threads, with discards, prefetches and duplicates; then every pair of writes around every dirty log, and RUNS
# migrations of the KVM guest in every mode over every log. SEED repeats a run.
SOAK ?= 1000
FAULTS ?= 5000000
RUNS ?= 20
SEED ?= $(shell date +%s)
soak: $(VENV)/.test
	@echo "SEED=$(SEED) SOAK=$(SOAK) FAULTS=$(FAULTS) RUNS=$(RUNS)"
	PAGECORE_SOAK=$(SOAK) PAGECORE_SOAK_FAULTS=$(FAULTS) PAGECORE_SOAK_MATRIX=$(RUNS) PAGECORE_STRESS_SEED=$(SEED) \
	PAGECORE_STRESS_SECONDS=$(shell expr $(SOAK) / 100 + 1) \
	$(BIN)/python -m pytest -s --timeout=7200 -o faulthandler_timeout=0 --hypothesis-seed=$(SEED) \
	tests/test_tracker_machine.py tests/test_tracker_model.py tests/test_tracker_threads.py \
	tests/test_placement_soak.py tests/test_lost_writes.py tests/test_migrate_matrix.py $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/cython-lint --no-pycodestyle src tests
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest pagecore --allowlist tools/stubtest-allowlist.txt

# The environment, the build tools, then the package itself, and what its extras want. Editable: an edit of a .py file needs
# nothing, an edit of a native file rebuilds what depends on it. Built once for all of the extras: each build is a whole one.
$(VENV)/.tools:
	@sh tools/ensure-system.sh $(PYTHON)
	@echo "making $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools>=80" "cython>=3.2,<4"
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	@echo "building pagecore in $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.cli $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.built
	@echo "installing pagecore[$*] in $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check "pagecore[$*]"
	@touch $@

# Drawing takes more than all the rest: only for whoever asks for a picture.
$(VENV)/.plot: $(VENV)/.cli
	@echo "installing what --plot needs in $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check "pagecore[plot]"
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
	find src -name '*.so' -delete
