#!/usr/bin/env bash
# Train on a Cloud TPU VM or slice, from an empty project to a finished run, through preemptions.
#
#   launch/tpu_vm.sh --name=NAME --project=PROJECT --zone=ZONE --type=v5litepod-8 --version=RUNTIME [OPTION ...] \
#       -- --config=configs/text_ct.py:sd15 --workdir=gs://BUCKET/runs/a
#   launch/tpu_vm.sh --name=... ... -- launch/recipe.sh sd15 --workdir=gs://BUCKET/runs/a
#   launch/tpu_vm.sh --name=NAME --project=PROJECT --zone=ZONE --down
#
# Enables the services, makes the buckets that are not there, creates the TPU, installs on every worker (with a Python of
# its own where the image's is older than 3.11), brings data and weights, starts the command on every worker, detached,
# and looks after it: where the TPU was preempted, or the command was told to stop, everything is made again and the
# command goes on from its last checkpoint. When it has ended, the TPU is deleted. Interrupted here, the run goes on
# there, and the same command finds it again.
#
#   --name, --project, --zone    of the TPU
#   --type=TYPE                  accelerator type: v5litepod-8 is 8 chips of v5e; does it fit? medm2g plan --topology
#   --version=RUNTIME            the TPU's image, as `gcloud compute tpus tpu-vm versions list` names them
#   --spot                       preemptible capacity
#   --create=FLAG                one more flag for the creation (--create=--network=NAME); repeat
#   --data=PLACE                 prepared data: gs://..., copied to each worker's disk, or a folder here; MEDM2G_DATA there
#   --weights=PLACE              converted weights, likewise; MEDM2G_SD_WEIGHTS there
#   --mount                      mount gs:// data and weights with gcsfuse instead of copying them
#   --env=NAME=VALUE             for the command; repeat
#   --poll=SECONDS               between looks at the run, default 60
#   --keep                       leave the TPU when the command has ended
#   --down                       delete the TPU and do nothing else
#   --dry-run                    print every command, through one preemption, and what the files hold that are sent
#   --help                       this text
#
# After --: arguments of medm2g_jax.main, or another command. With several workers --workdir must be a bucket.

# shellcheck disable=SC2016 # what stands in single quotes is for the workers' shells
set -euo pipefail
exec 3>&1 # where commands are shown that are run for their answer
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry="" name="" project="" zone="" type="" version="" data="" weights="" spot="" mount="" keep="" down="" poll=60
create=() environment=() command=()
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' launch/tpu_vm.sh && exit 0 ;;
    --dry-run) dry=1 ;;
    --name=*) name=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --create=*) create+=("${1#*=}") ;;
    --data=*) data=${1#*=} ;;
    --weights=*) weights=${1#*=} ;;
    --mount) mount=1 ;;
    --env=*=*) environment+=("${1#*=}") ;;
    --poll=*) poll=${1#*=} ;;
    --keep) keep=1 ;;
    --down) down=1 ;;
    --) shift && command=("$@") && break ;;
    *) echo "error: unknown argument $1; the trainer's own come after --; launch/tpu_vm.sh --help lists the others" >&2 && exit 2 ;;
  esac
  shift
done
needed=(name project zone)
[[ -n $down ]] || needed+=(type version)
for one in "${needed[@]}"; do
  if [[ -z ${!one} ]]; then
    echo "error: --$one=... is needed; launch/tpu_vm.sh --help says what it is" >&2
    exit 2
  fi
