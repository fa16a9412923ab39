# make demo       train the Text-CT round at its tiny size on phantom data, with everything it builds on
# make test       the test suite;  make test-full  the networks at their published size (slow)
# make lint       ruff, and shellcheck on the launch scripts
# make docs       the site of docs/ in site/; fails where a link leads nowhere
# make bench      speed and memory against the same networks in torch; half an hour on two quiet cores at most
# make plan-env   .venv-tpu, with the TPU compiler, for `medm2g plan --topology=...` on a machine without a TPU
# make clean      remove .venv, .venv-tpu and caches; runs/ stays
#
# Everything runs in .venv, made with $(PYTHON) where it is missing: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
TPU_VENV := .venv-tpu
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# What entry points do themselves (device.keep_memory); other systems ignore these.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
PYTEST := $(MALLOC) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=12

.PHONY: demo test test-full lint docs bench plan-env clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime.stamp
	$(PY) -m medm2g_jax.main --config=configs/text_ct.py:tiny

test: $(VENV)/dev.stamp
	$(PYTEST)

# One at a time: the networks take up to 20 GB.
test-full: $(VENV)/dev.stamp
	$(PY) -m pytest -n 0 -s -m full

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(VENV)/bin/shellcheck launch/*.sh .ci/run

docs: $(VENV)/dev.stamp
	$(PY) -m mkdocs build --clean

bench: $(VENV)/dev.stamp
	$(PY) -m benchmarks.all

# An environment of its own: where libtpu is installed, jax hangs on machines without a TPU.
plan-env: $(TPU_VENV)/stamp

clean:
	rm -rf $(VENV) $(TPU_VENV) build dist site *.egg-info .pytest_cache .ruff_cache
	find benchmarks configs medm2g_jax tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps make a repeated call instant; a changed list of requirements installs again.
$(VENV)/runtime.stamp: requirements.txt setup.py pyproject.toml | $(VENV)/bin/pip
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -e .
	@touch $@

# torch first and alone: pip then takes the CPU build where it is configured for one, and keeps it.
$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/runtime.stamp
	$(PIP) install torch==2.13.0
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(TPU_VENV)/stamp: requirements.txt | $(VENV)/bin/pip
	$(PY) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip --disable-pip-version-check install -r requirements.txt "jax[tpu]$$(sed -n 's/^jax\(==.*\)/\1/p' requirements.txt)"
	@touch $@

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; name a Python 3.11 to 3.13: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: $(PYTHON) is Python %d.%d; medm2g_jax needs 3.11 to 3.13: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
