# Run "make" for a list of what there is. Everything works on a Debian machine with Go, gcc, make and
# git; what else is needed is installed or built on first use and kept in ~/.cache/streamshim.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
PROGRAMS := $(or $(STREAMSHIM_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/streamshim)/peers/bin
FUZZTIME ?= 20s
# Flags of the comparison with containerd, see bin/bench -h
BENCHFLAGS ?=
LAB_DIR ?= .lab
# Go packages under test, for instance: make test PACKAGES=./pkg/execproc
PACKAGES ?= ./...

say = @echo '== $(1)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/streamshim
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

.PHONY: test
test: peers build ## run all tests, with the race detector and against real containerd, runc and critest
	$(call say,compiling the tests)
	go build -race $(PACKAGES)
	$(call say,testing: one package after the other because real containers share host ports)
	STREAMSHIM_REAL=required go test -race -p 1 -count 1 -timeout 30m $(PACKAGES)

.PHONY: critest
critest: peers build ## run only the CRI conformance suite, through streamshim and without it
	STREAMSHIM_REAL=required go test -v -count 1 -timeout 30m ./test/critest

.PHONY: lint
lint: setup ## check formatting, go vet and golangci-lint
	$(call say,gofmt)
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted, please run gofmt -w:" >&2; echo "$$unformatted" >&2; exit 1; fi
	$(call say,go vet)
	go vet ./...
	$(call say,golangci-lint)
	@test/peers/build.sh lint >/dev/null
	$(PROGRAMS)/golangci-lint run ./...

.PHONY: fuzz
fuzz: setup ## run every fuzz test for FUZZTIME (20s)
	test/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: peers build ## measure streamshim beside the containerd behind it; flags: make bench BENCHFLAGS=-quick
	@go build -buildvcs=false -o bin/bench ./test/bench
	@bin/bench $(BENCHFLAGS)

.PHONY: gobench
gobench: peers ## run the packages' own Go benchmarks
	go test -run '^$$' -bench . -benchmem -p 1 -timeout 60m $(PACKAGES)

.PHONY: lab
lab: peers build ## a private containerd with streamshim in front, and a shell in a pod
	@go build -buildvcs=false -o bin/lab ./test/lab
	@bin/lab -dir $(LAB_DIR) up

.PHONY: lab-down
lab-down: ## take the lab down without a trace
	@go build -buildvcs=false -o bin/lab ./test/lab
	@bin/lab -dir $(LAB_DIR) down

.PHONY: clean
clean: ## remove what was built here (not ~/.cache/streamshim, not a running lab)
	rm -rf bin .artefacts

.PHONY: setup
setup:
	@test/setup.sh

.PHONY: peers
peers: setup
	$(call say,containerd$(,) runc$(,) CNI plugins$(,) crictl$(,) critest: built once$(,) then taken from the cache)
	@test/peers/build.sh >/dev/null

, := ,
