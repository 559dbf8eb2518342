"""One run on two hosts that can lose each other: namespaces with addresses of their own, on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dla_train.resilience.exit_codes import read_status
from dla_train.trackers import read_lines
from tests.faults.processes import free_port
from tests.launch.hosts import Hosts, missing
from tests.train.runs import ROOT, TINY, numbers_of, run_training, tensors_of, write_corpus

pytestmark = pytest.mark.hosts
STEPS = 120


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if why := missing():
        pytest.skip(why)
    made = Hosts.make()
    yield made
    made.remove()


def launch(hosts: Hosts, index: int, log: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """dla-launch on one of the hosts; the same command on each."""
    command = ["ip", "netns", "exec", hosts.names[index], sys.executable, "-m", "dla_train.launch.command"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen([*command, *arguments], stdout=output, stderr=output, env=environment)


def wait_until(what: str, holds, logs: list[Path], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        told = "\n".join(log.read_text()[-1500:] for log in logs)
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}\n{told}"
        time.sleep(0.1)


def test_hosts_that_lose_each_other_wait_and_go_on_from_the_last_checkpoint_with_the_weights_of_an_uninterrupted_run(
    hosts: Hosts, tmp_path: Path
) -> None:
    run = [*TINY, *write_corpus(tmp_path / "corpus"), "train.micro_batch_rows=2", f"train.steps={STEPS}"]
    impatient = ["parallel.timeout_minutes=0.2", "resilience.step_minutes=0.1", "resilience.checkpoint_minutes=0.1"]
    place = [f"launcher.endpoint={hosts.addresses[0]}:{free_port()}", "launcher.nodes=2", "launcher.ranks_per_node=1"]
    folder, logs = tmp_path / "run", [tmp_path / f"host{index}.log" for index in range(2)]
    arguments = [*place, "launcher.join_seconds=90", *run, "checkpoint.interval_steps=10", *impatient]
    jobs = [launch(hosts, index, logs[index], [*arguments, f"run_dir={folder}"]) for index in range(2)]
    try:
        wait_until("step 25", lambda: any(line["step"] >= 25 for line in read_lines(folder / "metrics.jsonl")), logs)
        hosts.cable(plugged=False)
        wait_until("both hang", lambda: all("hangs: " in log.read_text() for log in logs), logs)
        hosts.cable(plugged=True)
        assert [job.wait(120) for job in jobs] == [0, 0], [log.read_text()[-2000:] for log in logs]
    finally:
        for job in jobs:
            job.kill()
    assert "continues after step" in logs[0].read_text() + logs[1].read_text()
    status = read_status(folder)
    assert status and status["state"] == "finished"
    run_training(tmp_path / "whole.json", [[*run, f"run_dir={tmp_path}/whole"]], ranks=2)
    assert numbers_of(folder, "loss", "grad_norm") == numbers_of(tmp_path / "whole", "loss", "grad_norm")
    expected, found = tensors_of(tmp_path / "whole", STEPS), tensors_of(folder, STEPS)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if not name.startswith("rng/"))


def test_the_doctor_meets_on_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    run = [*TINY, *write_corpus(tmp_path / "corpus"), "train.micro_batch_rows=2", f"run_dir={tmp_path}/run"]
    place = [f"launcher.endpoint={hosts.addresses[0]}:{free_port()}", "launcher.nodes=2", "launcher.ranks_per_node=1"]
    doctor = ["launcher.program=doctor", "doctor.reduce_mb=1", "doctor.disk_mb=1"]
    logs = [tmp_path / f"host{index}.log" for index in range(2)]
    jobs = [launch(hosts, index, logs[index], [*place, *doctor, *run]) for index in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert "2 rank(s) on 1 host(s): all-reduce of 1 MB" in logs[0].read_text() + logs[1].read_text()
