#!/usr/bin/env bash
# build.sh [NAME...] builds what test/matrix runs besides the newest programs, such as containerd-1.7, runc-1.1 or gvisor,
# from the pinned versions in the folders of these names, one Go module each, as ../internal/peers/build.sh does for the
# newest. Results lie in $STREAMSHIM_CACHE/matrix (default ~/.cache/streamshim/matrix), in a folder for each set of inputs.
# Printed is a line for each: "containerd-1.7 v1.7.35 FOLDER".
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${STREAMSHIM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/streamshim}/matrix
mkdir -p "$cache"
export GOFLAGS=-buildvcs=false GOWORK=off # what the caller's environment sets must not change the result

# build NAME MODULE VERSION: every tool of the go.mod here into $out.tmp.
build() {
  local cgo=0 flags=() ldflags="-s -w"
  case $1 in
  containerd-*) ldflags+=" -X $2/version.Version=$3" ;;
  runc-*) cgo=1 flags=(-tags seccomp) ldflags+=" -X main.version=${3#v}" ;;
  gvisor)
    ldflags+=" -X gvisor.dev/gvisor/runsc/version.version=$3"
    # Its shim ends if it may not lower its oom_score_adj, as on a machine without CAP_SYS_RESOURCE. Here it goes on.
    cp -r "$(go list -m -f '{{.Dir}}' github.com/containerd/containerd/v2)" "$out.containerd"
    chmod -R u+w "$out.containerd"
    sed -i 's/if os.IsPermission(err) && (.*) {/if os.IsPermission(err) \&\& (true || !runningPrivileged() || userns.RunningInUserNS()) {/' "$out.containerd/pkg/sys/oom_linux.go"
    grep -q 'true ||' "$out.containerd/pkg/sys/oom_linux.go" || { echo "build.sh: oom_linux.go has changed" >&2; return 1; }
    cp go.mod "$out.containerd.mod" && cp go.sum "$out.containerd.sum"
    go mod edit -replace "github.com/containerd/containerd/v2=$out.containerd" "$out.containerd.mod"
    flags=(-modfile "$out.containerd.mod")
    ;;
  esac
  CGO_ENABLED=$cgo go build -mod=readonly -trimpath "${flags[@]}" -ldflags "$ldflags" -o "$out.tmp/" tool
  if [ "$1" = gvisor ]; then
    mv "$out.tmp/shim" "$out.tmp/containerd-shim-runsc-v1" # named after its folder otherwise
    rm -r "$out".containerd*
  fi
}

if [ $# = 0 ]; then
  for file in "$here"/*/go.mod; do set -- "$@" "$(basename "$(dirname "$file")")"; done
fi
for name; do
  [ -f "$here/$name/go.mod" ] || { echo "build.sh: there is no $name here" >&2; exit 2; }
  cd "$here/$name"
  case $name in
  containerd-1.*) module=github.com/containerd/containerd ;;
  containerd-*) module=github.com/containerd/containerd/v2 ;;
  runc-*) module=github.com/opencontainers/runc ;;
  gvisor) module=gvisor.dev/gvisor ;;
  esac
  version=$(go list -m -f '{{.Version}}' "$module")
  key=$({ declare -f build && go version && cat go.{mod,sum}; } | sha256sum | cut -c1-16)
  out=$cache/$name-$key
  exec 9>"$cache/$name.lock"
  flock 9 # two builds at once would write the same files
  if [ ! -d "$out" ]; then
    start=$SECONDS
    echo "building $name: $version (once; kept in $cache)" >&2
    rm -rf "$out".*
    mkdir -p "$out.tmp"
    build "$name" "$module" "$version"
    mv "$out.tmp" "$out"
    echo "built $name in $((SECONDS - start)) s" >&2
  fi
  exec 9>&-
  echo "$name $version $out"
done
