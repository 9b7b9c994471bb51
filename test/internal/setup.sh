#!/usr/bin/env bash
# setup.sh makes sure that the operating system has what building and testing streamshim needs, on
# Debian 12 or later. It looks first and installs only what is missing; with nothing missing it
# needs neither root nor the network. "setup.sh clients" also looks for what test/clients needs,
# "setup.sh ui" for what test/ui needs, and "setup.sh vm ARCH" for what test/vm needs to build and run a machine of that
# architecture.
set -euo pipefail

missing=()
need() { # need PACKAGE COMMAND...: the package, unless the command succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1"; }

need ca-certificates test -s /etc/ssl/certs/ca-certificates.crt # the Go module proxy speaks https
need gcc has gcc                                                # runc, and go test -race
need libc6-dev test -e /usr/include/stdlib.h
need pkg-config has pkg-config
need libseccomp-dev pkg-config --exists libseccomp # runc's build tag seccomp
need iptables has iptables                         # CNI's portmap
need iproute2 has ip
need util-linux has ipcmk # critest's HostIpc specs call it
need procps has ps
need crun has crun # pkg/execproc's tests of terminals; CRI-O's usual runtime
if [ "${1:-}" = clients ]; then
  need python3-kubernetes /usr/bin/python3 -c 'import kubernetes'
  need nodejs has node
  need npm has npm
fi
if [ "${1:-}" = ui ]; then
  need chromium has chromium
  need fonts-dejavu-core test -e /usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf
fi
if [ "${1:-}" = vm ]; then
  need mmdebstrap has mmdebstrap
  need qemu-utils has qemu-img
  need e2fsprogs has mke2fs
  case $2 in
  amd64) need qemu-system-x86 has qemu-system-x86_64 ;;
  arm64) need qemu-system-arm has qemu-system-aarch64 ;;
  esac
  # Packages of another architecture are configured by their own programs.
  if [ "$2" != "$(dpkg --print-architecture)" ]; then
    need qemu-user-static has qemu-aarch64-static
    need arch-test has arch-test
  fi
fi

if [ -n "${missing[*]}" ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "setup.sh: please install as root: apt-get install -y ${missing[*]}" >&2
    exit 1
  fi
  if ! has apt-get >/dev/null; then
    echo "setup.sh: this is no Debian; please install what provides: ${missing[*]}" >&2
    exit 1
  fi
  echo "setup.sh: installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >&2
  apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
fi

# Where no systemd has booted, nobody has told the kernel who runs the programs of the other architecture.
if [ "${1:-}" = vm ] && [ "$2" != "$(dpkg --print-architecture)" ] && [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  /usr/lib/systemd/systemd-binfmt /usr/lib/binfmt.d/qemu-aarch64.conf
fi

if ! has go >/dev/null; then
  echo "setup.sh: please install Go ($(sed -n 's/^go //p' "$(dirname "$0")/../../go.mod") or later) first" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "setup.sh: you are not root: building works, tests with real containers will be skipped or fail" >&2
fi
