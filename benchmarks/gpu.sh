#!/usr/bin/env bash
# The first quarter of an hour on one GPU, from a bare machine: an environment, then benchmarks/gpu.py.
#
#   benchmarks/gpu.sh [--wheels=DIR] [--dry-run] [--minutes=14] [--results=DIR]
#
# --wheels: a folder of wheels to install from, without any network; made before, where there is one, by
#   python3 -m pip download -d DIR -r requirements.txt "jax[cuda13]==0.10.2" torch==2.13.0 setuptools wheel
# Without it the environment is .venv, as `make test` makes it, or the Python that MEDM2G_PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=""
rest=()
for argument in "$@"; do
  case "$argument" in
    --wheels=*) wheels="${argument#--wheels=}" ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) rest+=("$argument") ;;
  esac
done

python="${MEDM2G_PYTHON:-.venv/bin/python}"
if [[ -n "$wheels" ]]; then
  [[ -d "$wheels" ]] || { echo "error: --wheels: no folder $wheels" >&2; exit 2; }
  python3 -m venv .venv-gpu
  python=.venv-gpu/bin/python
  "$python" -m pip --disable-pip-version-check install --quiet --no-index --find-links "$wheels" \
    -r requirements.txt "$(sed -n 's/^jax\(==.*\)/jax[cuda13]\1/p' requirements.txt)" torch
fi
command -v "$python" >/dev/null || { echo "error: no $python; run \`make test\` once, or name --wheels=DIR" >&2; exit 2; }
exec "$python" -m benchmarks.gpu "${rest[@]}"
