# make quickstart   sets up and pretrains a small model on this machine's Python source, offline, in minutes
# make test         sets up and runs the tests
#
# Without an active virtual environment both make and use .venv. ARGS="train.steps=100" goes to the run or to pytest.

PYTHON := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,.venv/bin/python)
STAMP := $(dir $(PYTHON))../.megasparse-installed

.PHONY: quickstart test lint setup

quickstart: setup
	@PATH="$(abspath $(dir $(PYTHON))):$$PATH" sh launch/quickstart.sh $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

setup: $(STAMP)

# A torch that is there already (a GPU build, say) is kept, with the ranges of setup.py instead of the pins.
$(STAMP): setup.py constraints.txt
	@echo "Setting up $(PYTHON); the first time this takes a minute or more."
	@test -x $(PYTHON) || python3 -m venv .venv
	@pins="-c constraints.txt"; $(PYTHON) -c "import torch" 2>/dev/null && pins=""; \
		$(PYTHON) -m pip install --quiet $$pins -e ".[dev,hf,monitor,serve]"
	@touch $(STAMP)
