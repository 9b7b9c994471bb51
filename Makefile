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
# Flags of the soak, see bin/chaos -h, for instance: make chaos CHAOSFLAGS='-duration 2m -seed 1'
CHAOSFLAGS ?=
LAB_DIR ?= .lab
LAB_K8S_DIR ?= .lab-k8s
# shim: streamshim alone, as CI runs it; quick: beside bare containerd; full: every setting, slowly
E2E ?= quick
# Go packages under test, for instance: make test PACKAGES=./pkg/execproc NODE_PACKAGES=./test/internal/node
PACKAGES ?= ./cmd/... ./pkg/... ./internal/... ./tools/...
NODE_PACKAGES ?= ./test/...

say = @echo '== $(1)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

BIN ?= bin
.PHONY: build
build: ## build bin/streamshim
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(BIN)/ ./cmd/...

.PHONY: test
test: peers build ## run all tests, with the race detector and against real containerd, runc and critest
	$(call say,compiling the tests)
	@$(if $(PACKAGES),go list -race -test -export $(PACKAGES) >/dev/null)
	@$(if $(NODE_PACKAGES),go list -test -export $(NODE_PACKAGES) >/dev/null)
	$(call say,testing: packages by themselves$(,) then with real nodes$(,) one after the other)
	@test/run.sh '$(PACKAGES)' '$(NODE_PACKAGES)'

.PHONY: check
check: build lint ## the inner loop: build, lint and the fast tests, without the race detector and without nodes; what has not changed is not run again
	$(call say,testing: what is fast)
	go test -short -timeout 5m $(PACKAGES) ./test/imports ./test/docs

.PHONY: critest
critest: peers build ## run only the CRI conformance suite, through streamshim and without it
	STREAMSHIM_REAL=required go test -v -count 1 -timeout 30m ./test/critest

.PHONY: e2e
e2e: peers kubernetes build ## kubectl against containerd and streamshim side by side; writes docs/compatibility.md (E2E=full: all of it)
	STREAMSHIM_E2E=$(E2E) STREAMSHIM_E2E_REPORT=$(if $(filter shim,$(E2E)),,$(CURDIR)/docs/compatibility.md) \
		go test -v -count 1 -parallel 8 -timeout 60m ./test/e2e

.PHONY: clients
clients: client-packages peers kubernetes build test/clients/javascript/node_modules ## stock clients of other languages (Python, JavaScript) against a cluster with streamshim
	STREAMSHIM_CLIENTS=1 go test -v -count 1 -timeout 15m ./test/clients

.PHONY: ui-test
ui-test: peers build ## the page of streamshim ui in a headless Chromium, on a real node; pictures in .artefacts/ui
	@test/internal/setup.sh ui
	STREAMSHIM_UI=1 STREAMSHIM_REAL=required go test -v -count 1 -timeout 15m ./test/ui

.PHONY: ui-vendor
ui-vendor: ## write pkg/ui/static/vendor, the page's libraries, from npm at pinned versions (committed: a build needs no npm)
	@pkg/ui/vendor.sh

.PHONY: client-packages
client-packages:
	@test/internal/setup.sh clients

# From the lock file, which has each package's hash and no host names.
test/clients/javascript/node_modules: test/clients/javascript/package-lock.json | client-packages
	$(call say,@kubernetes/client-node: installed once)
	@cd test/clients/javascript && npm ci --ignore-scripts --no-audit --no-fund >/dev/null
	@touch $@

# The architecture of the machine: amd64 or arm64
VM_ARCH ?= $(shell go env GOARCH)
.PHONY: vm
vm: peers kubernetes build bin/nfpm bin/cyclonedx-gomod ## a booted Debian node in a virtual machine: packages, systemd, cgroup v2, AppArmor (half an hour without KVM)
	@test/internal/setup.sh vm $(VM_ARCH)
	STREAMSHIM_VM=1 STREAMSHIM_VM_ARCH=$(VM_ARCH) STREAMSHIM_VM_REPORT=$(CURDIR)/docs/compatibility.md go test -v -count 1 -timeout 180m ./test/vm

# What to try in another version: all, for instance 'containerd-1.7 runc-1.1 crun gvisor', or oldest, as CI does
MATRIX ?= all
.PHONY: matrix
matrix: peers build ## critest's streaming specs and the integration tests with older containerds and runcs, crun and gVisor; writes docs/compatibility.md
	STREAMSHIM_MATRIX='$(MATRIX)' STREAMSHIM_MATRIX_REPORT=$(CURDIR)/docs/compatibility.md \
		go test -v -count 1 -timeout 600m ./test/matrix

# How many commands each attack meets, and more flags: test/hostile/README.md
COUNT ?= 2000
HOSTILE ?=
.PHONY: hostile
hostile: peers build ## attack COUNT (2000) commands on their way into containers, for each attack, configuration and engine
	cd test/hostile && STREAMSHIM_REAL=required go test -v -count 1 -timeout 48h . \
		-hostile.alone -hostile.count $(COUNT) $(HOSTILE)

