#!/usr/bin/env bash
# Makes .venv from one complete lock (`make setup`). A second call with nothing changed does nothing.
#   PYTHON=python3.12      which Python, 3.11 or 3.12    (default: the one .venv was made with, else the first found)
#   ACCELERATOR=cpu|cuda   which lock                    (default: the one in .venv, else cuda where nvidia-smi lists a GPU)
#   TESTS=1                stops where there is no bubblewrap, which the tests and the coding task need (`make test` sets it)
#   FLASH_ATTENTION=1      on cuda: builds FlashAttention too; where that fails, attention stays at sdpa
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$@"; }
stop() { say "$@" >&2; exit 1; }

# What only the system can give, one line each: is it there? else the Debian package that brings it.
missing_packages() {
  "$python" -c 'import ensurepip' 2>/dev/null || echo "python${version%.*}-venv"
  # Installed where we may; where not, only what needs a sandbox stops.
  if [ "$(uname)" = Linux ] && ! command -v bwrap >/dev/null && { [ "${TESTS:-0}" = 1 ] || may_install; }; then
    echo bubblewrap
  fi
}
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# Prints version, executable and a digest of the given files; fails unless $1 is a Python that the locks are made for.
look() {
  "$1" -c '
import hashlib, pathlib, platform, sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12): sys.exit(1)
digest = hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest()
print(platform.python_version(), getattr(sys, "_base_executable", sys.executable), digest, sep="\n")' "${@:2}" 2>/dev/null
}

# .venv/setup-stamp: Python, accelerator, what .venv was made for, what was installed into it ("unfinished" until the end).
stamp=.venv/setup-stamp had_python='' had_accelerator='' had_made='' had_content=''
if [ -f "$stamp" ]; then { read -r had_python; read -r had_accelerator; read -r had_made; read -r had_content; } <"$stamp" || true; fi

accelerator=${ACCELERATOR:-$had_accelerator}
if [ -z "$accelerator" ]; then
  case "$(nvidia-smi -L 2>/dev/null || true)" in *"GPU 0:"*) accelerator=cuda ;; *) accelerator=cpu ;; esac
fi
case "$accelerator" in
  cpu | cuda) lock=requirements/$accelerator.lock ;;
  *) stop "ACCELERATOR=$accelerator is not known. Allowed: cpu, cuda (or leave it out: nvidia-smi decides)." ;;
esac
case "${FLASH_ATTENTION:-0}" in 0 | 1) ;; *) stop "FLASH_ATTENTION=$FLASH_ATTENTION is not known. Allowed: 0, 1." ;; esac

facts=''
for candidate in ${PYTHON:+"$PYTHON"} ${had_python:+"$had_python"} python3.11 python3.12 python3; do
  if facts=$(look "$candidate" "$lock" "$0"); then break; fi
  if [ -n "${PYTHON:-}" ]; then
    stop "PYTHON=$PYTHON cannot be used ($("$PYTHON" --version 2>/dev/null || echo 'it does not run')). Allowed: Python 3.11 or 3.12." \
      "Name another one: PYTHON=python3.11 make setup"
  fi
done
[ -n "$facts" ] || stop "no Python 3.11 or 3.12 found (looked for python3.11, python3.12, python3)." \
  "Debian 12: apt-get install -y python3 python3-venv. Elsewhere: https://www.python.org/downloads/" \
  "One that is not on PATH: PYTHON=/path/to/python3.12 make setup"
{ read -r version; read -r python; read -r content; } <<<"$facts"
made="Python $version, $accelerator, in $PWD"

# `venv --clear` would empty the folder that a link points at: another checkout's, say.
[ ! -L .venv ] || stop ".venv is a link to $(readlink .venv): remove it, or run make setup there"

missing=$(missing_packages)
if [ "$(uname)" = Linux ] && ! command -v bwrap >/dev/null && [ -z "$missing" ]; then
  say "no bubblewrap: the coding task's sandbox wants it (sudo apt-get install bubblewrap); all else runs without"
fi
if [ -z "$missing" ] && [ "$had_made" = "$made" ] && [ "$had_content" = "$content" ] && [ "${FLASH_ATTENTION:-0}" = 0 ]; then
  say "ready: .venv (Python $version, $accelerator lock)"
  exit 0
fi

if [ -n "$missing" ]; then
  install="apt-get install -y --no-install-recommends $(echo $missing)"
  command -v apt-get >/dev/null || stop "missing, and to be installed with this system's own tools: $missing (Debian's names)"
  [ "$(id -u)" = 0 ] || stop "missing system packages. Run this, then make setup again:" "  sudo $install"
  say "$install"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install -qq >/dev/null; } || stop "that failed (see above)"
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
# -qq: pip warns once per package about each place it is told to look in and that is not there; errors still show.
install() { pip install -qq --no-deps "$@"; }

if [ "$had_content" != "$content" ] || [ "$had_made" != "$made" ]; then
  # Interrupted, or another Python, accelerator or folder: from scratch. Only the lock is new, or .venv is not ours: on top.
  clear=''
  if [ -e "$stamp" ] && [ "$had_made" != "$made" ]; then clear=--clear; fi
  say "installing $lock with Python $version into $PWD/.venv ($([ $accelerator = cpu ] && echo 'about 3 GB' || echo 'about 10 GB'); minutes, the first time)"
  "$python" -m venv $clear .venv
  [[ "$(look .venv/bin/python)" == "$version"$'\n'* ]] ||
    stop ".venv holds another Python than $version and was not made by make setup. Remove it: make clean"
  printf '%s\n' "$python" "$accelerator" unfinished unfinished >"$stamp"

  torch=$(sed -n "s/^\(torch==[^ ]*+cpu\) .*/\1/p" "$lock")
  if [ -n "$torch" ] && [ "$(uname)" = Linux ] && ! install "$torch" 2>/dev/null; then
    say "pip's own index has no $torch: adding PyTorch's"
    install --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
  fi
  install -r "$lock"
  install --no-build-isolation --editable .
  mkdir -p .venv/share/jupyter/lab/settings
  echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
    >.venv/share/jupyter/lab/settings/overrides.json
  printf '%s\n' "$python" "$accelerator" "$made" "$content" >"$stamp.new"
  mv "$stamp.new" "$stamp"
fi

attention='sdpa (FlashAttention: FLASH_ATTENTION=1 make setup)'
if [ "$accelerator" = cpu ]; then
  attention='sdpa (FlashAttention is not used on a CPU)'
elif [ "${FLASH_ATTENTION:-0}" = 1 ]; then
  say "building FlashAttention: needs nvcc; up to an hour"
  if MAX_JOBS=4 install --no-build-isolation flash-attn==2.8.3.post2; then
    attention=FlashAttention
  else
    attention='sdpa (FlashAttention did not build: the reason is above)'
  fi
fi
count=$(find .venv/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
say "done: $lock ($((count)) packages, Python $version) in $PWD/.venv; attention: $attention; $SECONDS s"
