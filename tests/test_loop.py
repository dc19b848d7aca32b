"""What the policy-gradient scripts share, and each of their loops, against environments with known answers."""

import importlib
import math
import signal

import numpy as np
import pytest
import torch
from conftest import assert_same, metrics, short, weights

ROLLOUTS = ["a2c", "trpo", "ppo"]  # fixed numbers of steps
EPISODES = ["reinforce", "reinforce_baseline"]  # whole episodes


# ---- sampling and the network


def test_actions_follow_the_policy(rung):
    agent = rung.Agent((2,), 3, False)
    agent.actor.weight.data *= 200
    obs = torch.ones(20_000, 2)
    actions, log_probs, *values = agent.act(obs, torch.Generator().manual_seed(0))
    logits = agent(obs) if rung.SCRIPT == "reinforce" else agent(obs)[0]
    probabilities = logits[0].softmax(-1).detach()
    assert probabilities.max() - probabilities.min() > 0.1
    np.testing.assert_allclose(np.bincount(actions, minlength=3) / 20_000, probabilities, atol=0.015)
    torch.testing.assert_close(log_probs, probabilities.log()[actions])
    if values:
        torch.testing.assert_close(values[0], agent(obs)[1])


@pytest.mark.parametrize("shape, image", [((5,), False), ((3, 2), False), ((4, 84, 84), True)])
def test_new_agent_is_nearly_uniform(rung, shape, image):
    agent = rung.Agent(shape, 7, image)
    obs = torch.randint(0, 255, (6, *shape), dtype=torch.uint8) if image else torch.randn(6, *shape)
    logits, *values = [agent(obs)] if rung.SCRIPT == "reinforce" else agent(obs)
    assert logits.shape == (6, 7) and logits.dtype == torch.float32
    assert all(v.shape == (6,) and v.dtype == torch.float32 for v in values)
    assert logits.softmax(-1).sub(1 / 7).abs().max() < 0.02
    gains = {head: getattr(agent, head).weight.norm(dim=1) for head in ("actor", "critic") if hasattr(agent, head)}
    for head, gain in gains.items():  # orthogonal rows
        torch.testing.assert_close(gain, torch.full_like(gain, {"actor": 0.01, "critic": 1}[head]))


def test_bfloat16_is_close_to_float32(ppo):
    agent = ppo.Agent((4, 84, 84), 7, True)
    obs = torch.randint(0, 255, (32, 4, 84, 84), dtype=torch.uint8)
    exact, _ = agent(obs)
    agent.dtype = torch.bfloat16
    rounded, _ = agent(obs)
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("name", ["reinforce_baseline", "trpo"])
def test_policy_and_critic_share_nothing(name):
    agent = importlib.import_module(name).Agent((4, 84, 84), 7, True)
    agent(torch.randint(0, 255, (2, 4, 84, 84), dtype=torch.uint8))[1].sum().backward()
    moved = {name for name, p in agent.named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("critic") for name in moved)


@pytest.mark.parametrize("name", ["actor_critic", "a2c", "ppo"])
def test_on_images_policy_and_critic_move_one_trunk(name):
    agent = importlib.import_module(name).Agent((4, 84, 84), 7, True)
    assert agent.actor_trunk is agent.critic_trunk
    obs = torch.randint(0, 255, (2, 4, 84, 84), dtype=torch.uint8)
    for output in agent(obs):
        agent.zero_grad()
        output.sum().backward(retain_graph=True)
        assert agent.actor_trunk[0].weight.grad.abs().sum() > 0


# ---- every step is learnt from, once


def spy(monkeypatch, script, name):
    """Keep the arguments of every call of a function of the script; tensors as they were at the call."""
    calls, original = [], getattr(script, name)

    def keep(x):
        if isinstance(x, dict):
            return {k: keep(v) for k, v in x.items()}
        return x.clone() if isinstance(x, torch.Tensor) else x

    def spying(*args):
        calls.append([keep(x) for x in args])
        return original(*args)

    monkeypatch.setattr(script, name, spying)
    return calls


def batches(updates):
    """The batch of each call of update()."""
    return [next(x for x in call if isinstance(x, dict)) for call in updates]


class Oracle(torch.nn.Module):
    """In place of the agent on `Diary`: V(s) = 100 x episode + step, so a value tells which state it is of."""

    def __init__(self, *_):
        super().__init__()
        self.actor_trunk, self.actor = torch.nn.Identity(), torch.nn.Linear(2, 2)
        self.critic_trunk, self.critic = torch.nn.Identity(), torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(self.actor.weight)
        self.critic.weight.data = torch.tensor([[100.0, 1.0]])

    def forward(self, obs):
        return self.actor(obs), self.critic(obs).squeeze(-1)

    @torch.no_grad()
    def act(self, obs, generator=None):
        actions = torch.randint(2, (len(obs),), generator=generator)
        return actions, torch.full((len(obs),), math.log(0.5)), self(obs)[1]


