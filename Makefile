# `make study` and `make test` are all a newcomer needs; each makes the environment (.venv) first.
PYTHON ?= python3
STUDY ?= studies/quick.yaml

PY := .venv/bin/python
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH
unexport PYTHONHOME

# What makes of a notebook its source: no outputs, no counts, nothing of the kernel that executed it last.
STRIP := $(PY) -m nbstripout --keep-id --extra-keys metadata.language_info
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: help install study report test test-faults test-browser lint strip hooks lab bench audit
.DELETE_ON_ERROR:

help:
	@echo "make study [STUDY=studies/quick.yaml]   run a study: executed notebooks and figures"
	@echo "make report [STUDY=...]                 a study's executed notebooks as one page; it says where"
	@echo "make test                               every test but the slow ones of make test-faults"
	@echo "make test-faults                        tests with real kills and real full disks"
	@echo "make test-browser                       the notebooks in JupyterLab, by a real browser (chromium)"
	@echo "make lab [LAB=--port=8899]              JupyterLab on the notebooks, with options of its own"
	@echo "make lint                               ruff: lint and format; notebooks without outputs"
	@echo "make hooks                              for contributors: git leaves outputs out, and lints each commit"
	@echo "make bench                              speed against other implementations"
	@echo "make audit                              known holes in the pinned packages (needs the network)"
	@echo "make install [PYTHON=python3]           the environment only"

install: .venv/installed

# The stamp is made last, so an installation that broke off is taken up again; the build backend (setuptools) is
# pinned in the lock, since torch needs it anyway: hence no build isolation, and nothing unpinned is ever fetched.
.venv/installed: requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "No Python found as '$(PYTHON)': install Python 3.11 or newer, or name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "'$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), but Python 3.11 or newer is needed: install one and name it with make PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module: install it (on Debian and Ubuntu: apt install python3-venv), or name another Python with make PYTHON=/path/to/python3." >&2; exit 1; }
	@rm -f .venv/installed .venv/installed-bench
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "Installing the pinned packages into .venv; the first time takes some minutes, most of them for torch."
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/installed-bench: .venv/installed
	$(PY) -m pip install --quiet --no-build-isolation -c requirements.lock -e '.[bench]'
	@touch $@

study: install
	$(PY) -m samlib run "$(STUDY)"

report: install
	$(PY) -m samlib report "$(STUDY)" --html

test: install
	$(PY) -m pytest

test-faults: install
	$(PY) -m pytest -m faults || [ $$? -eq 5 ]  # 5: there are none

test-browser: install
	$(PY) -m pytest -m browser -rs tests/test_browser.py

# Of a notebook, what git would commit is looked at: one that was just executed is no fault once `make hooks` was called.
lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@for notebook in $(NOTEBOOKS); do { git show ":$$notebook" 2>/dev/null || cat "$$notebook"; } | $(STRIP) --verify \
		>/dev/null || { echo "$$notebook carries outputs, or what its last kernel was: call make strip, and make hooks for the next time" >&2; exit 1; }; done

strip: install
	@$(STRIP) $(NOTEBOOKS)

hooks: install
	git config filter.nbstripout.clean '$(STRIP)'
	$(PY) -m pre_commit install

# The root folder is the project, so that studies, runs and figures are within reach; root may start it, in a container.
lab: install
	$(PY) -m jupyterlab --ip=127.0.0.1 --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

bench: .venv/installed-bench
	$(PY) -m samlib bench

# pip-audit has an environment of its own: it would bring other versions of what is pinned.
audit: install
	@test -x build/audit/bin/pip-audit || { "$(PYTHON)" -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip
