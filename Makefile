# make help lists the targets.

SHELL := /bin/bash
# dockerd, ip and mkfs stand in sbin, which is not on every user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin
export CGO_ENABLED ?= 0

# Versions are fixed here: neither tool is a dependency of the module.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0

# Platforms that get a boot binary; empty is all of them.
PLATFORMS ?=
HOST      := $(shell go env GOOS)/$(shell go env GOARCH)
# Packages that test, bench and fuzz work on.
PKG       ?= ./...
# The package whose tests take longest, much of it in waiting: they begin first.
LONGEST   := ./internal/e2e
FUZZTIME  ?= 30s
SOAK      ?= 20
# What the evaluation measures, as SECTION/NAME (REGEXP), and how often.
ROWS      ?=
ROUNDS    ?= 7

.PHONY: build
build: ## bin/bootfs-convert, with the boot binaries of all platforms in it (PLATFORMS="linux/amd64 …" narrows)
	go run ./internal/bootbin/gen $(PLATFORMS)
	go build -trimpath -buildvcs=false -ldflags='-s -w' -o bin/bootfs-convert ./cmd/bootfs-convert

.PHONY: build-host
build-host: ## the same with the boot binary of this machine only: quicker
	@$(MAKE) --no-print-directory build PLATFORMS=$(HOST)

.PHONY: test
test: deps build-host ## unit, fuzz-seed and end-to-end tests (root; PKG=./index/... narrows)
	go run $(GOTESTSUM) --format pkgname-and-test-fails -- -timeout 45m $(if $(filter ./...,$(PKG)),$(LONGEST)) $(PKG)
	$(if $(filter ./...,$(PKG)),go -C internal/evaluation test .)

.PHONY: demo
demo: deps build-host ## make an image, convert it, run it, compare (root; IMAGE=REF takes another source)
	go run ./internal/demo -convert bin/bootfs-convert $(if $(IMAGE),-image $(IMAGE))

.PHONY: bench
bench: deps build-host ## benchmarks, and with all packages the evaluation (PKG=./index/... narrows)
	go test -run '^$$' -bench . -benchmem -timeout 0 $(PKG)
	$(if $(filter ./...,$(PKG)),$(MAKE) --no-print-directory evaluation)

.PHONY: evaluation
evaluation: deps ## bootfs against its peers: docs/evaluation.md (root, hours; ROWS=REGEXP, ROUNDS=7)
	@scripts/install-deps.sh evaluation
	go -C internal/evaluation run . -rounds $(ROUNDS) -rows '$(ROWS)'

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (30s), output in FUZZRECORD if set
	FUZZTIME=$(FUZZTIME) scripts/fuzz.sh $(PKG)

.PHONY: soak
soak: deps build-host ## the tests in their long form, SOAK (20) times over, in changing order (root)
	BOOTFS_SOAK=1 BOOTFS_IMAGES=all BOOTFS_FIDELITY=all go test -count=$(SOAK) -shuffle=on -timeout 0 $(PKG)

.PHONY: race
race: deps build-host ## the tests under the race detector (root, needs a C compiler)
	CGO_ENABLED=1 go test -race -timeout 60m $(PKG)

.PHONY: lint
lint: ## gofmt, go vet, staticcheck; golangci-lint where it is installed
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	[ -z "$$unformatted" ] || { echo "not gofmt-ed:"; echo "$$unformatted"; exit 1; }
	go vet ./... && go -C internal/evaluation vet ./...
	go run $(STATICCHECK) ./... && go -C internal/evaluation run $(STATICCHECK) ./...
	@if command -v golangci-lint >/dev/null; then golangci-lint run; fi

.PHONY: cache-image
cache-image: ## the keeper of a node cache as a container image, bootfs-cache:latest (samples/cache)
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags='-s -w' -o bin/bootfs-cache ./cmd/bootfs-cache
	docker build --file samples/cache/Dockerfile --target prebuilt --tag bootfs-cache:latest .

.PHONY: image
image: build ## the converter as a container image, bootfs-convert:latest (BASE=REF is what it stands on)
	docker build --target prebuilt $(if $(BASE),--build-arg BASE=$(BASE)) --tag bootfs-convert:latest .

.PHONY: deps
deps: ## install what tests and demo run, with apt (root)
	@scripts/install-deps.sh

.PHONY: clean
clean: ## remove what was built; the cache of test roots stays (see internal/testenv)
	rm -rf bin demo.d internal/bootbin/boot-linux-*

.PHONY: help
help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
