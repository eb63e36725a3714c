"""Runs on two hosts: submitted as jobs, trained on both, and continued after the loss of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data.files import picture, question, solution, write_jsonl, write_parquet
from tests.drills.faults import lines, steps_done
from tests.drills.hosts import Hosts, missing_namespaces, two_hosts
from tests.e2e.conftest import SMALL
from tests.e2e.test_interrupt import MARK, processes_with, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_namespaces() is not None, reason=str(missing_namespaces())),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
QUICK = (
    *("train.checkpoint_every=1", "rollout.threads=1", "learner.threads=1", "model.tiny.warm_steps=0"),
    *("rollout.max_tokens=32", "rollout.step_timeout_s=60", "learner.micro_tokens=2048"),
)
# For tests that are not about vLLM, which is slow to load.
PLAIN = ("rollout=hf", "rollout.num_actors=2")
# Ranks too large to share a host, each with room for an engine beside it.
RANK_EACH = ("learner.world_size=2", "learner.cpus_per_rank=0.7", "rollout.cpus_per_actor=0.3")


@dataclass(frozen=True)
class Site:
    """The hosts, a checkout to submit, a folder that only the head sees, and one that both hosts see."""

    hosts: Hosts
    checkout: Path
    head_only: Path
    shared: Path

    def submit(self, *options: str, settings: tuple[str, ...], notice: bool = False) -> subprocess.Popen[str]:
        """Submit a run from the head, as a user does."""
        folders = (f"run.cache_dir={self.shared / 'cache'}", f"cluster.address={self.hosts.address}")
        return subprocess.Popen(
            [*self.hosts.job(*options, notice=notice), *SMALL, *QUICK, *folders, *settings],
            cwd=self.checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | self.hosts.environment,
        )

    def ray_job(self, *words: str) -> str:
        return self.output("ray", "job", words[0], "--address", self.hosts.dashboard, *words[1:])

    def gauges(self, run_dir: Path) -> str:
        """Return the metrics of an active run as Prometheus would scrape them."""
        [found] = json.loads((run_dir / "prometheus.json").read_text())
        return "".join(self.output("curl", "--silent", f"http://{target}/metrics") for target in found["targets"])

    def output(self, *command: str) -> str:
        """Run a command on the head; return its output."""
        environment = os.environ | self.hosts.environment
        done = subprocess.run(
            self.hosts.on("head", *command), capture_output=True, text=True, env=environment, check=False, timeout=120
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start the hosts; afterwards check that none of their processes is left."""
    shared, head_only, checkout = (tmp_path_factory.mktemp(name) for name in ("shared", "head_only", "checkout"))
    for part in ("othink_ray", "conf", "launch"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    try:
        with two_hosts(cpus=1, head_only=head_only, home=shared / "home") as hosts:
            yield Site(hosts, checkout, head_only, shared)
    finally:
        del os.environ[MARK]
    assert wait_until(lambda: not processes_with(mark), 60), processes_with(mark)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=240)
    return job.returncode, output


def test_a_job_trains_on_both_hosts_with_data_of_one_host(site: Site) -> None:
    """Ray runs its uploaded copy of the checkout; a relative run.dir outlives the copy."""
    custom = (site.checkout / "conf/algo/grpo_d.yaml").read_text().replace("name: grpo_d", "name: mine")
    (site.checkout / "conf/algo/mine.yaml").write_text(custom)
    rows = range(8)
    train = write_parquet(site.head_only / "train.parquet", [{"bytes": picture(row), "path": None} for row in rows])
    for row in rows:
        (site.head_only / f"{row}.png").write_bytes(picture(row))
    records = [{"image_path": f"{row}.png", "question": question(row), "ground_truth": solution(row)} for row in rows]
    test = write_jsonl(site.head_only / "test.jsonl", records)
    data = ("data=custom", f"data.train.files.path={train}", f"data.test.files.path={test}")
    settings = ("algo=mine", *data, *RANK_EACH, "train.steps=2", "run.dir=runs/first")
    status, output = ended(site.submit(settings=settings))
    assert status == 0, output
    assert "after GRPO-D" in output or "accuracy" in output
    run_dir = site.shared / "home" / "runs" / "first"
    assert str(run_dir) in output
    assert [line["step"] for line in lines(run_dir)] == [0, 1]
    ranks = [line for line in output.splitlines() if "[L" in line]
    assert [line.count("[L") for line in ranks] == [1, 1], ranks
    assert "`ray job stop` kills this run 3 seconds after" in output


