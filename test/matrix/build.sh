#!/usr/bin/env bash
# build.sh [NAME...] builds older programs, such as containerd-1.7 or runc-1.1, from the pinned versions in the folders of
# these names, one Go module each, as ../internal/peers/build.sh does for the newest. Results lie in
# $STREAMSHIM_CACHE/matrix (default ~/.cache/streamshim/matrix), in a folder for each set of inputs. Printed is a line
# for each: "containerd-1.7 v1.7.35 FOLDER".
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${STREAMSHIM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/streamshim}/matrix
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two builds at once would write the same files
unset GOFLAGS
export GOWORK=off

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
  esac
  version=$(go list -m -f '{{.Version}}' "$module")
  key=$({ go version && cat "$here/build.sh" go.{mod,sum}; } | sha256sum | cut -c1-16)
  out=$cache/$name-$key
  if [ ! -d "$out" ]; then
    start=$SECONDS
    echo "building $name: $version (once; kept in $cache)" >&2
    rm -rf "$out.tmp"
    mkdir -p "$out.tmp"
    case $name in
    containerd-*) cgo=0 tags='' ldflags="-s -w -X $module/version.Version=$version" ;;
    runc-*) cgo=1 tags=seccomp ldflags="-s -w -X main.version=${version#v}" ;; # as ../internal/peers/build.sh does
    esac
    CGO_ENABLED=$cgo go build -mod=readonly -buildvcs=false -trimpath -tags "$tags" -ldflags "$ldflags" -o "$out.tmp/" tool
    mv "$out.tmp" "$out"
    echo "built $name in $((SECONDS - start)) s" >&2
  fi
  echo "$name $version $out"
done