.PHONY: lint
lint: setup ## check formatting, go vet and golangci-lint
	$(call say,gofmt)
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted, please run gofmt -w:" >&2; echo "$$unformatted" >&2; exit 1; fi
	$(call say,go vet)
	go vet ./...
	$(call say,golangci-lint)
	@test/internal/peers/build.sh lint >/dev/null
	$(PROGRAMS)/golangci-lint run ./...

.PHONY: fuzz
fuzz: setup ## run every fuzz test for FUZZTIME (20s)
	test/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: peers build ## measure streamshim beside the containerd behind it; flags: make bench BENCHFLAGS=-quick
	@go build -buildvcs=false -o bin/bench ./test/bench
	@bin/bench $(BENCHFLAGS)

# How many pods, at most 250
PODS ?= 110 250
.PHONY: sizing
sizing: peers build ## what the exec probes of PODS (110 250) cost, with streamshim and without; writes docs/sizing.md (half an hour, on a machine with nothing else to do)
	@go build -buildvcs=false -o bin/bench ./test/bench
	@bin/bench -sizing '$(PODS)' -report docs/sizing.md

.PHONY: chaos
chaos: peers build ## ten minutes of everything going wrong on one node, with invariants; CHAOSFLAGS='-seed N' runs it again
	@go build -buildvcs=false -o bin/chaos ./test/chaos
	@bin/chaos $(CHAOSFLAGS)

.PHONY: chaos-teeth
chaos-teeth: peers build ## show in two minutes that make chaos finds a leak, a cut and a stall that are injected into it
	@go build -buildvcs=false -o bin/chaos ./test/chaos
	@bin/chaos -teeth -duration 40s $(CHAOSFLAGS)

.PHONY: gobench
gobench: peers ## run the packages' own Go benchmarks
	go test -run '^$$' -bench . -benchmem -p 1 -timeout 60m $(PACKAGES)

.PHONY: lab
lab: setup ## a private containerd with streamshim in front, and a shell in a pod
	$(call say,what a node needs: built once$(,) then taken from the cache)
	@test/internal/peers/build.sh >/dev/null
	$(call say,streamshim)
	@$(MAKE) build bin/lab
	@bin/lab -dir $(LAB_DIR) up

.PHONY: lab-down
lab-down: bin/lab ## take the lab down without a trace
	@bin/lab -dir $(LAB_DIR) down

# Built as streamshim is, so that what both stand on is compiled once.
.PHONY: bin/lab
bin/lab:
	@CGO_ENABLED=0 go build -trimpath -buildvcs=false -o bin/lab ./test/internal/lab

.PHONY: lab-k8s
lab-k8s: peers kubernetes build ## a whole Kubernetes node with streamshim, and kubectl exec in a pod
	@go build -buildvcs=false -o bin/lab-k8s ./test/internal/kubernetes/lab
	@bin/lab-k8s -dir $(LAB_K8S_DIR) up

.PHONY: lab-k8s-down
lab-k8s-down: ## take that down without a trace
	@go build -buildvcs=false -o bin/lab-k8s ./test/internal/kubernetes/lab
	@bin/lab-k8s -dir $(LAB_K8S_DIR) down

.PHONY: generate
generate: ## write what is derived from the code: sample configuration, configuration reference, manual pages
	go run ./tools/reference
	go test -count 1 ./cmd/streamshim -run '^TestManPages$$' -update

