#!/usr/bin/env bash
# release.sh VERSION OUT writes everything that a release has into the folder OUT, which must be empty or not there:
# packages and tarballs for amd64 and arm64, a bill of materials for each, the notes from CHANGELOG.md, and
# SHA256SUMS of it all. VERSION is the tag that is checked out (v1.2.3), without changes in the working copy;
# "devel" makes the same of whatever is here, to try it. Run it by "make release".
#
# Two releases of one commit by the same Go are the same bytes, wherever and whenever: all times are the commit's.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: release.sh VERSION OUT" >&2; exit 2; }
version=$1
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "release.sh: $*" >&2; exit 1; }

[ -z "$(ls -A "$out")" ] || fail "$out is not empty; what lies in it would become part of the release"
case $version in
devel) section=Unreleased package=0.0.0-devel ;;
v[0-9]*)
  [ -z "$(git status --porcelain)" ] || fail "the working copy has changes that are not committed"
  section=${version#v} package=${version#v}
  ;;
*) fail "no tag v* is checked out; tag the commit first, or try it with RELEASE=devel" ;;
esac
commit=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

# The notes are the section of CHANGELOG.md, up to the next one.
notes=$(awk -v want="## $section" '$0 == want || index($0, want " ") == 1 { on = 1; next } /^## / { on = 0 } on' CHANGELOG.md)
[ -n "$notes" ] || fail "CHANGELOG.md has no section \"## $section\", or nothing in it"

make packages ARCH='amd64 arm64' VERSION="$version" PACKAGE_VERSION="$package" PACKAGES_DIR="$out"
for arch in amd64 arm64; do
  name=streamshim-$package-linux-$arch
  stage=bin/release/$name
  rm -rf "$stage"
  mkdir -p "$stage/docs"
  cp "bin/package/$arch/streamshim" LICENSE CHANGELOG.md SECURITY.md deploy/config.toml deploy/systemd/streamshim.service "$stage/"
  cp -r docs/. "$stage/docs/"
  mkdir -p "$stage/ui/vendor" && cp pkg/ui/static/NOTICE "$stage/ui/" && cp pkg/ui/static/vendor/*.LICENSE "$stage/ui/vendor/"
  mkdir "$stage/man" && cp deploy/man/*.[58] "$stage/man/"
  cp -r bin/package/completion "$stage/"
  tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' \
    -C bin/release -c "$name" | gzip -9n >"$out/$name.tar.gz"
done
{
  echo "# streamshim $version"
  echo
  echo "Commit $commit, built by $(go version | cut -d' ' -f3). \`sha256sum --check SHA256SUMS\` verifies what was downloaded."
  echo "The .cdx.json files are bills of materials (CycloneDX). How to install: docs/install.md, also in each archive."
  printf '%s\n' "$notes"
} >"$out/NOTES.md"
(cd "$out" && rm -f SHA256SUMS && sha256sum -- * >.SHA256SUMS && mv .SHA256SUMS SHA256SUMS)
echo "release.sh: $version is in $out:" >&2
ls -l "$out" >&2
