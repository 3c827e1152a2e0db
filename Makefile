# Everything lives in .venv; pip takes its settings (mirrors, proxies, caches) from the environment.

.DEFAULT_GOAL := help
.PHONY: help render test test-gpu chaos lint style types house lowest freeze lock clean

VENV    := .venv
# the first of these that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another
PYTHON  ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INPUTS  := pyproject.toml constraints.txt constraints.lock constraints-gpu.lock constraints-dev.lock
PIP     := $(VENV)/bin/python -m pip install --disable-pip-version-check
PINNED  := $(PIP) --constraint constraints.txt
HASHED  := $(PIP) --require-hashes --no-deps --only-binary :all: --requirement
FITS    := $(VENV)/bin/python infra/lock.py fits
# by hash, Triton and NVIDIA's libraries where the torch that is now there asks for them; setuptools, which builds, too
LOCKED  := $(HASHED) constraints.lock && { ! $(FITS) gpu || $(HASHED) constraints-gpu.lock; } \
           && $(PINNED) --no-build-isolation
NO_LOCK := echo "constraints.lock has no hashes for this Python and machine: versions are pinned, hashes not checked"
# said before pip begins; where pip chooses torch with CUDA, as on Linux, that is several GB more
SIZES   := torch, ray, transformers, pyarrow and what they need, 2 GB on disk and more where torch brings CUDA; minutes
ARGS    ?=
LOWEST  ?= .cache/lowest
TORCH   ?=

help:                                   ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

render: $(VENV)/.installed              ## set up, then render examples/prompts.parquet into out/ on the CPU
	@echo "Rendering the 24 prompts of examples/prompts.parquet into out/, clips of two seconds"
	$(VENV)/bin/dailies render examples/prompts.parquet --out out/

test: $(VENV)/.installed-dev            ## set up (the S3 test server and Chromium too), then run the tests; ARGS="-k store" for some
	@$(VENV)/bin/python -m tests.s3.install
	@$(VENV)/bin/python -m tests.install_chromium
	@$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-gpu: $(VENV)/.installed-gpu        ## set up with Triton, then test on a CUDA device (without a network: pytest -m gpu)
	@$(VENV)/bin/python -m pytest -m gpu $(ARGS)

chaos: $(VENV)/.installed-dev           ## nights of kills, bad stores, poison, full disks and losses; ARGS="poison --good 50" for one
	@$(VENV)/bin/python -m tests.s3.install
	@$(VENV)/bin/python -m tests.chaos $(ARGS)

lint: style types house                 ## ruff, mypy and the rules of the house, in a minute

style: $(VENV)/.installed-dev           ## ruff alone
	@$(VENV)/bin/python -m ruff check $(ARGS)

# mypy takes the folders for what they are imported as: links in .cache, one below the other
types: $(VENV)/.installed-dev           ## mypy alone
	@mkdir -p .cache/typed/dailies && for each in dailies/*.py dailies/py.typed kernels model actors pipeline jobs; do \
	   ln -sfn "../../../$$each" .cache/typed/dailies/; done
	@cd .cache/typed && "$(abspath $(VENV))/bin/python" -m mypy --config-file ../../pyproject.toml --package dailies $(ARGS)

house: $(VENV)/.installed-dev           ## the rules of the house alone: imports, doors, names, documents
	@$(VENV)/bin/python -m pytest -q tests/test_house.py $(ARGS)

lowest:                                 ## try the lowest versions that pyproject.toml allows; TORCH=2.13.0 for another torch
	@test -n "$(PYTHON)" || { echo "dailies needs Python 3.11 or newer" >&2; exit 1; }
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python infra/lowest.py $(if $(TORCH),torch=$(TORCH)) > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet --only-binary :all: \
	   --constraint $(LOWEST)/constraints.txt --editable .
	@$(LOWEST)/bin/python -m tests.lowest

freeze: $(VENV)/.installed-dev          ## write the installed versions into constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	   $(VENV)/bin/python -m pip list --format=freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' \
	   | grep -v -E '^(pip|wheel)==' | sort -f -u; \
	 } > constraints.new && mv constraints.new constraints.txt

lock: $(VENV)/.installed                ## write the hashes of what is installed into constraints*.lock
	@$(VENV)/bin/python infra/lock.py make

clean:                                  ## remove what make made: .venv, .cache, out, out-night
	rm -rf $(VENV) .cache out out-night

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "dailies needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || true)." \
	  "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dailies needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2; \
	  exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(INPUTS)
	@echo "Installing dailies into $(VENV), the first time only: $(SIZES)"
	@if $(FITS); then $(LOCKED) --editable .; else $(NO_LOCK); $(PINNED) --editable .; fi && touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(INPUTS)
	@echo "Installing dailies and its test tools into $(VENV), the first time only: $(SIZES)"
	@{ ! $(FITS) || $(HASHED) constraints-dev.lock; } && $(PINNED) --editable '.[dev]' && touch $@ $(VENV)/.installed

$(VENV)/.installed-gpu: $(VENV)/bin/python $(INPUTS)
	@echo "Installing dailies, Triton and the test tools into $(VENV), the first time only: $(SIZES)"
	@$(PINNED) --editable '.[dev,gpu]' && touch $@ $(VENV)/.installed $(VENV)/.installed-dev
