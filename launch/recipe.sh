#!/usr/bin/env bash
# Every stage of the paper, one after the other: autoencoders, alignments, single flows, rounds.
#
#   launch/recipe.sh [WORDS] [--config=FILE:WORDS] [--workdir=DIR] [--config.FIELD=VALUE ...] [--dry-run]
#   launch/recipe.sh tiny                    the model of all four modalities on the phantom, in minutes
#   launch/recipe.sh sd15 --workdir=runs/a   at the paper's sizes, from converted weights in MEDM2G_SD_WEIGHTS
#
# The stages and their order are what `medm2g plan` says of the last one. Each is a command of its own that requires what
# it stands on (--config.upstream=require); what is finished is passed over, what was stopped goes on: the same command
# resumes.
#
#   WORDS                           words after the colon of the last stage's config: tiny, sd15, paper
#   --config=FILE:WORDS             another last stage; default configs/ct_mri.py, the whole model
#   --workdir=DIR                   run root; default as the trainer's
#   --config.FIELD=VALUE            for every stage; steps, batch, lr and the like for the last one only
#   --config.stages.NAME.FIELD=V    for the stage NAME
#   --dry-run                       print the commands of the stages that are left
#   --help                          this text
#
# Anything else goes to every stage's command as it is (--distributed). PYTHON as in launch/local.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry="" words="" config="" workdir=()
fields=() others=()
for arg in "$@"; do
  case $arg in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' launch/recipe.sh && exit 0 ;;
    --dry-run) dry=1 ;;
    --config=*) config=${arg#--config=} ;;
    --workdir=*) workdir=("$arg") ;;
    --config.*) fields+=("$arg") ;;
    -*) others+=("$arg") ;;
    *) words=${words:+$words,}$arg ;;
  esac
done
if [[ -n $words && -n $config ]]; then
  echo "error: words ($words) and --config=$config: write the words after the colon of --config" >&2
  exit 2
fi
config=${config:-configs/ct_mri.py${words:+:$words}}

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
export PYTHON

# The plan needs no accelerator, and must not take one from the stages.
plan=$(JAX_PLATFORMS=cpu "$PYTHON" -m medm2g_jax plan --commands --config="$config" \
  ${workdir[@]+"${workdir[@]}"} ${fields[@]+"${fields[@]}"})

args=()
while IFS= read -r line <&3; do
  if [[ $line == "#"* ]]; then
    echo "$line"
    continue
  fi
  eval "args=(${line#python -m medm2g_jax.main })" # quoted by plan for a shell
  if [[ -n $dry ]]; then
    launch/local.sh --dry-run "${args[@]}" ${others[@]+"${others[@]}"}
  else
    launch/local.sh "${args[@]}" ${others[@]+"${others[@]}"}
  fi
done 3<<<"$plan"
