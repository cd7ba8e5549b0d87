#!/bin/sh
# Makes the environment $2 with just what the file $1 lists. One that cannot be made is taken away
# again, and that is no failure: the tests that want it are skipped and say so. Nothing is compiled
# ahead: that takes a third of the time, for modules of which few are imported.
set -u
echo "camserve: installing the clients of $1 into $2"
if .venv/bin/python -m venv --clear "$2" &&
	"$2/bin/python" -m pip install --disable-pip-version-check --quiet \
		--no-compile --no-deps -r "$1"; then
	touch "$2/.installed"
else
	echo "camserve: $2 cannot be made here; its tests are skipped" >&2
	rm -rf "$2"
fi
