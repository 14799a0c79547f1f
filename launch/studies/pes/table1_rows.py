"""Every estimator, and what table 1 of the PES paper says of it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from meta_train import estimators as est

GROUP = 8  # Pairs of reparam+ES that share weights; their variance has heavy tails with few.


class TableRow(NamedTuple):
    """An estimator, and what the table says of it.

    Attributes:
      build: ``(system, N, T, K, sigma) -> estimator``.
      compute, memory: the paper's (F, B: a forward and a backward step), but for RTRL and UORO:
        the paper forms the Jacobian of a step (``P S^2 + S (F + B)`` and ``S P + S^2``; ``S^2``
        more for UORO), here it is only multiplied with.
      flops, bytes: the exponents of the symbols in them; an absent symbol has exponent 0.
      unbiased, differentiates, smooths: what it should be found to be.
      final: whether it estimates the gradient of the last loss, instead of the mean one.
    """

    build: Callable
    compute: str
    memory: str
    flops: dict[str, int]
    bytes: dict[str, int]
    unbiased: bool = True
    differentiates: bool = True
    smooths: bool = False
    final: bool = False


def builder(make: Callable, **given: Any) -> Callable:
    """``TableRow.build``, of an estimator that takes some of the five."""
    takes = inspect.signature(make).parameters

    def build(system, num, horizon, truncation, sigma):
        offered: dict[str, Any] = {
            "num_particles": num,
            "num_pairs": num,
            "horizons": est.fixed_horizon(horizon),
            "truncation": truncation,
            "sigma": sigma,
        }
        return make(system, **{k: v for k, v in offered.items() if k in takes}, **given)

    return build


def _gpes(system, num, horizon, truncation, sigma):
    build = builder(est.gpes, noise_period=2 * truncation)
    return build(system, num, horizon, truncation, sigma)


def _grouped(system, num, *sizes):
    return builder(est.reparam_es, pairs_per_particle=GROUP)(system, num // GROUP, *sizes)


def _telescoped(system, num, horizon, *sizes):
    last = est.telescoped(system, est.fixed_horizon(horizon))
    return builder(est.pes)(last, num, horizon, *sizes)


def _rows() -> dict[str, TableRow]:
    """Of a step of ``S^2`` operations and ``N`` particles of ``S`` bytes."""
    held = {"S": 1, "N": 1}
    window, episode = ({length: 1, "S": 2, "N": 1} for length in "KT")
    tape, long_tape = ({length: 1, **held} for length in "KT")
    es: dict[str, Any] = {"differentiates": False, "smooths": True}
    pes = "N K F", "N(S+P)", window, held
    artbp = builder(est.artbp, mean_truncation=4.0)
    dynamic = "T(F+B); K(F+B) if dynamic", "TS; KS if dynamic"
    reparam = "N T(F+B)", "N TS", episode, long_tape
    guided = builder(est.guided_es, num_surrogates=1)
    return {
        "BPTT": TableRow(builder(est.bptt), "T(F+B)", "TS", episode, long_tape),
        "TBPTT": TableRow(builder(est.tbptt), "K(F+B)", "KS", window, tape, unbiased=False),
        "ARTBP": TableRow(artbp, *dynamic, episode, long_tape),
        "RTRL": TableRow(builder(est.rtrl), "K P F", "SP", window | {"P": 1}, held | {"P": 1}),
        "UORO": TableRow(builder(est.uoro), "K(F+B)", "S+P", window, held),
        "forward gradient": TableRow(builder(est.forward_gradient), "K F", "S+P", window, held),
        "Reparam": TableRow(builder(est.reparam), *reparam, smooths=True),
        "Reparam+ES": TableRow(_grouped, *reparam, smooths=True),
        "ES": TableRow(builder(est.full_es), "N T F", "N S", episode, held, **es),
        "truncated ES": TableRow(
            builder(est.truncated_es), "N K F", "N S", window, held, unbiased=False, **es
        ),
        "PES": TableRow(builder(est.pes), *pes, **es),
        "PES+Analytic": TableRow(
            builder(est.pes_analytic), "N K(F+B)", "N(KS+P)", window, tape, smooths=True
        ),
        "telescoped PES": TableRow(_telescoped, *pes, final=True, **es),
        "GPES": TableRow(_gpes, *pes, **es),
        "NRES": TableRow(builder(est.nres), *pes, **es),
        "guided ES": TableRow(
            guided, "N T(F+B)", "N(TS+P)", episode, long_tape, unbiased=False, smooths=True
        ),
    }


ROWS = _rows()
