#!/bin/sh
# After removing. Configuration, audit log and recordings stay, also with "dpkg --purge": whether an
# audit log may be deleted is not for a package to decide.
set -e

[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
systemctl daemon-reload
