#!/usr/bin/env bash
# vendor.sh writes vendor/, the page's libraries, from npm. "make ui-vendor" calls it. The result is committed, so that
# a build needs no npm. A new version: change it here with its sum, and in static/NOTICE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# unpack PACKAGE VERSION SHA256
unpack() {
  local file
  file=$(cd "$work" && npm pack --silent "$1@$2")
  echo "$3  $work/$file" | sha256sum --check --quiet
  mkdir -p "$work/$1"
  tar -xzf "$work/$file" -C "$work/$1" --strip-components 1
}

unpack @xterm/xterm 6.0.0 908e66e04af6c8dc6b00dd3b54de088e2e81e5ed866284fd6c2fb3c2d1c7a3f6
unpack asciinema-player 3.18.0 18d9703510fae9209da9e26ce3d13c59f083b4abcff003a3bba958e03918a862
rm -rf static/vendor
mkdir -p static/vendor
xterm=$work/@xterm/xterm player=$work/asciinema-player
# Without the name of a source map that is not served.
sed '/^\/\/# sourceMappingURL=/d' "$xterm/lib/xterm.js" >static/vendor/xterm.js
cp "$xterm/css/xterm.css" static/vendor/
cp "$player/dist/bundle/asciinema-player.min.js" "$player/dist/bundle/asciinema-player.css" static/vendor/
cp "$xterm/LICENSE" static/vendor/xterm.LICENSE
cp "$player/LICENSE" static/vendor/asciinema-player.LICENSE
chmod 644 static/vendor/*
