#!/usr/bin/env bash
# build.sh [PEER...] builds the real programs that streamshim is tested against (containerd, runc,
# CNI plugins, crictl) from the pinned versions in this folder, one Go module per peer so
# that none of their dependencies reaches the product's go.mod. Two more are not peers but are kept
# the same way: "busybox", Debian's package unpacked without installing it, from which the test
# images are made, and "lint", golangci-lint from ../tools/lint. Built only when named: "lint";
# "critest" for test/critest; "etcd" and "kubernetes" (kube-apiserver, kubelet, kubectl) for test/e2e.
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
  critest) echo "$here/critools" ;;
  *) echo "$here/$1" ;;
  esac
}

# inputs PEER: everything that the result depends on.
inputs() {
  echo "$GOFLAGS" && declare -f build kubernetes_version unpack_busybox
  case $1 in
  busybox) dpkg --print-architecture ;;
  *) go version && cat "$(folder "$1")"/go.{mod,sum} ;;
  esac
}

# unpack_busybox: Debian's dynamic busybox. Not busybox-static, whose shell runs its applets without
# exec, so that critest's MaskedPaths spec sees a masked /bin/ls work.
unpack_busybox() {
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
  case $1 in
  runc) cgo=1 tags=(-tags seccomp) ;; # cgo for its namespace set-up, libseccomp for seccomp profiles
  containerd) ldflags+=" -X $2/version.Version=$version" ;;
  critools | critest) ldflags+=" -X $2/pkg/version.Version=$version" ;;
  kubernetes) ldflags+=" $(kubernetes_version "$version")" ;;
  esac
  if [ "$1" = critest ]; then # a test binary, which go.mod's "tool" cannot name
    CGO_ENABLED=0 go test -c -v -mod=readonly -trimpath -ldflags "$ldflags" -o "$out.tmp/critest" "$2/cmd/critest"
    return
  fi
  CGO_ENABLED=$cgo go build -v -mod=readonly -trimpath "${tags[@]}" -ldflags "$ldflags" -o "$out.tmp/" tool
  if [ "$1" = etcd ]; then mv "$out.tmp/server" "$out.tmp/etcd"; fi # named after its folder otherwise
}

# counted LABEL: passes on what is on stdin, except the names of packages that Go has compiled and the
# modules that it has fetched, which it counts: every second on a terminal, every 15 s elsewhere.
counted() {
  local line part='' packages=0 modules=0 last=$SECONDS pause=15 end='\n' status=0
  if [ -t 2 ]; then pause=1 end='\r'; fi
  while [ $status -eq 0 ] || [ $status -gt 128 ]; do # more than 128: nothing has come for a second
    status=0
    IFS= read -r -t 1 line || status=$?
    part+=$line
    if [ $status -eq 0 ]; then
      case $part in
      "go: downloading "*) modules=$((modules + 1)) ;;
      *[\ :]*) printf '%s\n' "$part" ;;
      *) packages=$((packages + 1)) ;;
      esac
      part=
    fi
    if [ $((SECONDS - last)) -ge $pause ]; then
      printf "%s: %d s, %d modules fetched, %d packages compiled$end" "$1" $((SECONDS - start)) $modules $packages
      last=$SECONDS
    fi
  done >&2
}

declare -A module=(
  [containerd]=github.com/containerd/containerd/v2
  [runc]=github.com/opencontainers/runc
  [cni]=github.com/containernetworking/plugins
  [critools]=sigs.k8s.io/cri-tools
  [critest]=sigs.k8s.io/cri-tools
  [etcd]=go.etcd.io/etcd/server/v3
  [kubernetes]=k8s.io/kubernetes
  [busybox]=none
  [lint]=github.com/golangci/golangci-lint/v2
)
[ $# -gt 0 ] || set -- busybox runc cni critools containerd
number=0
for peer; do
  number=$((number + 1))
  [ -n "${module[$peer]:-}" ] || { echo "build.sh: no peer named $peer" >&2; exit 2; }
  key=$(inputs "$peer" | sha256sum | cut -c1-16)
  out=$cache/$peer-$key
  if [ ! -d "$out" ]; then
    start=$SECONDS label="[$number/$#] $peer"
    echo "$label: building it (once; kept in $cache)" >&2
    rm -rf "$out.tmp"
    mkdir -p "$out.tmp"
    if [ "$peer" = busybox ]; then (unpack_busybox); else (build "$peer" "${module[$peer]}") 2>&1 | counted "$label"; fi
    mv "$out.tmp" "$out"
    echo "$label: built in $((SECONDS - start)) s" >&2
  fi
  for program in "$out"/*; do ln -sfn "$program" "$bin/"; done
done
echo "$bin"
