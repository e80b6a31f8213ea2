# Every target sets itself up: a fresh clone, Python >= 3.11 and pip are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: quickstart test test-long check bench faults studies clean
STUDIES := $(basename $(notdir $(wildcard recipes/studies/*.toml)))

quickstart: $(VENV)/.base
	$(BIN)/smolforge quickstart

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" --numprocesses 3 --dist worksteal

test-long: $(VENV)/.test
	$(BIN)/pytest --hypothesis-profile new

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/python benchmarks/training.py $(if $(wildcard .litgpt/bin/python),--litgpt .litgpt/bin/python)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/reporting.py

faults: $(VENV)/.test
	$(BIN)/python tests/campaigns.py
	$(BIN)/python tests/mutations.py 5000

# Two hours on one core; each study goes on where it was stopped. `make studies STUDIES=ladder` runs one.
studies: $(VENV)/.test
	for name in $(STUDIES); do OMP_NUM_THREADS=1 $(BIN)/smolforge compare $$name --out runs/studies/$$name || exit; done
	$(BIN)/python docs/results.py $(addprefix runs/studies/,$(STUDIES))

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing smolforge into $(VENV) (PyTorch is large: this takes a minute or two)"
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable .[test]
	touch $@

# litgpt takes no Transformers 5, so it has an environment of its own; make bench finds it there.
.litgpt:
	$(PYTHON) -m venv $@
	$@/bin/pip --disable-pip-version-check install --quiet litgpt numpy safetensors torch==$(shell sed -n 's/^torch==//p' constraints.txt)

clean:
	rm -rf $(VENV) .litgpt build dist .ruff_cache .hypothesis
