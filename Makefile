# Python 3.11 runs at the versions of requirements.lock, in .venv; a newer one (make test PYTHON=python3.13)
# at the newest releases of everything, in a folder of its own (.venv-3.13).
PYTHON ?= python3
SERIES := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
ifeq ($(SERIES),)
$(error PYTHON=$(PYTHON) does not run; name a Python that does: make $(MAKECMDGOALS) PYTHON=python3.11)
endif
VENV := .venv$(if $(filter-out 3.11,$(SERIES)),-$(SERIES))
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Extras of pyproject.toml that nobody needs for the rest: make setup EXTRAS=control
EXTRAS :=

.PHONY: setup demo test test-control test-slow test-readme test-x64 test-as-jobs \
  mutate pretrained lint docs browse benchmark clean

setup: $(VENV)/ready $(foreach extra,$(EXTRAS),$(VENV)/$(extra))

.venv/ready: requirements.lock
	$(NEW_VENV)
	$(INSTALL) --no-deps -r requirements.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

.venv-%/ready: pyproject.toml
	$(NEW_VENV)
	$(INSTALL) --upgrade --upgrade-strategy=eager --editable '.[train,search,dev,docs]'
	touch $@

# An extra beside what is there, which stays at its versions: what the extra names, and what that
# needs and is missing.
$(VENV)/control: pyproject.toml $(VENV)/ready
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/kept.txt
	$(INSTALL) --constraint $(VENV)/kept.txt --editable '.[control]' --no-build-isolation
	touch $@

define NEW_VENV
$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
  || { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
$(PYTHON) -m venv $(VENV)
endef

demo: setup
	$(BIN)/python -m launch.demo

test: setup
	$(BIN)/python -m pytest -q -m "not slow and not exact"
	$(BIN)/python -m pytest -q -m "not slow and exact" $$(grep -rl --include="*.py" "mark\.exact" tests)

# Of the extra `control`: a policy in a MuJoCo environment.
test-control:
	$(MAKE) setup EXTRAS=control
	$(BIN)/python -m pytest -q -n 0 tests/test_control.py

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# The README from its first line, in an environment made from nothing: installs from a package index.
test-readme: setup
	$(BIN)/python -m pytest -q -s -n 0 tests/follow_readme.py

# Every page of the site in headless Chromium, at two widths (`pip install playwright`, chromium).
browse: docs
	$(BIN)/python tests/browse.py site $(BROWSE)

# The contracts in double precision.
test-x64: setup
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -q tests/test_contracts.py

# Compiled as jobs are, not as fast as can be.
test-as-jobs: setup
	XLA_FLAGS="$$($(BIN)/python -c 'from meta_train import devices; print(devices.CPU_FLAGS)')" \
	  $(BIN)/python -m pytest -q

# Faults put into the code; for example: make mutate MODULE=estimators/pes COUNT=20 SEED=1
mutate: setup
	$(BIN)/python -u tests/mutate.py --module=$(or $(MODULE),.py) --count=$(or $(COUNT),150) \
	  --seed=$(or $(SEED),0) $(if $(FAULT),--fault=$(FAULT))

# Trains a trained optimizer of the package again (resumes); runs/NAME/optimizer_best is what it has.
pretrained: setup
	$(BIN)/python -m launch.train --preset=$(or $(NAME),controller) --workdir=runs/$(or $(NAME),controller)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, to `site`; without a network. A broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

benchmark: setup
	$(BIN)/python -m launch.benchmark

clean:
	rm -rf .venv .venv-*
