# make demo   install into .venv, train on handwritten digits, measure, and name the files to look at
# make test   the tests; make lint: ruff and mypy; make proofs: every slow proof; make proof NAME=digits: one
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m genlight
STAMP := $(VENV)/.installed
# read what is written for them, in tests; apart, since diffusers imports both wherever they are, which takes two seconds
FORMATS := $(CURDIR)/$(VENV)/formats
FORMAT_TESTS := tests/modules/test_serving.py tests/quantization/test_torchao_format.py
# files stay whole, since their fixtures are dear, in the order of tests/conftest.py
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
# those of a GPU have a script of their own, tools/proofs/gpu.sh
PROOFS := $(filter-out %_gpu.py %_cifar.py,$(wildcard tools/proofs/[!_]*.py))

# of `make lowest`: on Linux the one on PyPI brings CUDA along, TORCH=2.13.0+cpu does not
TORCH ?= 2.11.0
LOWEST := $(VENV)/lowest
UV := env DS_BUILD_OPS=0 VIRTUAL_ENV=$(LOWEST) $(BIN)/uv pip

.PHONY: demo test lint proof proofs install resolve lowest

install: $(STAMP)

# torch first and alone: on machines whose index has a CPU build for the pinned version nothing larger is pulled in afterwards
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target $(FORMATS) torchao peft
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) fit run.name=demo run.overwrite=true
	$(RUN) validate run.name=demo run.overwrite=true ckpt_path=runs/demo/fit

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $(FORMAT_TESTS:%=--ignore=%)
	OMP_NUM_THREADS=1 PYTHONPATH=$(FORMATS) $(BIN)/python -m pytest $(FORMAT_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proof: $(STAMP)
	$(BIN)/python tools/proofs/$(NAME).py

proofs: $(STAMP)
	$(BIN)/python -m pytest -m slow
	for proof in $(PROOFS); do $(BIN)/python $$proof || exit 1; done

# the lowest and the newest versions that pyproject.toml allows each go together: in .venv/<which>-<Python>.txt
resolve: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	for which in lowest-direct highest; do for python in 3.11 3.12; do \
		$(UV) compile -q --resolution $$which --python-version $$python --extra dev -o $(VENV)/$$which-$$python.txt pyproject.toml || exit 1; \
	done; done

# the tests with the lowest
lowest: resolve
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(LOWEST)
	$(UV) install -q --resolution lowest-direct torch==$(TORCH) -e '.[dev]'
	$(UV) check
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(SPREAD)
