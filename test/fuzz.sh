#!/usr/bin/env bash
# fuzz.sh [TIME] runs every fuzz test of the module for TIME (20s; 3000x is a number of inputs), one after
# the other, and goes on after a failure. Go keeps a failing input below the package's testdata/fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${1:-20s}
failed=()
while read -r package; do
  for name in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
    echo "== $name of $package, for $time"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" || failed+=("$package $name")
  done
done < <(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./... | grep .)
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
