#!/bin/sh
# After installing or upgrading. The kubelet is never touched: pointing it at streamshim, and when, is
# the operator's decision. dpkg calls "configure [OLD-VERSION]", rpm 1 (install) or 2 (upgrade).
set -e

[ -d /run/systemd/system ] && [ -z "${DPKG_ROOT:-}" ] || exit 0
systemctl daemon-reload
if [ "$1" = configure ] && [ -n "${2:-}" ] || [ "$1" = 2 ]; then
	systemctl --quiet is-active streamshim.service || exit 0
	# The new version takes over with all sessions. If it cannot, the old one goes on, and a package that is
	# installed is no reason to end its sessions.
	status=0
	/usr/bin/streamshim upgrade || status=$?
	case $status in
	0) ;;
	3) systemctl try-restart streamshim.service ;; # too old for that: as ever
	4) systemctl reload streamshim.service ;;      # its admin socket is elsewhere, or off
	*)
		echo "The version of streamshim that runs goes on. \"streamshim upgrade\" tries it again, \"systemctl restart streamshim\"" >&2
		echo "starts the new one and ends the sessions." >&2
		;;
	esac
else
	echo "streamshim is installed and not started. Try \"streamshim check\", then \"systemctl enable --now streamshim\";"
	echo "/usr/share/doc/streamshim/docs/install.md says how to point the kubelet at it."
fi
