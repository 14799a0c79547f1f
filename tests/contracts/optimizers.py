"""The contract of every learned optimizer."""

import functools
import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import OPTIMIZERS, inspection, mask_zero_gradients, scale_by_width
from tests.contracts.wrong_values import check_arguments
from tests.systems import leaves_equal

NAMES = sorted(OPTIMIZERS)
PARAMS = {
    "scalar": jnp.array(0.5),
    "matrix": jnp.arange(6.0).reshape(3, 2),
    "deep": [jnp.arange(6.0).reshape(3, 2) / 2],  # Of a shape that is there: one compilation.
}
LOSS = {"value": 1.5}  # Given to every update, as inner training does; most do not read it.


@functools.cache
def signature(name):
    return inspect.signature(OPTIMIZERS[name]).parameters.keys()


def make(name, num_tensors=3):
    """The optimizer of that name for so many tensors, small where it has a size, and a theta."""
    return made(name, num_tensors if "num_tensors" in signature(name) else None)


@functools.cache
def made(name, num_tensors):
    arguments = {
        "num_tensors": num_tensors,
        "hidden_size": 4,
        "mlp_sizes": (4,),
        "num_networks": 2,
        "network_mult": 100.0,
    }
    taken = arguments.keys() & signature(name)
    optimizer = OPTIMIZERS[name](**{key: arguments[key] for key in taken})
    return optimizer, jax.jit(optimizer.init)(jax.random.key(0))


def is_float(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def types(tree):
    """The type of every leaf, and whether it is a weak one."""
    return [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", NAMES)
def test_learned_optimizer(name):
    optimizer, theta = make(name)
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)

    def run(theta):
        transform = optax.chain(optax.clip(10.0), optimizer.bind(theta, 5))

        def body(carry, loss):
            params, state = carry
            updates, state = transform.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        # Losses that differ: of a constant one, some optimizers compare rounding errors.
        losses = jnp.linspace(1.5, 1.0, 5)
        return jax.lax.scan(body, (PARAMS, transform.init(PARAMS)), losses)[0][0]

    params, again = jax.device_get(
        jax.jit(lambda theta, key: (run(theta), optimizer.init(key)))(theta, jax.random.key(0))
    )
    assert leaves_equal(theta, again)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for after, before in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True):
        assert after.shape == before.shape and after.dtype == before.dtype
        assert np.all(np.isfinite(after)) and not np.array_equal(after, before)

    # theta matters, is differentiable, and may be batched. In NumPy: JAX compiles for every shape.
    def both(t):
        moved = t + 0.1 * np.sin(1 + np.arange(t.size)).reshape(t.shape)
        return np.stack([t, moved]).astype(t.dtype)

    thetas = jax.tree.map(both, jax.device_get(theta))

    @jax.jit
    @jax.vmap
    @partial(jax.grad, has_aux=True)
    def batched(theta):
        params = run(theta)
        return optax.tree.sum(params), params["matrix"]

    slopes, matrices = jax.device_get(batched(thetas))
    assert any(np.any(x[0] != 0) for x in jax.tree.leaves(slopes))
    np.testing.assert_allclose(matrices[0], params["matrix"], rtol=1e-5)
    assert not np.allclose(matrices[0], matrices[1], atol=1e-9)


# Gradients of the first step and of the later ones, and parameters: everything a float32 run may
# meet before it is lost, up to 1e30 (ten steps of 0.9 momentum below the largest float).
GRADIENTS = [(0, 0), (1, 0), (1e20, 0), (1e30, 0), (0, 1), (1, 1), (1e20, 1e20), (1e30, 1e30)]
GRADIENTS += [(1e18, 1e19), (1e-20, 1e-20), (1e-30, 1e-30)]
EXTREMES = [(*grads, param) for grads in GRADIENTS for param in (0, 1, 1e20, 1e30)]


