# `make demo` and `make test` do all set-up themselves, in .venv, on a machine that has only Python >= 3.10 and gcc.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find kernels include python -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')
# With no GPU in sight, torch comes from its CPU index: hundreds of megabytes instead of gigabytes of CUDA.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(HAS_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 0)

.PHONY: demo test test-gpu sanitize bench bench-wan bench-models plots profile docs lint format sass wheel wheels test-torch clean

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH) $(TORCH_INDEX)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES) pyproject.toml setup.py build_backend.py CMakeLists.txt
	$(RUN) -m pip install '.[test]'
	touch $@

demo: $(VENV)/installed  ## on a real clip: dense, FP8, sparse, FPSAttention; then trained models denoise one
	$(VENV)/bin/fpsattention demo
	$(RUN) examples/denoise_tiny_dit.py

# Without a GPU, a process for every core. A GPU has one process at a time.
WORKERS := $(if $(HAS_GPU),,-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)

test: $(VENV)/installed  ## the tests this machine can run; the GPU receipt stands for the others
	$(RUN) -m pytest -q $(WORKERS)

test-gpu: $(VENV)/installed  ## the GPU tests, on a Hopper GPU; writes the receipt that `make test` checks elsewhere
	$(RUN) -m pytest -q -m gpu --gpu-receipt tests/gpu_receipt.json

sanitize: $(VENV)/installed  ## compute-sanitizer's four tools over small launches of every kernel variant
	$(RUN) tests/sanitize.py

bench: $(VENV)/installed  ## every number of the README, in one run on one Hopper GPU
	$(RUN) bench/bench_forward.py --output bench/results/h100.json
	$(MAKE) plots

bench-wan: $(VENV)/installed  ## Wan2.1-14B at 720p end to end, on one Hopper GPU
	$(RUN) -m pip install --quiet '.[bench]'
	$(RUN) bench/bench_wan.py --output bench/results/h100_wan.json

bench-models: $(VENV)/installed  ## a few layers of diffusers' other models, on one Hopper GPU
	$(RUN) -m pip install --quiet '.[bench]'
	$(RUN) bench/bench_models.py --output bench/results/h100_models.json

plots: $(VENV)/installed
	$(RUN) bench/plots.py

# Those of `fpsattention profile`; asked for by the recipe alone.
NCU_SECTIONS = $(shell $(RUN) -c 'from fpsattention.cli.bench import NCU_SECTIONS; print(*NCU_SECTIONS)')
PROFILE := build/profile.ncu-rep

# The third launch: the first two load the kernel and warm the GPU. The clock is left to the GPU, as in real use.
profile: $(VENV)/installed  ## the forward under Nsight Compute (CASE=shape/window); docs/profiling.md reads the report
	mkdir -p $(dir $(PROFILE))
	ncu --clock-control none --kernel-name regex:attn_fwd --launch-skip 2 --launch-count 1 \
	    $(addprefix --section ,$(NCU_SECTIONS)) --force-overwrite --export $(PROFILE) \
	    $(RUN) bench/profile_forward.py $(addprefix --case ,$(CASE))
	ncu --import $(PROFILE) --page details --print-details all

# In an environment of its own: mkdocs reads the sources without importing them, so it needs no torch.
DOCS := build/docs

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

docs: $(DOCS)/installed  ## the documentation site, in build/site
	$(DOCS)/bin/mkdocs build --strict

$(VENV)/lint: $(VENV)/torch pyproject.toml
	$(RUN) -m pip install --quiet --group lint
	touch $@

CPP := $(wildcard kernels/*.cu kernels/*.cpp include/fpsattention/* $(addprefix tests/emulator/*.,cpp cuh h))

lint: $(VENV)/lint
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/lint
	$(VENV)/bin/clang-format -i $(CPP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

sass: $(VENV)/lint $(VENV)/installed  ## what ptxas made of the kernels: QGMMA there, no local memory, register counts
	$(RUN) .ci/check_sass.py

RELEASE := build/release

$(RELEASE)/installed: pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet --group release
	touch $@

WHEEL := $(RELEASE)/wheel-$(notdir $(PYTHON))

$(WHEEL): $(RELEASE)/installed $(SOURCES) setup.py build_backend.py CMakeLists.txt MANIFEST.in .ci/build_wheels.py
	$(RELEASE)/bin/python .ci/build_wheels.py --python $(PYTHON)
	touch $@

wheel: $(WHEEL)  ## the sdist and, from it, the wheel for $(PYTHON), in dist/

wheels: $(RELEASE)/installed  ## the same for each of Python 3.10 to 3.14 that is on this machine
	$(RELEASE)/bin/python .ci/build_wheels.py

# The wheel in a clean environment, with another torch: make test-torch TORCH='torch==2.11.*'
TEST_TORCH := build/test-torch

test-torch: $(WHEEL)  ## the tests (TESTS) on another torch (TORCH), on the wheel for $(PYTHON)
	$(PYTHON) -m venv --clear $(TEST_TORCH)
	$(TEST_TORCH)/bin/python -m pip install --quiet --upgrade pip
	$(TEST_TORCH)/bin/python -m pip install --quiet $(TORCH) $(TORCH_INDEX) \
	    "$$(ls dist/fpsattention-*-$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-manylinux*.whl)[test]"
	$(TEST_TORCH)/bin/python -m pytest -q $(WORKERS) $(TESTS)

clean:
	rm -rf $(VENV) build dist python/*.egg-info
