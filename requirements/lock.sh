#!/usr/bin/env bash
# Resolves the locks (`make lock`): two from the version table, one from verl's own list. Needs uv; installs nothing.
# CHECK=1 writes to a temporary folder instead and fails where a committed lock no longer resolves (`make lock-check`, CI).
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
out=.
if [ "${CHECK:-0}" = 1 ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; cp cpu.lock cuda.lock verl.lock "$out"; fi
compile() { "$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --output-file "$@" >/dev/null; }
compile "$out/cpu.lock" cpu.in --override cpu-overrides.txt
compile "$out/cuda.lock" cuda.in
compile "$out/verl.lock" verl.in
# uv cannot lock PyTorch's CPU build and stay portable: name it here, for the one platform that has it.
sed -i -e "s/^torch==\([0-9.]*\)$/torch==\1+cpu ; sys_platform == 'linux'\ntorch==\1 ; sys_platform != 'linux'/" -e "/sys_platform == 'never'/d" "$out/cpu.lock"
for lock in cpu cuda verl; do
  echo "$lock.lock: $(grep -c == "$out/$lock.lock") packages"
done
