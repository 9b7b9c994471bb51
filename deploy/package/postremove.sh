#!/bin/sh
# After removing. The audit log and recordings stay, also with "dpkg --purge": whether an audit log may be
# deleted is not for a package to decide. The configuration stays until the purge, which deletes it; rpm keeps an
# edited one as config.toml.rpmsave.
set -e

[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
systemctl daemon-reload
