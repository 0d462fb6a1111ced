# `make demo` and `make test` do all set-up themselves, in .venv, on a machine that has only Python >= 3.10 and gcc.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CUDA := $(wildcard kernels/*.cu kernels/*.cpp include/fpsattention/*)
SOURCES := $(CUDA) $(shell find python -name '*.py' -o -name '*.pyi')
BUILD_FILES := pyproject.toml setup.py build_backend.py CMakeLists.txt
# With no GPU in sight, torch comes from its CPU index: hundreds of megabytes instead of gigabytes of CUDA.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
# h100, h200, ...: results are kept per GPU.
GPU := $(shell echo '$(HAS_GPU)' | sed -n 's/.*NVIDIA \(H[0-9]*\).*/\L\1/p')
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(HAS_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 0)

.DELETE_ON_ERROR:
.PHONY: help demo dev test test-gpu sanitize bench bench-wan bench-models bench-finetune plots profile docs lint format sass wheel wheels test-torch clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand --tabs=14

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH) $(TORCH_INDEX)
	touch $@

# What compiles the extension, in the environment itself and not in one that pip makes for each build: CMake finds the
# tools where they were, so only what an edit concerns is compiled.
$(VENV)/tools.txt: $(VENV)/torch setup.py build_backend.py
	$(RUN) -m pip install --quiet 'setuptools>=77'
	$(RUN) build_backend.py > $@
	$(RUN) -m pip install --quiet --requirement $@

PIP_INSTALL := PATH="$(abspath $(VENV)/bin):$$PATH" $(RUN) -m pip install --no-build-isolation

$(VENV)/installed: $(VENV)/tools.txt $(SOURCES) $(BUILD_FILES)
	$(PIP_INSTALL) '.[test]'
	touch $@

$(VENV)/editable: $(VENV)/tools.txt $(CUDA) $(BUILD_FILES)
	$(PIP_INSTALL) --editable '.[test]'
	touch $@

# What the other targets use: the package as a user has it or, once `make dev` was called, the sources themselves.
INSTALLED := $(VENV)/$(if $(wildcard $(VENV)/editable),editable,installed)

dev: $(VENV)/editable  ## an editable install: an edit of Python builds nothing, one of a kernel compiles that kernel

demo: $(INSTALLED)  ## on a real clip: dense, FP8, sparse, FPSAttention; then trained models denoise one
	$(VENV)/bin/fpsattention demo
	$(RUN) examples/denoise_tiny_dit.py

# Without a GPU, a process for every core. A GPU has one process at a time.
WORKERS := $(if $(HAS_GPU),,-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)

test: $(INSTALLED)  ## the tests this machine can run; the GPU receipt stands for the others
	$(RUN) -m pytest -q $(WORKERS)

test-gpu: $(INSTALLED)  ## the GPU tests, on a Hopper GPU; writes the receipt that `make test` checks elsewhere
	$(RUN) -m pytest -q -m gpu --gpu-receipt tests/gpu_receipt.json

sanitize: $(INSTALLED)  ## compute-sanitizer's four tools over small launches of every kernel variant
	$(RUN) tests/sanitize.py

bench: $(INSTALLED)  ## every number of the README, in one run on one Hopper GPU
	$(RUN) bench/bench_forward.py --output bench/results/$(GPU).json
	$(MAKE) plots

bench-wan: $(INSTALLED)  ## whole Wan models, videos of 50 and of 4 steps, on one Hopper GPU
	$(RUN) bench/bench_wan.py --output bench/results/$(GPU)_wan.json

bench-models: $(INSTALLED)  ## a few layers of diffusers' other models, on one Hopper GPU
	$(RUN) bench/bench_models.py --output bench/results/$(GPU)_models.json

bench-finetune: $(INSTALLED)  ## a fine-tuning step of Wan2.1, dense and with FPSAttention, on one Hopper GPU
	$(RUN) bench/bench_finetune.py --output bench/results/$(GPU)_finetune.json

plots: $(INSTALLED)  ## the pictures alone, from the records; needs no GPU
	$(RUN) bench/plots.py

# Those of `fpsattention profile`; asked for by the recipe alone.
NCU_SECTIONS = $(shell $(RUN) -c 'from fpsattention.cli.profile import NCU_SECTIONS; print(*NCU_SECTIONS)')
PROFILE := build/profile.ncu-rep

# The third launch: the first two load the kernel and warm the GPU. The clock is left to the GPU, as in real use.
profile: $(INSTALLED)  ## the forward under Nsight Compute (CASE=shape/window); docs/profiling.md reads the report
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

CPP := $(CUDA) $(wildcard $(addprefix tests/emulator/*.,cpp cuh h))

lint: $(VENV)/lint  ## clang-format, ruff and mypy; changes nothing
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/lint  ## clang-format and ruff; change the files
	$(VENV)/bin/clang-format -i $(CPP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

sass: $(VENV)/lint $(INSTALLED)  ## what ptxas made of the kernels: QGMMA there, no local memory, register counts
	$(RUN) .ci/check_sass.py

RELEASE := build/release

$(RELEASE)/installed: pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet --group release
	touch $@

WHEEL := $(RELEASE)/wheel-$(notdir $(PYTHON))

$(WHEEL): $(RELEASE)/installed $(SOURCES) $(BUILD_FILES) MANIFEST.in .ci/build_wheels.py
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

clean:  ## remove .venv and all that was built
	rm -rf $(VENV) build dist python/*.egg-info
