"""Settings proposed by Optuna's TPE, in a study that lies in the sweep's folder (`study.db`, sqlite).

Optuna is asked and told directly. Hydra's sweeper plugin for it pulls Optuna 2, cannot open its own sqlite storage with
today's SQLAlchemy, runs a point inside the sweeping process or a pool of it, and so could neither outlive a kill nor
prune. Every proposal has a sampler of its own, seeded by the sweep's seed and the trial's number: a sampler's random
state is not stored, and one that began anew after a restart would propose its first settings again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from dla_train.config import ConfigError
from dla_train.sweep.definition import Axis, Range, Scalar, SweepConfig, sweep_axes
from dla_train.sweep.points import Setting, setting_of
from dla_train.sweep.sampling import rounded

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
STARTUP_TRIALS = 5
"""Settings that are drawn at random, and that must have ended, before TPE proposes and the median prunes."""


class Study:
    """The search of a sweep; every setting it ever proposed is in `settings`, also after a restart."""

    def __init__(self, sweep: SweepConfig) -> None:
        """Opens or begins the study in the sweep's folder. Raises ConfigError without Optuna, or for other axes."""
        self._optuna = _import_optuna()
        self._sweep = sweep
        axes = sweep_axes(sweep)
        self._distributions = {key: _distribution(self._optuna, axis) for key, axis in axes.items()}
        pruner = (
            self._optuna.pruners.MedianPruner(STARTUP_TRIALS, sweep.prune_after_steps)
            if sweep.prune
            else self._optuna.pruners.NopPruner()
        )
        path = (Path(sweep.folder) / STUDY_FILE).resolve()
        self._study = self._optuna.create_study(
            study_name="sweep", storage=f"sqlite:///{path}", direction="minimize", pruner=pruner, load_if_exists=True
        )
        self._check_axes()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == self._optuna.trial.TrialState.RUNNING and not self._is_whole(trial.params):
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)  # killed while it was proposed

    def settings(self) -> list[Setting]:
        """Every whole proposal so far, by number."""
        whole = [trial for trial in self._study.get_trials(deepcopy=False) if self._is_whole(trial.params)]
        return [self._setting(trial.number, trial.params) for trial in whole]

    def ask(self) -> Setting | None:
        """The next setting to try; None when the budget is used up."""
        trials = self._study.get_trials(deepcopy=False)
        if sum(self._is_whole(trial.params) for trial in trials) >= self._sweep.budget:
            return None
        self._study.sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=False, seed=_seed(self._sweep.sampler_seed, len(trials))
        )
        trial = self._study.ask(self._distributions)
        return self._setting(trial.number, trial.params)

    def is_open(self, number: int) -> bool:
        """Whether the study has not been told how the trial ended."""
        return not self._frozen(number).state.is_finished()

    def report(self, number: int, curve: Mapping[int, float]) -> None:
        """Tell the objective of a trial after some steps; what it was told before is left alone."""
        known = self._frozen(number).intermediate_values
        for step, value in curve.items():
            if step not in known and math.isfinite(value):
                self._trial(number).report(value, step)

    def should_stop(self, number: int) -> bool:
        """Whether the trial, by its reports, lies behind the others."""
        return bool(self._trial(number).should_prune())

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """How a trial ended: `finished` with its value, `failed` or `pruned`."""
        states = self._optuna.trial.TrialState
        ended = {"finished": states.COMPLETE, "failed": states.FAIL, "pruned": states.PRUNED}[state]
        self._study.tell(number, value, state=ended)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> optuna.trial.Trial:
        """A trial that may have been begun by another process."""
        return self._optuna.trial.Trial(self._study, self._frozen(number)._trial_id)

    def _setting(self, number: int, params: Mapping[str, Scalar]) -> Setting:
        found = {key: params[key] for key in self._distributions}
        values = {key: rounded(value) if isinstance(value, float) else value for key, value in found.items()}
        return setting_of(self._sweep, values, trial=number)

    def _is_whole(self, params: Mapping[str, object]) -> bool:
        return params.keys() == self._distributions.keys()

    def _check_axes(self) -> None:
        for trial in self._study.get_trials(deepcopy=False):
            for key, there in trial.distributions.items():
                if self._distributions.get(key) != there:
                    raise ConfigError(
                        f"sweep.axes.{key} is {self._distributions.get(key)} here and {there} in "
                        f"{Path(self._sweep.folder) / STUDY_FILE}; choose another sweep.folder, or keep the axes"
                    )


def _import_optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError as error:
        mend = "pip install 'dla-train[sweep]', or use random"
        raise ConfigError(f"sweep.sampler=tpe needs the package optuna; {mend}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: ModuleType, axis: Axis) -> object:
    kinds = optuna.distributions
    if not isinstance(axis, Range):
        return kinds.CategoricalDistribution(axis)
    if axis.integer:
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def _seed(seed: int, number: int) -> int:
    """One seed of a trial, below 2**32 as NumPy asks."""
    return (seed * 1_000_003 + number) % 2**32
