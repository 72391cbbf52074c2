#!/usr/bin/env bash
# Google Kubernetes Engine: writes a JobSet, with the arguments that XPK takes, and applies it.
#
#   launch/gke_jobset.sh --workload=picto-1 --tpu-type=v5litepod-256 --docker-image=REGISTRY/vixml:1 \
#       --volume=nfs:10.0.0.2:/share -- train --config=configs/picto_tags.py --workdir=/mnt/vixml/runs/picto
#   launch/gke_jobset.sh --workload=picto-2 --gpu-type=nvidia-h100-80gb --gpus-per-node=8 --num-nodes=4 ...
#
#   --workload=NAME         of the JobSet
#   --docker-image=IMAGE    with vixml installed, and the configs in its working directory
#   --tpu-type=TYPE         a slice: v5litepod-16, v5p-128 (cores), v6e-256
#   --gpu-type=NAME         or GPUs, as GKE labels nodes: nvidia-h100-80gb, nvidia-h200-141gb
#   --num-nodes=N           GPU hosts (default 1), one process each
#   --gpus-per-node=N       (default 8)
#   --volume=nfs:HOST:/PATH or --volume=claim:NAME   mounted at /mnt/vixml; workdir and data lie on it
#   --priority=NAME         priority class (default: the cluster's)
#   --max-restarts=N        after pods failed (default 10); pre-emption and evictions do not count
#   --termination-grace-period-seconds=N   to save in after SIGTERM (default 120)
#   --env=NAME=VALUE        may be given several times
#   --namespace=NAME        (default: kubectl's)
#   --dry-run               print the JobSet, and how it would be applied
#
# What follows `--` goes to vixml in every pod. The cluster is that of kubectl's current context; it needs
# the JobSet controller. A pod that ends with 75 (pre-empted, all saved) or whose node is taken away is started
# again without counting; 2 (a user's mistake) fails the JobSet at once.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

workload="" image="" tpu_type="" gpu_type="" nodes=1 gpus=8 volume="" priority=""
restarts=10 grace=120 environment=() namespace=() dry_run=""
while (($#)); do
  case $1 in
    --workload=*) workload=${1#*=} ;;
    --docker-image=*) image=${1#*=} ;;
    --tpu-type=*) tpu_type=${1#*=} ;;
    --gpu-type=*) gpu_type=${1#*=} ;;
    --num-nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --volume=*) volume=${1#*=} ;;
    --priority=*) priority=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --termination-grace-period-seconds=*) grace=${1#*=} ;;
    --env=*) environment+=("${1#*=}") ;;
    --namespace=*) namespace=("$1") ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; what goes to vixml follows --" ;;
  esac
  shift
done
(($#)) || fail "no command; give one after --, as in -- train --config=configs/demo.py --workdir=/mnt/vixml/demo"
check_name --workload "$workload"
[[ $image ]] || fail "no --docker-image"
[[ ($tpu_type && ! $gpu_type) || ($gpu_type && ! $tpu_type) ]] || fail "give --tpu-type or --gpu-type"
for pair in "--num-nodes $nodes" "--gpus-per-node $gpus" "--max-restarts $restarts" \
  "--termination-grace-period-seconds $grace"; do
  check_count "${pair% *}" "${pair#* }"
done

for argument in "$@" "${environment[@]}"; do
  [[ $argument != *$'\n'* ]] || fail "a line break in $argument"
done
for pair in "${environment[@]}"; do [[ $pair == ?*=* ]] || fail "--env=$pair: give NAME=VALUE"; done
case $volume in
  "" | nfs:?*:/* | claim:?*) ;;
  *) fail "--volume=$volume: give nfs:HOST:/PATH or claim:NAME" ;;
esac

# A YAML scalar in single quotes, whatever it holds but line breaks.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

# One variable of a container.
variable() { printf '                - {name: %s, value: %s}\n' "$(quoted "$1")" "$(quoted "$2")"; }

variables() {
  local pair
  for pair in "${environment[@]}"; do variable "${pair%%=*}" "${pair#*=}"; done
  if [[ $tpu_type ]]; then
    variable VIXML_DISTRIBUTED 1
  else
    # The first pod of a JobSet has a name that the others can work out.
    variable VIXML_COORDINATOR "$workload-hosts-0-0.$workload:8476"
    variable VIXML_PROCESSES "$nodes"
    cat <<'END'
                - name: VIXML_PROCESS
                  valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
END
  fi
}

arguments() {
  local argument
  for argument in "$@"; do printf '                - %s\n' "$(quoted "$argument")"; done
}

volumes() {
  local rest=${volume#*:}
  case $volume in
    nfs:*:/*) echo "              - {name: shared, nfs: {server: $(quoted "${rest%%:*}"), path: $(quoted "${rest#*:}")}}" ;;
    claim:?*) echo "              - {name: shared, persistentVolumeClaim: {claimName: $(quoted "$rest")}}" ;;
  esac
}

if [[ $tpu_type ]]; then
  tpu_slice "$tpu_type"
  case $tpu_type in
    v5litepod-*) accelerator=tpu-v5-lite-podslice ;;
    v5p-*) accelerator=tpu-v5p-slice ;;
    v6e-*) accelerator=tpu-v6e-slice ;;
  esac
  pods=$hosts resource="google.com/tpu: 4"
  selector="{cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology}"
else
  pods=$nodes resource="nvidia.com/gpu: $gpus"
  selector="{cloud.google.com/gke-accelerator: $(quoted "$gpu_type")}"
fi

jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $workload
$([[ -z $tpu_type ]] || echo "  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}")
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          parallelism: $pods
          completions: $pods
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - {action: FailJob, onExitCodes: {containerName: vixml, operator: In, values: [2]}}
              - {action: Ignore, onExitCodes: {containerName: vixml, operator: In, values: [$PREEMPTED]}}
              - {action: Ignore, onPodConditions: [{type: DisruptionTarget}]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
$([[ -z $priority ]] || echo "              priorityClassName: $(quoted "$priority")")
              nodeSelector: $selector
              containers:
              - name: vixml
                image: $(quoted "$image")
                command: [python, -m, vixml_jax]
                args:
$(arguments "$@")
                env:
$(variables)
                resources: {limits: {$resource}}
$([[ -z $volume ]] || echo "                volumeMounts: [{name: shared, mountPath: /mnt/vixml}]")
$([[ -z $volume ]] || echo "              volumes:")
$([[ -z $volume ]] || volumes)
END
}

manifest=$(jobset "$@")
manifest=$(sed '/^$/d' <<<"$manifest")
if [[ $dry_run ]]; then
  printf '%s\n' "$manifest"
  show kubectl apply "${namespace[@]}" --filename=- | sed 's/^/# /'
else
  kubectl apply "${namespace[@]}" --filename=- <<<"$manifest"
fi
