# Everything is installed into .venv, which is made from PYTHON on first use.
PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# One stamp for each stage of the installation, written when the stage is complete.
CREATED := $(VENV)/.created
STACK := $(VENV)/.stack
TOOLS := $(VENV)/.tools
OPS := $(VENV)/.ops

# PYTHON chooses the Python of .venv, and is not for the scripts that run in it.
unexport PYTHON
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint install ops announce clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses a Python, ARGS=... goes to the demo or to pytest.'

demo: install  ## see GFNet learn to segment; needs no compiler and no GPU
	$(PY) tools/demo.py $(ARGS)

# Two processes, each with whole files, which share what is trained for several tests.
test: ops  ## run every test
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(TOOLS)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# A stack that fails its check loses its stamp, so that the next call installs it again.
install: $(STACK)  ## the pinned stack and this package, about 6 GB
	@$(PY) tools/check_environment.py || { rm -f $(STACK); exit 1; }

ops: announce $(OPS)  ## install, and the operators of mmcv that detection needs
	@$(PY) tools/check_environment.py --ops || { rm -f $(STACK) $(OPS); exit 1; }

clean:  ## remove .venv and caches; compiled operators are kept in the user's cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist

# Before anything long, so that a missing compiler is known at once.
announce: $(CREATED)
	@test -e $(OPS) || $(PY) tools/install_mmcv_ops.py --announce

$(CREATED):
	@$(PYTHON) --version || { echo 'There is no $(PYTHON). Install Python 3.11, 3.12 or 3.13,' \
	  'or name yours: make demo PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo 'The pinned packages are made for Python 3.11, 3.12 and 3.13.' \
	  'Name one of them: make demo PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'This Python cannot make virtual' \
	  'environments. On Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The headless OpenCV once more, so that it lies on top: see requirements.txt.
$(STACK): requirements.txt constraints.txt pyproject.toml | $(CREATED)
	$(PIP) install -r requirements.txt -c constraints.txt
	$(PIP) install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' requirements.txt)
	$(PIP) install --no-deps -e .
	@touch $@

$(TOOLS): requirements-test.txt | $(CREATED)
	$(PIP) install -r requirements-test.txt
	@touch $@

$(OPS): $(STACK) $(TOOLS)
	$(PY) tools/install_mmcv_ops.py
	@touch $@
