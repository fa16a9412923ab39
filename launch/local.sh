#!/usr/bin/env bash
# Train on this machine.
#
#   launch/local.sh [--dry-run] --config=configs/text_ct.py:tiny [--workdir=DIR] [--config.FIELD=VALUE ...]
#
# Runs python -m medm2g_jax.main with these arguments, and with glibc told to keep its memory: it otherwise returns every
# step's buffers to the kernel and faults them in again, about a fifth of the time on CPU. Paths are taken from the top of
# the repository. The same command resumes.
#
#   --dry-run   print the command instead
#   --help      this text
#
# PYTHON names the interpreter; default: .venv/bin/python of this repository where it is there, else python3.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=""
args=()
for arg in "$@"; do
  case $arg in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' launch/local.sh && exit 0 ;;
    --dry-run) dry=1 ;;
    *) args+=("$arg") ;;
  esac
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
command=(env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  "$PYTHON" -m medm2g_jax.main ${args[@]+"${args[@]}"})
if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
