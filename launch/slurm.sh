#!/usr/bin/env bash
# GPU hosts under Slurm: writes a batch script, and submits it.
#
#   launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 -- \
#       train --config=configs/picto_tags.py --workdir=/shared/runs/picto
#
#   --nodes=N          hosts (default 1)
#   --gpus-per-node=N  processes of a host, one for each GPU (default 8)
#   --cpus-per-gpu=N   cores of each process (default 8)
#   --name=NAME        of the job (default vixml)
#   --time=TIME        limit, as Slurm takes it (default 24:00:00)
#   --partition=NAME, --account=NAME, --constraint=EXPRESSION   as Slurm takes them (default: the cluster's)
#   --log=FILE         output (default slurm-%j.log)
#   --dry-run          print the batch script, and how it would be submitted
#
# What follows `--` goes to vixml, which must be installed in the .venv of this directory; directory and
# workdir lie on a file system that all hosts see. Two minutes before the time limit, and on pre-emption,
# Slurm sends SIGTERM: the run saves and ends with 75, and the job queues itself again.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=8 cpus=8 name=vixml time=24:00:00 log=slurm-%j.log dry_run="" extra=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --cpus-per-gpu=*) cpus=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --log=*) log=${1#*=} ;;
    --partition=* | --account=* | --constraint=*) extra+=("$1") ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; what goes to vixml follows --" ;;
  esac
  shift
done
(($#)) || fail "no command; give one after --, as in -- train --config=configs/demo.py --workdir=/shared/demo"
check_count --nodes "$nodes"
check_count --gpus-per-node "$gpus"
check_count --cpus-per-gpu "$cpus"
for argument in "$log" "${extra[@]}"; do
  [[ $argument != *[[:space:]]* ]] || fail "$argument holds white space, which a batch script's header cannot"
done

# All GPUs of a host are seen by each of its processes, and JAX gives each its own.
batch=$(
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --output=$log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
$(for option in "${extra[@]}"; do echo "#SBATCH $option"; done)
set -uo pipefail
export VIXML_DISTRIBUTED=1
srun --kill-on-bad-exit=0 --wait=60 $(show .venv/bin/python -m vixml_jax "$@")
code=\$?
if ((code == $PREEMPTED)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
)
batch=$(sed '/^$/d' <<<"$batch")
if [[ $dry_run ]]; then
  printf '%s\n' "$batch"
  echo "# sbatch, with this script on its standard input"
else
  sbatch <<<"$batch"
fi
