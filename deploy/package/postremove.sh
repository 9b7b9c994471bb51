#!/bin/sh
# After removing. The audit log and recordings stay, also with "dpkg --purge": whether an audit log may be
# deleted is not for a package to decide. The configuration stays until the purge, which deletes it; rpm keeps an
# edited one as config.toml.rpmsave. What is left in /run goes with the purge, too.
set -e

case "$1" in
purge | 0)
	rm -rf "${DPKG_ROOT:-}/run/streamshim"
	[ ! -d "${DPKG_ROOT:-}/var/log/streamshim" ] || rmdir --ignore-fail-on-non-empty "${DPKG_ROOT:-}/var/log/streamshim"
	;;
esac
[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
systemctl daemon-reload
