"""Hybrid-ES as a configuration: a search for every mode."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meta_train.checks import check_positive, check_whole
from meta_train.estimators.backprop import TBPTT
from meta_train.estimators.config import ONE_DEVICE, Context, EstimatorConfig, Shards
from meta_train.estimators.hybrid.compression import COMPRESSORS
from meta_train.estimators.hybrid.differences import control_variate, guided, past_descent
from meta_train.estimators.hybrid.estimator import check_settings, hybrid_es
from meta_train.estimators.hybrid.messages import Sends
from meta_train.estimators.hybrid.noise import Noise
from meta_train.estimators.hybrid.prediction import learned_features
from meta_train.estimators.hybrid.searches import Search, skip, stale
from meta_train.estimators.hybrid.select import select

# What a mode makes of the fields below; the second argument is the meta-optimizer's rate.
_SEARCHES: dict[str, Callable[["HybridES", float], Search]] = {
    "select": lambda fields, rate: select(
        step_size=rate, combine=fields.combine, top=fields.top, antithetic=fields.antithetic
    ),
    "control_variate": lambda fields, rate: control_variate(),
    "guided": lambda fields, rate: guided(num_surrogates=fields.num_surrogates, alpha=fields.alpha),
    "past_descent": lambda fields, rate: past_descent(),
    "stale": lambda fields, rate: stale(),
    "skip": lambda fields, rate: skip(),
}


@dataclass(frozen=True)
class HybridES(EstimatorConfig):
    """See ``hybrid_es``.

    Attributes:
      base: the estimator of the gradients.
      refresh_every: outer steps per gradient.
      assist: search after the gradient steps too.
      num_workers: split over the devices; must divide the base's particles (or pairs).
      candidates_per_worker: candidates a worker evaluates in an in-between step.
      num_tasks: episodes averaged for a candidate's cost.
      mode: select, control_variate, guided, past_descent, stale or skip.
      combine: what select makes of the costs: argmin, worker_mean, top or rank.
      top: how many the combination top averages.
      antithetic: mirrored candidates, in mode select.
      num_surrogates: past gradients that guide, in mode guided.
      alpha: share of the isotropic part, in mode guided, in (0, 1].
      sigma: standard deviation of the candidates' perturbations.
      sampler: their distribution.
      relative_sigma: sigma in units of the gradient's own spread.
      per_layer: sigma (if relative) and the mask by layers of theta.
      success_rate: speed of the 1/5th success rule, in mode select; 0: off.
      mask: which entries are perturbed: none (all), random, layers or largest.
      fraction: of the entries or layers perturbed.
      predict: in between, a learned prediction in place of the stale gradient.
      compression: of the gradients: none, int8 or top_k.
      kept: share of the entries that top_k keeps.
      replay_log: write WORKDIR/replay.log, from which the weights can be rebuilt.
    """

    base: EstimatorConfig = field(default_factory=TBPTT)
    refresh_every: int = 5
    assist: bool = False
    num_workers: int = 8
    candidates_per_worker: int = 4
    num_tasks: int = 1
    mode: str = "control_variate"
    combine: str = "argmin"
    top: int = 1
    antithetic: bool = False
    num_surrogates: int = 4
    alpha: float = 0.5
    sigma: float = 0.01
    sampler: str = "normal"
    relative_sigma: bool = False
    per_layer: bool = False
    success_rate: float = 0.0
    mask: str = "none"
    fraction: float = 1.0
    predict: bool = False
    compression: str = "none"
    kept: float = 0.01
    replay_log: bool = False

    def __post_init__(self):
        size = self.base.population.size
        if isinstance(self.base, HybridES):
            raise ValueError("`base` must be an estimator of its own, got hybrid_es.")
        check_whole(num_workers=self.num_workers)
        if size % self.num_workers:
            raise ValueError(
                f"`num_workers` must divide the population of `base`, {size} "
                f"{self.base.population.unit}, got num_workers={self.num_workers}: every worker "
                "computes a part of the gradient."
            )
        if self.mask == "layers" and not self.per_layer:
            raise ValueError("`mask`='layers' needs `per_layer`=true.")
        if self.compression not in COMPRESSORS:
            raise ValueError(
                f"`compression` must be one of {sorted(COMPRESSORS)}, got {self.compression!r}."
            )
        check_positive(kept=self.kept)
        if self.mode not in _SEARCHES:
            raise ValueError(f"`mode` must be one of {list(_SEARCHES)}, got {self.mode!r}.")
        for search in _SEARCHES.values():  # Fields are checked whichever of them the mode reads.
            made = search(self, ONE_DEVICE.learning_rate)
            made.check(self.num_workers * self.candidates_per_worker)
        if self.antithetic and self.mode != "select":
            raise ValueError(
                f"`antithetic` is for mode='select', got mode={self.mode!r}; the other modes that "
                "evaluate candidates always pair them. Leave it out."
            )
        check_settings(**self._settings(ONE_DEVICE))

    @property
    def num_particles(self) -> int:
        """Inner runs of the base."""
        return self.base.population.size * self.base.population.runs

    @property
    def needs_reversible(self):
        return self.base.needs_reversible

    @property
    def plain_descent(self):
        return self._search().stale_step is not None

    @property
    def keeps_log(self):
        return self.replay_log

    @property
    def population(self):
        return self.base.population

    @property
    def shards(self):
        return Shards(self.num_workers, "num_workers", 1)

    @property
    def horizon_multiple(self):
        return self.base.horizon_multiple

    def inner_steps(self, horizon):
        candidates = self.num_workers * self.candidates_per_worker
        candidates += self.num_workers if self.success_rate else 0
        if self._search().sends is Sends.NOTHING:
            candidates = 0
        searches = 1.0 if self.assist else 1 - 1 / self.refresh_every
        gradients = self.base.inner_steps(horizon) / self.refresh_every
        return gradients + searches * candidates * self.num_tasks * horizon

    def _search(self, rate: float = ONE_DEVICE.learning_rate) -> Search:
        return _SEARCHES[self.mode](self, rate)

    def _settings(self, context: Context) -> dict[str, Any]:
        """The arguments of ``hybrid_es`` that are mere values."""
        return {
            "refresh_every": self.refresh_every,
            "num_workers": self.num_workers,
            "candidates_per_worker": self.candidates_per_worker,
            "noise": Noise(
                self.sigma,
                self.sampler,
                self.relative_sigma,
                context.layers if self.per_layer else (),
                self.success_rate,
                self.mask,
                self.fraction,
            ),
            "search": self._search(context.learning_rate),
            "num_tasks": self.num_tasks,
            "predictor": learned_features() if self.predict else None,
        }

    def make(self, system, horizons, context=ONE_DEVICE):
        return hybrid_es(
            system,
            self.base.make(system, horizons, context),
            horizons=horizons,
            exchange=context.exchange,
            compressor=COMPRESSORS[self.compression](self.kept),
            assist=self.assist,
            **self._settings(context),
        )
