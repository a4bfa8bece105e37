#!/bin/sh
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
#
# usage: contrib/python.sh PYTHON VENV
#
# Prints the interpreter to use: PYTHON itself if it can import cryptography of
# version 36 or later, else a virtual environment of PYTHON in directory VENV,
# which is made, and given cryptography by pip, if need be.
set -eu

python=$1
venv=$2

usable() {
	"$1" -c '
import sys
import cryptography
found = int(cryptography.__version__.split(".")[0])
sys.exit(sys.version_info < (3, 9) or found < 36)
' 2>/dev/null
}

version() {
	"$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

have=$(version "$python") || {
	echo "$python: cannot run it; choose one with PYTHON=..." >&2
	exit 1
}
case $have in
2.*|3.[0-8])
	echo "$python is Python $have; 3.9 or later is needed (PYTHON=...)" >&2
	exit 1
esac
if usable "$python"; then
	"$python" -c 'import sys; print(sys.executable)'
	exit 0
fi

# An environment of another version is made anew.
if [ "$(version "$venv/bin/python" || :)" != "$have" ]; then
	echo "making $venv for Python $have" >&2
	"$python" -m venv --clear "$venv" >&2 || {
		echo "$python cannot make a virtual environment;" \
		    "Debian has that in the package python3-venv" >&2
		exit 1
	}
fi
if ! usable "$venv/bin/python"; then
	"$venv/bin/python" -m pip install -q --disable-pip-version-check \
	    'cryptography >= 36' >&2
	usable "$venv/bin/python" || {
		echo "$venv: cryptography cannot be imported there" >&2
		exit 1
	}
fi
echo "$(cd "$venv" && pwd)/bin/python"
