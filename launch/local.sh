#!/usr/bin/env bash
# Several processes on one machine, as one run.
#
#   launch/local.sh --processes=2 --cpu-devices=4 -- train --config=configs/demo.py --workdir=runs/demo
#   launch/local.sh --processes=8 --gpus=1 -- train --config=configs/picto_tags.py --workdir=runs/picto
#
#   --processes=N    processes (default 2)
#   --cpu-devices=N  run on CPUs, with so many devices a process
#   --gpus=N         GPUs of each process, in the order of their numbers
#   --port=N         of the coordinator on 127.0.0.1 (default: a free one)
#   --dry-run        print what would be executed
#
# What follows `--` goes to vixml. The output of process 0 is shown as it is, that of the others with their
# number in front. If a process fails, the others are ended, and its exit code is the script's. SIGTERM is
# handed on: the run saves and ends with 75. PYTHON names the interpreter (default .venv/bin/python).
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2 cpu_devices="" gpus="" port="" dry_run=""
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --cpu-devices=*) cpu_devices=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; what goes to vixml follows --" ;;
  esac
  shift
done
(($#)) || fail "no command; give one after --, as in -- train --config=configs/demo.py --workdir=runs/demo"
check_count --processes "$processes"
[[ -z $cpu_devices ]] || check_count --cpu-devices "$cpu_devices"
[[ -z $gpus ]] || check_count --gpus "$gpus"
[[ -z $port ]] || check_count --port "$port"
[[ -z $cpu_devices || -z $gpus ]] || fail "give --cpu-devices or --gpus, not both"

python=${PYTHON:-.venv/bin/python}
if [[ -z $port ]]; then
  port=12345
  [[ $dry_run ]] || port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# Sets `command` to that of process $1.
command_of() {
  command=(env VIXML_COORDINATOR="127.0.0.1:$port" VIXML_PROCESSES="$processes" VIXML_PROCESS="$1")
  if [[ $cpu_devices ]]; then
    command+=(JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$cpu_devices")
  elif [[ $gpus ]]; then
    local first=$(($1 * gpus))
    command+=(CUDA_VISIBLE_DEVICES="$(seq -s, "$first" $((first + gpus - 1)))")
  fi
  command+=("$python" -m vixml_jax "${arguments[@]}")
}

arguments=("$@")
alive=()
# Children of a script ignore SIGINT, so that Ctrl-C is handed on as SIGTERM too.
trap 'kill -TERM "${alive[@]}" 2>/dev/null || true' TERM INT
for ((process = 0; process < processes; process++)); do
  command_of "$process"
  if [[ $dry_run ]]; then
    show "${command[@]}"
  elif ((process)); then
    "${command[@]}" > >(sed -u "s/^/[$process] /") 2> >(sed -u "s/^/[$process] /" >&2) &
    alive+=($!)
  else
    "${command[@]}" &
    alive+=($!)
  fi
done

# The first failure is the run's; that all is saved and may go on is said only where nothing else failed. Who waits
# for a process that has failed would wait for long: ten seconds do.
code=0 deadline=""
while ((${#alive[@]})); do
  sleep 0.1
  left=()
  for pid in "${alive[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if ((status && (!code || code == PREEMPTED))); then
      code=$status
      ((code == PREEMPTED)) || deadline=$((SECONDS + 10))
    fi
  done
  alive=("${left[@]}")
  if [[ $deadline ]] && ((SECONDS >= deadline && ${#alive[@]})); then
    kill -KILL "${alive[@]}" 2>/dev/null || true
  fi
done
wait
exit "$code"
