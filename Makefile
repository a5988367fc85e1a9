# `make demo` shows the main job, `make test` runs the tests; both set everything up first.

# The CUDA half where there is an NVIDIA driver; CUDA=0 or CUDA=1 decides otherwise.
CUDA ?= $(if $(wildcard /proc/driver/nvidia/version /dev/nvidiactl),1,0)
export CUDA

# libgomp's threads spin while they wait for each other. Where threads outnumber cores that costs ten times the time
# (480 against 5,300 tokens/s in training on two busy cores), so they sleep.
export OMP_WAIT_POLICY ?= PASSIVE

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
FEATURES := $(if $(filter 1,$(CUDA)),--features cuda)
# One profile and one set of packages for all, so that libtorch's bindings are compiled once.
ALL := --release --workspace $(FEATURES)
# The data crate again, with features that the others do without: urls, and libjpeg-turbo where it can be built.
REMOTE := --release --package m6-data --features remote
TURBOJPEG := --release --package m6-data --features turbojpeg
HAS_TURBOJPEG := $(shell command -v cmake >/dev/null && command -v nasm)
NO_TURBOJPEG := @echo "without cmake and nasm the feature turbojpeg is left out"

.DEFAULT_GOAL := help
.PHONY: help setup demo test check parity interop bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

setup: ## libtorch into .libtorch
	@scripts/setup_libtorch.sh

demo: setup ## pretrain a tiny model, draw and caption pictures: out/demo/index.html
	cargo build $(ALL)
	$(TARGET_DIR)/release/m6 demo --out out/demo

# Tests run beside each other: one thread each.
test: export OMP_NUM_THREADS ?= 1
test: setup ## all tests
	@if cargo nextest --version >/dev/null 2>&1; then \
		set -x; cargo nextest run $(ALL) && cargo nextest run $(REMOTE) && cargo test $(ALL) --doc; \
	else \
		set -x; cargo test $(ALL) && cargo test $(REMOTE); \
	fi
	$(if $(HAS_TURBOJPEG),cargo test $(TURBOJPEG) --lib,$(NO_TURBOJPEG))

check: setup ## formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy $(ALL) --all-targets -- -D warnings
	cargo clippy $(REMOTE) --all-targets -- -D warnings
	$(if $(HAS_TURBOJPEG),cargo clippy $(TURBOJPEG) --all-targets -- -D warnings,$(NO_TURBOJPEG))
	RUSTDOCFLAGS="-D warnings" cargo doc $(ALL) --no-deps

# The path of a Python with torch, transformers, tiktoken and safetensors; where none is named, one is made (some GB).
PYTHON ?= out/parity/bin/python
out/parity/bin/python:
	python3 -m venv out/parity
	out/parity/bin/pip install --quiet 'torch==2.11.*' 'transformers==5.24.*' 'tiktoken==0.14.*' safetensors || { rm -r out/parity; exit 1; }

parity: setup $(PYTHON) ## language models and their tokens against transformers and tiktoken
	cargo build $(ALL)
	$(PYTHON) m6/tests/parity/check.py $(TARGET_DIR)/release/m6 --device $(if $(filter 1,$(CUDA)),cuda:0,cpu)
	cargo test $(ALL) --lib every_gradient

# As PYTHON, with webdataset, numpy and Pillow.
WEBDATASET_PYTHON ?= out/interop/bin/python
out/interop/bin/python:
	python3 -m venv out/interop
	out/interop/bin/pip install --quiet 'webdataset==1.0.*' numpy pillow || { rm -r out/interop; exit 1; }

interop: setup $(WEBDATASET_PYTHON) ## shards of webdataset read here, and ours there
	cargo build $(ALL)
	$(WEBDATASET_PYTHON) tests/interop_webdataset.py $(TARGET_DIR)/release/m6

bench: setup ## benchmarks
	cargo bench --workspace $(FEATURES)

fuzz: ## a minute of any bytes for each parser; needs nightly Rust and cargo-fuzz
	python3 fuzz/seeds.py
	set -e; export M6_CACHE=$$(mktemp -d) M6_CACHE_LIMIT=16M; trap 'rm -r $$M6_CACHE' EXIT; targets=$$(cargo +nightly fuzz list); \
	for target in $$targets; do cargo +nightly fuzz run $$target -- -max_total_time=60; done

clean: ## remove what was built and the demo's output; .libtorch stays
	cargo clean
	rm -rf out/demo
