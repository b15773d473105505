# Everything a newcomer types; `make` alone lists it.
#   make PYTHON=python3.12 demo     use another Python to make the environment
#   make VENV=/path/to/env test     use an environment of yours, as it is: nothing is installed in it

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Stamp files say what was installed, so that set-up runs once, and again when a requirement changes.
ifeq ($(origin VENV),file)
  DEMO_READY := $(VENV)/.installed
  TEST_READY := $(VENV)/.installed-dev
else
  DEMO_READY := yours
  TEST_READY := yours
  export PYTHONPATH := $(CURDIR)
endif
FACTS = settings.ini setup.py pyproject.toml

# A folder of yours with ImageNet weights and real images; cells and tests that need one are skipped where it is missing.
ifdef VAE_NB_FILES
  override VAE_NB_FILES := $(abspath $(VAE_NB_FILES))
  export VAE_NB_FILES
endif

.PHONY: help demo test test-all checks gpu gpu-pack readme clean yours

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_READY) ## set up, show the ready model, train a small one on the embedded scenes (about 4 minutes on 2 cores)
	@echo "the model that comes with the package:"
	@$(BIN)/vae-reconstruct scenes scenes --n 8 --out runs/ready/reconstructions.png
	@$(BIN)/vae-sample scenes --n 16 --out runs/ready/samples.png
	@$(BIN)/vae-traverse scenes --data scenes --factors --out runs/ready/factors.png
	@echo "and now one of your own:"
	@$(BIN)/vae-train scenes --preset demo --out runs/demo --overwrite

test: SELECT =
test: checks ## set up, then check exports and style, run every notebook, and run the tests
test-all: SELECT = -m ""
test-all: checks ## the same with the slow tests

checks: $(TEST_READY)
	@echo "1/4  library and README are what the notebooks say"
	@$(BIN)/python tests/house.py check
	@echo "2/4  lint"
	@$(BIN)/python -m ruff check --quiet .
	@echo "3/4  every notebook, two at a time"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/house.py notebooks
	@echo "4/4  tests, two at a time"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(SELECT)

gpu: ## on a machine with a GPU: measure, train the reference run, test (at most ten minutes; needs no network)
	@if ls .gpu/wheels/*.whl >/dev/null 2>&1; then \
	  $(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu/site .gpu/wheels/*.whl; fi
	@PYTHONPATH=$(CURDIR)/.gpu/site:$(CURDIR) PYTHONUNBUFFERED=1 $(PYTHON) benchmarks/gpu.py

# wheels for Python 3.12 on Linux, beside PyTorch; the files of VAE_NB_FILES or of the network
gpu-pack: $(TEST_READY) ## here: lay what `make gpu` needs into .gpu/
	@mkdir -p .gpu/wheels .gpu/files
	@$(PIP) download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 -d .gpu/wheels fastcore lpips pythae cloudpickle pydantic typing-inspection annotated-types
	@$(BIN)/python benchmarks/gpu.py --pack
	@du -sh .gpu

readme: $(TEST_READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python tests/house.py readme

clean: ## remove caches and build products (keeps the environment and runs/)
	@rm -rf _docs _proc .quarto build dist *.egg-info .pytest_cache .ruff_cache nbs/nbdev.yml nbs/.last_checked
	@find nbs vae_nb tests -name __pycache__ -o -name .ipynb_checkpoints | while read -r d; do rm -rf "$$d"; done

# ---- set-up

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "vae_nb needs Python 3.10 or newer as $(PYTHON); to name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (its venv or ensurepip is missing)." >&2; \
	  echo "On Debian or Ubuntu: sudo apt-get install python3-venv. Or make one yourself, install vae_nb with" >&2; \
	  echo "pip install -e '.[dev]', and say where it is: make VENV=/path/to/env ..." >&2; exit 1; }
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(FACTS)
	@echo "installing PyTorch and friends (~6 GB, 2-3 minutes, once)"
	@$(PIP) -e . > $(VENV)/pip.log 2>&1 || { tail -n 30 $(VENV)/pip.log >&2; exit 1; }
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(FACTS)
	@echo "installing PyTorch, nbdev, Jupyter and friends (~6 GB, 2-3 minutes, once)"
	@$(PIP) -e '.[dev]' > $(VENV)/pip.log 2>&1 || { tail -n 30 $(VENV)/pip.log >&2; exit 1; }
	@touch $(VENV)/.installed $@

yours:
	@test -x $(BIN)/python || { echo "VENV=$(VENV) holds no bin/python" >&2; exit 1; }
