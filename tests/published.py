"""Updates that published implementations computed, and NumPy transcriptions of what they share."""

import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from learned_opt import formats

NUM_STEPS = 12
BESIDE = Path(__file__).parents[2] / "shared" / "data" / "peer_updates"


def recorded(name):
    """Parameters ``[13]``, gradients and losses ``[12]``, and theta of the authors' own run.

    Skips the test, and says so, where the recordings are not: they are no part of the repository.
    """
    folder = Path(os.environ.get("LEARNED_OPT_PEER_UPDATES", BESIDE))
    if not folder.is_dir():
        pytest.skip(f"no recorded updates at {folder} (LEARNED_OPT_PEER_UPDATES names another)")
    arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")

    def tree(start):
        start = start + "/"
        return {key.removeprefix(start): x for key, x in arrays.items() if key.startswith(start)}

    params = [unflatten_dict(tree(f"params_{t}"), sep="/") for t in range(NUM_STEPS + 1)]
    grads = [unflatten_dict(tree(f"grads_{t}"), sep="/") for t in range(NUM_STEPS)]
    return params, grads, arrays["losses"], tree("theta")


def compiled(optimizer, num_steps):
    """Its first state, of theta and parameters; and its update, of whatever that depends on."""

    def begin(theta, params):
        return optimizer.bind(theta, num_steps).init(params)

    def update(theta, grads, state, params, loss):
        return optimizer.bind(theta, num_steps).update(grads, state, params, value=loss)

    return jax.jit(begin), jax.jit(update)


def check_recorded(name, optimizer, theta_of=None, tolerance=1e-5):
    """Each update from the recorded parameters, against the recorded one; prints the error.

    ``LEARNED_OPT_RECORDED_ERRORS`` names a file for it too, which `launch.describe` reads.

    That is the largest difference in a tensor, beyond what the rounding of the recorded
    parameters explains, over the largest update in it.

    Args:
      theta_of: from the recorded arrays to theta; by default as ``formats`` has it.
    """
    params, grads, losses, found = recorded(name)
    begin, update = compiled(optimizer, 50)
    if theta_of is None:
        theta = unflatten_dict(formats.theta_of(name, found), sep="/")
    else:
        theta = theta_of(found)
    worst = 0.0
    state = begin(theta, params[0])
    for t in range(NUM_STEPS):
        updates, state = update(theta, grads[t], state, params[t], losses[t])
        for u, p, q in zip(*map(jax.tree.leaves, (updates, *params[t : t + 2])), strict=True):
            rounding = np.spacing(np.maximum(abs(p), abs(q)))
            error = abs(np.asarray(u) - (q.astype(float) - p)) - rounding
            worst = max(worst, error.max() / abs(q - p).max())
    print(f"{name}: largest relative error over {NUM_STEPS} updates {worst:.1e}")
    if kept := os.environ.get("LEARNED_OPT_RECORDED_ERRORS"):
        file = Path(kept)
        found = json.loads(file.read_text()) if file.is_file() else {}
        found[name] = float(f"{max(worst, 0):.1e}")
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert worst < tolerance


SHAPES = {"conv": (3, 2, 2, 4), "tall": (9, 2), "other": (7,), "scalar": (), "vector": (7,)}


def check_transcription(optimizer, transcription, num_steps=6, shapes=SHAPES, single=1e-5):
    """Updates from the parameters of a run of ``transcription``, in double precision and single.

    Args:
      transcription: ``theta -> (name, shape) -> update``, with ``update(p, g, t, loss)`` the
        change of the tensor in step ``t``; it remembers what it needs, in float64.
      single: the largest error in single precision, relative to a tensor's largest update.
    """
    rng = np.random.default_rng(0)
    theta = jax.tree.map(
        lambda w: w + rng.normal(size=w.shape, scale=0.1), optimizer.init(jax.random.key(0))
    )
    first = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = [
        {name: rng.normal(size=s) * 10.0 ** rng.integers(-3, 2) for name, s in shapes.items()}
        for _ in range(num_steps)
    ]
    losses = 2.0 + rng.normal(size=num_steps)
    rules = transcription(jax.tree.map(np.asarray, theta), shapes)
    expected, params = [], first
    for t in range(num_steps):
        changes = rules(params, grads[t], t, losses[t])
        expected.append((params, changes))
        params = {name: params[name] + changes[name] for name in params}

    for dtype, tolerance in ((np.float64, 1e-6), (np.float32, single)):
        with jax.enable_x64(dtype == np.float64):
            cast = partial(jax.tree.map, lambda x, d=dtype: jnp.asarray(x, d))
            begin, update = compiled(optimizer, num_steps)
            weights = cast(theta)
            state, worst = begin(weights, cast(first)), 0.0
            for t, (params, changes) in enumerate(expected):
                loss = jnp.asarray(losses[t], dtype)
                updates, state = update(weights, cast(grads[t]), state, cast(params), loss)
                for name, change in changes.items():
                    error = abs(np.asarray(updates[name]) - change).max() / abs(change).max()
                    worst = max(worst, error)
                    assert error < tolerance, (name, t, dtype, error)
            print(f"{dtype.__name__}: largest relative error over {num_steps} updates {worst:.1e}")