class Blind(Oracle):
    """The same for a script without a critic."""

    def __init__(self, *_):
        super().__init__()
        del self.critic

    def forward(self, obs):
        return self.actor(obs)

    @torch.no_grad()
    def act(self, obs, generator=None):
        actions = torch.randint(2, (len(obs),), generator=generator)
        return actions, torch.full((len(obs),), math.log(0.5))


DIARY = "--env probes:Diary-v0 --num-envs 3 --total-timesteps 96 --eval-episodes 3 --learning-rate 1e-30".split()


def diary(i, steps):
    """(episode, step) of the first steps of an environment."""
    return [(e, s) for e in range(50) for s in range(2 + e % 5)][:steps]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_transition_is_lost_none_crosses_an_episode(name, call, monkeypatch, tmp_path):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "Agent", Oracle)
    gae, update = spy(monkeypatch, script, "gae"), spy(monkeypatch, script, "update")
    flags = [*DIARY, "--num-steps", 16, *(["--num-minibatches", 2] if name == "ppo" else [])]
    assert call(script, *flags, "--no-norm-reward", "--run-dir", tmp_path / "run") == 0
    rewards, values, next_values, dones = (torch.cat([c[k] for c in gae]) for k in range(4))
    obs = torch.cat([batch["obs"].view(16, 3, 2) for batch in batches(update)])
    for i in range(3):
        expected = diary(i, 32)
        assert [tuple(map(int, row)) for row in obs[:, i]] == expected  # every step of every episode, once, in order
        for t, (e, s) in enumerate(expected):
            over = s + 1 == 2 + e % 5
            assert rewards[t, i].item() == pytest.approx(e + (s + 1) / 100)
            assert dones[t, i].item() == over
            assert values[t, i].item() == 100 * e + s
            worth = 0 if over and e % 2 else 100 * e + s + 1  # terminated: 0; cut: V goes on
            assert next_values[t, i].item() == pytest.approx(worth)


def test_one_step_at_a_time(call, monkeypatch, tmp_path):
    script = importlib.import_module("actor_critic")
    monkeypatch.setattr(script, "Agent", Oracle)
    errors, update = spy(monkeypatch, script, "td_errors"), spy(monkeypatch, script, "update")
    flags = [*DIARY, "--value-learning-rate", 1e-30, "--no-norm-reward", "--run-dir", tmp_path / "run"]
    assert call(script, *flags) == 0
    assert len(errors) == 32
    for i in range(3):
        assert [tuple(map(int, batch["obs"][i])) for batch in batches(update)] == diary(i, 32)
        for t, (e, s) in enumerate(diary(i, 32)):
            rewards, values, next_values, gamma = errors[t]
            over = s + 1 == 2 + e % 5
            worth = 0 if over and e % 2 else 100 * e + s + 1
            assert rewards[i].item() == pytest.approx(e + (s + 1) / 100) and gamma == 0.9
            assert values[i].item() == 100 * e + s and next_values[i].item() == pytest.approx(worth)
            target = rewards[i].item() + 0.9 * worth
            assert batches(update)[t]["returns"][i].item() == pytest.approx(target, rel=1e-5)
            assert batches(update)[t]["advantages"][i].item() == pytest.approx(target - values[i].item(), abs=1e-3)


@pytest.mark.parametrize("name", EPISODES)
def test_whole_episodes_one_per_environment(name, call, monkeypatch, tmp_path):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "Agent", Blind if name == "reinforce" else Oracle)
    update = spy(monkeypatch, script, "update")
    flags = [*DIARY, *(["--value-learning-rate", 1e-30] if name != "reinforce" else [])]
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    for e, batch in enumerate(batches(update)):  # episode e of each environment, step by step
        length = 2 + e % 5
        assert [tuple(map(int, row)) for row in batch["obs"]] == [(e, s) for s in range(length) for _ in range(3)]
        rest = 0 if e % 2 or name == "reinforce" else 100 * e + length  # what is worth the state of a time limit
        for row, (_, s) in enumerate(batch["obs"].tolist()):
            paid = [e + (k + 1) / 100 for k in range(int(s), length)]
            G = sum(0.9**k * reward for k, reward in enumerate(paid)) + 0.9 ** len(paid) * rest
            weight = G if name == "reinforce" else G - (100 * e + s)
            assert batch["weights"][row].item() == pytest.approx(weight, rel=1e-4, abs=1e-3)
            assert batch["discounts"][row].item() == pytest.approx(0.9**s)
            if name != "reinforce":
                assert batch["returns"][row].item() == pytest.approx(G, rel=1e-5)  # V's target is never reweighted
    assert len(update) == 9  # 3 x (2 + 3 + 4 + 5 + 6 + 2 + 3 + 4) = 87 < 96 <= 87 + 15


