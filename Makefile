# Two commands for a fresh machine: `make quickstart` and `make test`. Both set up .venv by themselves and are quick the second time;
# so do `make notebook` and `make book`.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do if $$p -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
SETUP := settings.ini setup.py pyproject.toml constraints.txt assets.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

BOOK := .venv-book

.PHONY: help quickstart test gpu-check setup lint notebook notebooks tables export readme book clean

help:
	@echo "make quickstart   align a small model on a real task: table, figures, report (about 6 minutes on 2 cores)"
	@echo "make test         notebooks and pytest"
	@echo "make gpu-check    on a machine with a CUDA GPU: is it right there, and how fast (7 minutes, no network)"
	@echo "make notebook     JupyterLab on nbs/, open at the whole way"
	@echo "make book         the notebooks and an API reference as a site, from their stored outputs: build/book/html/index.html"
	@echo "make tables       run what is missing of the paper's tables (hours on 2 cores; may be stopped), then draw them"
	@echo "make setup        only .venv with everything for development"
	@echo "make notebooks    run all notebooks and store their outputs, then export, clean and write README.md"
	@echo "make export       lire_nb/ and README.md from the notebooks, without running them"

quickstart: $(VENV)/.ready
	$(BIN)/lire quickstart

# Two workers of one thread each: most models in the tests are too small for a second thread. The policy is converted, and the package compiled, before both ask for it.
test: $(VENV)/.ready-dev
	$(BIN)/python -m ruff check lire_nb tests .ci setup.py
	$(BIN)/python -c "from lire_nb.models import resolve_model; resolve_model('smollm2')"
	$(BIN)/python -m compileall -q lire_nb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# On a machine that has PyTorch with CUDA already: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	PYTHONPATH=. $(GPU_PYTHON) tests/gpu_check.py

setup: $(VENV)/.ready-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is written last, so an interrupted set-up is done again.
$(VENV)/.ready: $(VENV)/bin/python $(SETUP)
	@echo "Setting up $(VENV) …"
	$(PIP) -c constraints.txt -e '.[assets]'
	$(PIP) --no-deps --require-hashes -r assets.txt
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Adding what the tests need …"
	$(PIP) -c constraints.txt -e '.[assets,lora,server,evaluation,peers,dev]'
	@touch $@

# Every page runs with these extras; on a machine without a screen: make notebook JUPYTER=--no-browser.
$(VENV)/.ready-notebook: $(VENV)/.ready
	@echo "Adding JupyterLab …"
	$(PIP) -c constraints.txt -e '.[assets,lora,server,evaluation,peers,notebook]'
	@touch $@

notebook: $(VENV)/.ready-notebook
	$(BIN)/python -m jupyterlab --ServerApp.root_dir=. $(JUPYTER) nbs/00_whole_way.ipynb

# The book has a small set-up of its own: it reads what the pages carry, and needs neither PyTorch nor the package.
$(BOOK)/.ready: settings.ini constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(BOOK) …"
	$(PYTHON) -m venv $(BOOK)
	sed -n 's/^book_requirements = //p' settings.ini | tr ' ' '\n' > $(BOOK)/requirements.txt
	$(BOOK)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -r $(BOOK)/requirements.txt
	@touch $@

# Warnings are errors; afterwards every link of the site is followed, and nothing may be loaded from elsewhere.
book: $(BOOK)/.ready
	rm -rf build/book
	$(BOOK)/bin/python .ci/book/pages.py build/book/source
	$(BOOK)/bin/python -m sphinx -W --keep-going --quiet -j auto -b html -c .ci/book -d build/book/doctrees build/book/source build/book/html
	$(BOOK)/bin/python .ci/book/check.py build/book/html
	@echo "build/book/html/index.html"

notebooks: $(VENV)/.ready-dev
	for nb in nbs/*.ipynb; do $(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace $$nb || exit 1; done
	$(MAKE) export

tables: $(VENV)/.ready-dev
	$(BIN)/lire reproduce all
	for nb in nbs/9*.ipynb nbs/index.ipynb; do $(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace $$nb || exit 1; done
	$(MAKE) export

export: $(VENV)/.ready-dev
	$(BIN)/nbdev_export
	$(BIN)/python .ci/book/fold.py nbs/*.ipynb
	$(BIN)/python .ci/book/lead.py nbs/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py README.md

readme: export

clean:
	rm -rf $(VENV) $(BOOK) build *.egg-info
