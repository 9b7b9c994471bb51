#!/bin/sh
# Before removing: not as long as the kubelet depends on it. dpkg calls "remove" or "upgrade", rpm 0
# (removal) or 1 (upgrade).
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
if grep -qs '^containerRuntimeEndpoint:.*streamshim' /var/lib/kubelet/config.yaml; then
	echo "The kubelet of this node talks to streamshim. Set containerRuntimeEndpoint in" >&2
	echo "/var/lib/kubelet/config.yaml back to the runtime's socket and restart the kubelet first." >&2
	exit 1
fi
systemctl disable --now streamshim.service
