#!/usr/bin/env bash
# A Cloud TPU pod slice, by a queued resource: asks for it, waits, installs, runs, and continues when it was
# pre-empted.
#
#   launch/tpu_pod.sh --name=vixml-1 --type=v5litepod-16 --zone=us-west4-a --spot --nfs=10.0.0.2:/share -- \
#       train --config=configs/picto_tags.py --workdir=/mnt/vixml/runs/picto
#   launch/tpu_pod.sh --name=vixml-1 --zone=us-west4-a --delete
#
#   --name=NAME        of the queued resource, and of its TPU
#   --type=TYPE        of the slice, as Cloud TPU names it: v5litepod-16, v5p-128 (cores), v6e-256
#   --zone=ZONE
#   --project=PROJECT  (default: gcloud's)
#   --spot             pre-emptible, and cheaper
#   --nfs=HOST:/PATH   a share that is mounted at /mnt/vixml on every host; workdir and data must lie on one
#   --attempts=N       how often a slice is asked for in all, when it is pre-empted (default 10)
#   --delete           give the slice back
#   --dry-run          print what would be executed, once, as if nothing failed
#
# What follows `--` goes to vixml on every host at once. The files that git has are copied there. The slice
# stays when the run has ended: give it back with --delete.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" type="" zone="" nfs="" attempts=10 delete="" dry_run="" project=() spot=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=("$1") ;;
    --spot) spot=(--spot) ;;
    --nfs=*) nfs=${1#*=} ;;
    --attempts=*) attempts=${1#*=} ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; what goes to vixml follows --" ;;
  esac
  shift
done
check_name --name "$name"
[[ $zone ]] || fail "no --zone; give one, as in --zone=us-west4-a"
check_count --attempts "$attempts"
where=(--zone="$zone" "${project[@]}")

tpu() { run gcloud compute tpus "$@" "${where[@]}"; }

give_back() { tpu queued-resources delete "$name" --force --quiet; }

if [[ $delete ]]; then
  give_back
  exit
fi
(($#)) || fail "no command; give one after --, as in -- train --config=configs/demo.py --workdir=/mnt/vixml/demo"
tpu_slice "$type"
[[ -z $nfs || $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]] || fail "--nfs=$nfs: give HOST:/PATH"
case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
esac

on_all() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

# What there is of the slice: NONE where there is none, UNKNOWN where gcloud does not say, but why.
state() {
  local errors said status=0
  errors=$(mktemp)
  said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors") ||
    status=$?
  if ((!status)); then
    echo "$said"
  elif grep -qi 'not.found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

wait_for_slice() {
  if [[ $dry_run ]]; then
    echo "# until it says ACTIVE:"
    tpu queued-resources describe "$name" --format='value(state.state)'
    return
  fi
  local now seen="" unknown=0
  while now=$(state); [[ $now != ACTIVE ]]; do
    [[ $now == "$seen" ]] || echo "$name: $now" >&2
    seen=$now
    case $now in
      NONE | FAILED | SUSPENDED | SUSPENDING) return 1 ;;
      UNKNOWN) ((++unknown < 15)) || fail "gcloud does not say what became of $name" ;;
      *) unknown=0 ;;
    esac
    sleep 20
  done
}

# Each step by itself: within a condition, bash goes on after one that fails.
install() {
  local archive=/tmp/$name.tar.gz code=0
  run git archive --format=tar.gz --output="$archive" HEAD || return
  tpu tpu-vm scp "$archive" "$name:$archive" --worker=all || code=$?
  [[ $dry_run ]] || rm -f "$archive"
  ((!code)) || return "$code"
  on_all "mkdir -p vixml && tar -xzf $archive -C vixml && cd vixml && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'" || return
  [[ -z $nfs ]] ||
    on_all "sudo mkdir -p /mnt/vixml && (mountpoint -q /mnt/vixml || sudo mount -t nfs $nfs /mnt/vixml) && sudo chmod 777 /mnt/vixml"
}

for ((attempt = 1; attempt <= attempts; attempt++)); do
  now=NONE
  [[ $dry_run ]] || now=$(state)
  [[ $now != UNKNOWN ]] || fail "gcloud does not say whether there is a $name"
  if [[ $now == @(FAILED|SUSPENDED) ]]; then
    give_back
    now=NONE
  fi
  if [[ $now == NONE ]]; then
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  fi
  code=0
  if wait_for_slice; then
    installed=""
    if install; then
      installed=1
      on_all "cd vixml && VIXML_DISTRIBUTED=1 $(show .venv/bin/python -m vixml_jax "$@")" || code=$?
      [[ -z $dry_run ]] || exit 0
      # A user's mistake stays one on another slice; so does success.
      ((code != 0 && code != 2)) || exit "$code"
    fi
    if [[ $(state) == @(ACTIVE|UNKNOWN) ]] && ((code != PREEMPTED)); then
      [[ $installed ]] || fail "cannot install on $name, which is there: see above"
      exit "$code"
    fi
  fi
  echo "$name: lost the slice (attempt $attempt of $attempts)" >&2
done
fail "no slice lasted"
