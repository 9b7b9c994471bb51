#!/usr/bin/env bash
# build.sh [ARCH] builds a Debian node for a virtual machine: a disk with systemd, Debian's own containerd, runc, crun,
# CNI plugins and AppArmor, and the kernel and initrd to boot it with. ARCH is Debian's word for it, by default this
# machine's. It takes about five minutes of a quiet machine and 2 GB, once: the result lies in
# $STREAMSHIM_CACHE/vm (default ~/.cache/streamshim/vm), in a folder for each set of inputs. The last line printed is that folder.
#
# What a run does in the node comes on a second disk (see vm-run.service), so that this one is seldom built again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
arch=${1:-$(dpkg --print-architecture)}
suite=bookworm
packages=(
  systemd systemd-sysv dbus udev "linux-image-cloud-$arch" initramfs-tools
  containerd runc crun containernetworking-plugins apparmor
  iproute2 iptables kmod procps busybox ca-certificates
)

cache=${STREAMSHIM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/streamshim}/vm
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two builds at once would do the same work twice
key=$(cat "$here/build.sh" "$here/vm-run.service" | sha256sum | cut -c1-16)
out=$cache/$arch-$key
if [ -d "$out" ]; then
  echo "$out"
  exit
fi

[ "$(id -u)" = 0 ] || { echo "build.sh: mmdebstrap and mke2fs -d need root to keep owners" >&2; exit 1; }
start=$SECONDS
echo "building a node of Debian $suite for $arch (once; kept in $cache)" >&2
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
list=$(IFS=,; echo "${packages[*]}")
# shellcheck disable=SC2016 # mmdebstrap's hooks expand $1
mmdebstrap --variant=minbase --architectures="$arch" --format=directory --include="$list" \
  --dpkgopt=force-unsafe-io --aptopt='Acquire::Retries "3"' \
  --customize-hook="copy-in $here/vm-run.service /etc/systemd/system" \
  --customize-hook='chroot "$1" systemctl enable vm-run.service' \
  --customize-hook='chroot "$1" systemctl mask serial-getty@ttyS0.service serial-getty@ttyAMA0.service getty@tty1.service systemd-timesyncd.service apt-daily.timer apt-daily-upgrade.timer fstrim.timer e2scrub_all.timer dpkg-db-backup.timer' \
  --customize-hook='echo "/dev/vda / ext4 rw 0 1" >"$1/etc/fstab"; echo vm >"$1/etc/hostname"; echo "127.0.0.1 localhost vm" >"$1/etc/hosts"' \
  "$suite" "$work/root" >&2
mkdir "$work/out"
cp "$work"/root/boot/vmlinuz-* "$work/out/vmlinuz"
cp "$work"/root/boot/initrd.img-* "$work/out/initrd"
mke2fs -q -t ext4 -L root -d "$work/root" "$work/disk.raw" 3G >&2
qemu-img convert -c -f raw -O qcow2 "$work/disk.raw" "$work/out/disk.qcow2" >&2
mv "$work/out" "$out"
echo "built the node in $((SECONDS - start)) s" >&2
echo "$out"