done
if [[ -z $down && ${#command[@]} == 0 ]]; then
  echo "error: say what to run after --, as in -- --config=configs/text_ct.py --workdir=gs://BUCKET/runs/a" >&2
  exit 2
fi

at=(--project="$project" --zone="$zone" --quiet)
vm=(gcloud compute tpus tpu-vm)

# Prints a command as one would type it.
show() {
  local word out=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      out+="$word "
    elif [[ $word != *"'"* ]]; then
      out+="'$word' "
    else
      out+="$(printf '%q' "$word") "
    fi
  done
  echo "+ ${out% }"
}

run() {
  show "$@"
  [[ -n $dry ]] || "$@"
}

# For a command that is run for its answer: in a dry run it is shown, and there is none.
ask() {
  if [[ -n $dry ]]; then
    show "$@" >&3
  else
    "$@"
  fi
}

everywhere() { run "${vm[@]}" ssh "$name" "${at[@]}" --worker=all --command="$1"; }

delete() { run "${vm[@]}" delete "$name" "${at[@]}"; }

if [[ -n $down ]]; then
  delete
  exit 0
fi

# --- what is sent to the workers --------------------------------------------------------------------------------------

if [[ ${command[0]} == -* ]]; then
  command=(.venv/bin/python -m medm2g_jax.main "${command[@]}")
fi
command+=(--distributed)

setup_script() {
  cat <<'END'
# Installs into ~/medm2g, with an environment of its own in .venv; leaves a command that is running alone.
set -euo pipefail
cd "$HOME"
if [ -e medm2g.pid ] && kill -0 "$(cat medm2g.pid)" 2>/dev/null; then exit 0; fi
mkdir -p medm2g
tar xzf medm2g.tgz -C medm2g
cd medm2g
if [ -e .venv/installed ]; then exit 0; fi
python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -n "$python" ]; then
  "$python" -m venv .venv
else # the image's Python is older, and its package manager is often locked by updates: uv brings one
  python3 -m pip install --user --quiet uv
  python3 -m uv venv --seed --python 3.11 .venv
fi
.venv/bin/python -m pip install --quiet -r requirements.txt gcsfs "jax[tpu]$(sed -n 's/^jax\(==.*\)/\1/p' requirements.txt)"
.venv/bin/python -m pip install --quiet --no-deps -e .
touch .venv/installed
END
}

# place NAME PLACE: lines that bring PLACE to ~/NAME; a folder of this machine is sent by itself.
place() {
  [[ $2 == gs://* ]] || return 0
  echo "mkdir -p \"\$HOME/$1\""
  if [[ -n $mount ]]; then
    local path=${2#gs://}
    local bucket=${path%%/*} inside=""
    [[ $path != */* ]] || inside=${path#*/}
    printf 'command -v gcsfuse >/dev/null || { echo "error: no gcsfuse on this image; leave --mount out" >&2; exit 1; }\n'
    printf 'mountpoint -q "$HOME/%s" || gcsfuse --implicit-dirs %s%q "$HOME/%s"\n' \
      "$1" "${inside:+--only-dir $(printf '%q' "${inside%/}") }" "$bucket" "$1"
  else
    printf 'gcloud storage rsync --recursive %q "$HOME/%s"\n' "$2" "$1"
  fi
}

fetch_script() {
  echo "# Data and weights, to this worker."
  echo "set -euo pipefail"
  [[ -z $data ]] || place medm2g_data "$data"
  [[ -z $weights ]] || place medm2g_weights "$weights"
}

job_script() {
  echo "# The command, and its exit status when it has ended."
  echo 'cd "$HOME/medm2g"'
  echo "export PYTHON=.venv/bin/python"
  [[ -z $data ]] || echo 'export MEDM2G_DATA="$HOME/medm2g_data"'
  [[ -z $weights ]] || echo 'export MEDM2G_SD_WEIGHTS="$HOME/medm2g_weights"'
  local one
  for one in ${environment[@]+"${environment[@]}"}; do
    printf 'export %s=%q\n' "${one%%=*}" "${one#*=}"
  done
  printf '%q ' "${command[@]}"
  echo
  echo 'echo $? >"$HOME/medm2g.status"'
}

start_script() {
  cat <<'END'
# Starts job.sh detached from this connection, unless it is running.
set -euo pipefail
cd "$HOME"
if [ -e medm2g.pid ] && kill -0 "$(cat medm2g.pid)" 2>/dev/null; then exit 0; fi
rm -f medm2g.status
cp job.sh running.sh # bash reads a script as it goes: job.sh may be sent again meanwhile
setsid nohup bash running.sh >>medm2g.log 2>&1 </dev/null &
echo $! >medm2g.pid
END
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
setup_script >"$folder/setup.sh"
fetch_script >"$folder/fetch.sh"
job_script >"$folder/job.sh"
start_script >"$folder/start.sh"
if [[ -n $dry ]]; then
  for one in setup fetch job start; do
    echo "--- $one.sh"
    cat "$folder/$one.sh"
  done
  echo "---"
fi
echo "+ git ls-files -z | tar --null --files-from=- -czf medm2g.tgz"
[[ -n $dry ]] || git ls-files -z | tar --null --files-from=- -czf "$folder/medm2g.tgz"

# --- the steps --------------------------------------------------------------------------------------------------------

prepare_project() {
  run gcloud services enable tpu.googleapis.com storage.googleapis.com --project="$project" --quiet
  local word bucket
  for word in "${command[@]}"; do
    [[ $word == --workdir=gs://* ]] || continue
    bucket=${word#--workdir=gs://}
    bucket=gs://${bucket%%/*}
    if ! ask gcloud storage buckets describe "$bucket" --format="value(name)" >/dev/null 2>&1 || [[ -n $dry ]]; then
      # In the TPU's own region: from another one every checkpoint is slow, and paid for.
      run gcloud storage buckets create "$bucket" --project="$project" --location="${zone%-*}" \
        --uniform-bucket-level-access --quiet
    fi
  done
}

# READY, PREEMPTED and so on; NONE where there is no such TPU, UNKNOWN where gcloud could not say.
state() {
  local answer log=$folder/state.log
  if answer=$(ask "${vm[@]}" describe "$name" "${at[@]}" --format="value(state)" 2>"$log"); then
    echo "${answer:-NONE}"
  elif grep -qiE 'NOT_FOUND|not found' "$log"; then
    echo NONE
  else
    cat "$log" >&2
    echo UNKNOWN
  fi
}

# Again and again while there is no capacity: a spot slice can take many tries.
create_tpu() {
  local flags=(--accelerator-type="$type" --version="$version" --scopes=cloud-platform) log=$folder/create.log
  [[ -z $spot ]] || flags+=(--spot)
  until run "${vm[@]}" create "$name" "${at[@]}" "${flags[@]}" ${create[@]+"${create[@]}"} 2>"$log"; do
    cat "$log" >&2
    if ! grep -qiE 'capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|stockout|internal error' "$log"; then
      echo "error: the TPU was not created; gcloud says why above" >&2
      exit 1
    fi
    echo "# no capacity; again in $poll s"
    sleep "$poll"
  done
}

install() {
  local files=(setup.sh fetch.sh job.sh start.sh medm2g.tgz) from=$folder/
  [[ -z $dry ]] || from=""
  run "${vm[@]}" scp "${files[@]/#/$from}" "$name:" "${at[@]}" --worker=all &&
    everywhere "bash setup.sh" &&
    send "$data" medm2g_data &&
    send "$weights" medm2g_weights &&
    everywhere "bash fetch.sh" &&
    everywhere "bash start.sh"
}

# send PLACE NAME: a folder of this machine to ~/NAME of every worker.
send() {
  [[ -z $1 || $1 == gs://* ]] || run "${vm[@]}" scp --recurse "$1" "$name:$2" "${at[@]}" --worker=all
}

# Prints what the first worker has logged last, and sets `status` once the command has ended.
look() {
  local answer
  answer=$(ask "${vm[@]}" ssh "$name" "${at[@]}" --worker=0 \
    --command='tail -n 2 medm2g.log; if [ -e medm2g.status ]; then echo "status $(cat medm2g.status)"; fi') || true
  [[ -z $answer ]] || echo "$answer"
  case ${answer##*$'\n'} in
    "status "*) status=${answer##*status } ;;
  esac
}

# A TPU that is ready, with the command running on it.
up() {
  while true; do
    case $(state) in
      READY) ;;
      NONE) create_tpu ;;
      CREATING | UNKNOWN)
        sleep "$poll"
        continue
        ;;
      *)
        delete
        create_tpu
        ;;
    esac
    if install; then
      return
    fi
    if [[ $(state) == READY ]]; then
      echo "error: a step failed on a TPU that is there; it is left as it is: repair and run the same command, or --down" >&2
      exit 1
    fi
  done
}

prepare_project
status=""
up
if [[ -n $dry ]]; then
  echo "# every $poll s, until the command has ended:"
  state >/dev/null
  look
  echo "# where the TPU was preempted: all of it again; the command resumes from its last checkpoint"
  state >/dev/null
  delete
  create_tpu
  install
  echo "# where the command was told to stop, and has saved (status 143): it resumes"
  everywhere "bash start.sh"
  echo "# when it has ended:"
  status=0
fi
while [[ -z $status ]]; do
  sleep "$poll"
  case $(state) in
    READY) look ;;
    UNKNOWN) ;;
    *)
      echo "# the TPU is gone: all of it again, the command resumes"
      up
      ;;
  esac
  if [[ $status == 143 ]]; then
    echo "# told to stop, and saved: it resumes"
    status=""
    sleep "$poll"
    everywhere "bash start.sh" || true # gone meanwhile: the next look finds out
  fi
done
if [[ -n $keep ]]; then
  echo "# kept; delete it with: launch/tpu_vm.sh --name=$name --project=$project --zone=$zone --down"
else
  delete
fi
exit "$status"