@pytest.mark.parametrize("name", EPISODES)
def test_a_short_episode_is_not_paid_for_what_follows_it(name, call, monkeypatch, tmp_path):
    """Episodes of 1 or 40 steps, each step pays 1: the last step of each has a return of 1, whoever plays on."""
    script = importlib.import_module(name)
    update = spy(monkeypatch, script, "update")
    flags = "--env probes:TwoLengths-v0 --num-envs 8 --total-timesteps 1000 --eval-episodes 1".split()
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    for batch in batches(update):
        assert (batch["weights" if name == "reinforce" else "returns"] == 1).sum() == 8


def test_a_cut_episode_is_worth_what_its_last_state_is_whoever_plays_on(call, monkeypatch, tmp_path):
    """1 or 40 steps that pay 1 each, then V; one observation, so one V, which is what weights leave out of returns."""
    script = importlib.import_module("reinforce_baseline")
    update = spy(monkeypatch, script, "update")
    flags = "--env probes:TwoCuts-v0 --num-envs 8 --gamma 0.9 --total-timesteps 900 --eval-episodes 1".split()
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    lengths = set()
    for batch in batches(update):
        (V,) = set((batch["returns"] - batch["weights"]).round(decimals=4).tolist())
        worth = {1: 1 + 0.9 * V, 40: (1 - 0.9**40) / 0.1 + 0.9**40 * V}
        for G in batch["returns"][:8].tolist():  # the first step of each environment
            (length,) = [length for length, known in worth.items() if abs(G - known) < 1e-3]
            lengths.add(length)
    assert lengths == {1, 40}


@pytest.mark.parametrize("name", ["actor_critic", *ROLLOUTS])
def test_rewards_are_scaled_episode_by_episode(name, call, monkeypatch, tmp_path):
    script, seen = importlib.import_module(name), []
    scale = script.RewardScaler.__call__

    def spying(self, rewards, dones):
        seen.append((rewards.copy(), dones.copy()))
        return scale(self, rewards, dones)

    monkeypatch.setattr(script.RewardScaler, "__call__", spying)
    flags = [*DIARY, *(["--num-steps", 16] if name in ROLLOUTS else []), *(["--num-minibatches", 2] * (name == "ppo"))]
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    rewards, dones = (np.concatenate(column) for column in zip(*seen, strict=True))
    for i in range(3):
        assert dones[:, i].tolist() == [s + 1 == 2 + e % 5 for e, s in diary(i, 32)]
        np.testing.assert_allclose(rewards[:, i], [e + (s + 1) / 100 for e, s in diary(i, 32)], rtol=1e-6)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_explained_variance_is_the_share_of_the_returns(name, call, monkeypatch, tmp_path):
    script = importlib.import_module(name)
    update = spy(monkeypatch, script, "update")
    assert call(script, *short(name), "--total-timesteps", 96, "--gamma", 0.5, "--run-dir", tmp_path / "run") == 0
    told = [row["losses/explained_variance"] for row in metrics(tmp_path / "run") if "charts/SPS" in row]
    for batch, share in zip(batches(update), told, strict=True):  # advantages are returns less values
        assert share == pytest.approx(1 - (batch["advantages"].var() / batch["returns"].var()).item(), abs=1e-4)
    assert min(told) < -0.01


def test_log_probs_are_those_of_the_actions_that_were_played(ppo, call, monkeypatch, tmp_path):
    made, update = [], spy(monkeypatch, ppo, "update")
    original = ppo.set_up
    monkeypatch.setattr(ppo, "set_up", lambda args: made.append(original(args)) or made[-1])
    flags = "--env CartPole-v1 --num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 32".split()
    assert call(ppo, *flags, "--eval-episodes", 1, "--learning-rate", 1e-30, "--run-dir", tmp_path / "run") == 0
    (batch,), agent = batches(update), made[0][2]
    logits, values = agent(batch["obs"])
    log_probs = logits.log_softmax(-1).gather(-1, batch["actions"][:, None]).squeeze(-1)
    torch.testing.assert_close((log_probs, values), (batch["log_probs"], batch["values"]))
    assert log_probs.unique().numel() > 16


