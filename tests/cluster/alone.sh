#!/bin/sh
# Runs a command where there is no network but a loopback interface, with an address for each node
# of a cluster: Ray listens on every interface there is. What the command leaves running ends with
# it. Where that cannot be done, it runs as it is, and the tests that need it are skipped.
set -u
alone="--net --pid --fork --mount-proc --kill-child"
if ! command -v ip >/dev/null; then
	exec "$@"
elif unshare $alone true 2>/dev/null; then
	unshare="unshare $alone"
elif unshare $alone --map-root-user true 2>/dev/null; then
	unshare="unshare $alone --map-root-user"
else
	exec "$@"
fi
exec $unshare sh -c '
	ip link set lo up
	for address in 10.77.0.1 10.77.0.2; do ip address add $address/32 dev lo; done
	"$@"' alone "$@"
