#!/usr/bin/env bash
# build.sh [PEER...] builds the real programs that streamshim is tested against (containerd, runc,
# CNI plugins, crictl, critest) from the pinned versions in this folder, one Go module per peer so
# that none of their dependencies reaches the product's go.mod.
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

# build PEER MODULE: every tool of the peer's go.mod into $out.tmp.
build() {
  local version cgo=0 tags=() ldflags="-s -w"
  cd "$here/$1"
  version=$(go list -m -f '{{.Version}}' "$2")
  echo "building $1 $version (once; kept in $cache)" >&2
  case $1 in
  runc) cgo=1 tags=(-tags seccomp) ;; # cgo for its namespace set-up, libseccomp for seccomp profiles
  containerd) ldflags+=" -X $2/version.Version=$version" ;;
  critools) ldflags+=" -X $2/pkg/version.Version=$version" ;;
  esac
  CGO_ENABLED=$cgo go build -mod=readonly -trimpath "${tags[@]}" -ldflags "$ldflags" -o "$out.tmp/" tool
}

declare -A module=(
  [containerd]=github.com/containerd/containerd/v2
  [runc]=github.com/opencontainers/runc
  [cni]=github.com/containernetworking/plugins
  [critools]=sigs.k8s.io/cri-tools
)
[ $# -gt 0 ] || set -- runc cni critools containerd
for peer; do
  [ -n "${module[$peer]:-}" ] || { echo "build.sh: no peer named $peer" >&2; exit 2; }
  key=$( { go version; cat "$here/build.sh" "$here/$peer/go.mod" "$here/$peer/go.sum"; } | sha256sum | cut -c1-16)
  out=$cache/$peer-$key
  if [ ! -d "$out" ]; then
    start=$SECONDS
    rm -rf "$out.tmp"
    mkdir -p "$out.tmp"
    (build "$peer" "${module[$peer]}")
    mv "$out.tmp" "$out"
    echo "built $peer in $((SECONDS - start)) s" >&2
  fi
  for program in "$out"/*; do ln -sfn "$program" "$bin/"; done
done
echo "$bin"
