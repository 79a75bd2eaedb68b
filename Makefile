# Every target sets up what it needs: `make demo` and `make test` work on a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo demo-dense test slow check lowest wheel format gpu bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(VENV)/.dev  ## Make the virtual environment with everything in it

# The file .EXTRA says that this extra is installed; dev has the others in it. Gigabytes are fetched: pip shows how far.
$(VENV)/.train $(VENV)/.dense $(VENV)/.dev: $(VENV)/.%: $(VENV)/.venv pyproject.toml setup.py
	$(BIN)/python -m pip install $(if $(LOWEST),--constraint $(VENV)/lowest.txt) --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(VENV)/.train $(VENV)/.dense)

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "visionattn needs Python 3.11 or newer, this is %s; name another one: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(LOWEST),$(PYTHON) .ci/lowest.py > $(VENV)/lowest.txt)
	@touch $@

demo: $(VENV)/.train  ## Train a small VAN on handwritten digits, draw what it learned
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m visionattn.train.demo

demo-dense: $(VENV)/.dense  ## Train a small VAN to segment and one to detect digits on photographs, draw what they find
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m visionattn.train.demo_dense

test: install  ## Run the default test suite
	$(PYTEST)

slow: install  ## Run the tests that take minutes
	$(PYTEST) -m slow

check: install  ## Lint, check the formatting, run the default tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

lowest: PYTHON = python3.12
lowest:  ## Run the default tests with the oldest versions that pyproject.toml allows (Python 3.12, or PYTHON=)
	$(MAKE) test VENV=.venv-lowest LOWEST=1 PYTHON=$(PYTHON)

wheel:  ## Build the package into dist/, install it in an environment of its own and try it there
	PYTHON=$(PYTHON) .ci/wheel

format: install  ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu:  ## GPU tests and benchmark with the Python that is there: nothing is installed
	@status=0; $(PYTHON) -m pytest -m gpu tests || status=1; \
	$(PYTHON) -m visionattn.benchmark gpu --out docs/benchmarks || status=1; exit $$status

bench: install  ## VAN on this machine's CPU beside its plain composition
	$(BIN)/python -m visionattn.benchmark models van_b0 van_b2

clean:  ## Remove the environments and what runs left behind
	rm -rf $(VENV) .venv-lowest build dist *.egg-info runs .pytest_cache .ruff_cache
