#!/usr/bin/env bash
# What pip cannot bring: a compiler for the messages, and the libraries that software rendering opens.
# As root it installs what is missing; otherwise it says what to install, and stops.
set -euo pipefail

missing=()
# Read once: under pipefail a `grep -q` that stops early would make ldconfig fail.
libraries=$(/sbin/ldconfig -p)
need_library() { [[ $libraries == *"$1"* ]] || missing+=("$2"); }

need_library libOSMesa.so libosmesa6
need_library libGL.so.1 libgl1
need_library libgthread-2.0.so.0 libglib2.0-0
command -v g++ >/dev/null || missing+=(g++)
python=${1:?usage: system_packages.sh PYTHON [browser]}
if ! command -v "$python" >/dev/null; then
  missing+=(python3 python3-venv python3-dev)
else
  "$python" -c "import ensurepip" 2>/dev/null || missing+=(python3-venv)
  header=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")/Python.h
  [[ -f $header ]] || missing+=(python3-dev)
fi

# For the tests that look at a page as a person does.
if [[ ${2:-} == browser ]]; then command -v chromium >/dev/null || missing+=(chromium); fi

if ((${#missing[@]} == 0)); then exit 0; fi
if ((EUID == 0)) && command -v apt-get >/dev/null; then
  echo "installing system packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "missing system packages; install them and run make again:  sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
