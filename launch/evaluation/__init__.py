"""Evaluations: of optimizers on one task (``one_task``), and on a suite of them (``suite``)."""

# Fixed, so that evaluations compare; no meta-training draws from it (their keys are folded).
SEED = 20_000
