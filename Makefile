# `make test` and `make demo` each work alone on a fresh clone. Nothing outside .venv is changed.
#   make test PARITY=folder    also compare with reference tensors
#   make test WORKERS=0        in one process, for a debugger
#   make demo DATA=folder      train on your own clips
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi)
comma := ,
EXTRAS := test,dev,train,models,video,metrics,bench$(if $(GPU),,$(comma)triton)
# Where the CPU build of torch comes from on a machine without a GPU; PyPI's own needs gigabytes.
TORCH_INDEX ?= $(if $(GPU),,https://download.pytorch.org/whl/cpu)
# One thread for each: together they keep every core busy.
WORKERS ?= auto
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: install test demo lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) -r constraints.txt
	$(PIP) install -r constraints.txt
	$(PIP) install -c constraints.txt "setuptools>=77" wheel ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(PIP) install --no-deps lpips
	$(BIN)/python .ci/check_install.py
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=worksteal \
	  $(if $(PARITY),--parity-dir=$(PARITY)) $(ARGS)

demo: install
	$(BIN)/python -m fastvid demo $(if $(DATA),--data $(DATA)) $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fastvid

bench: install
	$(BIN)/python -m benchmarks kernels $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_shared/*.so
