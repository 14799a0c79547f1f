"""What is submitted to clusters: run by the shell, or held against the published schema."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import choices
from launch import config as cfg
from launch.hosts import Place, find_place

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "launch" / "cluster"

# The fields of each object that we write, of those that the schemas have, and of what type: a
# dict is an object of its own, a list of one has such entries, `str` keys are free where `...` is.
POD = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
            "ports": [{"containerPort": int}],
            "resources": {"requests": {...: str}, "limits": {...: str}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": "Indexed",
                        "backoffLimit": int,
                        "template": {"spec": POD},
                    }
                },
            }
        ],
    },
}
SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {
        "cpus": str,
        "use_spot": bool,
        "job_recovery": {"strategy": "FAILOVER", "max_restarts_on_errors": int},
    },
    "file_mounts": {...: {"name": str, "mode": "MOUNT"}},
    "setup": str,
    "run": str,
}


def check(found, schema, where="file"):
    """Raises ``AssertionError`` on a field that there is not, or a value of another type."""
    if isinstance(schema, dict):
        assert isinstance(found, dict), where
        for name, value in found.items():
            assert name in schema or ... in schema, f"{where} has no field {name}"
            check(value, schema.get(name, schema.get(...)), f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(found, list) and found, where
        for value in found:
            check(value, schema[0], where)
    elif isinstance(schema, type):
        assert type(found) is schema, f"{where} must be {schema}, got {found!r}"
    else:
        assert found == schema, f"{where} must be {schema!r}, got {found!r}"


@pytest.mark.parametrize(("name", "schema"), [("jobset", JOBSET), ("skypilot", SKYPILOT)])
def test_the_files_have_the_fields_of_their_schema(name, schema):
    found = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    check(found, schema)
    with pytest.raises(AssertionError, match="has no field"):
        check({**found, "extra": 1}, schema)


def flags_of(words):
    """The configuration of a command's words, as the command would read them."""
    assert all(word.startswith("--") for word in words)
    node, rest = choices.take_words(["train", *words], "cfg")
    (preset,) = (w.partition("=")[2] for w in rest if w.startswith("--preset="))
    return choices.apply_words(cfg.load_preset(preset), node, "cfg")


def test_a_pod_of_the_jobset_finds_its_place():
    """The first pod's name is that of JobSet, Job and index; see its documentation on DNS."""
    jobset = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    (container,) = inner["template"]["spec"]["containers"]
    env = {e["name"]: e.get("value", "1") for e in container["env"]}
    place = find_place(env, None, None, None)
    name = jobset["metadata"]["name"]
    assert place == Place(f"{name}-{job['name']}-0-0.{name}", 4711, inner["completions"], 1)
    assert inner["parallelism"] == inner["completions"] == 2
    assert container["ports"] == [{"containerPort": place.port}]
    assert flags_of(container["args"]).num_steps == 5000


def test_a_node_of_skypilot_finds_its_place():
    """The script, run by the shell, with a `python` that prints what it was given."""
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    given = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NUM_NODES": "2"}
    python = 'python() { env | grep ^JAX_; echo words: "$@"; }\n'
    done = subprocess.run(
        ["bash", "-euc", python + task["run"]],
        env=given | {"SKYPILOT_NODE_RANK": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    env = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("JAX_"))
    assert find_place(env, None, None, None) == Place("10.0.0.4", 4711, 2, 1)
    (words,) = re.findall("^words: -m launch.train (.*)", done.stdout, re.M)
    assert flags_of(shlex.split(words)).num_steps == 5000
    assert find_place(env, None, None, None).size == task["num_nodes"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, 0), (75, 0, 1), (134, 2, 1), (2, 0, 0), (75, 100, 0)]
)
def test_the_script_of_slurm(tmp_path, code, restarts, requeued):
    """Run with an `srun` and a `scontrol` that say what they were asked."""
    path = CLUSTER / "slurm.sbatch"
    lines = re.findall(r"^#SBATCH (--[a-z-]+)(?:=(\S+))?$", path.read_text(), re.M)
    options = dict(lines)
    assert len(lines) == path.read_text().count("#SBATCH") == len(options)
    assert options["--ntasks-per-node"] == "1" and options["--requeue"] == ""
    assert re.fullmatch(r"TERM@\d+", options["--signal"])  # Not B: the tasks get it.
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(
            f'#!/bin/bash\necho {name} "$@"\n' + f"exit {code}\n" * (name == "srun")
        )
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", path, "runs/mine", "--preset=default", "--cfg.num_steps=7"],
        env=env | {"SLURM_RESTART_COUNT": str(restarts)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and not done.stderr
    assert done.stdout.count("scontrol requeue 7") == requeued
    (words,) = re.findall(
        "^srun --kill-on-bad-exit=1 python -m launch.train (.*)", done.stdout, re.M
    )
    assert words.startswith("--workdir=runs/mine ")
    assert flags_of(shlex.split(words)).num_steps == 7
