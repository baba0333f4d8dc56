PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
BIN := .venv/bin

.PHONY: help demo lint test test-fast coverage soak docs clean
help:
	@echo "make demo       train, quantize and score a small model on this machine's CPU, in about four minutes"
	@echo "make lint       check form, names, types and docstrings"
	@echo "make test       run the tests, in a few minutes"
	@echo "make test-fast  run those that need less than 40 seconds together"
	@echo "make coverage   run the tests and say which lines of train_gpt.py they ran"
	@echo "make soak       kill and resume sixty runs, audit forty honest ones, in about half an hour"
	@echo "make docs       renew the generated parts of README.md and docs/"
	@echo "make clean      remove .venv and the demo data"

.venv/ready: requirements.txt
	@echo "== making .venv and installing requirements.txt (PyTorch is large: minutes on a slow connection)"
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "needs Python 3.11 or newer with venv; name another one by PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/ready-tools: .venv/ready tools/requirements.txt
	@echo "== installing tools/requirements.txt"
	$(BIN)/pip install --disable-pip-version-check -q -r tools/requirements.txt
	@touch $@

demo: .venv/ready-tools
	@echo "== building the demo data from this Python's standard library"
	@$(BIN)/python -m tools.data.demo_data --out data/demo
	@echo "== training and scoring with the settings of tools/demo.env, two processes on the CPU"
	@set -a && . tools/demo.env && OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 train_gpt.py
	@echo "== what the stages did"
	@$(BIN)/python -m tools.reports.summary logs/demo.txt
	@$(BIN)/python -m tools.reports.plot logs/demo.txt --out logs/demo.png

lint: .venv/ready-tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: .venv/ready-tools
	@echo "== running the tests"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-fast: .venv/ready-tools
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

coverage: .venv/ready-tools
	@rm -rf data/coverage && mkdir -p data/coverage
	$(BIN)/coverage run -m pytest -q -n 2 --dist loadfile tests
	@$(BIN)/coverage combine -q
	$(BIN)/coverage report -i --include=train_gpt.py | tee logs/coverage.txt

soak: .venv/ready-tools
	TRIALS=60 $(BIN)/python -m pytest -v --no-header tests/tools/run/test_checkpoint.py -k random | tee logs/soak.txt
	TRIALS=40 $(BIN)/python -m pytest -v --no-header tests/tools/run/test_audit.py -k shapes | tee logs/audit_shapes.txt

docs: .venv/ready-tools
	$(BIN)/python -m tools.reports.docs

clean:
	rm -rf .venv data/demo
