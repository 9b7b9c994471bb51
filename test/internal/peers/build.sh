#!/usr/bin/env bash
# build.sh [PEER...] builds the real programs that streamshim is tested against (containerd, runc,
# CNI plugins, crictl, critest) from the pinned versions in this folder, one Go module per peer so
# that none of their dependencies reaches the product's go.mod. Two more are not peers but are kept
# the same way: "busybox", Debian's package unpacked without installing it, from which the test
# images are made, and "lint", golangci-lint from ../tools/lint. Built only when named: "lint", and
# "etcd" and "kubernetes" (kube-apiserver, kubelet, kubectl) for test/e2e.
#
# Results lie in $STREAMSHIM_CACHE/peers (default ~/.cache/streamshim/peers), one folder per peer
# and set of inputs, so a second run, and a second clone, costs nothing. The last line printed is
# the folder that holds a link to every program.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${STREAMSHIM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/streamshim}/peers
bin=$cache/bin
mkdir -p "$bin"
exec 9>"$cache/lock"
flock 9 # two builds at once would write the same files

export GOFLAGS=-buildvcs=false GOWORK=off # what the caller's environment sets must not change the result

# folder PEER: where its go.mod lies.
folder() {
  case $1 in
  lint) echo "$here/../tools/lint" ;;
  *) echo "$here/$1" ;;
  esac
}

# inputs PEER: everything that the result depends on.
inputs() {
  cat "$here/build.sh"
  case $1 in
  busybox) dpkg --print-architecture ;;
  *) go version && cat "$(folder "$1")"/go.{mod,sum} ;;
  esac
}

# unpack_busybox: Debian's dynamic busybox. Not busybox-static, whose shell runs its applets without
# exec, so that critest's MaskedPaths spec sees a masked /bin/ls work.
unpack_busybox() {
  echo "fetching Debian's busybox package (once; kept in $cache)" >&2
  mkdir "$out.tmp/package"
  cd "$out.tmp/package"
  apt-get download busybox >&2 || { apt-get update >&2 && apt-get download busybox >&2; }
  dpkg -x busybox_*.deb .
  cp bin/busybox "$out.tmp/busybox"
  rm -r "$out.tmp/package"
}

# kubernetes_version VERSION: without these, all of Kubernetes says that it is v0.0.0.
kubernetes_version() {
  local package=k8s.io/component-base/version major minor
  IFS=. read -r major minor _ <<<"${1#v}"
  echo "-X $package.gitVersion=$1 -X $package.gitMajor=$major -X $package.gitMinor=$minor"
}

# build PEER MODULE: every tool of the peer's go.mod into $out.tmp.
build() {
  local version cgo=0 tags=() ldflags="-s -w"
  cd "$(folder "$1")"
  version=$(go list -m -f '{{.Version}}' "$2")
  echo "building $1 $version (once; kept in $cache)" >&2
  case $1 in
  runc) cgo=1 tags=(-tags seccomp) ;; # cgo for its namespace set-up, libseccomp for seccomp profiles
  containerd) ldflags+=" -X $2/version.Version=$version" ;;
  critools) ldflags+=" -X $2/pkg/version.Version=$version" ;;
  kubernetes) ldflags+=" $(kubernetes_version "$version")" ;;
  esac
  CGO_ENABLED=$cgo go build -mod=readonly -trimpath "${tags[@]}" -ldflags "$ldflags" -o "$out.tmp/" tool
  if [ "$1" = etcd ]; then mv "$out.tmp/server" "$out.tmp/etcd"; fi # named after its folder otherwise
  if [ "$1" = critools ]; then # critest is a test binary, which go.mod's "tool" cannot name
    CGO_ENABLED=0 go test -c -mod=readonly -trimpath -ldflags "$ldflags" -o "$out.tmp/critest" "$2/cmd/critest"
  fi
}

declare -A module=(
  [containerd]=github.com/containerd/containerd/v2
  [runc]=github.com/opencontainers/runc
  [cni]=github.com/containernetworking/plugins
  [critools]=sigs.k8s.io/cri-tools
  [etcd]=go.etcd.io/etcd/server/v3
  [kubernetes]=k8s.io/kubernetes
  [busybox]=none
  [lint]=github.com/golangci/golangci-lint/v2
)
[ $# -gt 0 ] || set -- busybox runc cni critools containerd
for peer; do
  [ -n "${module[$peer]:-}" ] || { echo "build.sh: no peer named $peer" >&2; exit 2; }
  key=$(inputs "$peer" | sha256sum | cut -c1-16)
  out=$cache/$peer-$key
  if [ ! -d "$out" ]; then
    start=$SECONDS
    rm -rf "$out.tmp"
    mkdir -p "$out.tmp"
    if [ "$peer" = busybox ]; then (unpack_busybox); else (build "$peer" "${module[$peer]}"); fi
    mv "$out.tmp" "$out"
    echo "built $peer in $((SECONDS - start)) s" >&2
  fi
  for program in "$out"/*; do ln -sfn "$program" "$bin/"; done
done
echo "$bin"
