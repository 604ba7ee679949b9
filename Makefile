# Two commands do everything, set-up included:  make train  |  make test
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: setup train test faults long hosts monitoring check bench format clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and f"Python 3.11 or 3.12 is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test]'
	touch $@

setup: $(VENV)/.test

train: $(VENV)/.base
	$(BIN)/distributed-muzero train --preset cartpole

test: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --dist loadfile -m "not cluster and not faults and not long"
	$(BIN)/python -m pytest -m "cluster and not faults and not long"

faults: $(VENV)/.test
	$(BIN)/python -m pytest -m faults

long: $(VENV)/.test
	$(BIN)/python -m pytest -m "long and not faults"

# Three hosts out of namespaces, ray up to ray down: needs root, sshd, rsync, iproute2
hosts: $(VENV)/.test
	$(BIN)/python -m tests.cluster.real_hosts

# Prometheus, and Grafana where it is installed, for the runs in `runs` (or RUNS=…), until Ctrl-C
monitoring:
	@deploy/local-monitoring/start.sh $(RUNS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

bench: $(VENV)/.test
	$(BIN)/distributed-muzero bench search

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
