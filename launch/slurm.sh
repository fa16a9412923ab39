#!/usr/bin/env bash
# Train on a Slurm cluster: several nodes, requeued and resumed when it is preempted or runs into its time limit.
#
#   launch/slurm.sh [--nodes=N] [--gpus=N] [--sbatch=OPTION ...] [--dry-run] -- --config=configs/text_ct.py --workdir=DIR
#   launch/slurm.sh --nodes=4 --gpus=8 -- launch/recipe.sh sd15 --workdir=DIR
#
# Writes a batch script and gives it to sbatch. jax.distributed finds its peers in Slurm's environment, one task a GPU.
# Before the time limit, or when Slurm preempts the job, every task gets SIGTERM; all of them then save at the same step
# and end with status 143, and the job queues again. DIR and this repository, with its environment, must be on a file
# system that all nodes share.
#
#   --nodes=N         default 1
#   --gpus=N          GPUs a node, default 0: CPU, one task a node
#   --time=LIMIT      of one run of the job, as sbatch takes it
#   --grace=SECONDS   between SIGTERM and the time limit, default 300
#   --sbatch=OPTION   a line of options for sbatch (--sbatch=--partition=NAME); repeat
#   --dry-run         print the batch script and the command
#   --help            this text
#
# After --: arguments of medm2g_jax.main, or another command (launch/recipe.sh ...). PYTHON as in launch/local.sh; the
# environment goes along (MEDM2G_DATA, MEDM2G_SD_WEIGHTS).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry="" nodes=1 gpus=0 limit="" grace=300
options=() command=()
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' launch/slurm.sh && exit 0 ;;
    --dry-run) dry=1 ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --sbatch=*) options+=("${1#*=}") ;;
    --) shift && command=("$@") && break ;;
    *) echo "error: unknown argument $1; the trainer's own come after --, as in -- --config=configs/text_ct.py" >&2 && exit 2 ;;
  esac
  shift
done
if [[ ${#command[@]} == 0 ]]; then
  echo "error: say what to run after --, as in launch/slurm.sh --nodes=2 --gpus=8 -- --config=configs/text_ct.py" >&2
  exit 2
fi
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
if [[ ${command[0]} == -* ]]; then
  command=("$PYTHON" -m medm2g_jax.main "${command[@]}")
fi
if ((nodes * (gpus > 0 ? gpus : 1) > 1)); then
  command+=(--distributed)
fi

script() {
  echo "#!/usr/bin/env bash"
  echo "#SBATCH --job-name=medm2g"
  echo "#SBATCH --nodes=$nodes"
  echo "#SBATCH --ntasks-per-node=$((gpus > 0 ? gpus : 1))"
  ((gpus == 0)) || echo "#SBATCH --gpus-per-node=$gpus"
  [[ -z $limit ]] || echo "#SBATCH --time=$limit"
  echo "#SBATCH --requeue"
  echo "#SBATCH --open-mode=append"
  echo "#SBATCH --signal=TERM@$grace"
  local option
  for option in ${options[@]+"${options[@]}"}; do
    echo "#SBATCH $option"
  done
  printf 'cd %q\n' "$PWD"
  printf 'export PYTHON=%q MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 ' "$PYTHON"
  printf 'GLIBC_TUNABLES=glibc.malloc.hugetlb=1\n'
  printf 'srun --kill-on-bad-exit=1'
  printf ' %q' "${command[@]}"
  echo
  cat <<'END'
status=$?
# 143: asked to stop, and saved.
if [ "$status" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
END
}

if [[ -n $dry ]]; then
  script
  echo "# given to: sbatch"
else
  script | sbatch
fi
