"""What dla-launch refuses, and what it would run."""

from pathlib import Path

import pytest

from dla_train.config import ConfigError
from dla_train.launch.command import main
from dla_train.launch.settings import limit_seconds, load_launcher, split

SLURM = ["launcher=slurm", "launcher.ranks_per_node=4"]


def test_settings_of_the_launch_are_told_from_those_of_the_run() -> None:
    own, run = split(["experiment=quickstart", "launcher=slurm", "launcher.nodes=2", "name=launcher.x"])
    assert own == ["launcher=slurm", "launcher.nodes=2"] and run == ["experiment=quickstart", "name=launcher.x"]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["launcher=slrm"], ["launcher=slrm", "slurm, torchrun"]),
        (["launcher.nods=2"], ["launcher.nods", "did you mean launcher.nodes?"]),
        (["launcher.nodes"], ["launcher.nodes has no value"]),
        (["launcher.nodes=two"], ["'two'", "a value of the setting's type"]),
        (["launcher.nodes=2"], ["launcher.nodes=2", "launcher.endpoint=host0:29500"]),
        (["launcher.nodes=2", "launcher.endpoint=host0"], ["no place to meet", "'host0'"]),
        (["launcher.endpoint=host0:29500"], ["launcher.endpoint=host0:29500", "set launcher.nodes"]),
        ([*SLURM, "launcher.endpoint=host0:29500"], ["launcher.endpoint", "not used with launcher=slurm"]),
        (["launcher.program=tests"], ["launcher.program=tests", "train or doctor"]),
        (["launcher=slurm"], ["launcher.ranks_per_node=0", "such as 8"]),
        ([*SLURM, "launcher.nodes=0"], ["launcher.nodes=0", "1 or more"]),
        ([*SLURM, "launcher.time=tomorrow"], ["launcher.time=tomorrow", "hours:minutes:seconds"]),
        ([*SLURM, "launcher.time=1:2:3:4"], ["launcher.time=1:2:3:4"]),
        ([*SLURM, "launcher.time=5", "launcher.warn_seconds=300"], ["launcher.warn_seconds=300", "launcher.time=5"]),
        ([*SLURM, "launcher.port=80"], ["launcher.port=80", "1024 to 65535"]),
        ([*SLURM, "launcher.requeues=-1"], ["launcher.requeues=-1", "0 or more"]),
        (["launcher.bind=socket"], ["launcher.bind=socket", "node, share, none"]),
        (["launcher.interface=eth0,eth1"], ["launcher.interface=eth0,eth1", "ip -brief address"]),
        ([*SLURM, "launcher.cpu_bind=cores; x"], ["launcher.cpu_bind=cores; x", "sockets"]),
        (["launcher.threads_per_rank=-1"], ["launcher.threads_per_rank=-1", "0 or more"]),
        (["launcher.environment=NCCL_DEBUG"], ["a value of the setting's type"]),
        (["launcher.environment.nccl=1"], ["launcher.environment.nccl=1", "such as NCCL_DEBUG"]),
        (["launcher.environment.NCCL_DEBUG=$(x)"], ["NCCL_DEBUG=$(x)", "launcher.setup"]),
        (["launcher.environment.OMP_NUM_THREADS=2"], ["OMP_NUM_THREADS=2", "use launcher.threads_per_rank"]),
        (["launcher.environment.RANK=2"], ["RANK=2", "torchrun sets it"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_the_mend(given: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_launcher(given)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_site_has_a_file_of_its_own_and_times_are_quoted_there(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("kind: slurm\npartition: gpu\ntime: '2-00:00:00'\nranks_per_node: 8\n")
    launcher = load_launcher([f"launcher={site}", "launcher.nodes=3"])
    assert (launcher.partition, launcher.time, launcher.nodes) == ("gpu", "2-00:00:00", 3)
    site.write_text("kind: slurm\ntime: 24:00:00\nranks_per_node: 8\n")  # YAML reads a number of seconds
    with pytest.raises(ConfigError, match="write it in quotes"):
        load_launcher([f"launcher={site}"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("10", 600), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-00:30", 88200), ("2-00:00:05", 172805)],
)
def test_time_limits_are_read_as_sbatch_does(time: str, seconds: int) -> None:
    assert limit_seconds(time) == seconds


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SLURM, "launcher.nodes=2", "launcher.partition=gpu", "launcher.container=image.sqsh"]
    run = ["experiment=quickstart", "train.micro_batch_rows=1", f"run_dir={tmp_path}/a run"]
    assert main(["--dry-run", *settings, *run]) == 0
    out = capsys.readouterr().out
    for part in (
        "#SBATCH --nodes=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --signal=B:USR1@600",
        "--container-image=image.sqsh",
        "--nproc-per-node=4",
        f"-m dla_train.train {' '.join(run[:2])} 'run_dir={tmp_path}/a run' &",
        f"status='{tmp_path}/a run/status.json'",
    ):
        assert part in out, part
    assert "--account" not in out and not (tmp_path / "a run").exists()


def test_every_process_gets_the_settings_of_nccl_threads_and_cores_and_what_is_set_already_wins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for name in ("OMP_NUM_THREADS", "TORCH_FR_BUFFER_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dla_train.launch.environment.available_cores", lambda: 7)
    given = ["launcher.ranks_per_node=2", "launcher.interface=lo", "launcher.environment.NCCL_IB_HCA=mlx5_0,mlx5_1"]
    given += ["launcher.environment.TORCH_FR_BUFFER_SIZE=", "experiment=quickstart", "train.micro_batch_rows=1"]
    assert main(["--dry-run", *given, "launcher.bind=share"]) == 0
    words = capsys.readouterr().out.split()
    assert set(words[: next(i for i, word in enumerate(words) if "=" not in word)]) == {
        *("OMP_NUM_THREADS=3", "NCCL_DEBUG=INFO", "NCCL_IB_HCA=mlx5_0,mlx5_1", "DLA_BIND=share"),
        *("NCCL_SOCKET_IFNAME=lo", "GLOO_SOCKET_IFNAME=lo", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    }
    assert main(["--dry-run", *given, "launcher.interface=eth9"]) == 2
    assert "launcher.interface=eth9 is not on this machine; choose from lo" in capsys.readouterr().err


def test_a_batch_script_tells_srun_its_cores_again_and_exports_what_is_not_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["launcher.cpus_per_rank=12", "experiment=quickstart", "train.micro_batch_rows=1"]
    assert main(["--dry-run", *SLURM, *run]) == 0
    out = capsys.readouterr().out
    for part in (
        "#SBATCH --cpus-per-task=48",
        "srun --kill-on-bad-exit=1 --cpus-per-task=48 --cpu-bind=cores ",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-12}"',
        'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"',
        "export DLA_BIND=node",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ):
        assert part in out, part
    assert "SOCKET_IFNAME" not in out
    assert main(["--dry-run", *SLURM, *run, "launcher.threads_per_rank=2", "launcher.cpu_bind="]) == 0
    out = capsys.readouterr().out
    assert "export OMP_NUM_THREADS=2\n" in out and "--cpu-bind" not in out


def test_a_run_that_its_ranks_cannot_divide_is_refused_before_it_is_queued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SLURM, "launcher.nodes=3", "experiment=quickstart", f"run_dir={tmp_path}/run"]) == 2
    assert "train.global_batch_rows=8 is not a multiple" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