def test_episodes_are_told_as_they_were(rung, call, tmp_path):
    flags = [*DIARY, *short(rung.SCRIPT)[6:]]
    assert call(rung, *flags, "--run-dir", tmp_path / "run") == 0
    told = [row for row in metrics(tmp_path / "run") if "charts/episodic_return" in row]
    assert len(told) >= 18
    for k, row in enumerate(told[:24]):
        e = k // 3  # three environments end episode e at the same step
        length = 2 + e % 5
        assert row["charts/episodic_length"] == length
        assert row["charts/episodic_return"] == pytest.approx(e * length + sum(range(1, length + 1)) / 100)


def test_terminated_and_cut_at_once_is_terminated(ppo, call, monkeypatch, tmp_path):
    calls = spy(monkeypatch, ppo, "gae")
    call(ppo, *short("ppo"), "--env", "probes:Both-v0", "--total-timesteps", "32", "--run-dir", tmp_path / "run")
    _, _, next_values, dones = calls[0][:4]
    assert dones.sum() == 6 and (next_values[dones] == 0).all()


def test_both_ends_at_once_are_one_in_whole_episodes_too(call, monkeypatch, tmp_path):
    """Both pays 1 a step for 5 steps and ends in both ways: nothing may be added for what would have followed."""
    script = importlib.import_module("reinforce_baseline")
    updates = spy(monkeypatch, script, "update")
    flags = [*short("reinforce_baseline"), "--env", "probes:Both-v0", "--gamma", 0.9, "--total-timesteps", 20]
    assert call(script, *flags, "--run-dir", tmp_path / "run") == 0
    expected = torch.tensor([sum(0.9**k for k in range(n)) for n in (5, 4, 3, 2, 1)])
    for batch in batches(updates):
        torch.testing.assert_close(batch["returns"].sort().values, expected.repeat(2).sort().values)


def test_environments_of_one_run_differ(ppo):
    envs = ppo.Envs("CartPole-v1", 4)
    envs.reset(1)
    assert len({tuple(obs) for obs in envs.obs}) == 4


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_batch_of_one_step(name, call, tmp_path):
    flags = ["--env", "CartPole-v1", "--num-envs", 1, "--num-steps", 1, "--total-timesteps", 30, "--eval-episodes", 1]
    flags += ["--num-minibatches", 1] if name == "ppo" else []
    assert call(importlib.import_module(name), *flags, "--run-dir", tmp_path / "run") == 0
    assert all(
        math.isfinite(row["losses/loss" if name != "trpo" else "losses/kl"])
        for row in metrics(tmp_path / "run")
        if "losses/kl" in row or "losses/loss" in row
    )


def test_stored_frames_are_copies(rung, call, monkeypatch, tmp_path):
    update = spy(monkeypatch, rung, "update")
    flags = [*short(rung.SCRIPT), "--env", "probes:Screen-v0", "--total-timesteps", 32]
    assert call(rung, *flags, "--eval-episodes", 1, "--run-dir", tmp_path / "run") == 0
    frames = torch.cat([batch["obs"] for batch in batches(update)]).view(-1, 2, 4, 84, 84)
    assert len(frames) >= 15
    for t in range(len(frames)):  # an episode of 58 frames is 15 steps; each shows the frames of the last 4 steps
        newest = 4 * (t % 15)
        for i in range(2):
            expected = [max(newest - 4 * k, 0) for k in (3, 2, 1, 0)]
            assert [int(frame.max()) for frame in frames[t, i]] == expected
            assert [int(frame.min()) for frame in frames[t, i]] == expected


def test_schedules_do_what_the_flags_say(rung, call, monkeypatch, tmp_path):
    updates = spy(monkeypatch, rung, "update")
    for anneal in (True, False):
        updates.clear()
        run, ent = tmp_path / str(anneal), "ent_coef" in vars(rung.Args())
        flags = [*short(rung.SCRIPT), "--total-timesteps", 160, "--learning-rate", 0.02, "--run-dir", run]
        flags += ["--ent-coef", 0.3] if ent else []
        flags += [] if anneal else ["--no-anneal-lr", *(["--no-anneal-ent"] if ent else [])]
        assert call(rung, *flags) == 0
        rows = [row for row in metrics(run) if "charts/SPS" in row]
        batch = rows[0]["global_step"]
        for row in rows:
            left = 1 - (row["global_step"] - batch) / 160 if anneal else 1
            assert row["charts/learning_rate"] == pytest.approx(0.02 * left)
            assert not ent or row["charts/ent_coef"] == pytest.approx(0.3 * left)
        rates = [g["lr"] for g in rung.load(run / "checkpoint.pt")["optimizer"]["param_groups"]]
        assert rates[0] == pytest.approx(rows[-1]["charts/learning_rate"])  # what was told is what the optimiser had
        if ent:  # and the loss
            assert [call[-1] for call in updates] == pytest.approx([row["charts/ent_coef"] for row in rows])
        if rung.SCRIPT == "actor_critic":
            assert rates[1] == pytest.approx(rung.Args().value_learning_rate * rates[0] / 0.02)


