"""Tensors of equal shape side by side, so that a program grows with shapes and not with tensors."""

import jax
import jax.numpy as jnp

Groups = tuple[tuple[int, ...], ...]


def group_by_shape(tree) -> Groups:
    """Which leaves are alike: for every shape and type, the places of its leaves.

    Leaves without elements are in no group.
    """
    found: dict = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if leaf.size:
            found.setdefault((leaf.shape, leaf.dtype), []).append(i)
    return tuple(map(tuple, found.values()))


def stack(tree, groups: Groups) -> list[jax.Array]:
    """For every group of n leaves ``[n, *shape]``."""
    leaves = jax.tree.leaves(tree)
    return [jnp.stack([leaves[i] for i in places]) for places in groups]


def unstack(stacks: list[jax.Array], groups: Groups, like):
    """The tree that ``stack`` made ``stacks`` of; leaves without elements are those of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    for places, stacked in zip(groups, stacks, strict=True):
        for i, leaf in zip(places, stacked, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
