"""A search: settings proposed by Optuna, each round from the scores of all rounds before."""

import math
from collections.abc import Sequence

from launch.config import Config
from launch.sweeps.plan import Run, is_whole, runs_of, varied

# Settings proposed at a time. Not the number of jobs, on which nothing that is found may depend.
ROUND = 4


class Search:
    """The rounds of a search by Optuna's tree-structured Parzen estimator (TPE).

    Nothing of it is saved: proposals follow from the seed and the scores, so the same scores
    asked for and told again give the same settings. The first ten or so are drawn at random.

    Args:
      base: the configuration of all runs, but for what they vary; its seed is the search's too.
      vary: as of ``plan.plan``; a range is searched by its logarithm.
      seeds: runs of each setting.
      settings: how many to try.

    Raises:
      ValueError: naming what is wrong with ``vary``, or where no search is needed.
      ImportError: without Optuna.
    """

    def __init__(self, base: Config, vary: Sequence[str], seeds: int, settings: int):
        self._base, self._seeds, self._wanted = base, seeds, settings
        fields = varied(vary)
        for name, values in fields.items():  # Before anything has run, and each by itself.
            ends = values if isinstance(values, list) else [f"{x:g}" for x in values]
            runs_of(base, [{name: value} for value in ends], 1)
        count = math.prod(len(v) if isinstance(v, list) else math.inf for v in fields.values())
        if settings >= count:
            raise ValueError(
                f"--search={settings}: --vary has {count} settings in all; leave --search out, to "
                "run every one."
            )
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ImportError(
                f"--search needs {error.name}, which is not installed; install it in the "
                "folder of the repository with `pip install '.[search]'`, or give --random=N."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space: dict[str, optuna.distributions.BaseDistribution] = {}
        for name, values in fields.items():
            if isinstance(values, list):
                self._space[name] = optuna.distributions.CategoricalDistribution(values)
            elif is_whole(base, name):
                low, high = round(values[0]), round(values[1])
                self._space[name] = optuna.distributions.IntDistribution(low, high, log=True)
            else:
                self._space[name] = optuna.distributions.FloatDistribution(*values, log=True)
        sampler = optuna.samplers.TPESampler(seed=base.seed, multivariate=True, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler)
        self._failed = optuna.trial.TrialState.FAIL
        self._asked: list[optuna.Trial] = []
        self.settings: list[dict[str, str]] = []

    def ask(self) -> list[Run]:
        """The runs of the next round; none where all settings have been tried."""
        self._asked = []
        fresh: list[dict[str, str]] = []
        while len(fresh) < min(ROUND, self._wanted - len(self.settings)):
            setting = self._propose([*self.settings, *fresh])
            if setting is None:
                self._wanted = len(self.settings) + len(fresh)
                break
            fresh.append(setting)
        runs = runs_of(self._base, fresh, self._seeds, len(self.settings) * self._seeds)
        self.settings += fresh
        return runs

    def tell(self, scores: Sequence[float]) -> None:
        """What came of the last round.

        Args:
          scores: of its runs, in their order. A setting of which one is not finite is the worst.
        """
        for i, trial in enumerate(self._asked):
            mean = sum(scores[i * self._seeds : (i + 1) * self._seeds]) / self._seeds
            self._study.tell(trial, mean if math.isfinite(mean) else math.inf)

    def _propose(self, known: Sequence[dict[str, str]]) -> dict[str, str] | None:
        """A setting that was not tried, or None if a hundred in a row were, or are refused."""
        for _ in range(100):
            trial = self._study.ask(self._space)
            setting = {
                name: f"{value:.4g}" if isinstance(value, float) else str(value)
                for name, value in trial.params.items()
            }
            if setting in known:
                continue
            try:
                runs_of(self._base, [setting], 1)
            except ValueError:  # Between the ends of a range, such as an odd number of particles.
                self._study.tell(trial, state=self._failed)
                continue
            self._asked.append(trial)
            return setting
        return None
