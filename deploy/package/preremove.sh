#!/bin/sh
# Before removing: not as long as the kubelet depends on it. dpkg calls "remove" or "upgrade", rpm 0
# (removal) or 1 (upgrade).
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0

# The places that "streamshim check" looks at, too.
flag='--container-runtime-endpoint[= ][^ "]*streamshim'
where=
if grep -qs '^ *"\{0,1\}containerRuntimeEndpoint"\{0,1\}:.*streamshim' /var/lib/kubelet/config.yaml; then
	where="containerRuntimeEndpoint in /var/lib/kubelet/config.yaml"
elif grep -qs -e "$flag" /var/lib/kubelet/kubeadm-flags.env; then
	where="--container-runtime-endpoint in /var/lib/kubelet/kubeadm-flags.env"
else
	for process in /proc/[0-9]*; do
		if grep -qsx kubelet "$process/comm" && tr '\0' ' ' <"$process/cmdline" | grep -q -e "$flag"; then
			where="--container-runtime-endpoint in its unit or a drop-in"
		fi
	done
fi
if [ -n "$where" ]; then
	echo "The kubelet of this node talks to streamshim. Set $where" >&2
	echo "back to the runtime's socket and restart the kubelet first." >&2
	exit 1
fi
systemctl disable --now streamshim.service