@pytest.mark.parametrize("name", NAMES)
def test_updates_and_their_derivatives_are_finite(name):
    """Of the 1st, 2nd and 100th update, by theta, gradient, parameters, loss, state; both modes."""
    optimizer, theta = make(name)
    theta = jax.tree.map(lambda t: t.astype(jnp.float32), theta)
    # Some elements never have a gradient, nor has the last tensor: of another's shape, because an
    # optimizer treats those together, and compiles once.
    pattern = {"s": 1.0, "m": [[1, 0, -1], [0, 0, 2]], "zero": [[0, 0, 0], [0, 0, 0]]}
    pattern = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), pattern, is_leaf=lambda x: isinstance(x, list)
    )

    def scaled(by):
        return jax.tree.map(lambda x: by * x, pattern)

    def update_at(observed, theta, first, later, params, loss, floats):
        transform = optimizer.bind(theta, 100)
        leaves, structure = jax.tree.flatten(transform.init(params))
        floats = iter(floats)
        state = jax.tree.unflatten(structure, [next(floats) if is_float(x) else x for x in leaves])

        def body(state, step):
            grads = jax.tree.map(lambda a, b: jnp.where(step == 0, a, b), first, later)
            updates, state = transform.update(grads, state, params, value=loss)
            return state, updates

        updates = jax.lax.scan(body, state, jnp.arange(100))[1]
        return jax.tree.map(lambda u: u[observed], updates)

    @jax.jit
    @jax.vmap
    def everything(observed, first, later, param):
        params = jax.tree.map(lambda x: param * (1.0 + 0 * x), pattern)
        state = optimizer.bind(theta, 100).init(params)
        floats = [x for x in jax.tree.leaves(state) if is_float(x)]
        # The loss is as extreme as the parameters.
        at = (theta, scaled(first), scaled(later), params, param, floats)

        def update(*at):
            return update_at(observed, *at)

        # Both modes from one linearization: traced and compiled once.
        updates, push = jax.linearize(update, *at)
        forward = push(*jax.tree.map(jnp.ones_like, at))
        backward = jax.linear_transpose(push, *at)(jax.tree.map(jnp.ones_like, updates))
        return updates, backward, forward

    cases = [(observed, *case) for observed in (0, 1, 99) for case in EXTREMES]
    observed, first, later, param = map(np.asarray, zip(*cases, strict=True))
    for part in everything(observed, *(jnp.float32(x) for x in (first, later, param))):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            finite = np.isfinite(leaf).reshape(len(cases), -1).all(axis=1)
            assert finite.all(), (
                path,
                [case for case, ok in zip(cases, finite, strict=True) if not ok],
            )


def float_types():
    """All there are, in this mode."""
    double = [jnp.float64] if jax.config.jax_enable_x64 else []
    return [jnp.float16, jnp.bfloat16, jnp.float32, *double]


def accumulator_type(param_type):
    return jnp.float64 if param_type == jnp.float64 else jnp.float32


# Slow: what `test_types_round_nothing_but_the_update` computes is in the default mode.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x64", [pytest.param(False, marks=pytest.mark.slow), True], ids=["default", "x64"]
)
def test_types_of_state_and_updates(name, x64):
    """For every type of parameters and of gradients; traced only."""
    with jax.enable_x64(x64):
        check_types(name)


def shaped(x, dtype):
    return jax.ShapeDtypeStruct(x.shape, dtype)


def check_types(name):
    """A state of the same types after an update as before it may be carried by a loop."""
    optimizer, theta = make(name, 4)
    theta_types = [None, float] if jax.config.jax_enable_x64 else [None]
    tree = PARAMS | {"last": jnp.zeros(2)}
    for theta_type, (turn, param_type) in itertools.product(theta_types, enumerate(float_types())):
        # A gradient of another type for each tensor, in turn.
        grad_types = itertools.islice(itertools.cycle(float_types()), turn, None)
        given = (
            jax.tree.map(lambda t, to=theta_type: shaped(t, to or t.dtype), theta),
            jax.tree.map(lambda p, to=param_type: shaped(p, to), tree),
            jax.tree.map(lambda p, types=grad_types: shaped(p, next(types)), tree),
        )

        def first(theta, params, grads):
            transform = optimizer.bind(theta, 10)
            state = transform.init(params)
            updates, after = transform.update(grads, state, params, **LOSS)
            return state, updates, after, optax.apply_updates(params, updates)

        state, updates, after, moved = map(types, jax.eval_shape(first, *given))
        for dtype, is_weak in state:
            assert not is_weak and (not is_float(dtype) or dtype == accumulator_type(param_type))
        assert after == state and updates == moved == types(given[1])


