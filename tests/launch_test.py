"""The launch scripts: what they would execute, and the local one for real, with a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
TRAIN = ["--", "train", "--config=configs/demo.py:images=3", "--workdir=/mnt/vixml/it's here"]
QUOTED = "train --config=configs/demo.py:images=3 '--workdir=/mnt/vixml/it'\\''s here'"
# What each script needs to be told.
NEEDED = {
    "local.sh": ["--processes=2", "--cpu-devices=4"],
    "slurm.sh": ["--nodes=4", "--partition=h100"],
    "tpu_pod.sh": ["--name=pod-1", "--type=v5litepod-16", "--zone=us-west4-a", "--spot"],
    "gke_jobset.sh": ["--workload=job-1", "--docker-image=here/vixml:1", "--tpu-type=v5p-128"],
}


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAUNCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture
def dry_run(tmp_path):
    """What a script would execute, found out where hardly anything can be executed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "sed", "seq", "dirname", "cat", "env"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)

    def call(script: str, *arguments: str) -> str:
        done = run(script, *arguments, "--dry-run", *TRAIN, PATH=os.fspath(tools))
        assert not done.returncode, done.stderr
        return done.stdout

    return call


def test_every_script_is_known_here():
    assert set(NEEDED) == set(SCRIPTS)


@pytest.mark.skipif(not shutil.which("shellcheck", path=Path(sys.executable).parent), reason="extra dev")
def test_shellcheck_has_nothing_to_say():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", *LAUNCH.glob("*.sh")],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes(script):
    done = run(script, "--help")
    assert not done.returncode
    assert f"launch/{script} --" in done.stdout
    assert "--dry-run" in done.stdout
    for mistake in (["--nothing=1"], NEEDED[script], [*NEEDED[script], "--nodes=0", "--processes=x"]):
        done = run(script, *mistake)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{script}: error: ")
        assert done.stderr.count("\n") == 1


def test_local_processes(dry_run):
    lines = dry_run("local.sh", "--processes=2", "--cpu-devices=4", "--port=4711").splitlines()
    assert lines == [
        f"env VIXML_COORDINATOR=127.0.0.1:4711 VIXML_PROCESSES=2 VIXML_PROCESS={process} JAX_PLATFORMS=cpu "
        f"JAX_NUM_CPU_DEVICES=4 .venv/bin/python -m vixml_jax {QUOTED}"
        for process in (0, 1)
    ]
    lines = dry_run("local.sh", "--processes=2", "--gpus=4").splitlines()
    assert [word for line in lines for word in line.split() if "CUDA" in word] == [
        "CUDA_VISIBLE_DEVICES=0,1,2,3",
        "CUDA_VISIBLE_DEVICES=4,5,6,7",
    ]


def test_slurm_batch_script(dry_run, tmp_path):
    script = dry_run("slurm.sh", "--nodes=4", "--gpus-per-node=8", "--partition=h100")
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=h100", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert f".venv/bin/python -m vixml_jax {QUOTED}\n" in script
    # It queues itself again where the run was pre-empted, and only there.
    (tmp_path / "batch").write_text(script)
    for tool, text in {"srun": "exit $CODE", "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    for code in (0, 1, 2, 75):
        done = subprocess.run(
            ["bash", "batch"],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "17"},
            check=False,
        )
        assert done.returncode == code
        assert (tmp_path / "requeued").exists() == (code == 75)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_tpu_pod(dry_run):
    share = "--nfs=10.0.0.2:/share"
    text = dry_run("tpu_pod.sh", *NEEDED["tpu_pod.sh"], share)
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert commands[0] == (
        "gcloud compute tpus queued-resources create pod-1 --node-id=pod-1 --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a"
    )
    assert all("--zone=us-west4-a" in command for command in commands if command.startswith("gcloud"))
    assert any("mount -t nfs 10.0.0.2:/share /mnt/vixml" in command for command in commands)
    assert "--worker=all" in commands[-1]
    assert "VIXML_DISTRIBUTED=1 .venv/bin/python -m vixml_jax train" in commands[-1]
    text = run("tpu_pod.sh", "--name=pod-1", "--zone=z", "--delete", "--dry-run").stdout
    assert text == "gcloud compute tpus queued-resources delete pod-1 --force --quiet --zone=z\n"


@pytest.mark.parametrize(
    ("kind", "topology", "pods"),
    [
        ("v5litepod-16", "4x4", 4),
        ("v5litepod-256", "16x16", 64),
        ("v5p-128", "4x4x4", 16),
        ("v6e-256", "16x16", 64),
    ],
)
def test_jobset_of_a_slice(dry_run, kind, topology, pods):
    text = dry_run(
        "gke_jobset.sh", "--workload=job-1", "--docker-image=here/vixml:1", f"--tpu-type={kind}",
        "--volume=nfs:10.0.0.2:/share", "--priority=high", "--env=A=b c",
    )  # fmt: skip
    jobset = yaml.safe_load(text)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "job-1")
    assert job["parallelism"] == job["completions"] == pods
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod["priorityClassName"] == "high"
    assert pod["volumes"] == [{"name": "shared", "nfs": {"server": "10.0.0.2", "path": "/share"}}]
    assert container["args"] == TRAIN[1:]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {"name": "VIXML_DISTRIBUTED", "value": "1"} in container["env"]
    assert {"name": "A", "value": "b c"} in container["env"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [2], "Ignore": [75]}


