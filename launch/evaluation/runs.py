"""Many inner runs of one optimizer on one task at once, at any horizon by one compiled program."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt.base import LearnedOptimizer
from meta_train.checks import check_system
from meta_train.inner import InnerState, inner_training
from tasks.base import SPLITS, Split, Task

# Steps of the compiled program; a run is as many blocks as it takes.
BLOCK = 500
# Points of a curve that are kept.
POINTS = 200


class Runs(NamedTuple):
    """What inner runs came to.

    Attributes:
      curve: float32 ``[runs, points]``, the mean losses of the training batches in ``points``
        equal parts of the run (the last part has the rest, if any).
      final: float32 ``[runs]``, the mean over the last tenth of the steps.
      scores: name of a split -> name -> ``[runs]``, from ``Task.score`` after the last step; only
        of the splits that were asked for.
      seconds: of one step of one run, in a population of this size, compiling left out.
    """

    curve: np.ndarray
    final: np.ndarray
    scores: dict[str, dict[str, np.ndarray]]
    seconds: float


def check_runs(name: str, task: Task, optimizer: LearnedOptimizer) -> None:
    """Asks what types a step of a task under an optimizer has; nothing is computed.

    Raises:
      ValueError: that begins with ``name``, if they are not what they must be.
    """
    key = jax.random.key(0)
    with _named(name):
        theta = jax.eval_shape(optimizer.init, key)
        check_system(inner_training(task, optimizer), theta, key)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Begins with ``name`` what is raised, which of somebody's own code is anything."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {kind}{error}") from error


def check_scores(name: str, starts: "Starts") -> None:
    """Asks what a task's ``score`` and ``constant_loss`` return; a run's loss is all it computes.

    Raises:
      ValueError: that names the task, if a suite could not judge by it.
    """
    with _named(name):
        constants = np.shape(starts.constant(starts.keys(0, 2)))
    for split, scores in check_score(name, starts, SPLITS).items():
        if "loss" not in scores:
            raise ValueError(
                f"`score` of {name} must return a dict with its `loss` on every split, by which a "
                f"suite judges, got {', '.join(sorted(scores)) or 'nothing'} on {split}; add it."
            )
        if not jnp.issubdtype(scores["loss"].dtype, jnp.floating):
            raise ValueError(
                f"`score` of {name} must return a loss that is a real float, got "
                f"{scores['loss'].dtype} on {split}; convert it with `.astype(float)`."
            )
    if constants != (2,):
        raise ValueError(
            f"`constant_loss` of {name} must return a scalar, got one of shape {constants[1:]}; "
            "reduce it with `jnp.mean`."
        )


def check_score(name: str, starts: "Starts", splits: Sequence[Split]) -> dict[str, dict[str, Any]]:
    """Asks what a task's ``score`` returns; nothing is computed.

    Returns:
      Split -> name -> shape and dtype, of two runs.

    Raises:
      ValueError: that names the task, if it is no dict of scalars.
    """
    with _named(name):
        begun = jax.eval_shape(starts.begin, starts.keys(0, 2))
        of_splits: dict[str, Any] = {
            split: jax.eval_shape(lambda of, run, s=split: starts.score(run, of, s), *begun)
            for split in splits
        }
    for split, scores in of_splits.items():
        if not isinstance(scores, dict):
            raise ValueError(
                f"`score` of {name} must return a dict with its `loss` (and what else there is) on "
                f"every split, got {scores!r} on {split}; return {{'loss': ...}}."
            )
        for of, value in scores.items():
            shape = getattr(value, "shape", None)
            if shape != (2,):
                what = f"a {type(value).__name__}" if shape is None else f"shape {shape[1:]}"
                raise ValueError(
                    f"`score` of {name} must return scalars, got {of} of {what} on {split}; reduce "
                    "it with `jnp.mean`."
                )
    return of_splits


class Starts:
    """The starts of runs and the scores of their ends: what all optimizers of a task share.

    Run ``i`` of every optimizer gets the same instance, initialization and batches, those of
    ``meta_train.evaluate.inner_runs``: step ``t`` gets the key that ``fold_in`` makes with ``t``.
    """

    def __init__(self, task: Task):
        self.task = task

    def keys(self, seed: int, num_seeds: int) -> jax.Array:
        """The keys of the runs, ``[num_seeds]``."""
        return jax.random.split(jax.random.key(seed), num_seeds)

    @cached_property
    def begin(self) -> Callable[[jax.Array], tuple[Any, Any]]:
        """``keys [runs] -> (instances, params)``."""

        def one(key):
            key_sample, key_params = jax.random.split(jax.random.split(key)[0])
            instance = self.task.sample(key_sample)
            return instance, self.task.init(instance, key_params)

        return jax.jit(jax.vmap(one))

    @cached_property
    def constant(self) -> Callable[[jax.Array], Any]:
        """``keys [runs] ->`` the loss of a constant predictor ``[runs]``.

        It raises ``ValueError`` where one is no finite number above 0, unless traced.
        """
        loss = self.task.constant_loss
        if loss is None:
            raise ValueError(
                "`task` must have a `constant_loss`, the scale on which losses of a suite are "
                "averaged, got none; add it to the task."
            )

        def one(key):
            return loss(self.task.sample(jax.random.split(jax.random.split(key)[0])[0]))

        constants = jax.jit(jax.vmap(one))

        def checked(keys):
            if isinstance(keys, jax.core.Tracer):
                return constants(keys)
            found = np.asarray(constants(keys))
            if not (np.isfinite(found) & (found > 0)).all():
                raise ValueError(
                    "`task.constant_loss` must be finite and above 0, as losses are averaged as "
                    f"shares of it, got {found}; shift or mend it."
                )
            return found

        return checked

    @cached_property
    def score(self) -> Callable[[Any, Any, Split], dict[str, jax.Array]]:
        """``(params, instances, split) -> {name: [runs]}``."""
        score = self.task.score
        if score is None:
            raise ValueError(
                "`task` must have a `score`, got none; add it to the task, or evaluate the task on "
                "its own with --cfg.task."
            )

        @partial(jax.jit, static_argnums=2)
        def scores(params, instances, split):
            # One after another: whole splits take memory.
            return jax.lax.map(lambda run: score(run[0], run[1], split), (params, instances))

        return scores


class Runner:
    """Runs of one optimizer on one task, ``width`` at a time.

    Theta may be another for each run (the settings of a baseline) or one for all (``shared``).
    """

    def __init__(
        self,
        starts: Starts,
        optimizer: LearnedOptimizer,
        width: int,
        *,
        shared: bool = False,
        evaluated: Callable[[Any, Any], Any] | None = None,
        quick: bool = False,
    ):
        """Args:
        starts: of the task.
        width: runs of the compiled program; fewer are filled up.
        shared: whether theta is one for all runs.
        evaluated: ``(optimizer's state, params) -> params`` to judge by, if they are others.
        quick: compile on a CPU in a fifth of the time, for runs five times as slow.
        """
        self._starts, self._width, self._shared = starts, width, shared
        self._evaluated, self._quick = evaluated, quick
        self._optimizer = optimizer
        self._system = inner_training(starts.task, optimizer)
        self._axis = None if shared else 0

    @cached_property
    def _begin(self):
        def one(theta, instance, params, horizon):
            opt_state = self._optimizer.bind(theta, horizon).init(params)
            return InnerState(instance, params, opt_state, jnp.int32(0), horizon)

        return jax.jit(jax.vmap(one, (self._axis, 0, 0, None)))

    @cached_property
    def _block(self):
        task, evaluated = self._starts.task, self._evaluated

        def one(theta, state, key):
            step_key = jax.random.fold_in(jax.random.split(key)[1], state.step)
            after, loss = self._system.step(theta, state, step_key)
            if evaluated is not None:  # The batch is that of the step.
                key_batch, key_loss, _, _ = jax.random.split(step_key, 4)
                batch = task.batch(state.instance, key_batch, "train")
                params = self._judged(state)
                loss = task.loss(params, state.instance, batch, key_loss)
            return after, loss

        step = jax.vmap(one, (self._axis, 0, 0))

        def block(theta, state, keys, num_steps):
            """Losses ``[BLOCK, runs]``, of which the first ``num_steps`` are of steps."""

            def body(t, carry):
                state, losses = carry
                state, loss = step(theta, state, keys)
                return state, losses.at[t].set(loss.astype(losses.dtype))

            losses = jnp.zeros((BLOCK, len(keys)), jnp.float32)
            return jax.lax.fori_loop(0, num_steps, body, (state, losses))

        return jax.jit(block, donate_argnums=1)

    def _judged(self, state: InnerState) -> Any:
        if self._evaluated is None:
            return state.params
        found = self._evaluated(state.opt_state, state.params)
        return jax.tree.map(lambda x, p: x.astype(p.dtype), found, state.params)

    @cached_property
    def _ends(self):
        return jax.jit(jax.vmap(self._judged))

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state of one run."""
        theta = self._optimizer.init(jax.random.key(0))
        params = jax.eval_shape(self._starts.begin, self._starts.keys(0, 1))[1]
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
        spec = jax.eval_shape(lambda t, p: self._optimizer.bind(t, 1).init(p), theta, one)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(spec))

    def __call__(
        self, thetas: Any, keys: jax.Array, horizon: int, splits: tuple[Split, ...] = SPLITS
    ) -> Runs:
        """The runs of ``keys [runs]`` for ``horizon`` steps.

        Args:
          thetas: theta of each run, leaves ``[runs, ...]``; if shared, theta.
          splits: to score at the end.
        """
        chunks = _chunks(thetas, keys, self._width, self._shared)
        parts = [self._run(theta, part, horizon, splits) for theta, part in chunks]
        count = len(keys)

        def joined(*leaves):
            return np.concatenate(leaves)[:count]

        curve, final, scores = jax.tree.map(joined, *[(p.curve, p.final, p.scores) for p in parts])
        return Runs(curve, final, scores, float(np.mean([p.seconds for p in parts])))

    def _run(self, thetas, keys, horizon: int, splits: tuple[Split, ...]) -> Runs:
        instances, params = self._starts.begin(keys)
        state = self._begin(thetas, instances, params, jnp.int32(horizon))
        compiled = self._compiled(thetas, state, keys)
        collected, began = [], time.perf_counter()
        for first in range(0, horizon, BLOCK):
            steps = min(BLOCK, horizon - first)
            state, losses = compiled(thetas, state, keys, jnp.int32(steps))
            collected.append(np.asarray(losses)[:steps])
        seconds = (time.perf_counter() - began) / (horizon * len(keys))
        losses = np.concatenate(collected).T
        ends = self._ends(state)
        scores: dict[str, dict[str, np.ndarray]] = {
            split: jax.device_get(self._starts.score(ends, state.instance, split))
            for split in splits
        }
        with np.errstate(invalid="ignore", over="ignore"):
            final = losses[:, -max(1, horizon // 10) :].mean(axis=1)
            return Runs(thinned(losses), final, scores, seconds)

    def _compiled(self, thetas, state, keys):
        if not hasattr(self, "_program"):  # Ahead, so that no run's time is that of compiling.
            lowered = self._block.lower(thetas, state, keys, jnp.int32(1))
            self._program = lowered.compile(compiler_options=_options(self._quick))
            # A program's first call takes tens of milliseconds more; it takes a state's memory.
            copy = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(self._program(thetas, copy, keys, jnp.int32(1)))
        return self._program


def _options(quick: bool) -> dict[str, Any]:
    """XLA's: on a CPU its first level of optimization is as fast as more, and compiles sooner."""
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0 if quick else 1}
    if quick and jax.__version__.startswith("0.10."):  # The emitters before are gone since.
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def _chunks(
    thetas: Any, keys: jax.Array, width: int, shared: bool
) -> Iterator[tuple[Any, jax.Array]]:
    """Parts of ``width`` runs; the last is filled up with its last run."""
    for first in range(0, len(keys), width):
        index = np.minimum(np.arange(first, first + width), len(keys) - 1)
        yield thetas if shared else jax.tree.map(lambda x, i=index: x[i], thetas), keys[index]


def thinned(losses: np.ndarray) -> np.ndarray:
    """Means of losses ``[runs, steps]`` in at most ``POINTS`` parts: ``[runs, points]``."""
    edges = part_edges(losses.shape[1])
    return np.stack([losses[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)


def part_edges(horizon: int) -> np.ndarray:
    """The first steps of the parts of a curve, and the horizon."""
    return np.linspace(0, horizon, min(POINTS, horizon) + 1).astype(int)
