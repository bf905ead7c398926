# The doors to the project. `make demo` shows it working, `make test` is what CI runs.
# Everything made outside the tree goes to $MICA_CACHE_DIR (default /var/cache/mica).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

STATIC_TARGET := x86_64-unknown-linux-gnu
PROFILE := lab
OUT := target/mica
HOST_PROGRAMS := mica mica-lab standin-vm boot-vm bench-boot bench-http bench-proxy bench-allocations mica-bench
STATIC_PROGRAMS := mica-vm mica-guest
CARGO := cargo
# What the optional kernels of the code interpreter run on; Java's own comes with tools/python-env.
KERNEL_PACKAGES := r-cran-irkernel default-jdk-headless golang-go

.PHONY: help packages build demo test check unit fuzz-smoke fuzz test-clients-fast test-clients test-ui lab-test lab-endurance bench bench-lab bench-smoke clean

help:
	@echo 'make demo         bring up a host, build the template, run examples/hello.py'
	@echo 'make test         format, lints, unit, tidy, KVM and end-to-end tests'
	@echo 'make build        the programs, into $(OUT)/'
	@echo 'make test-clients  every client of docs/clients.md through every feature, in the lab: half an hour'
	@echo 'make fuzz         ten minutes of each fuzz target'
	@echo 'make lab-endurance  kills of the daemon under load, power cuts, two hundred bound sandboxes: long'
	@echo 'make bench        what every operation of the engine costs here, beside its floor; fails where a promise is broken'
	@echo 'make bench-lab    the same through HTTP, with Linux guests in the lab, beside a cold boot'
	@echo 'make bench-smoke  cold boot and HTTP figures of this machine'
	@echo 'make clean        remove build output (caches in $${MICA_CACHE_DIR:-/var/cache/mica} stay)'

packages:
	@tools/install-packages

# mica-vm and mica-guest are static: one runs in an empty root, the other is a guest's /init.
build: packages
	$(CARGO) build --locked --profile $(PROFILE) --workspace --bins
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --locked --profile $(PROFILE) \
	  --target $(STATIC_TARGET) -p mica-vmm -p mica-guest --bins
	@mkdir -p $(OUT)
	@for program in $(HOST_PROGRAMS); do \
	  install -C -m 755 target/$(PROFILE)/$$program $(OUT)/$$program; done
	@for program in $(STATIC_PROGRAMS); do \
	  install -C -m 755 target/$(STATIC_TARGET)/$(PROFILE)/$$program $(OUT)/$$program; done

demo: build
	@tools/demo $(OUT)

test: check unit fuzz-smoke test-clients-fast test-ui lab-test

check: packages
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

# Unit, tidy and KVM tests, and the daemon's own with a stand-in for the VM. The break-out tests need a
# mica-vm with a hook that no other build has; the build of everything after them puts it back.
unit: build
	@tools/install-packages $(KERNEL_PACKAGES)
	$(CARGO) test --locked --profile $(PROFILE) -p mica-vmm --features breakout --test breakout
	MICA_BIN_DIR=$(CURDIR)/$(OUT) MICA_TEST_PYTHON="$$(tools/python-env)/bin/python" \
	  REQUIRE_TEST_PYTHON=1 REQUIRE_OPTIONAL_KERNELS='r java go' \
	  $(CARGO) test --locked --profile $(PROFILE) --workspace

# Every fuzz target for a moment, from its committed corpus; see docs/testing.md.
fuzz-smoke: packages
	@tools/fuzz 5

fuzz: packages
	@tools/fuzz 600

# A few clients against the stand-in, at native speed; see docs/clients.md.
test-clients-fast: build
	@tools/test-clients $(OUT) standin

# All of them, with Linux guests.
test-clients: build
	@tools/test-clients $(OUT) lab

# The dashboard in a browser; see docs/dashboard.md.
test-ui: build
	@tools/test-ui $(OUT)

lab-test: build
	@tools/lab-test $(OUT)

# Without the assertions that programs under test have. Ends with 1 where a promised figure is not kept.
bench:
	@$(MAKE) --no-print-directory build PROFILE=release OUT=target/bench
	target/bench/mica bench engine -o target/bench/engine.json
	target/bench/mica bench registry -o target/bench/registry.json
	target/bench/mica bench scale -o target/bench/scale.json
	target/bench/bench-proxy --mica target/bench/mica --standin target/bench/standin-vm --added-us-max 100 \
	  --idle-streams 5000 --idle-bytes-max 20000
	target/bench/mica bench check target/bench/registry.json target/bench/scale.json

# The daemon killed a hundred times under load, power that is cut, two hundred sandboxes whose memory is bound:
# long, and not part of `make test`.
lab-endurance: build
	@tools/lab-test $(OUT) endurance

bench-lab: build
	@tools/bench-lab $(OUT) $(OUT)/bench-lab.json

bench-smoke: build
	$(OUT)/bench-boot --vm-program $(OUT)/mica-vm
	$(OUT)/bench-http --mica $(OUT)/mica

clean:
	rm -rf target
