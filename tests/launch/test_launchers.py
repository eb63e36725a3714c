"""Launchers start a cluster and pass the user's settings on; they set no hyperparameters."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from string import Template
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from othink_ray.config.load import load
from othink_ray.runtime.cluster import ray_job_notice

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# Keys that a launcher may set: the run's folder, resumption, and the cluster to join.
LAUNCHER_KEYS = {"cluster.address", "run.dir", "run.resume"}


def kuberay(arguments: str) -> dict[str, Any]:
    text = Template((LAUNCH / "kuberay.yaml").read_text()).substitute(IMAGE="some/image:gpu", RUN="one", ARGS=arguments)
    job = yaml.safe_load(text)
    assert isinstance(job, dict)
    return job


def settings(command: str) -> list[str]:
    return [word for word in shlex.split(command) if re.fullmatch(r"[a-z_.]+=\S*", word)]


def command_of(launcher: str) -> str:
    """Return the arguments of `othink_ray.main` in a shell launcher."""
    found = re.search(r"othink_ray\.main (.*)", (LAUNCH / launcher).read_text())
    assert found is not None
    return found[1].removesuffix(" &").replace("$address:$port", "auto")


def slurm_options() -> dict[str, str]:
    text = (LAUNCH / "slurm.sbatch").read_text()
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("launcher", ["local.sh", "slurm.sbatch"])
def test_shell_launchers_pass_all_arguments_last(launcher: str) -> None:
    command = command_of(launcher)
    assert command.endswith('"$@"')
    assert {setting.partition("=")[0] for setting in settings(command)} <= LAUNCHER_KEYS


def test_kuberay_passes_all_arguments_last() -> None:
    entrypoint = kuberay("algo=grpo train.steps=7")["spec"]["entrypoint"]
    assert entrypoint.endswith(" algo=grpo train.steps=7")
    assert {setting.partition("=")[0] for setting in settings(entrypoint)[:-2]} == LAUNCHER_KEYS


@pytest.mark.parametrize("command", [command_of("slurm.sbatch"), kuberay("")["spec"]["entrypoint"]])
def test_the_launchers_settings_make_a_valid_configuration(command: str) -> None:
    config = load(["cluster=two_nodes", *settings(command)])
    assert config.cluster.address == "auto"
    assert config.run.resume == "auto"


def test_the_users_settings_win_over_the_launchers() -> None:
    config = load([*settings(command_of("slurm.sbatch")), "run.dir=elsewhere", "run.resume=never"])
    assert (config.run.dir, config.run.resume) == ("elsewhere", "never")


def test_slurm_jobs_are_requeued_before_their_time_limit() -> None:
    """tests/drills/test_slurm.py does it for real."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = slurm_options()
    assert {"requeue", "exclusive", "nodes", "signal"} <= options.keys()
    signal = re.fullmatch(r"B:(\w+)@\d+", options["signal"])
    assert signal is not None
    assert re.search(rf"^trap out_of_time {signal[1]}$", text, flags=re.MULTILINE)


def test_stopped_jobs_have_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    job_environment = yaml.safe_load((LAUNCH / "job.yaml").read_text())["env_vars"]
    assert yaml.safe_load(kuberay("")["spec"]["runtimeEnvYAML"])["env_vars"] == job_environment
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert ray_job_notice() is not None
    for name, value in job_environment.items():
        monkeypatch.setenv(name, value)
    assert ray_job_notice() is None


def test_slurm_logs_are_not_uploaded_with_a_ray_job(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` uploads the checkout, which holds the logs, but not files that git ignores."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    options = slurm_options()
    log = options["output"].replace("%x", options["job-name"]).replace("%j", "17")
    for name in (log, "kept.txt"):
        (tmp_path / name).write_text("")
    package = tmp_path.with_suffix(".zip")
    create_package(str(tmp_path), package, include_gitignore=True)
    assert {"kept.txt"} == {name for name in ZipFile(package).namelist() if not name.startswith(".")}


def test_kuberay_nodes_run_one_image_with_shared_runs_and_memory() -> None:
    cluster = kuberay("")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert container["image"] == "some/image:gpu"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/runs", "/dev/shm"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def ray_up() -> dict[str, Any]:
    cluster = yaml.safe_load((LAUNCH / "ray_up.yaml").read_text())
    assert isinstance(cluster, dict)
    return cluster


def test_ray_up_accepts_the_cluster_file() -> None:
    """Validate as `ray up` does before it connects to a machine."""
    prepared = prepare_config(ray_up())
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 1


def test_fill_in_lines_of_ray_up_name_machines_and_users() -> None:
    lines = [line for line in (LAUNCH / "ray_up.yaml").read_text().splitlines() if not line.startswith("#")]
    marked = {line.partition(":")[0].strip() for line in lines if "# FILL IN" in line}
    assert marked == {"head_ip", "worker_ips", "ssh_user", "ssh_private_key", "min_workers", "max_workers"}
    cluster = ray_up()
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_ray_up_starts_every_node_with_the_token() -> None:
    cluster = ray_up()
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        [start] = [command for command in commands if "ray start" in command]
        assert start.startswith("RAY_AUTH_MODE=token ")


def test_the_command_shown_for_ray_up_is_valid() -> None:
    found = re.search(r"othink_ray\.main \\\n(.*)'\n", (LAUNCH / "ray_up.yaml").read_text())
    assert found is not None
    assert load(settings(found[1].removeprefix("#"))).cluster.address == "auto"


def test_launchers_request_the_gpus_of_two_nodes() -> None:
    config = load(["cluster=two_nodes"])
    rollout, learner = config.rollout, config.learner
    gpus = rollout.num_actors * rollout.gpus_per_actor + learner.world_size * learner.gpus_per_rank
    slurm = slurm_options()
    assert int(slurm["nodes"]) * int(slurm["gpus-per-node"]) == gpus
    [workers] = kuberay("")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"]) == gpus
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def gibibytes(text: str) -> int:
    return int(text.removesuffix("Gi"))


def test_kuberay_pods_may_use_what_they_reserve() -> None:
    cluster = kuberay("")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {name: requests[name] for name in limits} == limits  # overcommitted memory would get pods killed
        shared = next(volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shared-memory")
        assert gibibytes(shared["emptyDir"]["sizeLimit"]) < gibibytes(limits["memory"])
