"""Values that an argument with an annotation must refuse, so that a new argument is tried too."""

import inspect
import types
import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

NOT_FLAGS = ["yes", "", None, 0, 1, 2.5, (True,)]
NOT_COUNTS = [2.5, 8.0, -1, True, "3", None, (3,), np.nan, np.float32(2), 1j]
NOT_NUMBERS = ["0.1", "", None, True, np.bool_(True), (0.5,), [], 1j, object]
NOT_NUMBERS += [np.nan, np.inf, -np.inf, -1.0, 1e39, 10**400, np.ones(2), jnp.ones(1)]
NOT_TEXTS = [None, 3, True, (), ("relu",), ["relu"], b"relu", 1.5]


def wrong_values(annotation):
    """What an argument annotated so must refuse, whatever it is for: numbers are 0 or more."""
    scalars = {bool: NOT_FLAGS, int: NOT_COUNTS, float: NOT_NUMBERS, str: NOT_TEXTS}
    if annotation in scalars:
        return scalars[annotation]
    if isinstance(annotation, types.UnionType):
        kinds = typing.get_args(annotation)
        return wrong_values(next(kind for kind in kinds if kind in scalars))
    if typing.get_origin(annotation) in (tuple, Sequence):
        inner = typing.get_args(annotation)[0]
        # One wrong value among sound ones is wrong too, and so is the one alone, or a string.
        sound = {int: (4,), float: (0.5,), str: ("a",)}.get(inner, ())
        several = [(*sound, wrong) for wrong in wrong_values(inner)]
        return [*several, *sound, "34", b"34", "", None, True, 0.5, {4: 4}]
    assert isinstance(annotation, type), f"no wrong values of {annotation}: add them"
    return [None, "linear", 3, annotation, ()]  # Such as another task.


def check_arguments(constructor, annotated=None, unchecked=()):
    """Every argument of a constructor refuses what its annotation does not allow.

    Args:
      annotated: what has the annotations and defaults; the constructor itself.
      unchecked: arguments that may be anything.
    """
    annotated = annotated or constructor
    defaults = {key: x.default for key, x in inspect.signature(annotated).parameters.items()}
    hints = typing.get_type_hints(annotated)
    assert defaults.keys() <= hints.keys()
    for argument in defaults.keys() - set(unchecked):
        none_is_one = hints[argument] is int and defaults[argument] != 0
        for wrong in wrong_values(hints[argument]) + [0] * none_is_one:
            check_refused(constructor, argument, wrong)


def check_refused(constructor, argument, wrong):
    """One sentence, on one line, that names the argument and says what was given."""
    try:
        made = constructor(**{argument: wrong})
    except (TypeError, ValueError) as error:
        message = str(error)
        assert f"`{argument}` must be" in message and ", got" in message, (wrong, message)
        assert "\n" not in message and len(message) < 400, (wrong, message)
    else:
        pytest.fail(f"{argument}={wrong!r} was taken: {made}")
