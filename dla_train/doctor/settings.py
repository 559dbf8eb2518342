"""The settings: every rule of dla-train, all of the layout's rules side by side as dla-plan tells them, and memory."""

from __future__ import annotations

from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.doctor.findings import FAILED, OK, WARNING, Finding
from dla_train.plan_run.layout import Layout, checks
from dla_train.plan_run.plan import plan
from dla_train.plan_run.report import described
from dla_train.plan_run.target import Target


def check_settings(config: Config, world_size: int) -> list[Finding]:
    """One finding of legal settings, else every rule that is broken."""
    layout = Layout.of(config, world_size)
    try:
        validate(config, world_size)
    except ConfigError as error:
        # dla-plan does not plan the backend `recurrent`, but a run may use it
        broken = [check.problem for check in checks(config, layout) if not check.rule.startswith("memory.backend")]
        wrong = [problem for problem in broken if problem]
        return [Finding("settings", FAILED, problem) for problem in wrong or [str(error)]]
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    return [Finding("settings", OK, f"legal on {ranks}: {described(layout)}")]


def check_memory(config: Config, world_size: int, device_bytes: int) -> list[Finding]:
    """Whether a rank's memory, as dla-plan tells it, fits a CUDA device of `device_bytes`; settings must be legal."""
    planned = plan(config, Layout.of(config, world_size), Target(world_size=world_size, device_gb=device_bytes / 1e9))
    if planned.memory is None:
        return []
    need = f"{planned.memory.total / 1e9:.1f} GB of the device's {device_bytes / 1e9:.1f} GB by dla-plan"
    if planned.fits:
        return [Finding("memory", OK, f"a rank takes {need}")]
    mend = "set train.recompute=true, a smaller train.micro_batch_rows, or divide more (dla-plan shows by what)"
    return [Finding("memory", WARNING, f"a rank may take {need}; {mend}")]
