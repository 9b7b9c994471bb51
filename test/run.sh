#!/usr/bin/env bash
# run.sh PACKAGES NODE_PACKAGES runs the tests of packages and of packages that bring up nodes (go list patterns, either
# may be empty). make test calls it. Tests on nodes mostly wait for processes, one package after the other; what needs
# the processor runs beside them, and is told when it has ended.
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
# Beside the others may run what neither measures nor is in a hurry.
raced=() plain=() beside=()
sort_nodes() {
  local package imports
  # shellcheck disable=SC2086 # patterns
  while read -r package imports; do
    case $package in
      */test/critest | */test/packaging | */test/internal/images) beside+=("$package") ;;
      *) case $imports in */streamshim/pkg/*) raced+=("$package") ;; *) plain+=("$package") ;; esac ;;
    esac
  done < <(go list -f '{{.ImportPath}} {{join .Imports " "}} {{join .TestImports " "}} {{join .XTestImports " "}}' $1)
}

result=0
by_themselves=()
[ -z "$1" ] || mapfile -t by_themselves < <(packages "$1")
if [ -z "$2" ]; then
  go test -race -p 4 -parallel 8 "${flags[@]}" "${by_themselves[@]}" || exit 1
  exit 0
fi
sort_nodes "$2"

what_needs_the_processor() {
  local result=0
  [ ${#by_themselves[@]} -eq 0 ] || nice -n 5 go test -race -p 2 -parallel 8 "${flags[@]}" "${by_themselves[@]}" || result=1
  [ ${#beside[@]} -eq 0 ] || go test -p 1 "${flags[@]}" "${beside[@]}" || result=1
  return $result
}
log=$(mktemp)
set -m # a process group of its own, in which signals are not ignored as else in the background
what_needs_the_processor >"$log" 2>&1 </dev/null &
others=$!
set +m
trap 'kill -INT -- "-$others" 2>/dev/null || true; rm -f "$log"' EXIT

# -parallel: on two processors two tests at once would mostly sleep, as those of test/integration/exec do.
[ ${#raced[@]} -eq 0 ] || go test -race -p 1 -parallel 4 "${flags[@]}" "${raced[@]}" || result=1
[ ${#plain[@]} -eq 0 ] || go test -p 1 -parallel 4 "${flags[@]}" "${plain[@]}" || result=1
wait "$others" || result=1
cat "$log"
exit $result
