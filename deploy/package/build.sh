#!/usr/bin/env bash
# build.sh OUT ARCH... builds the .deb and the .rpm for each architecture (amd64, arm64) into the folder OUT, with a
# bill of materials (CycloneDX) each, and SHA256SUMS of everything of that kind that lies there. Run it by "make
# packages", which builds the programs that it needs and sets VERSION and PACKAGE_VERSION.
#
# Two builds of one commit by the same Go are the same bytes, wherever and whenever: all times are the commit's.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: build.sh OUT ARCH..." >&2; exit 2; }
mkdir -p "$1"
out=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Read by nfpm for everything that it writes. Without a repository, as in a tarball: the time of the changelog.
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}"
export SOURCE_DATE_EPOCH
unset GOFLAGS GOAMD64 GOARM64 # what the caller's environment sets must not change the result

stage=bin/package
exec 9>"$stage.lock"
flock 9 # two builds at once in one tree would take each other's files away
rm -rf "$stage"
mkdir -p "$stage/man" "$stage/completion"
for page in deploy/man/*.[58]; do gzip -9n <"$page" >"$stage/man/$(basename "$page").gz"; done
for shell in bash zsh fish; do bin/streamshim completion "$shell" >"$stage/completion/streamshim.$shell"; done

for arch; do
  case $arch in
  amd64 | arm64) ;;
  *) echo "build.sh: no package is made for \"$arch\", but for amd64 and arm64" >&2; exit 2 ;;
  esac
  GOARCH=$arch make build BIN="$stage/$arch"
  for packager in deb rpm; do
    ARCH=$arch bin/nfpm package --config deploy/package/nfpm.yaml --packager "$packager" --target "$out/"
  done
  # Without a serial number and a time, which would be others each time.
  bin/cyclonedx-gomod bin -json -std -noserial -notimestamp -version "$PACKAGE_VERSION" \
    -output "$out/streamshim_${PACKAGE_VERSION}_$arch.cdx.json" "$stage/$arch/streamshim"
  go run ./tools/bill "$out/streamshim_${PACKAGE_VERSION}_$arch.cdx.json" # what is in the page, and no Go module
done
(cd "$out" && sha256sum -- *.deb *.rpm *.cdx.json >SHA256SUMS)
