"""The commands: train, evaluate, demo, replay, reproduce, benchmark."""

from importlib.util import find_spec

if find_spec("absl") is None:
    raise ImportError(
        "the commands need more than the optimizers do; install them with "
        "`pip install 'learned-opt[train]'`."
    )
