"""An estimator as values: its arguments, and what a job must know to plan it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from meta_train.checks import check_positive, check_whole
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.horizons import Horizons
from meta_train.samplers import sampler_named
from meta_train.unroll import UnrolledSystem


class Exchange(NamedTuple):
    """How devices exchange.

    Attributes:
      mean: the mean of a tree over devices, summed in pairs.
      gather: leaves ``[n, ...]`` of every device, in order, as ``[devices * n, ...]``.
    """

    mean: Callable[[Any], Any]
    gather: Callable[[Any], Any]


NO_EXCHANGE = Exchange(lambda tree: tree, lambda tree: tree)


class Context(NamedTuple):
    """What a job tells its estimator.

    Attributes:
      chunk: particles (or pairs) computed at a time, where the estimator does not say.
      exchange: how devices exchange, for estimators that exchange their own messages.
      layers: sizes of the consecutive parts of theta.
      learning_rate: that of the meta-optimizer.
    """

    chunk: int | None = None
    exchange: Exchange = NO_EXCHANGE
    layers: tuple[int, ...] = ()
    learning_rate: float = 1.0


ONE_DEVICE = Context()


class Population(NamedTuple):
    """The particle axis: what an entry is called, how many there are, inner runs in each."""

    unit: str
    size: int
    runs: int


class Shards(NamedTuple):
    """How many parts the population may be split into over devices.

    Attributes:
      parts: how many.
      field: the field that sets their number.
      share: how much of that field makes one part.
    """

    parts: int
    field: str
    share: int


@dataclass(frozen=True)
class EstimatorConfig:
    """The kind of all estimators; see ``GradientEstimator`` for what ``make`` returns.

    The defaults below describe an estimator with one inner run a particle, whose outer step
    is a whole episode of each; ``num_particles`` is 1 where there is no such field.
    """

    def make(
        self, system: UnrolledSystem, horizons: Horizons, context: Context = ONE_DEVICE
    ) -> GradientEstimator:
        """The estimator for this system."""
        raise NotImplementedError(f"{type(self).__name__} must define `make`.")

    @property
    def needs_reversible(self) -> bool:
        """Whether inner training must be in a form that can be walked back."""
        return False

    @property
    def plain_descent(self) -> bool:
        """Whether it tries steps of plain gradient descent at the meta-optimizer's rate."""
        return False

    @property
    def keeps_log(self) -> bool:
        """Whether the job keeps a log from which its weights can be rebuilt."""
        return False

    @property
    def population(self) -> Population:
        return Population("particles", getattr(self, "num_particles", 1), 1)

    @property
    def shards(self) -> Shards:
        population = self.population
        return Shards(population.size, "num_particles", population.runs)

    @property
    def horizon_multiple(self) -> int:
        """What horizons must be multiples of, so that no episode idles in its last truncation."""
        return 1

    def inner_steps(self, horizon: int) -> float:
        """Forward inner steps of one outer step, all particles counted, on average."""
        population = self.population
        return population.size * population.runs * horizon


@dataclass(frozen=True)
class ParticlesConfig(EstimatorConfig):
    """Estimators with a population of inner runs.

    Attributes:
      num_particles: inner runs; antithetic estimators pair them up.
      chunk: particles (or pairs) computed at a time; 0: chosen for the device.
    """

    num_particles: int = 32
    chunk: int = 0

    def __post_init__(self):
        check_whole(num_particles=self.num_particles)
        check_whole(0, chunk=self.chunk)

    def arguments(self, context: Context) -> dict[str, Any]:
        """What the estimator's function gets of the population."""
        return {"num_particles": self.num_particles, "chunk": self.chunk or context.chunk}


@dataclass(frozen=True)
class TruncatedConfig(ParticlesConfig):
    """Estimators whose outer step is one truncation of each inner run.

    Attributes:
      truncation: inner steps per outer step.
    """

    truncation: int = 20

    def __post_init__(self):
        super().__post_init__()
        check_whole(truncation=self.truncation)

    @property
    def horizon_multiple(self) -> int:
        return self.truncation

    def inner_steps(self, horizon: int) -> float:
        del horizon
        return self.num_particles * self.truncation

    def arguments(self, context: Context) -> dict[str, Any]:
        return super().arguments(context) | {"truncation": self.truncation}


@dataclass(frozen=True)
class PairsConfig(ParticlesConfig):
    """Antithetic estimators, whose outer step is a whole episode of each half of a pair.

    Attributes:
      sigma: standard deviation of the perturbations.
      sampler: their distribution: normal, rademacher, uniform, laplace, cauchy, orthogonal, sobol.
    """

    sigma: float = 0.01
    sampler: str = "normal"

    def __post_init__(self):
        super().__post_init__()
        if self.num_particles % 2:
            raise ValueError(
                "`num_particles` must be even, since an antithetic estimator pairs inner runs up, "
                f"got num_particles={self.num_particles}. Try {self.num_particles + 1}."
            )
        check_positive(sigma=self.sigma)
        sampler_named(self.sampler)

    @property
    def population(self) -> Population:
        return Population("pairs", self.num_particles // 2, 2)

    def arguments(self, context: Context) -> dict[str, Any]:
        return {
            "num_pairs": self.num_particles // 2,
            "sigma": self.sigma,
            "sampler": self.sampler,
            "chunk": self.chunk or context.chunk,
        }


@dataclass(frozen=True)
class TruncatedPairsConfig(TruncatedConfig, PairsConfig):
    """Antithetic estimators whose outer step is one truncation of each half of a pair."""
