#!/bin/sh
# install.sh ENVIRONMENT SET: used by the Dockerfiles. Installs a compiled set, by its hashes, into a virtual environment
# that is made if absent, and leaves neither pip nor uv behind.
set -eu
environment=$1
here=$(dirname "$0")
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check --require-hashes --requirement "$here/bootstrap.txt"
[ -e "$environment/pyvenv.cfg" ] || python3 -m venv --without-pip "$environment"
# Compiled now: a read-only root can't keep what Python would compile at each start.
"$tools/bin/uv" pip install --python "$environment" --no-deps --require-hashes --build-constraints "$here/build.txt" \
    --compile-bytecode --link-mode=copy --no-progress --requirement "$here/$2"
