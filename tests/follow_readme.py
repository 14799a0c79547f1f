"""Follows the README from its first line, as somebody who has nothing but a checkout and a Python.

`make test-readme`: every command of its blocks and every block of Python, in order, in virtual
environments made here; packages come from a package index. `make test` is run on a few tests, the
training of 5,000 steps for a few steps. Apart from the other tests, since it needs a network.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
# Of `make test`: one of each of its two parts.
A_FEW = "-k 'test_the_readme_is_short or test_decay_one'"


def test_the_readme_from_its_first_line(tmp_path):
    checkout, home, env = tmp_path / "checkout", tmp_path / "home", tmp_path / "env"
    home.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    subprocess.run([f"{sys.base_prefix}/bin/python3", "-m", "venv", env], check=True)
    # As a user's shell has it: nothing of this one's environments or settings of JAX.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    others = [p for p in os.environ["PATH"].split(":") if ".venv" not in p]
    kept |= {
        "PATH": ":".join([f"{env}/bin", f"{sys.base_prefix}/bin", *others]),
        "VIRTUAL_ENV": str(env),
        "HOME": str(home),
        "WANDB_MODE": "offline",
        "PYTEST_ADDOPTS": A_FEW,
        "MPLBACKEND": "agg",
        # What was downloaded before need not be again.
        "PIP_CACHE_DIR": cache_of_pip(),
    }

    def run(*words):
        start = time.monotonic()
        done = subprocess.run(words, cwd=checkout, env=kept, capture_output=True, text=True)
        line = " ".join(" ".join(words).split())[:110]
        print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    said, seen = {}, []
    for language, text in BLOCK.findall((checkout / "README.md").read_text()):
        seen.append(language)
        if language == "python":
            run("python", "-c", text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+# .*$", "", line)
            line = line.replace("--cfg.num_steps=5000", "--cfg.num_steps=5")
            said[line] = run("bash", "-ec", line)
    assert seen.count("python") == 2 and len(said) >= 5
    (trained,) = [text for line, text in said.items() if "launch.train" in line]
    assert "compare it with Adam and SGD:" in trained
    assert "[95%]" in said["make demo"] and " passed" in said["make test"]
    assert (checkout / "runs/demo/optimizer/theta.safetensors").exists()
    run("make", "docs")
    assert (checkout / "site/index.html").exists()


def cache_of_pip():
    done = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
