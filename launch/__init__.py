"""The commands: ``python -m launch.train`` and its like, or ``learned-opt-train``."""

import contextlib
import os
import signal
import sys
from importlib.util import find_spec

# Of the extra `train`, those that nothing of the base install brings along.
_NEEDED = (
    "array_record",
    "filelock",
    "matplotlib",
    "sklearn",
    "simpy",
    "tensorflow_datasets",
    "tqdm",
    "wandb",
)
# A program of ours, not a module of somebody else's that imports this package.
_command = sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("learned-opt-")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    _message = (
        f"the commands need more than the optimizers do ({', '.join(_missing)} missing); install "
        "it in the folder of the repository with `pip install '.[train]'`."
    )
    if _command:
        print(f"error: {_message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_message)


def end(number, frame):
    """Ends a command at once, without a traceback, while it imports, compiles or computes.

    Whatever the commands write is whole at any moment, so there is nothing to tidy up. The train
    loop saves first: it has a handler of its own.
    """
    del frame
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # It may be in the middle of a print.
            stream.flush()
    if number == signal.SIGINT:
        os.write(2, b"\nInterrupted; run again to continue.\n")
        os._exit(130)  # 128 + SIGINT, as shells say it.
    os.write(2, f"\n{signal.Signals(number).name}: stopped; run again to continue.\n".encode())
    os._exit(75)  # EX_TEMPFAIL, "try again", for schedulers that requeue.


# Only in a command, and before anything slow is imported. (A shell that ignores the signal
# for what it starts in the background is obeyed.)
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    if _command and signal.getsignal(_number) is not signal.SIG_IGN:
        signal.signal(_number, end)