class Accumulators:
    """Of one tensor, as in Adafactor; gradients in, features out, all in float64."""

    def __init__(self, shape):
        self.shape = shape
        self.axes = tuple(np.argsort(shape, kind="stable")[-2:]) if len(shape) > 1 else None
        self.m, self.v = np.zeros((3, *shape)), np.zeros(shape)
        self.rows = self.columns = 0.0

    def update(self, g, momentum, square, factored):
        """Decays ``[3]``, a scalar and ``[3]``."""

        def by_decay(d):
            return np.reshape(d, (-1, *[1] * len(self.shape)))

        self.m = by_decay(momentum) * self.m + (1 - by_decay(momentum)) * g
        self.v = square * self.v + (1 - square) * g**2
        q, d = (g**2 + 1e-30)[None], by_decay(factored)
        if self.axes is None:
            self.rows = self.columns = d * self.rows + (1 - d) * q
            return
        d1, d0 = self.axes
        self.rows = d * self.rows + (1 - d) * q.mean(axis=d0 + 1, keepdims=True)
        self.columns = d * self.columns + (1 - d) * q.mean(axis=d1 + 1, keepdims=True)

    def full(self, x):
        return np.broadcast_to(x, (len(x), *self.shape))

    def roots(self):
        """``[3, *shape]``: Adafactor's inverse root."""
        d1 = self.axes[0] + 1
        rows = self.rows / (self.rows.mean(axis=d1, keepdims=True) + 1e-9)
        rows, columns = np.maximum(rows, 1e-9), np.maximum(self.columns, 1e-9)
        return (rows * columns) ** -0.5


def thirty_inputs(g, p, memory, axes, eps, square_eps):
    """Those of VeLO, Celo and Celo2, normalized; the last 15 of a vector are its ``v ** -0.5``."""
    m, v, rows, columns = memory.m, memory.v, memory.full(memory.rows), memory.full(memory.columns)
    if memory.axes is None:
        factored, for_momenta = (rows + 1e-9) ** -0.5, rows**-0.5
    else:
        factored = for_momenta = memory.roots()
    root = (v + square_eps) ** -0.5
    x = [g[None], np.clip(g, -0.1, 0.1)[None], p[None], m, v[None], m * root, root[None]]
    x += [g * factored, (g * root)[None], rows, columns]
    x = np.concatenate([*x, (rows + 1e-8) ** -0.5, (columns + 1e-8) ** -0.5, m * for_momenta])
    assert len(x) == 30
    return x / np.sqrt(eps + np.mean(x**2, axis=axes, keepdims=True))


def network(layers, x):
    """``x [inputs, ...]`` through layers of kernel and bias, ReLU between."""
    for i, (kernel, bias) in enumerate(layers):
        x = np.maximum(x, 0) if i else x
        x = np.einsum("io,i...->o...", kernel, x) + bias.reshape(-1, *[1] * (x.ndim - 1))
    return x


def layers_of(weights):
    """Pairs of kernel and bias of a network's parameters."""
    count = len(weights) // 2
    return [(weights[f"kernel_{i}"], weights[f"bias_{i}"]) for i in range(count)]


class Progress:
    """How far a run of ``num_steps`` is, and how its losses go: 18 features."""

    def __init__(self, num_steps):
        self.num_steps = num_steps
        self.d = np.exp(-1 / np.logspace(1, np.log10(num_steps), 10))
        self.means, self.minima = np.zeros(10), np.full(10, 999999999999.0)

    def features(self, t, loss):
        before = self.means / (1 - self.d ** (t + 1))
        loss = min(loss, 2 * abs(loss if t == 0 else before.max()))
        self.means = self.d * self.means + (1 - self.d) * loss
        a = self.means / (1 - self.d ** (t + 1))
        self.minima = np.minimum(self.minima, a)
        lowest = self.minima[:-1]
        f = np.clip((a[:-1] - lowest) / np.maximum(1e-8, a[1:] - lowest) - 1, -1, 1)
        c = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
        elapsed = np.tanh(10 * (t / self.num_steps - c))
        return np.concatenate([elapsed, f if t > 1 else 0 * f])


class Controller:
    """Mixing of tensors, LSTM and heads of VeLO and Celo."""

    def __init__(self, weights, num_tensors):
        self.weights = weights
        self.h, self.c = (
            np.repeat(weights["initial_state"][x], num_tensors, axis=0) for x in ("hidden", "cell")
        )

    def dense(self, name, x):
        return x @ self.weights[name]["kernel"] + self.weights[name]["bias"]

    def update(self, x):
        """``[tensors, inputs]`` to rates and controls."""
        x = self.dense("own", x) + np.maximum(self.dense("pooled", x), 0).max(axis=0)
        gates = self.dense("lstm", np.concatenate([x, self.h], axis=1))
        i, g, f, o = np.split(gates, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-x)) for x in (i, f + 1, o))
        self.c = f * self.c + i * np.tanh(g)
        self.h = o * np.tanh(self.c)
        controls = self.dense("controls", self.h) if "controls" in self.weights else None
        return self.dense("rate", self.h)[:, 0], controls
