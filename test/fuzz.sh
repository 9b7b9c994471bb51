#!/usr/bin/env bash
# fuzz.sh [TIME] runs every fuzz test of the module for TIME (20s; 3000x is a number of inputs), one after
# the other, and goes on after a failure. Go keeps a failing input below the package's testdata/fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${1:-20s}
failed=()
# Asking each package's test binary for its fuzz tests would link all of them.
while read -r folder package; do
  for name in $(grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$folder"/*_test.go | cut -c 6- || true); do
    echo "== $name of $package, for $time"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" || failed+=("$package $name")
  done
done < <(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}} {{.ImportPath}}{{end}}' ./... | grep .)
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
