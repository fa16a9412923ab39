#!/usr/bin/env bash
# Makes what lies here: costs of every stage, then sweeps, cheapest first. Days on two cores for all of sd15; each row is
# written when it is there, and the same command goes on where it stopped. Needs `make plan-env`.
#
#   results/plan/run.sh [PRESET ...]       # default: base sd15
set -euo pipefail
cd "$(dirname "$0")/../.."
medm2g="${MEDM2G:-.venv/bin/medm2g}"
presets=("$@")
[[ ${#presets[@]} -gt 0 ]] || presets=(base sd15)

for preset in "${presets[@]}"; do
  "$medm2g" plan --config="configs/ct_mri.py:$preset" --costs --out="results/plan/costs-$preset.json" \
    | tee "results/plan/costs-$preset.md"
  for stage in ldm:ct text_ct image_vae align:text_ct ldm:text text_vae ct_mri align:text_xray align:ct_mri ldm:xray \
    ldm:mri text_xray; do
    config="${stage%%:*}" words="$preset"
    [[ "$stage" == *:* ]] && words="${stage#*:},$preset"
    for topology in v5e:2x4 v5p:2x2x2; do
      name="results/plan/${stage/:/_}-$preset-${topology/:/-}"
      "$medm2g" plan --config="configs/$config.py:$words" --sweep --topology="$topology" --batches=1,4,16 \
        --out="$name.json" | tee "$name.md"
    done
  done
done
