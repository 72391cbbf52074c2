# Shared by the launch scripts; sourced, not run.
# shellcheck shell=bash

# What `vixml train` returns after a pre-emption (SIGTERM): all is saved, the same command continues (sysexits.h).
export PREEMPTED=75

# Prints the comment at the top of the calling script, its help.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

fail() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Prints a command in a form that a shell reads back.
show() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it where --dry-run was given (dry_run=1).
run() {
  if [[ ${dry_run:-} ]]; then show "$@"; else "$@"; fi
}

# Fails unless $2, the value of the flag $1, is a whole number of at least 1.
check_count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 is not a whole number above 0"; }

# Fails unless $2, the value of the flag $1, is a name as clouds take it.
check_name() { [[ $2 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "$1=$2: give lower-case letters, digits and dashes"; }

# Sets topology and chips of a TPU slice, named as Cloud TPU does: v5litepod-16, v5p-128 (cores), v6e-256.
tpu_slice() {
  local generation=${1%-*} size=${1##*-}
  case $generation in
    v5litepod | v6e)
      chips=$size
      case $size in
        4) topology=2x2 ;; 8) topology=2x4 ;; 16) topology=4x4 ;; 32) topology=4x8 ;;
        64) topology=8x8 ;; 128) topology=8x16 ;; 256) topology=16x16 ;;
        *) fail "no $generation slice has $size chips" ;;
      esac
      ;;
    v5p)
      case $size in # two cores a chip
        8) topology=2x2x1 ;; 16) topology=2x2x2 ;; 32) topology=2x2x4 ;; 64) topology=2x4x4 ;;
        128) topology=4x4x4 ;; 256) topology=4x4x8 ;; 512) topology=4x8x8 ;; 1024) topology=8x8x8 ;;
        *) fail "no v5p slice has $size cores" ;;
      esac
      chips=$((size / 2))
      ;;
    *) fail "unknown TPU type $1; known are v5litepod-N, v5p-N and v6e-N" ;;
  esac
  # Hosts of slices carry four chips each.
  export hosts=$((chips / 4)) topology chips
}
