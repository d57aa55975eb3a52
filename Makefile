# Everything is installed into .venv, which is made from PYTHON on first use.
PYTHON ?= python3
ARGS ?=
# For `make test-core`: a version such as 2.14.1, by default the newest that pip finds.
TORCH ?=
# For `make release-notes`: a section of the changelog.
VERSION ?= Unreleased

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Each stage of the installation leaves a stamp when it is complete.
CREATED := $(VENV)/.created
STACK := $(VENV)/.stack
LINT := $(VENV)/.lint
TOOLS := $(VENV)/.tools
OPS := $(VENV)/.ops

# The core, operator and networks, is tested in an environment of its own, where OpenMMLab is missing.
CORE_VENV := $(VENV)/core
CORE_PY := $(CORE_VENV)/bin/python
CORE_PIP := $(CORE_PY) -m pip --disable-pip-version-check
CORE := $(CORE_VENV)/.torch-$(or $(TORCH),newest)
CORE_TESTS := tests/spectral tests/models

# Two processes. Each takes whole files, whose tests share what is trained for several of them.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# The fast lane: what needs neither training runs nor mmcv's compiled operators.
# Long files come first, so that no process is left with one at the end.
FAST := tests/test_imports.py tests/data tests/spectral tests/models tests/configs \
  tests/openmmlab tests/inference tests/demo tests/test_docs.py tests/test_installation.py
NOT_FAST := --ignore=tests/configs/test_coco_configs.py \
  --ignore=tests/inference/test_detection.py \
  --ignore=tests/openmmlab/test_classification_runs.py --ignore=tests/openmmlab/test_detection.py \
  --ignore=tests/openmmlab/test_in_openmmlab.py \
  --deselect=tests/openmmlab/test_complexity.py::test_detectors

# PYTHON chooses the Python of .venv. The scripts that run there must not see it.
unexport PYTHON
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-core coverage lint types gpu install ops release-notes \
  announce clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses the Python, ARGS=... are arguments of the demo, of pytest or the report.'

demo: install  ## train and evaluate a small segmentor; needs no compiler and no GPU
	$(PY) tools/demo.py $(ARGS)

test: ops  ## run all tests; compiles mmcv's operators once
	$(PY) $(PYTEST) $(ARGS)

test-fast: $(TOOLS)  ## run the tests without training runs and compiled operators
	$(PY) $(PYTEST) -m 'not slow' $(FAST) $(NOT_FAST) $(ARGS)

test-core: $(CORE)  ## test operator and networks with torch and timm alone; TORCH=2.14.1
	$(CORE_PY) $(PYTEST) $(CORE_TESTS) $(ARGS)

coverage: ops  ## run all tests and report which lines they execute
	$(PY) $(PYTEST) --cov --cov-report=term --cov-report=html $(ARGS)

lint: $(LINT)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(TOOLS)  ## check types
	$(PY) -m mypy

gpu: install  ## check and measure everything on an NVIDIA GPU, about 12 minutes
	-$(PY) tools/gpu_report.py --out build/gpu $(ARGS)
	$(PY) tools/gpu_report.py --out build/gpu --render

release-notes:  ## print a section of the changelog; VERSION=0.1.0
	@awk -v heading='## [$(VERSION)]' \
	  '/^## / {on = index($$0, heading) == 1; found += on; next} on; \
	  END {if (!found) {print "CHANGELOG.md has no section " heading > "/dev/stderr"; exit 1}}' \
	  CHANGELOG.md

# A stack that fails its check loses its stamp, so that the next call installs it again.
install: $(STACK)  ## install the pinned packages and this one into .venv, about 6 GB
	@$(PY) tools/check_environment.py || { rm -f $(STACK); exit 1; }

ops: announce $(OPS)  ## install, and compile mmcv's operators, which detection needs
	@$(PY) tools/check_environment.py --ops || { rm -f $(STACK) $(OPS); exit 1; }

clean:  ## remove .venv and caches; compiled operators stay in the user's cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

# This comes before all long steps, so that a missing compiler is reported at once.
announce: $(CREATED)
	@test -e $(OPS) || $(PY) tools/install_mmcv_ops.py --announce

$(CREATED):
	@$(PYTHON) --version || { echo 'There is no $(PYTHON). Install Python 3.11, 3.12 or 3.13,' \
	  'or name the one to use: make demo PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo 'The pinned packages exist for Python 3.11, 3.12 and 3.13.' \
	  'Name one of them: make demo PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'This Python cannot create virtual' \
	  'environments. On Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The headless OpenCV is installed once more, over the desktop one: see requirements.txt.
$(STACK): requirements.txt constraints.txt pyproject.toml | $(CREATED)
	$(PIP) install -r requirements.txt -c constraints.txt
	$(PIP) install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' requirements.txt)
	$(PIP) install --no-deps -e .
	@touch $@

# ruff alone, so that linting installs no torch.
$(LINT): requirements-test.txt | $(CREATED)
	$(PIP) install -c requirements-test.txt ruff
	@touch $@

$(TOOLS): requirements-test.txt | $(STACK)
	$(PIP) install -r requirements-test.txt
	@touch $@

$(OPS): $(STACK) $(TOOLS)
	$(PY) tools/install_mmcv_ops.py
	@touch $@

# Made anew for another torch: the CUDA libraries of two versions overwrite each other's files.
$(CORE): pyproject.toml requirements-test.txt
	rm -rf $(CORE_VENV)
	$(PYTHON) -m venv $(CORE_VENV)
	$(CORE_PIP) install -c requirements-test.txt 'torch$(TORCH:%===%)' timm numpy pytest \
	  pytest-timeout pytest-xdist hypothesis onnx onnxscript onnxruntime segmentation-models-pytorch
	$(CORE_PIP) install --no-deps -e .
	@touch $@
