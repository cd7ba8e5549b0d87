#!/usr/bin/env bash
# Writes the files of hashes in this folder and in deploy/load. Run it after a change of
# constraints.txt, of a requirement in pyproject.toml, of tools.in or of locust.in.
#
#   make lock
#
# uv reads the hashes of every file of a version from the package index, without downloading the files:
# wheels of all platforms, so that the same lists serve x86-64 and aarch64. The index is that of
# pip's environment variables; its address is not written.
set -euo pipefail
cd "$(dirname "$0")/../.."

UV_VERSION=0.13.9
EXTRAS=(bulk int8 otel ray tensorboard timm)
PLATFORMS=(x86_64-manylinux_2_36 aarch64-manylinux_2_36) # Debian bookworm's glibc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "uv==$UV_VERSION"
[[ -z ${PIP_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=$PIP_INDEX_URL
[[ -z ${PIP_EXTRA_INDEX_URL:-} ]] || export UV_INDEX=$PIP_EXTRA_INDEX_URL

lock() { # $1: the file to write; the rest are uv's. Fails if the platforms differ
  local platform out=$1
  shift
  for platform in "${PLATFORMS[@]}"; do
    "$work/venv/bin/uv" pip compile --quiet --generate-hashes --no-build --no-annotate --no-header \
      --python-version 3.11 --python-platform "$platform" -o "$work/$platform.txt" "$@"
  done
  cmp "$work/${PLATFORMS[0]}.txt" "$work/${PLATFORMS[1]}.txt"
  { echo '# Written by `make lock`.'; cat "$work/${PLATFORMS[0]}.txt"; } >"$out"
  echo "$out: $(grep -c '^[a-z].*==' "$out") distributions"
}

lock deploy/image/packages.txt -c constraints.txt pyproject.toml "${EXTRAS[@]/#/--extra=}"
lock deploy/image/tools.txt deploy/image/tools.in
lock deploy/load/requirements.txt -c constraints.txt deploy/load/locust.in