def floats_in(program):
    """The types of all floats that a program computes with, those of the programs it calls too."""
    found = set()
    for step in program.eqns:
        variables = (*step.invars, *step.outvars)
        found |= {x.aval.dtype for x in variables if is_float(getattr(x.aval, "dtype", int))}
        for inner in jax.tree.leaves(
            list(step.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= floats_in(inner)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_double_is_computed_in_single(name):
    """Where all that is given is in double precision; traced only."""
    optimizer, theta = make(name)
    with jax.enable_x64(True):
        theta, params = (jax.tree.map(lambda x: x.astype(float), t) for t in (theta, PARAMS))

        def steps(theta, params, loss):
            transform = optimizer.bind(theta, 10)
            updates, state = transform.update(params, transform.init(params), params, value=loss)
            return transform.update(updates, state, params, value=loss)

        program = jax.make_jaxpr(steps)(theta, params, jnp.float64(1.5))
    assert floats_in(program.jaxpr) == {np.dtype(float)}


@pytest.mark.parametrize("name", NAMES)
def test_types_round_nothing_but_the_update(name):
    """Narrow and weakly typed leaves of a mixed tree are as good as their float32 copies."""
    optimizer, theta = make(name, num_tensors=5)
    transform = optimizer.bind(theta, 10)
    half, brain, single = jnp.float16, jnp.bfloat16, jnp.float32
    pairs = [(half, single), (brain, single), (single, half), (single, brain)]
    pairs = {f"{p.__name__}-{g.__name__}": (p, g) for p, g in pairs}
    values = jnp.linspace(-1, 1, 7, dtype=jnp.float32)
    params = {key: values.astype(p) for key, (p, _) in pairs.items()} | {"weak": jnp.asarray(0.5)}
    grads = {key: (3 * values).astype(g) for key, (_, g) in pairs.items()} | {"weak": 0.25}
    init, update = jax.jit(transform.init), jax.jit(partial(transform.update, **LOSS))

    def run(params, grads):
        state = init(params)
        for _ in range(2):
            updates, state = update(grads, state, params)
        return updates, state

    (updates, state), count = run(params, grads), update._cache_size()
    assert count == 1  # The state after a step has the types of the one before it.
    assert all(
        u.dtype == p.dtype for u, p in zip(*map(jax.tree.leaves, (updates, params)), strict=True)
    )
    copies = [jax.tree.map(lambda x: jnp.float32(x), tree) for tree in (params, grads)]
    wide_updates, wide_state = run(*copies)
    for key, update in wide_updates.items():
        rounding = jnp.finfo(updates[key].dtype)
        np.testing.assert_allclose(
            updates[key].astype(jnp.float32),
            update,
            rtol=max(float(rounding.eps), 1e-5),
            atol=float(rounding.smallest_subnormal),
            err_msg=key,
        )
    for leaf, wide in zip(*map(jax.tree.leaves, (state, wide_state)), strict=True):
        np.testing.assert_allclose(leaf, wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_trees(name):
    """Nothing, None, no elements, scalars, Python floats; and a group without parameters."""
    dtype = jnp.result_type(float)
    matrix, scalar = np.linspace(-1, 1, 6, dtype=dtype).reshape(3, 2), dtype.type(-0.5)
    nothing = (None, {}, (), {"a": None}, [None, {"b": ()}], np.zeros((0, 3), dtype))
    odd = {
        "a": matrix,
        "b": -0.5,
        "c": np.zeros((4, 0), dtype),
        "d": None,
        "e": [],
        "f": np.zeros(0, dtype),
    }
    groups = {"a": matrix, "b": scalar}

    def bound(num_tensors):
        optimizer, theta = make(name, num_tensors)
        return optimizer.bind(theta, 10)

    def grouped(labels):
        return optax.multi_transform({"sgd": optax.sgd(0.1), "ours": bound(1)}, labels)

    cases = [(bound(len(jax.tree.leaves(tree)) or 1), tree) for tree in nothing]
    cases += [
        (bound(2), [matrix, scalar]),
        (bound(4), odd),
        # Groups: all of it to another optimizer, then a part.
        (grouped({"a": "sgd", "b": "sgd"}), groups),
        (grouped({"a": "sgd", "b": "ours"}), groups),
        # One array alone, without a container.
        (bound(1), scalar),
    ]
    transforms, trees = zip(*cases, strict=True)

    @jax.jit
    def first_updates(trees):
        def first(transform, params):
            transform = optax.with_extra_args_support(transform)
            grads = jax.tree.map(lambda p: 2 * p + 1, params)
            return transform.update(grads, transform.init(params), params, **LOSS)[0]

        return [first(*case) for case in zip(transforms, trees, strict=True)]

    with jax.debug_nans(True):
        *found, plain, of_odd, all_sgd, part_sgd, alone = first_updates(trees)
    for updates, tree in zip(found, nothing, strict=True):
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, tree)
    # Beside other tensors a sum is rounded otherwise, and small entries are differences.
    np.testing.assert_allclose(of_odd["a"], plain[0], rtol=1e-6, atol=1e-5 * np.max(plain[0]))
    np.testing.assert_allclose(of_odd["b"], plain[1], rtol=1e-6)
    assert of_odd["c"].shape == (4, 0) and of_odd["d"] is None and of_odd["f"].shape == (0,)
    for updates in (all_sgd, part_sgd):
        np.testing.assert_allclose(updates["a"], -0.1 * (2 * matrix + 1), rtol=1e-6)
    np.testing.assert_allclose(part_sgd["b"], alone, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    """Each names the argument and the leaf, before any compute."""
    optimizer, theta = make(name, num_tensors=2)
    for bad in (
        0,
        -3,
        0.5,
        1.5,
        np.float32(10.5),
        np.nan,
        np.inf,
        None,
        "10",
        True,
        [1, 2],
        1j,
        np.zeros(2),
        jnp.int32(0),
    ):
        with pytest.raises(ValueError, match="`num_steps` must be a whole number of at least 1"):
            optimizer.bind(theta, bad)
    for good in (1, 10.0, np.int64(3), jnp.int32(3)):
        optimizer.bind(theta, good)
    for traced in (5, 5.5):  # What it is cannot be asked; a schedule takes either.
        jax.jit(lambda n: optimizer.bind(theta, n).init([jnp.ones(2), 1.0]))(traced)

    transform = optimizer.bind(theta, 10)
    params = {"a": jnp.ones(3), "b": [jnp.ones((3, 2))]}
    state = transform.init(params)
    for bad, what in (
        (jnp.ones((3, 2), complex), "complex.*split_real_and_imaginary"),
        (1 + 2j, "complex.*split_real_and_imaginary"),
        (jnp.ones((3, 2), int), "int.*make it a float"),
        (np.zeros((3, 2), jax.dtypes.float0), "float0.*optax.masked"),
        (jnp.ones((3, 2), bool), "bool"),
        (3, "int"),
        ("text", "str"),
        (jax.random.key(0), "key"),
    ):
        message = rf"must hold real floats, got {what}"
        tree = params | {"b": [bad]}
        where = r"at \['b'\]\[0\]"
        with pytest.raises(ValueError, match=rf"`params` must hold real floats, got .*{where}"):
            transform.init(tree)
        with pytest.raises(ValueError, match=rf"`updates` {message}") as caught:
            transform.update(tree, state, params)
        assert "at ['b'][0]" in str(caught.value)
        with pytest.raises(ValueError, match=rf"`params` {message}"):
            transform.update(params, state, tree)
    with pytest.raises(ValueError, match="an array without a name"):
        transform.init(jnp.ones(2, complex))
    with pytest.raises(ValueError, match=rf"`updates` must have the shapes .*\(2, 3\).*{where}"):
        transform.update(params | {"b": [jnp.ones((2, 3))]}, state, params)
    with pytest.raises(ValueError, match="`updates` must have the structure"):
        transform.update(params | {"b": None}, state, params)
    if name != "per_tensor_sgdm":  # Its state is of the parameters' structure.
        with pytest.raises(ValueError, match="got the parameters as `state`; swap the last two"):
            transform.update(params, params, state, value=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused(name):
    """Every argument, at values that its annotation does not allow: in one sentence, by name."""
    check_arguments(OPTIMIZERS[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_one_real_number(name):
    """Others are refused in one sentence, traced or not; whatever the optimizer reads."""
    optimizer, theta = make(name, num_tensors=1)
    params = jnp.ones(3)
    transform = optimizer.bind(theta, 10)
    state = transform.init(params)
    for wrong in (
        jnp.ones(1),
        jnp.ones(3),
        np.ones((1, 1)),
        1j,
        jnp.complex64(1),
        "1.5",
        True,
        jnp.array(True),
        [1.5],
        jax.random.key(0),
    ):
        with pytest.raises(ValueError, match="`value` must be the loss, one real number"):
            transform.update(params, state, params, value=wrong)
    for wrong in (jnp.ones(2), jnp.complex64(1)):
        with pytest.raises(ValueError, match="`value` must be the loss, one real number"):
            jax.eval_shape(lambda x: transform.update(params, state, params, value=x), wrong)
    for sound in (1, 1.5, np.float64(1.5), jnp.bfloat16(1.5), np.int32(2), np.array(1.5)):
        jax.eval_shape(lambda x=sound: transform.update(params, state, params, value=x))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_passes(name):
    """Updates, state and derivatives by theta are finite in that step and in all that follow."""
    optimizer, theta = make(name)
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)

    def run(theta, losses):
        transform = optimizer.bind(theta, 10)

        def body(state, loss):
            updates, state = transform.update(grads, state, PARAMS, value=loss)
            return state, updates

        state, updates = jax.lax.scan(body, transform.init(PARAMS), losses)
        return optax.tree.sum(updates), (updates, state)

    if not inspection.inspect(optimizer).reads["value"].used:
        return  # Its updates do not depend on a loss, as the program says.
    places = [(bad, at) for bad in (np.nan, np.inf, -np.inf) for at in (0, 2)]
    losses = np.linspace(1.5, 1.0, 4, dtype=np.float32) * np.ones((len(places), 1), np.float32)
    for row, (bad, at) in enumerate(places):
        losses[row, at] = bad
    slopes = jax.jit(jax.vmap(jax.grad(run, has_aux=True), (None, 0)))(theta, losses)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.all(np.isfinite(leaf)), path


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients(name):
    """What never had a gradient moves where it is said to, and nowhere behind the mask."""
    optimizer, theta = make(name, num_tensors=1)
    moves = optimizer.moves_without_gradient
    assert ("mask_zero_gradients" in OPTIMIZERS[name].__doc__) == moves
    params, grads = jnp.linspace(-1, 1, 6), jnp.array([1.0, 0, -2, 0, -0.0, 1e-30])
    plain = optimizer.bind(theta, 10)
    masked = optax.chain(optax.clip(10.0), mask_zero_gradients(plain))

    @jax.jit
    def two_updates(params, grads):
        def of(transform):
            def body(carry, _):
                params, state = carry
                updates, state = transform.update(grads, state, params, **LOSS)
                return (optax.apply_updates(params, updates), state), updates

            return jax.lax.scan(body, (params, transform.init(params)), length=2)[1]

        return of(plain), of(masked)

    grads = np.asarray(grads)
    (first, found), (first_held, held) = jax.device_get(two_updates(params, grads))
    assert np.array_equal(found[grads == 0] != 0, np.full(3, moves))
    np.testing.assert_array_equal(held, np.where(grads == 0, 0, held))
    assert held.dtype == params.dtype and np.all(held[np.array([0, 2])] != 0)
    # Two computations in one program may round differently; what is held is zero exactly.
    np.testing.assert_allclose(first_held, np.where(grads == 0, 0, first), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scaled_by_width(name):
    """Each tensor's update takes its multiplier, behind the mask too; the state is as without."""
    optimizer, theta = make(name, num_tensors=2)
    params = {"hidden": jnp.linspace(-1, 1, 24, dtype=jnp.float16).reshape(6, 4), "bias": 0.5}
    grads = {"hidden": params["hidden"].at[0].set(0), "bias": -1.0}
    base = {"hidden": np.zeros((3, 2)), "bias": np.zeros(())}
    plain = optimizer.bind(theta, 10)
    scaled = scale_by_width(mask_zero_gradients(plain), base)

    @jax.jit
    def first(params, grads):
        return [t.update(grads, t.init(params), params, **LOSS) for t in (plain, scaled)]

    (steps, state), (scaled_steps, scaled_state) = first(params, grads)
    assert leaves_equal(state, scaled_state) and types(steps) == types(scaled_steps)
    np.testing.assert_array_equal(scaled_steps["hidden"][1:], 0.5 * steps["hidden"][1:])
    np.testing.assert_array_equal(scaled_steps["hidden"][0], 0)
    assert scaled_steps["bias"] == steps["bias"]
