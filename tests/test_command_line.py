"""What a user meets: flags, files, mistakes, interruptions. Every test runs on every script."""

import contextlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from conftest import ENVIRON, ROOT, SCRIPTS, metrics, short, start, weights


def tiny(script):
    return [*short(script.SCRIPT), "--total-timesteps", "64"]


# ---- outputs


def test_a_run_leaves_what_design_promises(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    assert call(script, *tiny(script), "--run-dir", run, "--seed", 5) == 0
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "best.pt"}
    assert {path.name for path in run.iterdir()} == files | ({"replay"} if script.SCRIPT == "dreamerv3" else set())
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 5 and config["script"] == script.SCRIPT and config["device"]
    assert {"torch", "gymnasium", "gym-super-mario-bros", "numpy"} == set(config["versions"])
    assert set(vars(script.Args())) <= set(config)
    rows = metrics(run)
    assert all({"global_step", "time"} <= set(row) for row in rows)
    assert [row["global_step"] for row in rows] == sorted(row["global_step"] for row in rows)
    keys = {key for row in rows for key in row}
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"} <= keys
    assert {"eval/return_mean", "eval/return_std", "eval/episodes"} <= keys
    assert any(key.startswith("losses/") for key in keys)
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert str(run) in last_lines[0] and "finished" in last_lines[0]
    assert f"--evaluate {run} --capture-video" in last_lines[1]


def test_default_run_dir_tells_env_script_seed(script, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(script, *tiny(script), "--seed", 3) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"probes-Clockwork-v0__{script.SCRIPT}__3__")


