"""The code of the first pages does what it says, and a bound optimizer trains a Flax model.

That every block and command of every page works is checked in `test_docs.py`.
"""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import learned_opt
from launch import config as cfg
from tests import jobs

ROOT = Path(__file__).parent.parent


def _python(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


SHIPPED, TRAIN = _python("README.md")
_, BIND, LOOP = _python("docs/use.md")[:3]
TASK = _python("docs/extend.md")[0]


def test_using_a_trained_optimizer(tmp_path, monkeypatch):
    optimizer = learned_opt.learnable_adam(0.1)
    theta = optimizer.init(jax.random.key(0))
    arguments = {"learning_rate": 0.1}
    learned_opt.save(tmp_path / "runs/demo/optimizer", "adam", arguments, theta)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(BIND + LOOP, scope)
    before, after = (scope["loss"](w, scope["x"], scope["y"]) for w in (jnp.zeros(5), scope["w"]))
    assert after < 0.1 * before
    assert np.linalg.norm(scope["w"] - np.arange(5.0)) < 2


def test_the_optimizer_in_the_package():
    """In the loop of the page, with the line of the README."""
    scope = {}
    exec(SHIPPED.replace("=1000", "=100"), scope)
    tx = scope["tx"]
    scope |= {"jax": jax, "jnp": jnp, "optax": optax, "tx": tx}
    exec(LOOP, scope)
    before, after = (scope["loss"](w, scope["x"], scope["y"]) for w in (jnp.zeros(5), scope["w"]))
    assert after < 0.2 * before


def test_meta_training_in_python():
    """The meta-loss falls as the comment says."""
    first, last = map(float, re.search(r"falls from ([\d.]+) to ([\d.]+)", TRAIN).groups())
    scope = {}
    head, loop, tail = TRAIN.partition("for _ in range(300):")
    exec(head, scope)
    state, losses = scope["state"], []
    for _ in range(10):
        state, metrics = scope["step"](state)
        losses.append(metrics["meta_loss"])
    assert abs(np.median(losses) - first) < 0.05
    exec(loop + tail, scope)
    assert abs(scope["metrics"]["meta_loss"] - last) < 0.05
    assert set(scope["theta"]["params"]) == {"log_learning_rate", "logit_momentum"}


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    """A job trains on it, from the file that the page shows."""
    (tmp_path / "mytask.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    task = cfg.task("mytask:waves", width=4)
    done = jobs.run(tmp_path / "job", task=task, num_steps=3, eval_every=0)
    assert done.step == 3 and np.isfinite(jobs.rows(tmp_path / "job")[-1]["meta_loss"])


def test_flax_training_loop():
    """In `flax.training.TrainState`, as any optax optimizer."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))

    net, optimizer = Net(), learned_opt.mlp_optimizer()
    tx = optimizer.bind(optimizer.init(jax.random.key(0)), num_steps=10)
    x = jax.random.normal(jax.random.key(1), (16, 4))
    params = net.init(jax.random.key(2), x)
    state = TrainState.create(
        apply_fn=net.apply, params=params, tx=optax.chain(optax.clip_by_global_norm(1.0), tx)
    )

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.mean(state.apply_fn(p, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(10):
        state = step(state)
    moved = optax.tree.norm(optax.tree.sub(state.params, params))
    assert 0 < moved < 1 and state.step == 10