# ---- probe environments: the answers can be computed by hand

LEARN = {
    "reinforce": "--learning-rate 5e-3 --total-timesteps 6400",
    "reinforce_baseline": "--learning-rate 5e-3 --value-learning-rate 5e-3 --total-timesteps 12800",
    "actor_critic": "--learning-rate 1e-3 --value-learning-rate 5e-3 --total-timesteps 12800",
    "a2c": "--learning-rate 5e-3 --num-steps 4 --total-timesteps 12800",
    "trpo": "--learning-rate 5e-3 --num-steps 16 --max-kl 0.05 --total-timesteps 12800",
    "ppo": "--learning-rate 5e-3 --num-steps 16 --num-minibatches 4 --total-timesteps 12800",
}


def trained(script, call, run_dir, *flags):
    """Train and return pi and V of the result, for the observations 0 and 1."""
    flags = ["--num-envs", 8, *LEARN[script.SCRIPT].split(), "--eval-episodes", 1, *flags]
    flags += ["--no-norm-reward"] if "norm_reward" in vars(script.Args()) else []
    assert call(script, *flags, "--run-dir", run_dir) == 0
    agent = script.Agent((1,), 2, False)
    agent.load_state_dict(script.load(run_dir / "checkpoint.pt")["agent"])
    with torch.no_grad():
        out = agent(torch.tensor([[0.0], [1.0]]))
    logits, values = (out, None) if script.SCRIPT == "reinforce" else out
    return logits.softmax(-1).tolist(), values


@pytest.mark.parametrize("probe, known", [("OneStep", [1, None]), ("Delayed", [0.9, 1]), ("Constant", [10, None])])
def test_the_critic_learns_known_values(rung, call, tmp_path, probe, known):
    """`Constant` is cut every 5 steps and must still be worth 1 / (1 - 0.9)."""
    if rung.SCRIPT == "reinforce":
        pytest.skip("has no critic")
    _, values = trained(rung, call, tmp_path / "run", "--env", f"probes:{probe}-v0")
    for value, expected in zip(values.tolist(), known, strict=True):
        assert expected is None or value == pytest.approx(expected, abs=0.1)


def test_the_policy_learns_to_look(rung, call, tmp_path):
    policy, _ = trained(rung, call, tmp_path / "run", "--env", "probes:Copycat-v0")
    assert policy[0][0] > 0.95 and policy[1][1] > 0.95


# ---- environments and rewards


def test_reward_scaler_divides_by_the_deviation_of_the_discounted_return(ppo):
    rng = np.random.default_rng(0)
    rewards, dones = rng.normal(3, 50, (400, 3)), rng.random((400, 3)) < 0.1
    rewards[300, 2] = -10_000  # beyond the clip
    scaler, discounted, returns = ppo.RewardScaler(3, 0.9), np.zeros(3), []
    for start in range(0, 400, 40):
        rollout = slice(start, start + 40)
        scaled = scaler(rewards[rollout], dones[rollout])
        for reward, done in zip(rewards[rollout], dones[rollout], strict=True):
            discounted = 0.9 * discounted + reward
            returns.append(discounted.copy())
            discounted[done] = 0
        np.testing.assert_allclose(scaled, np.clip(rewards[rollout] / np.std(returns), -10, 10), rtol=1e-4)
        assert (scaled.min() == -10) == (start == 280)


def test_frames_repeat_the_action_and_stop_at_the_end(ppo):
    env = ppo.make_env("probes:Screen-v0")
    obs, _ = env.reset()
    assert obs.shape == (4, 84, 84) and env.metadata["render_fps"] == 15
    for step in range(1, 16):
        obs, reward, terminated, _, _ = env.step(0)
        assert reward == (4 if step < 15 else 2) and terminated == (step == 15)
        newest = 4 * step if step < 15 else 58
        assert [int(frame.max()) for frame in obs] == [max(4 * (step - k), 0) for k in (3, 2, 1)] + [newest]


def test_a_time_limit_ends_the_repetition_of_an_action(script):
    env, paid = script.make_env("probes:CutScreen-v0"), []
    env.reset()
    for _ in range(15):
        action = 0 if script.SCRIPT != "dreamerv3" else np.eye(2)[0]
        _, reward, terminated, cut, _ = env.step(action)
        paid.append(reward)
    assert paid == [4.0] * 14 + [2.0] and cut and not terminated


