# make test   install, then format, lint, type and unit tests
# make book   install, then run every chapter and build the site
# make figures  fetch the figures that the paper's authors published; needs internet
# make links  ask the addresses of other sites whether they are still there; needs internet
# make fuzz   install, then read 100,000 damaged files of every format
# make floors install the lowest versions that pyproject.toml allows, and run the quick tests with them
# make release   wheel and source distribution into dist/, tried in a clean environment
# Both set up .venv with PYTHON (3.11 or later) on the first call and install nothing on the next.
# ARGS goes to pytest (make test) or to the book's build script (make book ARGS=00_ten_pictures).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := medbudget tests benchmarks book notebooks

# glibc gives large blocks back to the kernel and pays for them again; keeping them makes training
# on a CPU several times faster. It has to be set before Python starts.
export MALLOC_MMAP_THRESHOLD_ ?= 8589934592
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_TOP_PAD_ ?= 1073741824
# Threads that wait give the core to others: beside another busy process, spinning costs tenfold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help test book figures links fuzz floors format clean constraints release
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("medbudget needs \
	Python 3.11 or later, $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 …" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment could be made: on Debian and \
	Ubuntu, install python3-venv first."; exit 1; }
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[book,dev]"
	@touch $@

# One thread for each test process: there are as many processes as cores.
test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 $(ARGS)

book: $(STAMP)
	$(BIN)/python book/build.py $(ARGS)

# Seven synthetic images of the authors' repository, about 10 MB; without them the book has
# placeholders. `MEDBUDGET_FIGURES=1 make book` fetches them too.
figures: $(STAMP)
	$(BIN)/python book/figures.py

links: $(STAMP)
	$(BIN)/python book/links.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# 100,000 damaged files; more with ARGS="--inputs 1000000 --seed 1", kept with ARGS=--record.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(ARGS)

# Several GB; by hand, before a release. Needs Python 3.11, for which the lowest versions have wheels.
floors:
	$(PYTHON) -m venv --clear _build/floors
	$(PYTHON) book/floors.py > _build/floors.txt
	_build/floors/bin/python -m pip install --requirement _build/floors.txt
	_build/floors/bin/python -m pip install --no-deps --editable .
	OMP_NUM_THREADS=1 _build/floors/bin/python -m pytest -m "not slow and not browser" $(ARGS)

# Wheel and source distribution in dist/, tried in a clean environment outside the checkout.
release: $(STAMP)
	MEDBUDGET_CLEAN_INSTALL=1 MEDBUDGET_DIST=$(CURDIR)/dist $(BIN)/python -m pytest -s tests/test_release.py

constraints:
	$(PYTHON) -m venv --clear _build/fresh
	_build/fresh/bin/python -m pip install --editable ".[book,dev]"
	_build/fresh/bin/python book/constraints.py > constraints.tmp && mv constraints.tmp constraints.txt

clean:
	rm -rf $(VENV) _build .pytest_cache .mypy_cache .ruff_cache