def test_progress_lines_without_a_terminal(script, call, tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(script.time, "time", lambda: float(next(clock)))
    call(script, *tiny(script), "--run-dir", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 64 steps" in line]
    assert len(lines) > 5 and all("steps/s, " in line for line in lines)
    returns = ["return" in line for line in lines]  # as soon as an episode has ended
    assert returns == sorted(returns) and sum(returns) > len(lines) / 2
    assert all("no episode has ended yet" in line for line in lines[: returns.index(True)])


def test_the_speed_is_the_mean_of_the_whole_run(script, monkeypatch, capsys):
    bar = types.SimpleNamespace(disable=True, n=0, total=500, set_postfix_str=lambda *_, **__: None, update=lambda n: n)
    run = script.Run.__new__(script.Run)
    run.bar, run.recent, run.global_step, run.began = bar, [], 300, 1000.0  # a resumed run began earlier by its seconds
    for now, shown in ((1020.0, "15"), (1030.0, "10"), (1000.0, "300,000,000,000")):  # the clock has not ticked yet
        monkeypatch.setattr(script.time, "time", lambda now=now: now)
        run.show()
        assert f"300 of 500 steps, {shown} steps/s" in capsys.readouterr().out


def test_a_terminal_shows_a_bar_which_says_what_takes_its_time(script, call, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert call(script, *short(script.SCRIPT), "--total-timesteps", 64, "--run-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert "64/64" in err and "evaluating, 2 episodes" in err
    assert "steps/s, return" not in out  # the lines of a run without a terminal


def test_mario_figures_and_a_video_in_which_things_move(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*tiny(script), "--env", "SuperMarioBros-1-1-v0", "--capture-video", "--run-dir", run]
    assert call(script, *flags) == 0
    evaluation = [row for row in metrics(run) if "eval/episodes" in row][-1]
    assert 0 <= evaluation["eval/flag_rate"] <= 1 and 40 < evaluation["eval/x_pos_mean"] < 3200
    assert call(script, "--evaluate", run, "--capture-video") == 0
    told = capsys.readouterr().out.splitlines()[-2]
    assert all(word in told for word in ("2 episodes", "return", "flag", "x", "+-"))
    for name in (str(evaluation["global_step"]), "best"):
        assert moves(run / "videos" / f"{name}.mp4", [256, 240])
        if script.SCRIPT == "dreamerv3":  # truth, dream and difference
            assert moves(run / "videos" / f"{name}-dream.mp4", [256, 768])


def test_an_environment_that_cannot_draw_goes_without_videos(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    for flags in ([*tiny(script), "--run-dir", run], ["--evaluate", run]):
        assert call(script, *flags, "--capture-video") == 0
        out, err = capsys.readouterr()
        assert "--capture-video: probes:Clockwork-v0 cannot draw itself; going on without videos." in out
        assert err == "" and not (run / "videos").exists()


@pytest.mark.parametrize("name", ["ppo", "dreamerv3"])
@pytest.mark.parametrize(
    "drawing", [None, [], np.zeros((9, 9, 3)), RuntimeError("no screen")], ids=["none", "list", "floats", "error"]
)
def test_an_environment_whose_drawing_fails_is_refused_at_once(drawing, name, call, tmp_path, capsys, monkeypatch):
    script = importlib.import_module(name)

    def render(env):
        if isinstance(drawing, Exception):
            raise drawing
        return drawing

    monkeypatch.setattr(probes.Screen, "render", render)
    flags = [*tiny(script), "--env", "probes:Screen-v0", "--run-dir", tmp_path / "run"]
    assert call(script, *flags, "--capture-video") == 2
    err = capsys.readouterr().err
    assert err.startswith("--capture-video cannot work: probes:Screen-v0 cannot draw itself (") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_images_that_no_cnn_sees_are_told(script, monkeypatch, capsys):
    args = script.Args(env="probes:Screen-v0")
    script.set_up(args)
    assert "CNN" not in capsys.readouterr().out
    for shape in ((3, 96, 96), (96, 96)):  # channels first, and none
        monkeypatch.setattr(probes.Screen, "observation_space", gym.spaces.Box(0, 255, shape, np.uint8))
        script.set_up(args)
        assert "--env probes:Screen-v0: a CNN sees only uint8 images of height x width x 1 " in capsys.readouterr().out


def test_a_runs_folder_stands_for_its_best_checkpoint(script, call, tmp_path, monkeypatch):
    run, read, load = tmp_path / "run", [], script.load
    assert call(script, *tiny(script), "--run-dir", run) == 0
    monkeypatch.setattr(script, "load", lambda path: read.append(path) or load(path))
    assert call(script, "--evaluate", run) == 0
    (run / "best.pt").unlink()  # as long as nothing was evaluated
    assert call(script, "--evaluate", run) == 0
    assert read == [run / "best.pt", run / "checkpoint.pt"]


def moves(path, size):
    clip, frames = cv2.VideoCapture(str(path)), []
    assert clip.get(cv2.CAP_PROP_FPS) == 15
    while (read := clip.read())[0]:
        frames.append(read[1].astype(int))
    assert list(frames[0].shape) == [*size[::-1], 3]
    changed = [np.abs(a - b).max() > 40 for a, b in itertools.pairwise(frames)]
    return len(frames) > 20 and np.mean(changed) > 0.8


def test_every_tracked_number_is_in_the_file_and_every_video_is_sent(script, call, tmp_path, monkeypatch):
    logged, asked = [], {}

    def finish(exit_code):  # it can take long: a second Ctrl-C must end it
        handlers = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        asked.update(exit_code=exit_code, handlers=handlers, ended=time.time())

    def init(**flags):
        time.sleep(2)
        asked.update(flags, began=time.time())
        return run

    run = types.SimpleNamespace(log=logged.append, finish=finish, id="abc", define_metric=lambda *_, **__: None)
    login = lambda prompt, verify: prompt  # noqa: E731, no key is known
    fake = types.SimpleNamespace(init=init, login=login, Video=str, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    flags = [*tiny(script), "--env", "probes:Screen-v0", "--capture-video", "--track", "--wandb-project-name", "p"]
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    assert metrics(tmp_path / "run")[-1]["time"] < asked["ended"] - asked["began"]  # the clock did not wait for wandb
    sent = [
        {key.removeprefix("videos/eval"): row.pop(key) for key in list(row) if key[:6] == "videos"} for row in logged
    ]
    assert logged == metrics(tmp_path / "run") and logged
    step = logged[-1]["global_step"]
    kinds = ("", "-dream") if script.SCRIPT == "dreamerv3" else ("",)
    assert sent[-1] == {kind: str(tmp_path / f"run/videos/{step}{kind}.mp4") for kind in kinds}
    assert asked["project"] == "p" and asked["config"]["env"] == "probes:Screen-v0"
    assert asked["exit_code"] == 0 and asked["handlers"] == {signal.SIG_DFL}
    assert asked["mode"] == "offline"  # no key, no terminal: no question


def test_a_resumed_run_is_tracked_further_and_its_copy_anew(ppo, call, tmp_path, monkeypatch):
    asked, tracker = [], types.SimpleNamespace(id="abc", define_metric=lambda *_, **__: None)
    tracker.log, tracker.finish = lambda _: None, lambda exit_code: None
    fake = types.SimpleNamespace(init=lambda **flags: asked.append(flags["id"]) or tracker, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    assert call(ppo, *tiny(ppo), "--track", "--run-dir", run) == 0
    assert call(ppo, "--resume", run, "--total-timesteps", 256, "--no-track") == 0
    shutil.copytree(run, tmp_path / "copy")
    assert call(ppo, "--resume", run, "--total-timesteps", 320, "--track") == 0
    assert call(ppo, "--resume", tmp_path / "copy", "--total-timesteps", 320, "--track") == 0
    assert asked == [None, "abc", None]


def test_a_project_that_wandb_refuses_gets_a_sentence(ppo, tmp_path):
    process = start("ppo", *tiny(ppo), "--track", "--wandb-project-name", "a/b", cwd=tmp_path, WANDB_MODE="offline")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "--track cannot work (" in err and "Traceback" not in err, err


def test_tracking_offline_with_the_real_wandb(ppo, tmp_path):
    process = start("ppo", *tiny(ppo), "--track", "--run-dir", "run", cwd=tmp_path, WANDB_MODE="offline")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    steps = []
    for data in wandb_records(file.read_bytes()):
        record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
            steps.append({key: json.loads(item.value_json) for key, item in items.items() if key[0] != "_"})
    assert steps == metrics(tmp_path / "run")


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format (32 KiB blocks of crc, length, kind, bytes) behind 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_and_moviepy_are_imported_only_when_asked_for(tmp_path):
    env, processes = {**ENVIRON, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, []
    for name in SCRIPTS:
        flags = [*tiny(importlib.import_module(name)), "--run-dir", str(tmp_path / name)]
        code = f"import sys, {name} as s; sys.argv[1:] = {flags}\ntry: s.main()\nexcept SystemExit: pass\n"
        code += "print([m for m in ('wandb', 'moviepy') if m in sys.modules])"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path, **pipes))
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert out.splitlines()[-1] == "[]", err
        assert err == ""  # no warning either


def test_cuda_flag_without_a_device(script, call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(script, *tiny(script), "--cuda", "--run-dir", tmp_path / "a") == 0
    assert "no CUDA device" in capsys.readouterr().out


# ---- mistakes: exit code 2, one sentence, nothing written


MISTAKES = {
    "--num-envs 0": "--num-envs 0 cannot work",
    "--num-envs -3": "--num-envs -3 cannot work",
    "--num-threads -1": "--num-threads -1 cannot work",
    "--total-timesteps -5": "--total-timesteps -5 cannot work",
    "--learning-rate 0": "--learning-rate 0.0 cannot work",
    "--learning-rate nan": "--learning-rate nan cannot work",
    "--learning-rate inf": "--learning-rate inf cannot work",
    "--gamma 1.5": "--gamma 1.5 cannot work; it must be at least 0 and at most 1",
    "--seed -1": "--seed -1 cannot work",
    "--eval-episodes 0": "--eval-episodes 0 cannot work",
    "--eval-every -1": "--eval-every -1 cannot work",
    "--save-every -1": "--save-every -1 cannot work",
    "--log-every -1": "--log-every -1 cannot work",
    "--env CartPol-v1": "the nearest known ids are: CartPole-v1",
    "--env ALE/Pong-v5": "one of another package is written package:ALE/Pong-v5",
    "--env SuperMarioBros-9-1-v0": "SuperMarioBros-8-1-v0",
    "--env no.such.module:Thing-v0": "No module named 'no'",
    "--env probes:Nothing-v0": "--env probes:Nothing-v0 is unknown",
    "--resume nowhere": "There is no checkpoint nowhere",
    "--resume a --evaluate b": "--resume cannot work with --evaluate",
    "--run-dir a --evaluate b": "--run-dir cannot work with --evaluate",
    "--track --evaluate b": "--track cannot work with --evaluate",
    "--run-dir config.json/run": "--run-dir config.json/run cannot be written to (Not a directory)",
    "--evaluate nothing.pt": "There is no checkpoint nothing.pt",
    "--evaluate .": "There is no checkpoint checkpoint.pt",
}
ROLLOUT = {
    "--num-steps 0": "--num-steps 0 cannot work",
    "--total-timesteps 31": "it must be at least a batch, 32",
    "--gae-lambda -0.1": "--gae-lambda -0.1 cannot work",
}
LOSS = {
    "--ent-coef -1": "--ent-coef -1.0 cannot work",
    "--vf-coef nan": "--vf-coef nan cannot work",
    "--max-grad-norm 0": "--max-grad-norm 0.0 cannot work",
}
MODEL_FREE = {
    "--env probes:BoxActions-v0": "its action space is Box(",
    "--env probes:DictObs-v0": "needs Box, and dreamerv3.py takes Box actions and Dict observations, too.",
}
CRITIC = {
    "--value-epochs 0": "--value-epochs 0 cannot work",
    "--value-batch-size 0": "--value-batch-size 0 cannot work",
}
OWN_MISTAKES = {
    "reinforce": {"--total-timesteps 0": "--total-timesteps 0 cannot work; it must be above 0"},
    "reinforce_baseline": CRITIC | {"--value-learning-rate 0": "--value-learning-rate 0.0 cannot work"},
    "actor_critic": {
        "--total-timesteps 1": "it must be at least a batch, 2",
        "--value-learning-rate 0": "--value-learning-rate 0.0 cannot work",
    },
    "a2c": ROLLOUT | LOSS,
    "trpo": ROLLOUT
    | CRITIC
    | {
        "--max-kl 0": "--max-kl 0.0 cannot work",
        "--cg-iterations 0": "--cg-iterations 0 cannot work",
        "--cg-damping -1": "--cg-damping -1.0 cannot work",
        "--fisher-every 0": "--fisher-every 0 cannot work",
        "--backtracks 0": "--backtracks 0 cannot work",
        "--backtrack-coef 2": "--backtrack-coef 2.0 cannot work",
    },
    "ppo": ROLLOUT
    | LOSS
    | {
        "--num-minibatches 0": "--num-minibatches 0 cannot work",
        "--num-minibatches 5": "it must divide the batch, 32",
        "--update-epochs 0": "--update-epochs 0 cannot work",
        "--clip-coef 0": "--clip-coef 0.0 cannot work",
        "--target-kl -1": "--target-kl -1.0 cannot work",
    },
    "dreamerv3": {
        "--env probes:ManyActions-v0": "needs a Discrete or Box space where it has MultiBinary(2)",
        "--env probes:Words-v0": "needs a Box or Dict space of fixed size where it has Sequence",
        "--total-timesteps 15": "it must be at least the 16 steps with which training begins",
        "--replay-size 15": "it must be at least the 16 steps with which training begins",
        "--replay-size 2000000000 --total-timesteps 2000000000": "MB for 2,000,000,000 steps, but at most",
        "--train-ratio 0": "--train-ratio 0.0 cannot work",
        "--batch-size 0": "--batch-size 0 cannot work",
        "--batch-length 0": "--batch-length 0 cannot work",
        "--batch-length 1": "--batch-length 1 cannot work; it must be at least 2",
        "--horizon 0": "--horizon 0 cannot work",
        "--return-lambda 1.1": "--return-lambda 1.1 cannot work",
        "--ent-coef -1": "--ent-coef -1.0 cannot work",
        "--free-nats -1": "--free-nats -1.0 cannot work",
        "--unimix 2": "--unimix 2.0 cannot work",
        "--slow-rate -1": "--slow-rate -1.0 cannot work",
        "--agc 0": "--agc 0.0 cannot work",
        "--warmup -1": "--warmup -1 cannot work",
    },
}
CASES = [
    (name, *case)
    for name in SCRIPTS
    for case in (MISTAKES | OWN_MISTAKES[name] | (MODEL_FREE if name != "dreamerv3" else {})).items()
]


@pytest.mark.parametrize("name, flags, sentence", CASES)
def test_mistakes_get_one_sentence(name, flags, sentence, call, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").touch()
    assert call(__import__(name), *tiny(__import__(name)), *flags.split()) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_mistake_has_no_traceback(tmp_path):
    mistakes = (["--num-envs", "many"], ["--no-such-flag"], ["--env", "Mario"])
    for process in [start("ppo", *flags, cwd=tmp_path) for flags in mistakes]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in out + err


def test_checkpoints_that_do_not_fit(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    call(script, *tiny(script), "--run-dir", run)
    (tmp_path / "torn.pt").write_bytes((run / "best.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    other = torch.load(run / "best.pt", weights_only=True) | {"script": "dreamerv2"}
    torch.save(other, tmp_path / "other.pt")
    best = torch.load(run / "best.pt", weights_only=True)
    torch.save(best | {"args": best["args"] | {"momentum": 0.9}}, tmp_path / "edited.pt")
    cases = {
        ("--evaluate", run / "best.pt", "--env", "CartPole-v1"): "does not fit the checkpoint",
        ("--resume", run, "--env", "CartPole-v1"): "does not fit the checkpoint",
        ("--resume", run): "is complete; for instance --total-timesteps ",
        ("--resume", run / "checkpoint.pt"): f"--resume {run} is complete; ",
        ("--resume", run, "--run-dir", tmp_path / "branch"): "branch cannot work with --resume, which goes on in",
        ("--resume", run / "best.pt"): "There is no checkpoint ",
        ("--run-dir", run, *tiny(script)): "is there already; continue it with --resume",
        ("--run-dir", run / "config.json", *tiny(script)): "is there already",
        ("--evaluate", tmp_path / "edited.pt"): "has other flags than this script",
        ("--evaluate", tmp_path / "torn.pt"): "cannot be read as a checkpoint",
        ("--evaluate", tmp_path / "empty.pt"): "cannot be read as a checkpoint",
        ("--evaluate", tmp_path / "other.pt"): "is a checkpoint of dreamerv2.py",
    }
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    capsys.readouterr()
    for flags, sentence in cases.items():
        assert call(script, *flags) == 2
        err = capsys.readouterr().err
        assert sentence in err and len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*.*")}


def test_a_complete_run_goes_on_as_its_refusal_says(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    assert call(script, *tiny(script), "--run-dir", run) == 0
    assert call(script, "--resume", run) == 2
    (longer,) = re.findall(r"--total-timesteps (\d+) would continue it", capsys.readouterr().err)
    same = run.parent / ".." / run.parent.name / run.name
    assert call(script, "--resume", run / "checkpoint.pt", "--run-dir", same, "--total-timesteps", longer) == 0
    rows = metrics(run)
    evaluations = [row for row in rows if "eval/return_mean" in row]
    out = capsys.readouterr().out
    for row in evaluations[-1:]:  # of the second part
        figures = (
            f"{row['eval/episodes']:.0f} episodes, return {row['eval/return_mean']:.1f} +- {row['eval/return_std']:.1f}"
        )
        assert f"evaluation at step {row['global_step']:,}: {figures}\n" in out
    played = [row["charts/episodic_return"] for row in rows if "charts/episodic_return" in row]
    recent = torch.load(run / "checkpoint.pt", weights_only=True)["recent"]
    assert [episode["episodic_return"] for episode in recent] == played[-100:]  # the mean that is shown goes on, too


def test_who_stops_the_last_evaluation_is_not_told_to_resume(script, call, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate", stopped)
    run = tmp_path / "Mario's;$HOME"  # for a shell what is printed is one word
    assert call(script, *tiny(script), "--eval-every", 0, "--run-dir", run) == 130
    out = capsys.readouterr().out
    assert "Continue it" not in out
    assert shlex.split(out.partition("Watch it: ")[2])[-3:] == ["--evaluate", str(run), "--capture-video"]
    assert torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] == metrics(run)[-1]["global_step"]


class Stranger:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_strangers_file_cannot_run_code(script, call, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"script": script.SCRIPT, "args": Stranger()}, "evil.pt")
    assert call(script, "--evaluate", "evil.pt") == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert not Path("touched").exists()
    torch.load("evil.pt", weights_only=False)
    assert Path("touched").exists()  # the file does run code where a script is careless


# ---- runs that end early


def test_signals_save_and_say_how_to_go_on(tmp_path):
    """Signals to a process of its own. tests/test_loop.py interrupts and resumes every script."""
    cases = [("ppo", signal.SIGTERM), ("ppo", signal.SIGINT)]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal, unless nohup has started these tests
        cases.append(("ppo", signal.SIGHUP))
    running = []
    for name, number in cases:
        run = tmp_path / f"{name}{number}"
        flags = [*short(name), "--total-timesteps", "10000000", "--save-every", "0", "--run-dir", run]
        running.append((name, number, run, start(name, *flags, cwd=tmp_path)))
    for i, (name, number, run, process) in enumerate(running):
        wait_for(process, lambda run=run: len(metrics_so_far(run)) > 50)
        other = start(name, "--resume", run, cwd=tmp_path)  # two would write into one file
        sentence = f"--resume {run} cannot work while that run is still going on; stop it first.\n"
        assert other.communicate()[1] == sentence and other.returncode == 2
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 128 + number and err == ""
        assert f"The run stopped; all is kept in {run} as of step" in out and f"--resume {run}" in out
        step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
        assert step > 0 and f"as of step {step:,}" in out
        again = start(name, "--resume", run, "--total-timesteps", step + 64, cwd=tmp_path)
        running[i] = run, step, again
    for run, step, again in running:
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0 and err == ""
        assert metrics(run)[-1]["global_step"] == step + 64


def test_a_run_does_not_fit_an_environment_that_has_changed(script, call, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert call(script, *tiny(script), "--env", "probes:Screen-v0", "--run-dir", run) == 0
    monkeypatch.setattr(probes.Screen, "action_space", probes.gym.spaces.Discrete(3))
    for flags in (["--resume", run, "--total-timesteps", 128], ["--evaluate", run]):
        assert call(script, *flags) == 2
        assert f"{flags[0]} {run}" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_an_observation_of_another_shape_is_not_broadcast(script, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes.Clockwork, "obs", lambda self: np.zeros(1, np.float32))  # its space has shape (2,)
    assert call(script, *tiny(script), "--run-dir", tmp_path / "run") == 1
    assert "cannot reshape array of size 1 into shape (2,)" in capsys.readouterr().out


def test_the_best_is_never_ahead_of_the_checkpoint(script, call, tmp_path, monkeypatch):
    """Else a resumed run could replace it by a worse one."""
    saved, save = [], script.save
    monkeypatch.setattr(script, "save", lambda path, state: saved.append((path, state)) or save(path, state))
    flags = [*short(script.SCRIPT), "--total-timesteps", 96, "--eval-every", 32, "--save-every", 0]
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    kept = {"best.pt", "checkpoint.pt"}  # dreamerv3.py saves its replay, too
    saved = [(path.name, state["global_step"], state["best"]) for path, state in saved if path.name in kept]
    for (name, step, _), (then, its_step, best) in itertools.pairwise(saved):
        assert name != "best.pt" or (then == "checkpoint.pt" and its_step == step and best > -math.inf)
    assert any(name == "best.pt" and step < 96 for name, step, _ in saved)


def test_ctrl_c_takes_the_reader_of_a_pipe_along(tmp_path):
    """As in `| tee log`: the last words go to stderr then."""
    run = tmp_path / "a run"
    process = start("ppo", *short("ppo"), "--total-timesteps", "10000000", "--run-dir", run, cwd=tmp_path)
    wait_for(process, lambda: len(metrics_so_far(run)) > 50)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=300) == 130 and "Traceback" not in err and "Exception" not in err
    assert f"--resume '{run}'\n" in err and f"--evaluate '{run}' --capture-video\n" in err
    assert not (run / "error.txt").exists()


def test_a_signal_in_an_update_waits_even_if_nobody_can_be_told(script, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    run = script.Run.__new__(script.Run)
    run.signal, run.updating = None, True
    monkeypatch.setattr(os, "write", gone)
    run.interrupt(signal.SIGINT, None)
    assert run.signal == signal.SIGINT


def test_two_runs_do_not_share_a_folder_even_if_the_other_has_saved_nothing_yet(script, call, tmp_path, capsys):
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"global_step": 1}\n')
    assert call(script, *tiny(script), "--run-dir", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [lines] and lines.read_text() == '{"global_step": 1}\n'


def test_signals_find_nothing_half_done(script, call, tmp_path, monkeypatch):
    """Before the first checkpoint is whole there is nothing to save; a best score counts when its weights are kept."""
    save, handlers = script.save, []

    def watched(path, state):
        handlers.append(signal.getsignal(signal.SIGINT))
        if path.name == "best.pt":
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(script, "save", watched)
    assert call(script, *tiny(script), "--run-dir", tmp_path / "run") == 130
    assert handlers[0] == signal.SIG_DFL and handlers[-2] != signal.SIG_DFL
    state = script.load(tmp_path / "run" / "checkpoint.pt")
    assert state["best"] == -math.inf and state["global_step"] == 64


def test_an_evaluation_that_was_cut_off_is_made_up_for(script, call, tmp_path, monkeypatch):
    evaluate, calls = script.evaluate, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", cut_off)
    run = tmp_path / "run"
    assert call(script, *tiny(script), "--total-timesteps", 192, "--eval-every", 100, "--run-dir", run) == 130
    step = script.load(run / "checkpoint.pt")["global_step"]
    assert call(script, "--resume", run) == 0
    evaluated = [row["global_step"] for row in metrics(run) if "eval/episodes" in row]
    assert 100 <= step < evaluated[0] <= step + 32 and len(evaluated) == 2


def metrics_so_far(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() and (run / "checkpoint.pt").exists() else []


def wait_for(process, condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, "nothing happened"
        time.sleep(0.02)


def test_flags_given_with_resume_win_over_saved_ones(script, call, tmp_path):
    """Also those that the optimiser keeps in its state."""
    run, own = tmp_path / "run", vars(script.Args())
    assert call(script, *tiny(script), "--run-dir", run) == 0
    names = [name for name in ("value_learning_rate", "warmup", "agc") if name in own]
    flags = ["--learning-rate", 0.001, *(["--no-anneal-lr"] if "anneal_lr" in own else [])]
    for name in names:
        flags += [f"--{name.replace('_', '-')}", 2 if name == "warmup" else 0.002]
    assert call(script, "--resume", run, "--total-timesteps", 128, *flags) == 0
    groups = script.load(run / "checkpoint.pt")["optimizer"]["param_groups"]
    rates = [0.001, 0.002] if "value_learning_rate" in names else [0.001]
    assert [group["lr"] for group in groups] == rates
    if script.SCRIPT == "dreamerv3":
        assert groups[0]["warmup"] == 2 and groups[0]["agc"] == 0.002


@pytest.mark.parametrize("name", ["reinforce", "ppo", "dreamerv3"])
def test_kill_at_random_moments(name, tmp_path):
    """KILLS=30 repeats it as often as one likes. The other scripts share every line that saves and loads."""
    run, rng, lost = tmp_path / "run", random.Random(0), []
    flags = "--env CartPole-v1 --total-timesteps 100000000 --save-every 320 --run-dir run"
    flags = [*short(name), *flags.split()]
    for _ in range(int(os.environ.get("KILLS", 3))):
        process = start(name, *flags, cwd=tmp_path)
        known = len(metrics_so_far(run))
        wait_for(process, lambda known=known: len(metrics_so_far(run)) > known + 5)
        time.sleep(rng.random() / 2)
        process.kill()
        process.communicate()
        rows = metrics(run)  # parses every line: none is torn
        state = torch.load(run / "checkpoint.pt", weights_only=True)  # the checkpoint is whole
        steps = [row["global_step"] for row in rows]
        assert steps == sorted(steps) and steps[-1] >= state["global_step"]
        lost.append(steps[-1] - state["global_step"])
        flags = ["--resume", "run"]
    batch = 2 * 500 if name == "reinforce" else 32  # whole episodes, or a rollout
    assert max(lost) < 320 + 2 * batch, "more was lost than the steps since the last checkpoint"


def test_a_run_that_dies_before_its_first_line_does_not_move_the_mark(script, call, tmp_path, monkeypatch):
    run = tmp_path / "run"
    call(script, *tiny(script), "--run-dir", run)
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines + b'{"global_step": 66}\n')  # was not saved: to be played again
    monkeypatch.setattr(script.Envs, "reset", lambda *_: 1 / 0)
    assert call(script, "--resume", run, "--total-timesteps", 128) == 1
    assert torch.load(run / "checkpoint.pt", weights_only=True)["metrics_bytes"] == len(lines)
    assert (run / "metrics.jsonl").read_bytes() == lines


def test_a_kill_while_saving_leaves_the_previous_checkpoint(script, tmp_path, monkeypatch):
    def torn(state, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt(9)

    path, state = tmp_path / "checkpoint.pt", {"script": script.SCRIPT, "agent": {}}
    script.save(path, state)
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        script.save(path, state)
    assert script.load(path) == state


def room(size):
    """From now on no file grows beyond size bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def room_restored():
    """Before pytest, too, writes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 2048])
def test_a_full_disk_gets_one_sentence(script, call, tmp_path, capsys, size):
    with room_restored():
        room(size)
        assert call(script, *tiny(script), "--run-dir", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot hold a run" in err
    assert call(script, *tiny(script), "--run-dir", tmp_path / "run") == 0  # once there is room


@pytest.mark.parametrize("save_every", [1, 0])
def test_a_disk_that_fills_up_costs_no_more_than_the_steps_since_the_last_checkpoint(
    script, call, tmp_path, capsys, monkeypatch, save_every
):
    """With --save-every 0 it is a line of metrics.jsonl that finds no room, else a checkpoint."""
    run, reset = tmp_path / "run", script.Envs.reset
    flags = "--total-timesteps", 320, "--eval-every", 0, "--save-every", save_every
    with room_restored(), monkeypatch.context() as patch:
        patch.setattr(script.Envs, "reset", lambda envs, seed: (room(2048), reset(envs, seed)))
        assert call(script, *tiny(script), *flags, "--run-dir", run) == 1
    out, err = capsys.readouterr()
    assert "cannot be written; is the disk full?); all is kept" in out and "as of step 0." in out
    assert err == "" and "OSError" in (run / "error.txt").read_text()
    assert ("metrics.jsonl cannot be written" in (run / "error.txt").read_text()) == (save_every == 0)
    metrics(run)  # parses every line: none is torn
    assert not list(run.rglob("*.tmp"))
    assert call(script, "--resume", run, "--total-timesteps", 64) == 0
    assert not (run / "error.txt").exists()  # what it told is over


def test_an_environment_that_raises_ends_with_a_sentence(script, call, tmp_path, capsys):
    run = tmp_path / "run"
    assert call(script, *tiny(script), "--env", "probes:Breaks-v0", "--total-timesteps", 640, "--run-dir", run) == 1
    assert "The run failed (environment 0 raised OSError: the joystick is gone)" in capsys.readouterr().out
    assert "joystick" in (run / "error.txt").read_text()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    whole = {"reinforce": 0, "reinforce_baseline": 0}  # no episode ended
    whole |= {"actor_critic": 198, "dreamerv3": 198}  # 99 steps of each were taken
    assert state["global_step"] == whole.get(script.SCRIPT, 192)  # 6 rollouts of 16 steps; the 100th step raised


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_what_an_environment_returns_must_be_numbers(where, script, call, tmp_path, capsys, monkeypatch):
    step = probes.NotANumber.step
    if where == "observation":
        monkeypatch.setattr(probes.NotANumber, "step", lambda env, a: ((o := step(env, a))[0] * o[1], 1.0, *o[2:]))
    run, flags = tmp_path / "run", ["--env", "probes:NotANumber-v0", "--total-timesteps", 640, "--save-every", 80]
    assert call(script, *tiny(script), *flags, "--run-dir", run) == 1
    assert "The run failed (a reward or an observation of the environment is not finite)" in capsys.readouterr().out
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    kept = {"reinforce": 0, "reinforce_baseline": 0}  # the first batch of episodes is not over
    kept |= {"actor_critic": 198, "dreamerv3": 198}  # 99 steps of each were taken
    assert state["global_step"] == kept.get(script.SCRIPT, 192)  # 6 rollouts of 16 steps
    assert all(value.isfinite().all() for value in weights(run).values())
    assert np.isfinite(list(state.get("scaler", {}).values())).all()


def test_a_loss_that_is_no_number_ends_with_a_sentence_and_good_weights(script, call, tmp_path, capsys, monkeypatch):
    run, update, calls = tmp_path / "run", script.update, []

    def broken(agent, *rest, **more):
        calls.append(agent)
        figures = update(agent, *rest, **more)
        if len(calls) == 3:
            next(agent.parameters()).data.fill_(math.nan)
            figures["losses/policy_loss"] = torch.tensor(math.nan)
        return figures

    monkeypatch.setattr(script, "update", broken)
    flags = ["--total-timesteps", 640, "--save-every", 1, "--eval-every", 0]
    assert call(script, *tiny(script), *flags, "--run-dir", run) == 1
    assert "no longer finite; try a smaller --learning-rate); all is kept" in capsys.readouterr().out
    assert len(calls) >= 3 and torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] > 0
    assert all(value.isfinite().all() for value in weights(run).values())