PACKAGES_DIR ?= dist
# The last tag and what came after it, or 0.0.0 and the commit, in the words of semver.
PACKAGE_VERSION ?= $(or $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//'),0.0.0-g$(shell git rev-parse --short=10 HEAD 2>/dev/null || echo 0))

# For which architectures, for instance: make packages ARCH='amd64 arm64'
ARCH ?= $(shell go env GOARCH)

.PHONY: packages
packages: build bin/nfpm bin/cyclonedx-gomod ## .deb, .rpm, bill of materials and checksums for ARCH (this machine's), in PACKAGES_DIR (dist)
	@VERSION='$(VERSION)' PACKAGE_VERSION='$(PACKAGE_VERSION)' deploy/package/build.sh $(PACKAGES_DIR) $(ARCH)

# A tag has both; anything else is for trying: make release RELEASE=devel
RELEASE ?= $(shell git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null)
.PHONY: release
release: ## everything that a release has, of the tag that is checked out, in PACKAGES_DIR (dist)
	@deploy/release.sh "$(RELEASE)" $(PACKAGES_DIR)

# Each is a module of its own, so that its dependencies stay out of the product's.
bin/nfpm: test/internal/tools/nfpm/go.mod
bin/cyclonedx-gomod: test/internal/tools/sbom/go.mod
bin/nfpm bin/cyclonedx-gomod:
	$(call say,$(@F): built once$(,) about a minute)
	@cd $(<D) && CGO_ENABLED=0 GOWORK=off go build -mod=readonly -trimpath -buildvcs=false -o $(CURDIR)/bin/ tool
	@touch $@

IMAGE ?= dist/streamshim-image.tar
IMAGE_NAME ?= registry.example/streamshim:$(VERSION)
IMAGE_ARCHES := amd64 arm64

.PHONY: image
image: bin/image ## the image for a fleet (amd64, arm64) as an OCI archive, dist/streamshim-image.tar, without a Docker daemon
	@for arch in $(IMAGE_ARCHES); do \
		GOOS=linux GOARCH=$$arch CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' \
			-o bin/image-$$arch/ ./cmd/streamshim; \
	done
	@mkdir -p $(dir $(IMAGE))
	@bin/image -o $(IMAGE) -tag $(IMAGE_NAME) -version $(VERSION) -license LICENSE \
		$(foreach arch,$(IMAGE_ARCHES),linux/$(arch)=bin/image-$(arch)/streamshim)

bin/image: test/internal/tools/image/go.mod test/internal/tools/image/main.go
	@cd test/internal/tools/image && CGO_ENABLED=0 GOWORK=off go build -mod=readonly -trimpath -buildvcs=false -o $(CURDIR)/bin/ .
	@touch $@

PLUGIN_PLATFORMS := linux-amd64 linux-arm64 darwin-arm64

.PHONY: plugin
plugin: ## kubectl streamshim for krew: archives and their sums in PACKAGES_DIR (dist)
	@mkdir -p $(PACKAGES_DIR)
	@for platform in $(PLUGIN_PLATFORMS); do \
		GOOS=$${platform%-*} GOARCH=$${platform#*-} CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' \
			-o bin/plugin-$$platform/ ./cmd/kubectl-streamshim; \
		tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C bin/plugin-$$platform -cf - kubectl-streamshim -C $(CURDIR) LICENSE \
			| gzip -9n >$(PACKAGES_DIR)/kubectl-streamshim-$$platform.tar.gz; \
	done
	@cd $(PACKAGES_DIR) && sha256sum kubectl-streamshim-*.tar.gz

.PHONY: manifests print-manifests
manifests: bin/helm ## write deploy/manifests from the chart in deploy/helm
	@$(MAKE) -s print-manifests >deploy/manifests/streamshim.yaml
print-manifests:
	@bin/helm template streamshim deploy/helm/streamshim --kube-version 1.36.0 --namespace streamshim-system --set namespace.create=true

# Modules of their own, so that their dependencies stay out of the product's.
bin/helm bin/kubeconform: test/internal/tools/helm/go.mod
	$(call say,helm and kubeconform: built once$(,) some minutes)
	@cd test/internal/tools/helm && CGO_ENABLED=0 GOWORK=off go build -mod=readonly -trimpath -buildvcs=false -ldflags '-s -w' -o $(CURDIR)/bin/ tool
	@touch bin/helm bin/kubeconform

bin/kube-controller-manager bin/kube-scheduler: test/internal/tools/cluster/go.mod
	$(call say,kube-controller-manager and kube-scheduler: built once$(,) some minutes)
	@cd test/internal/tools/cluster && version=$$(go list -m -f '{{.Version}}' k8s.io/kubernetes) && \
		CGO_ENABLED=0 GOWORK=off go build -mod=readonly -trimpath -buildvcs=false \
		-ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" \
		-o $(CURDIR)/bin/ tool
	@touch bin/kube-controller-manager bin/kube-scheduler

.PHONY: fleet
fleet: IMAGE_NAME = registry.example/streamshim:test
fleet: peers kubernetes build image bin/helm bin/kube-controller-manager ## image, chart and DaemonSet on a real node, which it moves over and back
	STREAMSHIM_FLEET=1 go test -v -count 1 -timeout 30m ./test/fleet

.PHONY: clean
clean: ## remove what was built here (not ~/.cache/streamshim, not a running lab)
	rm -rf bin dist .artefacts test/clients/javascript/node_modules

.PHONY: setup
setup:
	@test/internal/setup.sh

.PHONY: peers
peers: setup
	$(call say,containerd$(,) runc$(,) CNI plugins$(,) crictl$(,) critest: built once$(,) then taken from the cache)
	@test/internal/peers/build.sh busybox runc cni critools containerd critest >/dev/null

.PHONY: kubernetes
kubernetes: setup
	$(call say,etcd$(,) kube-apiserver$(,) kubelet$(,) kubectl: built once$(,) about six minutes$(,) then taken from the cache)
	@test/internal/peers/build.sh etcd kubernetes >/dev/null

, := ,