def test_an_invalid_job_fails_with_the_reason_in_its_log(site: Site) -> None:
    status, output = ended(site.submit(settings=("train.steps=0",)))
    assert status != 0
    assert "train.steps = 0" in output and "must be at least 1" in output


def test_a_cluster_with_a_token_refuses_clients_without_it(site: Site) -> None:
    tokenless = {name: value for name, value in site.hosts.environment.items() if not name.startswith("RAY_AUTH")}
    command = site.hosts.on("worker", "ray", "job", "list", "--address", site.hosts.dashboard)
    refused = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | tokenless, check=False, timeout=60
    )
    assert refused.returncode != 0
    assert "token" in refused.stdout + refused.stderr


def test_a_stopped_job_saves_its_step_and_another_resumes(site: Site) -> None:
    """The driver of the stopped job runs on the worker."""
    run_dir = site.shared / "stopped"
    there = ("--entrypoint-resources", f'{{"node:{site.hosts.addresses["worker"]}": 0.001}}', "--submission-id", "long")
    settings = (*PLAIN, "train.steps=500", "train.checkpoint_every=0", f"run.dir={run_dir}")
    job = site.submit(*there, settings=settings, notice=True)
    wait_until(lambda: steps_done(run_dir) >= 2, 300)
    shown = wait_until(lambda: "ray_othink_ray_kl_beta" in site.gauges(run_dir), 30)
    site.ray_job("stop", "--no-wait", "long")
    _, output = ended(job)
    done = steps_done(run_dir)
    assert done >= 2 and shown, output
    assert "stopping after this step is finished and saved" in output, output
    assert (run_dir / "checkpoints" / f"step_{done}").is_dir()
    settings = (*PLAIN, f"train.steps={done + 1}", f"run.dir={run_dir}", "run.resume=auto")
    status, output = ended(site.submit(settings=settings))
    assert status == 0, output
    assert [line["step"] for line in lines(run_dir)] == list(range(done + 1))


@pytest.mark.parametrize("lost_node", ["wait", "continue"])
def test_a_run_survives_the_loss_of_a_host(site: Site, tmp_path: Path, lost_node: str) -> None:
    """The run waits for the host, or continues on what is left."""
    overrides = (
        *(f"run.dir={tmp_path / 'run'}", f"run.cache_dir={site.shared}", f"cluster.address={site.hosts.address}"),
        *(*PLAIN, "cluster.placement=SPREAD", f"faults.lost_node={lost_node}", f"train.steps={STEPS}"),
    )
    with (tmp_path / "screen.txt").open("w") as screen:
        run = subprocess.Popen(
            site.hosts.on("head", sys.executable, "-m", "othink_ray.main", *SMALL, *QUICK, *overrides),
            stdout=screen,
            stderr=subprocess.STDOUT,
            env=os.environ | site.hosts.environment | {"CI": "true"},
        )

    def said() -> str:
        return (tmp_path / "screen.txt").read_text()

    assert wait_until(lambda: steps_done(tmp_path / "run") >= 2, 240), said()
    site.hosts.cable("down")
    if lost_node == "wait":
        assert wait_until(lambda: "waiting for the cluster: needs 1.5 CPUs (cluster has 1" in said(), 120), said()
        site.hosts.cable("up")
        site.hosts.bring_worker()
    status = run.wait(240)
    assert status == 0, said()
    assert ("continuing on the remaining nodes: 1 of 2 rollout actors" in said()) == (lost_node == "continue")
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(STEPS))
