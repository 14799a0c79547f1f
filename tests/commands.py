"""Commands as a user gives them, each in a process of its own, all of which find imported what
takes seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FORKING = """
import importlib, json, os, sys
from launch import config, job, loop
for number, (module, *words) in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        for stream in (1, 2):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv[1:] = words
        sys.exit(importlib.import_module(module).cli())
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Said(NamedTuple):
    code: int
    out: str
    error: str


def one_by_one(folder: Path, commands, env, logs: Path) -> list[Said]:
    """The outcomes of ``commands``, each of a module and words, given one after another."""
    words = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", FORKING, words, logs],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    codes = [int(word) for word in done.stdout.split()]
    assert len(codes) == len(commands), done.stderr
    return [
        Said(code, *((logs / f"{number}.{stream}").read_text() for stream in (1, 2)))
        for number, code in enumerate(codes)
    ]
