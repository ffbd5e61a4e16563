# `make book` builds the book, `make test` checks everything. Both work on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
RUN := .venv/bin/python
INSTALLED := .venv/.installed
# Python compiles what it imports; compiling all that is installed takes a minute more.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help book student course test ci unit coverage notebooks fresh lab sources clean

help: ## list the commands
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' Makefile | expand -t 12

book: $(INSTALLED) ## run every chapter and build _build/html
	@$(RUN) book/tools/execute.py
	@$(RUN) book/tools/build.py _build/book

student: $(INSTALLED) ## the book without solutions, with a cell for each answer, in _build/student
	@$(RUN) book/tools/student_edition.py

test: $(INSTALLED) ## all checks: style, types, unit tests, chapters, pages
	@$(RUN) book/tools/check.py

ci: $(INSTALLED) ## as test, but the chapters in a new environment, as Colab would run them
	@$(RUN) book/tools/check.py --ci

unit: $(INSTALLED) ## the unit tests only
	@$(RUN) book/tools/check.py unit

coverage: $(INSTALLED) ## the unit tests, and which lines they reach: 95 % at least
	@$(RUN) book/tools/check.py coverage

notebooks: $(INSTALLED) ## measure what the comparison lacks, run the chapters in place, refresh their outputs
	@$(RUN) tests/benchmarks/bench_comparison.py --out book/results/comparison.json --part digits_shift --part allocators
	@$(RUN) book/tools/execute.py --in-place

fresh: $(INSTALLED) ## run the chapters as Colab would: alone, with what they install; compare their outputs
	@$(RUN) book/tools/fresh.py

lab: $(INSTALLED) ## open the chapters in JupyterLab, as a reader gets them
	@$(RUN) book/tools/kernel_notebooks.py --trust
	@$(RUN) -m jupyterlab _build/notebooks

sources: $(INSTALLED) ## open the chapters' sources in JupyterLab, to edit them
	@$(RUN) -m jupyterlab book

course: $(INSTALLED) ## make homework sheets, solutions and what grades them: NUMBERS=1-30, or STUDENTS=file.csv
	@$(RUN) book/tools/course.py make $(if $(STUDENTS),--students "$(STUDENTS)",$(if $(NUMBERS),--numbers $(NUMBERS)))

clean: ## remove what was built, and the virtual environment
	rm -rf _build .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ". Another one: make PYTHON=python3.12 book")'
	@echo "[1/3] making .venv"
	@$(PYTHON) -m venv .venv
	@echo "[2/3] installing torch"
	@$(PIP) torch
	@echo "[3/3] installing the package, the book's tools and the tests' (some minutes)"
	@$(PIP) -e ".[book,test,peers,course]"
	@touch $@
