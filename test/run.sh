#!/usr/bin/env bash
# run.sh PACKAGES NODE_PACKAGES runs the tests of packages and of packages that bring up nodes (go list patterns, either
# may be empty). make test calls it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export STREAMSHIM_REAL=required
flags=(-count 1 -timeout 20m)

# The longest first, so that at the end both processors have something to do.
packages() {
  # shellcheck disable=SC2086 # patterns
  go list $1 | awk '{ print ($0 ~ /\/pkg\/(streaming|execproc)$/ ? 0 : $0 ~ /\/spdy$/ ? 1 : 2), $0 }' | sort -s -n -k 1,1 | cut -d ' ' -f 2
}

# Of the packages with nodes the race detector is only for those whose tests have code of streamshim in their own
# process. The others are clients of the program, and client-go takes a third of the machine with it.
raced=() plain=()
sort_nodes() {
  local package imports
  # shellcheck disable=SC2086 # patterns
  while read -r package imports; do
    case $imports in */streamshim/pkg/*) raced+=("$package") ;; *) plain+=("$package") ;; esac
  done < <(go list -f '{{.ImportPath}} {{join .Imports " "}} {{join .TestImports " "}} {{join .XTestImports " "}}' $1)
}

result=0
by_themselves=()
[ -z "$1" ] || mapfile -t by_themselves < <(packages "$1")
[ -z "$2" ] || sort_nodes "$2"

# One after the other: tests on nodes wait for processes, and are no quicker with others beside them.
[ ${#by_themselves[@]} -eq 0 ] || go test -race -p 4 -parallel 8 "${flags[@]}" "${by_themselves[@]}" || result=1
# -parallel: on two processors two tests at once would mostly sleep, as those of test/integration/exec do.
[ ${#raced[@]} -eq 0 ] || go test -race -p 1 -parallel 4 "${flags[@]}" "${raced[@]}" || result=1
[ ${#plain[@]} -eq 0 ] || go test -p 1 -parallel 4 "${flags[@]}" "${plain[@]}" || result=1
exit $result
