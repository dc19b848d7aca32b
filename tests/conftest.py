"""What the tests share: the scripts, and ways to run them inside this process or as a user does."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # as the scripts have it; more would only fight with whatever else runs here
ROOT = Path(__file__).parent.parent
LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "a2c", "trpo", "ppo", "dreamerv3"]
SCRIPTS = [name for name in LADDER if (ROOT / f"{name}.py").exists()]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
OWN_FLAGS = {
    "a2c": "--num-steps 16",
    "trpo": "--num-steps 16",
    "ppo": "--num-steps 16 --num-minibatches 2",
    "dreamerv3": "--batch-size 2 --batch-length 4 --horizon 3 --train-ratio 4",  # one update per step of both
}


def short(name):
    """Flags of a short run. Clockwork's episodes last 8 steps, so with these they end where batches end."""
    flags = "--env probes:Clockwork-v0 --num-envs 2 --eval-episodes 2 --log-every 1"
    return [*flags.split(), *OWN_FLAGS.get(name, "").split()]


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=[name for name in LADDER if name in SCRIPTS and name != "dreamerv3"])
def rung(request):
    """Each policy-gradient script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws depends on no other test."""
    torch.manual_seed(0)


@pytest.fixture
def a2c():
    return importlib.import_module("a2c")


@pytest.fixture
def ppo():
    return importlib.import_module("ppo")


@pytest.fixture
def call(monkeypatch):
    """call(script, *flags) -> exit code of the script's main() with these flags, run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, flags)])
        try:
            script.main()
        except SystemExit as end:
            return end.code or 0
        return 0

    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(script, *flags, cwd, **more):
    """Start a script in a process of its own, as a user does."""
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([str(part) for part in command], cwd=cwd, env={**ENVIRON, **more}, **pipes)


def metrics(run_dir):
    """metrics.jsonl, every line parsed: a torn line fails here."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir, name="checkpoint.pt"):
    """All tensors that training changes, by name: parameters and the optimiser's averages."""
    state = torch.load(Path(run_dir) / name, weights_only=True)
    tensors = dict(state["agent"])
    for index, averages in state["optimizer"]["state"].items():
        tensors |= {f"optimizer {index} {name}": value for name, value in averages.items()}
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"these tensors differ: {different}"