def test_jobset_of_gpus(dry_run):
    text = dry_run(
        "gke_jobset.sh", "--workload=job-1", "--docker-image=here/vixml:1", "--gpu-type=nvidia-h100-80gb",
        "--num-nodes=4", "--volume=claim:models",
    )  # fmt: skip
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert job["completions"] == 4
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert environment["VIXML_PROCESSES"]["value"] == "4"
    assert environment["VIXML_COORDINATOR"]["value"].startswith("job-1-hosts-0-0.job-1:")
    assert "job-completion-index" in environment["VIXML_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "models"}


TPU_POD = [*NEEDED["tpu_pod.sh"], "--attempts=2", *TRAIN]


@pytest.fixture
def pod(tmp_path):
    """The script on a cloud of our own: gcloud and git say and do what the test wants of them."""

    def call(gcloud: str, git: str = "exit 0") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        called = tmp_path / "called"
        for tool, text in {
            "gcloud": f'echo "$@" >> {called}\n{gcloud}',
            "git": git,
            "sleep": "exit 0",
        }.items():
            (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / tool).chmod(0o755)
        done = run("tpu_pod.sh", *TPU_POD, PATH=f"{tmp_path}:{os.environ['PATH']}")
        return done, called.read_text().splitlines() if called.exists() else []

    return call


def test_tpu_pod_runs_on_a_slice_that_is_there(pod):
    done, called = pod('[[ $* != *describe* ]] || echo ACTIVE; [[ $* != *"-m vixml_jax"* ]] || exit 3')
    assert done.returncode == 3
    assert not any(" create " in call for call in called)


@pytest.mark.parametrize("step", ["git", " scp ", "pip install"])
def test_tpu_pod_says_that_it_cannot_install(pod, step):
    """It ran what was not there, or asked for another slice, ten times."""
    done, called = pod(
        f'[[ $* != *describe* ]] || echo ACTIVE; [[ $* != *"{step}"* ]] || exit 9',
        "exit 9" if step == "git" else "exit 0",
    )
    assert done.returncode == 2
    assert "cannot install on pod-1" in done.stderr
    assert not any("-m vixml_jax" in call for call in called)


@pytest.mark.parametrize("known", [0, 1])
def test_tpu_pod_does_not_take_trouble_with_the_cloud_for_a_lost_slice(pod, tmp_path, known):
    """gcloud says what there is so many times, and then nothing any more."""
    done, called = pod(
        f"[[ $* == *describe* ]] || exit 0; echo . >> {tmp_path}/asked; "
        f"(($(wc -l < {tmp_path}/asked) > {known})) || {{ echo WAITING_FOR_RESOURCES; exit 0; }}; "
        "echo 'ERROR: no credentials' >&2; exit 1"
    )
    assert done.returncode == 2
    assert "ERROR: no credentials" in done.stderr
    assert "gcloud does not say" in done.stderr
    assert not any(" create " in call or " delete " in call for call in called)


def test_tpu_pod_asks_for_a_slice_that_is_not_found(pod):
    done, called = pod("[[ $* != *describe* ]] || { echo 'ERROR: NOT_FOUND: no such' >&2; exit 1; }")
    assert sum(" create " in call for call in called) == 2
    assert done.returncode == 2
    assert "no slice lasted" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_pod.sh", ["--name=x", "--zone=z", "--type=v5litepod-17"]),
        ("tpu_pod.sh", ["--name=Not This", "--zone=z", "--type=v5litepod-16"]),
        ("gke_jobset.sh", ["--workload=x", "--docker-image=i", "--tpu-type=v9-8"]),
        ("gke_jobset.sh", ["--workload=x", "--docker-image=i", "--tpu-type=v6e-8", "--gpu-type=a"]),
        ("gke_jobset.sh", ["--workload=x", "--docker-image=i", "--tpu-type=v6e-8", "--volume=a:b"]),
        ("gke_jobset.sh", ["--workload=x", "--docker-image=i", "--tpu-type=v6e-8", "--env=A"]),
        ("slurm.sh", ["--log=a b"]),
        ("local.sh", ["--gpus=1", "--cpu-devices=1"]),
    ],
)
def test_wrong_values(script, arguments):
    done = run(script, *arguments, "--dry-run", *TRAIN)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


def stand_in(tmp_path: Path, text: str) -> str:
    """A program in Python's place, which local.sh calls once a process."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return os.fspath(path)


def test_local_output_and_exit_code(tmp_path):
    python = stand_in(
        tmp_path, 'echo "process $VIXML_PROCESS of $VIXML_PROCESSES: $*"; exit $((VIXML_PROCESS * 7))'
    )
    done = run("local.sh", "--processes=2", "--port=4711", "--", "train", "a b", PYTHON=python)
    assert done.returncode == 7
    assert sorted(done.stdout.splitlines()) == [
        "[1] process 1 of 2: -m vixml_jax train a b",
        "process 0 of 2: -m vixml_jax train a b",
    ]


def test_local_does_not_take_a_failure_for_a_preemption(tmp_path):
    python = stand_in(tmp_path, 'sleep "$VIXML_PROCESS"; exit $((75 - 74 * VIXML_PROCESS))')
    done = run("local.sh", "--processes=2", "--port=4711", "--", "train", PYTHON=python)
    assert done.returncode == 1


def test_local_hands_sigterm_on_and_waits(tmp_path):
    python = stand_in(
        tmp_path,
        "trap 'sleep 0.5; echo saved; exit 75' TERM; touch $2-$VIXML_PROCESS; while :; do sleep 0.1; done",
    )
    process = subprocess.Popen(
        [LAUNCH / "local.sh", "--processes=2", "--port=4711", "--", "train"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": python},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"vixml_jax-{number}").exists() for number in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(output.splitlines()) == ["[1] saved", "saved"]
