# /// script
# requires-python = ">=3.13,<3.14"  # Box2D has no wheels for 3.14 yet, nes-py none for 3.15
# dependencies = [
#     "torch>=2.8,<3",
#     "gymnasium[classic-control]>=1.2.3,<2",
#     "gymnasium[box2d]>=1.2.3,<2; platform_machine != 'aarch64'",  # Box2D has no wheels for Linux on ARM
#     "gym-super-mario-bros>=9,<10",
#     "numpy>=2.1,<3",
#     "opencv-python-headless>=4.11,<6",
#     "moviepy>=2.1,<3",
#     "tqdm>=4.67,<5",
#     "tyro>=0.9,<2",
#     "wandb>=0.31,<1",
# ]
# ///
"""How much the baseline calms the policy gradient: its variance with and without, at several points of a training run.

    uv run benchmark/variance.py                  # some minutes; writes benchmark/results/variance.json

reinforce_baseline.py learns CartPole with the README's flags. At each point a copy of it goes on with a step size of
nothing, so that policy and critic stand still, and 60 batches of 8 episodes give 60 gradients three times over:
weighted by the returns G, by G less the batch's mean (reinforce.py divides that by the deviation, too) and by G - V(s).
The figure is the sum of the variances of all components (the trace of the covariance) for each of the three, and the
squared length of the mean gradient beside them.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import reinforce_baseline as script  # noqa: E402

FLAGS = "--env CartPole-v1 --num-envs 8 --gamma 0.99 --learning-rate 3e-3 --value-epochs 5 --eval-every 0"
POINTS, BATCHES = [3_000, 10_000, 20_000, 40_000, 80_000], 60


def call(*flags) -> None:
    sys.argv[1:] = [str(flag) for flag in flags]
    with contextlib.suppress(SystemExit):
        script.main()


def gradient(agent, batch: dict, weights: torch.Tensor) -> torch.Tensor:
    """The policy gradient of one batch of 8 episodes, as one vector."""
    log_probs = log_softmax(agent(batch["obs"])[0], -1).gather(-1, batch["actions"][:, None]).squeeze(-1)
    parameters = [*agent.actor_trunk.parameters(), *agent.actor.parameters()]
    loss = script.policy_loss(log_probs, weights, 8)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def measure(run: Path) -> dict:
    """Sixty gradients of each kind for the policy of a run -> their spread."""
    threes, update = [], script.update

    def spy(agent, optimizer, args, batch):
        returns = batch["returns"]
        threes.append([gradient(agent, batch, w) for w in (returns, returns - returns.mean(), batch["weights"])])
        if len(threes) == BATCHES:
            raise KeyboardInterrupt
        return update(agent, optimizer, args, batch)

    script.update = spy
    still = ["--learning-rate", 1e-30, "--value-learning-rate", 1e-30, "--total-timesteps", 10_000_000]
    call("--resume", run, *still)
    script.update = update
    gradients = dict(zip(("without", "batch mean", "with"), zip(*threes, strict=True), strict=True))
    gradients = {name: torch.stack(column).double() for name, column in gradients.items()}
    spread = {name: g.var(0).sum().item() for name, g in gradients.items()}
    return spread | {"mean squared": gradients["with"].mean(0).square().sum().item()}


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        run, copy = Path(folder) / "run", Path(folder) / "copy"
        for point in POINTS:
            start = ["--resume", run] if run.exists() else [*FLAGS.split(), "--run-dir", run]
            call(*start, "--total-timesteps", point)
            shutil.copytree(run, copy)
            results[point] = measure(copy)
            shutil.rmtree(copy)
            print(point, results[point], file=sys.stderr)
    (ROOT / "benchmark" / "results" / "variance.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
