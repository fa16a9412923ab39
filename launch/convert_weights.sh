#!/usr/bin/env bash
# Published weights -> the folder of converted weights that the preset sd15 starts from.
#
#   launch/convert_weights.sh --to=DIR [--sd15=PATH] [--clip=PATH] [--vd=PATH]
#                             [--optimus=PATH --bert=DIR --gpt2=DIR] [--dry-run]
#
# Runs `medm2g convert NAME --from PATH --to DIR/NAME` for each that is named; a part that is there already is left alone.
# Files are read from where they were downloaded to, nothing is fetched. Ends with what is missing, and with the line that
# selects the folder (MEDM2G_SD_WEIGHTS).
#
#   --sd15=PATH      Stable Diffusion 1.5: a diffusers folder, or the single .safetensors or .ckpt file
#   --clip=PATH      CLIP ViT-L/14: a transformers folder
#   --vd=PATH        Versatile Diffusion: a diffusers folder, or its .pth file
#   --optimus=PATH   Optimus: optimus-vae.pth
#   --bert=DIR       the folder of BERT's tokenizer (bert-base-cased), which Optimus's file does not hold
#   --gpt2=DIR       that of GPT-2's
#   --to=DIR         where the four folders go
#   --dry-run        print the commands
#   --help           this text
#
# PYTHON as in launch/local.sh.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

dry="" to="" bert="" gpt2=""
names=() paths=()
for arg in "$@"; do
  case $arg in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "$here/launch/convert_weights.sh" && exit 0 ;;
    --dry-run) dry=1 ;;
    --to=*) to=${arg#--to=} ;;
    --bert=*) bert=${arg#--bert=} ;;
    --gpt2=*) gpt2=${arg#--gpt2=} ;;
    --sd15=* | --clip=* | --vd=* | --optimus=*)
      name=${arg%%=*}
      names+=("${name#--}")
      paths+=("${arg#*=}")
      ;;
    *) echo "error: unknown argument $arg; launch/convert_weights.sh --help lists them" >&2 && exit 2 ;;
  esac
done
if [[ -z $to || ${#names[@]} == 0 ]]; then
  echo "error: say what to convert and where to: launch/convert_weights.sh --sd15=v1-5-pruned.safetensors --to=DIR" >&2
  exit 2
fi
if [[ " ${names[*]} " == *" optimus "* && ( -z $bert || -z $gpt2 ) ]]; then
  echo "error: --optimus needs --bert=DIR and --gpt2=DIR, the folders of the two tokenizers" >&2
  exit 2
fi
[[ $to == /* ]] || to=$PWD/$to
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x $here/.venv/bin/python ]] || PYTHON=$here/.venv/bin/python
fi
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

for i in "${!names[@]}"; do
  target=$to/${names[$i]}
  if [[ -e $target ]]; then
    echo "# $target is there already"
    continue
  fi
  command=("$PYTHON" -m medm2g_jax convert "${names[$i]}" --from "${paths[$i]}" --to "$target")
  [[ ${names[$i]} != optimus ]] || command+=(--bert "$bert" --gpt2 "$gpt2")
  printf '%q ' "${command[@]}"
  echo
  [[ -n $dry ]] || "${command[@]}"
done
for name in sd15 clip vd optimus; do
  case " ${names[*]} " in
    *" $name "*) ;;
    *) [[ -e $to/$name ]] || echo "# missing: $to/$name (launch/convert_weights.sh --$name=PATH --to=$to)" ;;
  esac
done
printf 'export MEDM2G_SD_WEIGHTS=%q\n' "$to"
