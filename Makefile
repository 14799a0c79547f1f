# Everything runs in .venv, made from the pinned versions in requirements.lock.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-x64 mutate lint benchmark clean

setup: .venv/ready

.venv/ready: requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	touch .venv/ready

demo: setup
	$(BIN)/python -m launch.demo

test: setup
	$(BIN)/python -m pytest -q

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# The contracts in double precision.
test-x64: setup
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -q tests/test_contracts.py

# Faults put into the code; for example: make mutate MODULE=estimators/pes COUNT=20 SEED=1
mutate: setup
	$(BIN)/python -u tests/mutate.py --module=$(or $(MODULE),.py) --count=$(or $(COUNT),150) \
	  --seed=$(or $(SEED),0) $(if $(FAULT),--fault=$(FAULT))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: setup
	$(BIN)/python -m launch.benchmark

clean:
	rm -rf .venv