def test_no_action_is_repeated_twice(script):
    """4 frames an action by the script and 4 each of them by Atari's environments would be 16."""
    assert script.make_env("probes:Atari-v0").unwrapped.frameskip == 1
    assert script.make_env("probes:Atari-ram-v0").unwrapped.frameskip == 4


def test_what_atari_draws_on_every_other_frame_is_seen(script):
    env, images = script.make_env("probes:Atari-v0"), []
    env.reset()
    for _ in range(15):
        action = 0 if script.SCRIPT != "dreamerv3" else np.eye(2)[0]
        obs, *_ = env.step(action)
        images.append(obs["image"][..., 0].copy() if script.SCRIPT == "dreamerv3" else obs[-1].copy())
    width = images[0].shape[1]
    assert [int(image[:, : width // 2].max()) for image in images] == [*range(4, 57, 4), 58]
    assert all((image[:, -width // 4 :] == 200).all() for image in images)


def test_mario_is_grey_small_and_has_seven_actions(ppo):
    envs = ppo.Envs("SuperMarioBros-1-1-v0", 2)
    envs.reset(1)
    before = envs.obs.copy()
    assert envs.num_actions == 7 and envs.obs.shape == (2, 4, 84, 84) and envs.obs.std() > 10
    for _ in range(10):
        envs.step([3, 0])  # the one runs right, the other stands
    assert (before[0] != envs.obs[0]).mean() > 0.1 > 2 * (before[1] != envs.obs[1]).mean()
    assert envs.returns[0] > 20 > envs.returns[1]


def test_evaluation_does_not_prefer_short_episodes(ppo):
    """Whoever takes the first 64 finished episodes of 32 environments sees far too many of one step."""
    agent, envs = ppo.Agent((1,), 2, False), ppo.Envs("probes:TwoLengths-v0", 32)
    lengths = [ppo.evaluate(agent, envs, 64, seed)["eval/length_mean"] for seed in range(8)]
    assert np.mean(lengths) == pytest.approx(20.5, abs=3)  # 512 episodes: standard error 0.86


def test_evaluation_draws_its_actions_from_the_policy(rung):
    """An episode of Clockwork pays 4 if all 8 actions are the same; drawn from a fair coin 4 +- sqrt(2)."""
    agent, envs = rung.Agent((2,), 2, False), rung.Envs("probes:Clockwork-v0", 4)
    result, other = (rung.evaluate(agent, envs, 80, seed) for seed in (1, 2))
    assert (
        result != other
        and result["eval/return_mean"] == pytest.approx(4, abs=0.8)
        and 1 < result["eval/return_std"] < 1.9
    )


def test_evaluation_is_decided_by_its_seed(ppo):
    agent, envs = ppo.Agent((4,), 2, False), ppo.Envs("CartPole-v1", 3)
    first, again, other = (ppo.evaluate(agent, envs, 6, seed) for seed in (5, 5, 6))
    assert first == again != other


def test_each_environment_plays_its_share(ppo, monkeypatch):
    agent, envs = ppo.Agent((1,), 2, False), ppo.Envs("probes:TwoLengths-v0", 4)
    played = np.zeros(4)
    original = envs.step

    def step(*args):
        original(*args)
        for i in envs.finished:
            played[i] += 1

    monkeypatch.setattr(envs, "step", step)
    assert ppo.evaluate(agent, envs, 10, 1)["eval/episodes"] == 10
    assert played.tolist() == [3, 3, 2, 2]


def test_threads_change_nothing(ppo):
    results = []
    for threads in (1, 3):
        envs = ppo.Envs("CartPole-v1", 5, threads)
        envs.reset(7)
        for step in range(60):
            envs.step([step % 2] * 5)
        results.append((envs.obs.copy(), envs.returns.copy(), envs.lengths.copy()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mario_that_somebody_has_wrapped_stays_wrapped(script):
    """The emulator's own screen is faster, but not what a wrapper shows; its buttons are chosen already."""
    envs = script.Envs("probes:DarkMario-v0", 1)
    envs.reset(1)
    envs.step([[0.0, 1.0]] if script.SCRIPT == "dreamerv3" else [1])
    assert envs.num_actions == 2
    assert not np.any(envs.obs["image"] if script.SCRIPT == "dreamerv3" else envs.obs)


@pytest.mark.parametrize("env", ["FromOne", "Scalar"])
def test_other_spaces_run(env, rung, call, tmp_path):
    flags = [*short(rung.SCRIPT), "--env", f"probes:{env}-v0", "--total-timesteps", 64]
    assert call(rung, *flags, "--run-dir", tmp_path / "run") == 0


# ---- resume and evaluation


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(rung, call, monkeypatch, tmp_path, capfd):
    """Clockwork's episodes end where batches end, so both runs meet the same episodes."""
    flags = [*short(rung.SCRIPT), "--total-timesteps", 320, "--eval-every", 64]
    assert call(rung, *flags, "--run-dir", tmp_path / "whole") == 0
    calls, original = [], rung.update
    stop = 64 if rung.SCRIPT == "actor_critic" else 5  # after 128 steps of it, at the end of an episode

    def interrupted(*args):
        calls.append(1)
        figures = original(*args)
        if len(calls) == stop:
            signal.raise_signal(signal.SIGTERM)  # the weights have changed, nothing was logged or saved yet
        return figures

    monkeypatch.setattr(rung, "update", interrupted)
    assert call(rung, *flags, "--run-dir", tmp_path / "cut") == 143
    assert "The run stops when this update is whole." in capfd.readouterr().out
    batch = {"actor_critic": 2, "reinforce": 16, "reinforce_baseline": 16}.get(rung.SCRIPT, 32)
    assert rung.load(tmp_path / "cut" / "checkpoint.pt")["global_step"] == stop * batch
    assert call(rung, "--resume", tmp_path / "cut") == 0
    assert len(calls) == 320 // batch
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    whole, cut, clocks = metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), ("time", "charts/SPS")
    evaluated = [{row["global_step"] for row in rows if "eval/episodes" in row} for rows in (whole, cut)]
    late = {step + batch * (step == stop * batch) for step in evaluated[0]}  # one was cut off and is made up for
    assert evaluated[1] == late
    whole, cut = (
        [row for row in rows if "eval/episodes" not in row or row["global_step"] in evaluated[0] & late]
        for rows in (whole, cut)
    )
    for a, b in zip(whole, cut, strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {k: v for k, v in b.items() if k not in clocks}
    assert [row["time"] for row in cut] == sorted(row["time"] for row in cut)


def test_the_best_checkpoint_is_that_of_the_best_evaluation(rung, call, tmp_path, monkeypatch, capsys):
    """Also when a resumed run does worse. With the same seed --evaluate plays the very episodes of that evaluation."""
    evaluate, real, bonus = rung.evaluate, [], iter([0, 3000, 9000, 6000, 0] + [8000] * 5)

    def judged(*given):
        real.append(evaluate(*given))
        return real[-1] | {"eval/return_mean": real[-1]["eval/return_mean"] + next(bonus)}

    monkeypatch.setattr(rung, "evaluate", judged)
    flags = [*short(rung.SCRIPT), "--env", "CartPole-v1", "--eval-every", 64, "--eval-episodes", 4]
    flags += [] if rung.SCRIPT == "trpo" else ["--learning-rate", 0.02]
    assert call(rung, *flags, "--total-timesteps", 320, "--run-dir", tmp_path / "run") == 0
    assert call(rung, "--resume", tmp_path / "run", "--total-timesteps", 640) == 0
    evaluations = [row["global_step"] for row in metrics(tmp_path / "run") if "eval/episodes" in row]
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["global_step"] == evaluations[2]
    monkeypatch.setattr(rung, "evaluate", evaluate)
    capsys.readouterr()
    assert call(rung, "--evaluate", tmp_path / "run") == 0
    assert f"4 episodes, return {real[2]['eval/return_mean']:.1f} +- " in capsys.readouterr().out


def test_a_resumed_run_and_another_seed_meet_new_episodes(script, call, tmp_path, monkeypatch):
    begun, reset = [], script.Envs.reset

    def spying(self, seed):
        begun.append(tuple(np.random.SeedSequence(seed).generate_state(2)))
        reset(self, seed)

    monkeypatch.setattr(script.Envs, "reset", spying)
    for flags in (["--run-dir", tmp_path / "a"], ["--run-dir", tmp_path / "b", "--seed", 2]):
        assert call(script, *short(script.SCRIPT), "--total-timesteps", 64, *flags) == 0
    assert call(script, "--resume", tmp_path / "a", "--total-timesteps", 128) == 0
    first, evaluation, other, its_evaluation, resumed, evaluated = begun
    assert len({first, other, resumed, evaluation, its_evaluation}) == 5 and evaluated == evaluation


def test_evaluations_do_not_play_the_episodes_of_training(rung, call, tmp_path, monkeypatch):
    reset, seeds = rung.Envs.reset, []
    monkeypatch.setattr(rung.Envs, "reset", lambda envs, seed: seeds.append((envs, seed)) or reset(envs, seed))
    flags = [*short(rung.SCRIPT), "--env", "CartPole-v1", "--total-timesteps", 64]
    assert call(rung, *flags, "--run-dir", tmp_path / "run") == 0
    drawn = {id(envs): set() for envs, _ in seeds}
    for envs, seed in seeds:
        drawn[id(envs)] |= set(np.random.SeedSequence(seed).generate_state(2))
    training, evaluation = drawn.values()
    assert training and evaluation and not training & evaluation


def test_evaluating_changes_nothing(rung, call, tmp_path):
    for every in (32, 0):
        flags = [*short(rung.SCRIPT), "--total-timesteps", 320, "--eval-every", every]
        assert call(rung, *flags, "--run-dir", tmp_path / str(every)) == 0
    assert len([row for row in metrics(tmp_path / "32") if "eval/episodes" in row]) == 10
    assert_same(weights(tmp_path / "32"), weights(tmp_path / "0"))


def test_the_seed_decides(rung, call, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = [*short(rung.SCRIPT), "--env", "CartPole-v1", "--total-timesteps", 96, "--seed", seed]
        assert call(rung, *flags, "--run-dir", tmp_path / name) == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_window_of_updates_is_told_as_its_mean(a2c, call, tmp_path):
    flags = [*short("a2c"), "--total-timesteps", 320, "--num-steps", 8]
    for every in (1, 80):
        assert call(a2c, *flags, "--log-every", every, "--run-dir", tmp_path / str(every)) == 0
    single, window = ([r for r in metrics(tmp_path / e) if "losses/loss" in r] for e in ("1", "80"))
    assert len(single) == 20 and [row["global_step"] for row in window] == [80, 160, 240, 320]
    for k, row in enumerate(window):
        for name in ("losses/loss", "losses/entropy", "charts/learning_rate"):
            assert row[name] == pytest.approx(np.mean([r[name] for r in single[5 * k : 5 * k + 5]]), rel=1e-6)


def test_a_resumed_run_tells_the_mean_of_the_updates_before_it_too(a2c, call, tmp_path, monkeypatch):
    flags = [*short("a2c"), "--total-timesteps", 320, "--log-every", 160]
    assert call(a2c, *flags, "--run-dir", tmp_path / "whole") == 0
    original = a2c.update
    calls = []

    def interrupted(*args):
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 2 else None)
        return original(*args)

    monkeypatch.setattr(a2c, "update", interrupted)
    assert call(a2c, *flags, "--run-dir", tmp_path / "cut") == 143
    assert call(a2c, "--resume", tmp_path / "cut") == 0
    whole, cut = ([r["losses/loss"] for r in metrics(tmp_path / n) if "losses/loss" in r] for n in ("whole", "cut"))
    assert len(whole) == 2 and whole == cut


# ---- compiled


@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself is not ours
def test_compiled_and_eager_end_with_the_same_weights(rung, call, tmp_path, monkeypatch):
    """A compiled call returns gradients of zero where an eager one returns none: no optimiser may move by them."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic, **mode: compiler(model, backend="aot_eager", dynamic=dynamic)
    )
    torch._dynamo.reset()
    flags = [*short(rung.SCRIPT), "--total-timesteps", 64, "--eval-every", 0]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert call(rung, *flags, *more, "--run-dir", tmp_path / name) == 0
    eager, compiled = (weights(tmp_path / name) for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["actor_critic", *ROLLOUTS])  # those that have CUDA graphs
def test_what_a_cuda_graph_returned_may_be_overwritten_by_its_next_call(name, call, tmp_path, monkeypatch):
    script, returned = importlib.import_module(name), []
    forward = torch.nn.Module.__call__

    def graph(agent, obs):
        for tensor in returned:
            tensor.data.fill_(math.nan)
        returned[:] = forward(agent, obs)
        return tuple(returned)

    flags = [*short(name), "--total-timesteps", 64]
    assert call(script, *flags, "--run-dir", tmp_path / "plain") == 0
    monkeypatch.setattr(script.Agent, "__call__", graph)
    assert call(script, *flags, "--run-dir", tmp_path / "graph") == 0
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "graph"))


def test_an_update_leaves_the_parameters_where_they_lie(rung, call, tmp_path, monkeypatch):
    """Compiled code and CUDA graphs know their addresses, convolutions are fast in one order of the memory only."""
    update, places = rung.update, []

    def watched(agent, *rest, **more):
        before = [(p.data_ptr(), p.stride()) for p in agent.parameters()]
        figures = update(agent, *rest, **more)
        places.append(before == [(p.data_ptr(), p.stride()) for p in agent.parameters()])
        return figures

    monkeypatch.setattr(rung, "update", watched)
    flags = [*short(rung.SCRIPT), "--env", "probes:Screen-v0", "--total-timesteps", 64, "--eval-every", 0]
    assert call(rung, *flags, "--run-dir", tmp_path / "run") == 0
    assert places and all(places)
