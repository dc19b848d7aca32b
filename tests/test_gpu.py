"""What only a CUDA GPU can show. Where there is none, this file is skipped and test_cuda.py has to do."""

import importlib
import json
import math

import pytest
import torch
from conftest import metrics, short, weights
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)

ENVS = pytest.mark.parametrize("env", ["probes:Clockwork-v0", "probes:Screen-v0"])
IDLE = ["--eval-every", 0, "--save-every", 0]


class SameNoise(TorchFunctionMode):
    """Draws of either device from the CPU's generator, but for those from a generator of their own (evaluations)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if kwargs.get("generator") is None and name in ("rand", "randn", "randperm") and kwargs.get("device"):
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if kwargs.get("generator") is None and name == "exponential_":
            return args[0].copy_(torch.empty(args[0].shape).exponential_())
        return function(*args, **kwargs)


def losses(run_dir):
    """Every loss that a run has logged, in order."""
    return [figure for line in metrics(run_dir) for name, figure in sorted(line.items()) if name.startswith("losses/")]


def assert_near(run, other, rtol, atol):
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name, expected in a.items():  # each lies where it was trained
        torch.testing.assert_close(b[name].cpu(), expected.cpu(), rtol=rtol, atol=atol, msg=name)


@ENVS
def test_a_run_lives_on_the_gpu_and_its_checkpoint_anywhere(script, env, call, tmp_path, capfd):
    run, flags = tmp_path / "run", [*short(script.SCRIPT), "--env", env, "--capture-video"]
    assert call(script, *flags, "--cuda", "--total-timesteps", 64, "--run-dir", run) == 0
    assert call(script, "--resume", run, "--total-timesteps", 96) == 0
    for device in ([], ["--cuda"]):
        assert call(script, "--evaluate", run, "--eval-episodes", 1, *device) == 0
    assert call(script, "--resume", run, "--no-cuda", "--total-timesteps", 128) == 0
    assert json.loads((run / "config.json").read_text())["device"] != torch.cuda.get_device_name()
    assert all(map(math.isfinite, losses(run))) and losses(run)
    out, err = capfd.readouterr()
    assert "warn" not in (out + err).lower() and "A CUDA device was found; --cuda would use it." in out


def test_a_run_on_the_gpu_takes_the_steps_of_the_cpu(script, call, tmp_path, monkeypatch):
    """In float32, as bfloat16 is rounded here and there as the kernel likes."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *emulated: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for name, more in (("cpu", []), ("gpu", ["--cuda"])):
        with SameNoise():
            flags = [*short(script.SCRIPT), *IDLE, "--total-timesteps", 64, *more]
            assert call(script, *flags, "--run-dir", tmp_path / name) == 0
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3, abs=1e-5)
    assert_near(tmp_path / "cpu", tmp_path / "gpu", 1e-2, 1e-4)


@pytest.mark.parametrize("env", ["probes:Diary-v0", "probes:Screen-v0"])
def test_a_recorded_update_is_the_update(env, call, tmp_path, monkeypatch):
    """DreamerV3 as a CUDA graph, with nothing compiled: the same kernels on the same random numbers."""
    script = importlib.import_module("dreamerv3")
    monkeypatch.setattr(script, "compile_parts", lambda agent: None)
    flags = [*short("dreamerv3"), *IDLE, "--env", env, "--cuda", "--train-ratio", 8]
    for name, more in (("eager", []), ("graph", ["--compile"])):
        assert call(script, *flags, *more, "--total-timesteps", 32, "--run-dir", tmp_path / name) == 0
        assert call(script, "--resume", tmp_path / name, "--total-timesteps", 64) == 0
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3, abs=1e-5)
    assert_near(tmp_path / "eager", tmp_path / "graph", 1e-2, 1e-4)


@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself is not ours
@ENVS
def test_compiled_and_eager_agree(script, env, call, tmp_path):
    """On vectors numbers are float32; on images they are bfloat16, and actions soon differ: the first loss counts."""
    torch._dynamo.reset()
    flags = [*short(script.SCRIPT), *IDLE, "--env", env, "--cuda", "--total-timesteps", 64]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert call(script, *flags, *more, "--run-dir", tmp_path / name) == 0
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert compiled[0] == pytest.approx(eager[0], rel=0.05, abs=1e-3)
    assert len(compiled) == len(eager) and all(map(math.isfinite, compiled))
    if env == "probes:Clockwork-v0" and script.SCRIPT != "dreamerv3":
        assert_near(tmp_path / "eager", tmp_path / "compiled", 1e-2, 1e-4)
