#!/bin/sh
# After installing or upgrading. The kubelet is never touched: pointing it at streamshim, and when, is
# the operator's decision. dpkg calls "configure [OLD-VERSION]", rpm 1 (install) or 2 (upgrade).
set -e

[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
systemctl daemon-reload
if [ "$1" = configure ] && [ -n "${2:-}" ] || [ "$1" = 2 ]; then
	systemctl try-restart streamshim.service
else
	echo "streamshim is installed and not started. Try \"streamshim check\", then \"systemctl enable --now streamshim\";"
	echo "/usr/share/doc/streamshim/docs/install.md says how to point the kubelet at it."
fi
