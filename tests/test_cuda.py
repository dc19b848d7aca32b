"""--cuda on a machine without a GPU: a pretended device shows what mixes devices or waits where a graph is recorded."""

import contextlib
import importlib

import pretend
import pytest
import torch
from conftest import assert_same, metrics, short, weights

ENVS = pytest.mark.parametrize("env", ["probes:Diary-v0", "probes:Screen-v0"])


def figures(run_dir):
    return [{**line, "time": 0, "charts/SPS": 0} for line in metrics(run_dir)]


@ENVS
def test_a_run_on_the_device_is_the_run_on_the_cpu(script, env, call, tmp_path):
    """The same lines in the same order, only elsewhere: with the CPU's arithmetic the same weights, to the bit."""
    flags = [*short(script.SCRIPT), "--env", env, "--eval-every", 48, "--save-every", 0, "--capture-video"]
    for name, more, place in (("cpu", [], contextlib.nullcontext), ("cuda", ["--cuda"], pretend.device)):
        with place():
            assert call(script, *flags, *more, "--total-timesteps", 64, "--run-dir", tmp_path / name) == 0
            assert call(script, "--resume", tmp_path / name, "--total-timesteps", 96) == 0
            assert call(script, "--evaluate", tmp_path / name, *more, "--eval-episodes", 1) == 0
    assert_same(weights(tmp_path / "cpu"), weights(tmp_path / "cuda"))
    assert figures(tmp_path / "cpu") == figures(tmp_path / "cuda")


@ENVS
def test_a_recorded_update_is_the_update(env, call, tmp_path, monkeypatch, capsys):
    """DreamerV3 as a CUDA graph: recorded once and repeated, after a resumption too, it takes the same steps."""
    script, recorded, begin = importlib.import_module("dreamerv3"), [], pretend.Recorder.__init__
    monkeypatch.setattr(pretend.Recorder, "__init__", lambda self: recorded.append(self) or begin(self))
    flags = [*short("dreamerv3"), "--env", env, "--eval-every", 0, "--save-every", 0, "--cuda"]
    flags += ["--train-ratio", 8]  # two updates a step: the figures of the first must outlive the second
    for name, more in (("eager", []), ("graph", ["--compile"])):
        capsys.readouterr()
        with pretend.device():
            assert call(script, *flags, *more, "--total-timesteps", 24, "--run-dir", tmp_path / name) == 0
            assert ("--compile would make" in capsys.readouterr().out) == (not more)
            assert call(script, "--resume", tmp_path / name, "--total-timesteps", 40) == 0
    assert len(recorded) == 2 and all(recorder.operations for recorder in recorded)
    assert_same(weights(tmp_path / "eager"), weights(tmp_path / "graph"))
    assert figures(tmp_path / "eager") == figures(tmp_path / "graph")


def test_the_pretended_device_is_strict():
    """What a real one refuses, it refuses; what a graph repeats is the operation, on the memory that it had."""
    with pretend.device():
        there, here, graph = torch.ones(2, device=torch.device("cuda")), torch.ones(2), torch.cuda.CUDAGraph()
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.stack([there[0], here[0]])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="two devices"):
            there.numpy()
        for waiting in (there.sum().item, lambda: there.copy_(here), lambda: bool(there[0] > 0), there.nonzero):
            with pytest.raises(RuntimeError, match="cannot be recorded"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                waiting()
        with torch.cuda.graph(graph):
            double = there * 2
            there += 1
        assert there.tolist() == [1, 1]
        for expected in ([2, 2], [4, 4], [6, 6]):
            graph.replay()
            assert double.tolist() == expected
