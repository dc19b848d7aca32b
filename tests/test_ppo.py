"""PPO's numbers against their definitions, and the loop against environments with known answers."""

import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, assert_same, metrics, weights

INF = math.inf


# ---- advantages


def gae_by_definition(rewards, values, next_values, dones, gamma, lam):
    """The exponentially weighted mean of all n-step advantages (Schulman et al. 2016, equations 11-16), one by one.

    Beyond an episode's end, or the rollout's, no longer ones exist: the longest takes all the remaining weight.
    """
    T, N = rewards.shape
    out = np.zeros((T, N))
    for i in range(N):
        for t in range(T):
            end = next((k for k in range(t, T) if dones[k, i]), T - 1)
            n_step = []
            for last in range(t, end + 1):
                paid = sum(gamma ** (k - t) * rewards[k, i] for k in range(t, last + 1))
                n_step.append(paid + gamma ** (last + 1 - t) * next_values[last, i] - values[t, i])
            weight = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
            out[t, i] = np.dot(weight, n_step)
    return out


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.95), (0.99, 0.0), (0.99, 1.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_is_the_weighted_mean_of_n_step_advantages(ppo, gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 12, 4))
    dones, terminated = np.zeros((12, 4)), np.zeros((12, 4))
    dones[5, 1] = dones[3, 2] = dones[7, 2] = dones[11, 3] = 1  # cut in the middle, both kinds, at the rollout's end
    terminated[3, 2] = terminated[11, 3] = 1
    next_values[terminated > 0] = 0
    going_on = dones[:-1] == 0
    next_values[:-1][going_on] = values[1:][going_on]
    tensors = (torch.as_tensor(array) for array in (rewards, values, next_values, dones))
    advantages, returns = ppo.gae(*tensors, gamma, lam)
    expected = gae_by_definition(rewards, values, next_values, dones, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-12, atol=1e-12)


def test_constant_reward_with_a_time_limit_is_worth_the_infinite_sum(ppo):
    gamma = 0.9
    values = torch.full((10, 1), 1 / (1 - gamma), dtype=torch.float64)
    dones = torch.zeros_like(values)
    dones[4] = dones[9] = 1  # cut: the true V goes on
    advantages, _ = ppo.gae(torch.ones_like(values), values, values, dones, gamma, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(values))


# ---- losses


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.5, 2.0, -2.4, 0.0),  # better than usual and already 20 % likelier: clipped, no gradient
        (0.5, 2.0, -1.0, -2.0),  # better but less likely than before: the gradient is whole
        (1.5, -2.0, 3.0, 2.0),  # worse and likelier than before: whole
        (0.5, -2.0, 1.6, 0.0),  # worse and already 20 % less likely: clipped
        (1.1, 2.0, -2.2, -2.0),  # inside the clip range
        (0.9, -2.0, 1.8, 2.0),
    ],
)
def test_clipped_surrogate(ppo, ratio, advantage, loss, gradient):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    result = ppo.policy_loss(r.log(), torch.tensor([advantage], dtype=torch.float64), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) and r.grad.item() == pytest.approx(gradient)


def test_losses_are_means(ppo):
    log_ratio, advantages = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert ppo.policy_loss(log_ratio, advantages, 0.2).item() == pytest.approx(-3)
    assert ppo.value_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.zeros(2)).item() == pytest.approx(2.5)


@pytest.mark.parametrize(
    "value, old, target, loss, gradient",
    [
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved further than 0.2 towards the target: 0.5 (1.2 - 2)^2, no more pull
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away: 0.5 (0.5 - 2)^2, pulled back
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside: plain
    ],
)
def test_clipped_value_loss(ppo, value, old, target, loss, gradient):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = ppo.value_loss(v, torch.tensor([target]).double(), torch.tensor([old]).double(), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) and v.grad.item() == pytest.approx(gradient)


# ---- sampling and the network


def test_actions_follow_the_policy(ppo):
    agent = ppo.Agent((2,), 3, False)
    agent.actor.weight.data *= 200
    obs = torch.ones(20_000, 2)
    logits, values = agent(obs)
    actions, log_probs, same = agent.act(obs, torch.Generator().manual_seed(0))
    probabilities = logits[0].softmax(-1).detach()
    assert probabilities.max() - probabilities.min() > 0.1
    np.testing.assert_allclose(np.bincount(actions, minlength=3) / 20_000, probabilities, atol=0.015)
    torch.testing.assert_close(log_probs, probabilities.log()[actions])
    torch.testing.assert_close(values, same)


@pytest.mark.parametrize("shape, image", [((5,), False), ((3, 2), False), ((4, 84, 84), True)])
def test_new_agent_is_nearly_uniform(ppo, shape, image):
    agent = ppo.Agent(shape, 7, image)
    obs = torch.randint(0, 255, (6, *shape), dtype=torch.uint8) if image else torch.randn(6, *shape)
    logits, values = agent(obs)
    assert logits.shape == (6, 7) and values.shape == (6,) and logits.dtype == values.dtype == torch.float32
    assert logits.softmax(-1).sub(1 / 7).abs().max() < 0.02


def test_bfloat16_is_close_to_float32(ppo):
    agent = ppo.Agent((4, 84, 84), 7, True)
    obs = torch.randint(0, 255, (32, 4, 84, 84), dtype=torch.uint8)
    exact, _ = agent(obs)
    agent.dtype = torch.bfloat16
    rounded, _ = agent(obs)
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


# ---- one update


def batch_of(ppo, agent, n=64):
    torch.manual_seed(3)
    obs = torch.randn(n, 3)
    with torch.no_grad():
        actions, log_probs, values = agent.act(obs)
    batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values}
    return batch | {"advantages": torch.randn(n), "returns": torch.randn(n)}


def test_one_epoch_one_minibatch_is_the_step_of_a2c(ppo):
    """Huang et al. 2022 (arXiv 2205.09123): the ratio is 1, so the surrogate's gradient is the policy gradient."""
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1, norm_adv=False)
    ours, plain = ppo.Agent((3,), 4, False), ppo.Agent((3,), 4, False)
    ours.actor.weight.data *= 300  # far from uniform, where the entropy's gradient would vanish
    plain.load_state_dict(ours.state_dict())
    batch = batch_of(ppo, ours)
    ppo.update(ours, torch.optim.SGD(ours.parameters(), 0.1), args, batch, 0.3)

    logits, values = plain(batch["obs"])
    policy = torch.distributions.Categorical(logits=logits)
    loss = -(policy.log_prob(batch["actions"]) * batch["advantages"]).mean() - 0.3 * policy.entropy().mean()
    loss = loss + 0.5 * 0.5 * ((values - batch["returns"]) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    torch.optim.SGD(plain.parameters(), 0.1).step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_loss_figures_are_means_over_the_update(ppo):
    """With a step size of 0 every minibatch sees the same network, so the means must be those of the whole batch."""
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=8, update_epochs=3, norm_adv=False)
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    figures = ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch, 0.01)
    value_loss = 0.5 * ((batch["values"] - batch["returns"]) ** 2).mean()
    assert figures["losses/value_loss"] == pytest.approx(value_loss.item(), rel=1e-5)
    assert figures["losses/policy_loss"] == pytest.approx(-batch["advantages"].mean().item(), rel=1e-4, abs=1e-6)
    assert figures["losses/approx_kl"] == pytest.approx(0, abs=1e-6) and figures["losses/clipfrac"] == 0


def test_approx_kl_and_clipfrac_tell_how_far_the_policy_moved(ppo):
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1)
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    batch["log_probs"] = batch["log_probs"] - math.log(1.5)  # as if all actions had become 1.5 times as likely
    figures = ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch, 0.0)
    assert figures["losses/clipfrac"] == 1
    assert figures["losses/approx_kl"] == pytest.approx(0.5 - math.log(1.5), rel=1e-4)


def test_target_kl_ends_the_epochs(ppo):
    steps = []
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    for target in (0.0, 1e-9, 1e9):
        args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=5, target_kl=target)
        optimizer = torch.optim.SGD(agent.parameters(), 0.1)
        optimizer.register_step_post_hook(lambda *_: steps.append(target))  # noqa: B023
        ppo.update(agent, optimizer, args, batch, 0.0)
    assert [steps.count(target) for target in (0.0, 1e-9, 1e9)] == [10, 2, 10]


def test_minibatches_cover_each_epoch_once(ppo, monkeypatch):
    seen = []
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    batch["obs"][:, 0] = torch.arange(64)
    original = agent.forward
    monkeypatch.setattr(agent, "forward", lambda obs: seen.extend(obs[:, 0].tolist()) or original(obs))
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=4, update_epochs=2)
    ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch, 0.0)
    assert sorted(seen[:64]) == sorted(seen[64:]) == list(range(64)) and seen[:64] != seen[64:]


# ---- the loop


def spy(monkeypatch, ppo, name):
    """Keep the arguments of every call of a function of the script; tensors as they were at the call."""
    calls, original = [], getattr(ppo, name)

    def keep(x):
        if isinstance(x, dict):
            return {k: keep(v) for k, v in x.items()}
        return x.clone() if isinstance(x, torch.Tensor) else x

    def spying(*args):
        calls.append([keep(x) for x in args])
        return original(*args)

    monkeypatch.setattr(ppo, name, spying)
    return calls


class Oracle(torch.nn.Module):
    """In place of the agent on `Diary`: V(s) = 100 x episode + step, so a value tells which state it is of."""

    def __init__(self, *_):
        super().__init__()
        self.actor = torch.nn.Linear(2, 2)

    def forward(self, obs):
        return self.actor(obs * 0), 100 * obs[:, 0] + obs[:, 1]

    def act(self, obs, generator=None):
        actions = torch.randint(2, (len(obs),), generator=generator)
        return actions, torch.full((len(obs),), math.log(0.5)), self(obs)[1]


DIARY = "--env probes:Diary-v0 --num-envs 3 --num-steps 16 --num-minibatches 2 --total-timesteps 96 --eval-episodes 3"


def test_no_transition_is_lost_none_crosses_an_episode(ppo, call, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "Agent", Oracle)
    gae, update = spy(monkeypatch, ppo, "gae"), spy(monkeypatch, ppo, "update")
    assert call(ppo, *DIARY.split(), "--no-norm-reward", "--run-dir", tmp_path / "run") == 0
    rewards, values, next_values, dones = (torch.cat([c[k] for c in gae]) for k in range(4))
    obs = torch.cat([c[3]["obs"].view(16, 3, 2) for c in update])
    for i in range(3):
        expected = [(e, s) for e in range(20) for s in range(2 + e % 5)][:32]
        assert [tuple(map(int, row)) for row in obs[:, i]] == expected  # every step of every episode, once, in order
        for t, (e, s) in enumerate(expected):
            over = s + 1 == 2 + e % 5
            assert rewards[t, i].item() == pytest.approx(e + (s + 1) / 100)
            assert dones[t, i].item() == over
            assert values[t, i].item() == 100 * e + s
            assert next_values[t, i].item() == (
                0 if over and e % 2 else 100 * e + s + 1
            )  # terminated: 0; cut: V goes on


def test_episodes_are_told_as_they_were(ppo, call, tmp_path):
    call(ppo, *DIARY.split(), "--run-dir", tmp_path / "run")
    told = [row for row in metrics(tmp_path / "run") if "charts/episodic_return" in row]
    for e in range(6):
        rows = [row for row in told if row["charts/episodic_length"] == 2 + e % 5][:3] if e < 5 else told[15:18]
        length = 2 + e % 5
        for row in rows:
            assert row["charts/episodic_return"] == pytest.approx(e * length + sum(range(1, length + 1)) / 100)


def test_terminated_and_cut_at_once_is_terminated(ppo, call, monkeypatch, tmp_path):
    calls = spy(monkeypatch, ppo, "gae")
    call(ppo, *SHORT, "--env", "probes:Both-v0", "--total-timesteps", "32", "--run-dir", tmp_path / "run")
    _, _, next_values, dones = calls[0][:4]
    assert dones.sum() == 6 and (next_values[dones > 0] == 0).all()


def test_stored_frames_are_copies(ppo, call, monkeypatch, tmp_path):
    update = spy(monkeypatch, ppo, "update")
    flags = "--env probes:Screen-v0 --num-envs 2 --num-steps 20 --num-minibatches 1 --total-timesteps 40"
    call(ppo, *flags.split(), "--eval-episodes", 1, "--run-dir", tmp_path / "run")
    frames = update[0][3]["obs"].view(20, 2, 4, 84, 84)
    for t in range(20):  # an episode of 58 frames is 15 steps; each shows the frames of the last 4 steps
        newest = 4 * (t % 15)
        for i in range(2):
            expected = [max(newest - 4 * k, 0) for k in (3, 2, 1, 0)]
            assert [int(frame.max()) for frame in frames[t, i]] == expected
            assert [int(frame.min()) for frame in frames[t, i]] == expected


def test_schedules_do_what_the_flags_say(ppo, call, monkeypatch, tmp_path):
    for anneal in (True, False):
        seen, original = [], ppo.update
        monkeypatch.setattr(
            ppo, "update", lambda *a, seen=seen, f=original: seen.append((a[1].param_groups[0]["lr"], a[4])) or f(*a)
        )
        run = tmp_path / str(anneal)
        flags = ["--total-timesteps", 160, "--learning-rate", 0.02, "--ent-coef", 0.3, "--run-dir", run]
        flags += [] if anneal else ["--no-anneal-lr", "--no-anneal-ent"]
        call(ppo, *SHORT, *flags)
        monkeypatch.setattr(ppo, "update", original)
        factors = [1, 0.8, 0.6, 0.4, 0.2] if anneal else [1] * 5
        assert seen == [(pytest.approx(0.02 * f), pytest.approx(0.3 * f)) for f in factors]
        told = [(row["charts/learning_rate"], row["charts/ent_coef"]) for row in metrics(run) if "charts/SPS" in row]
        assert told == seen


def trained(ppo, call, run_dir, *flags):
    """Train and return V and pi of the result, as functions of one number."""
    flags = ["--num-envs", 8, "--num-steps", 16, "--num-minibatches", 4, "--learning-rate", 5e-3, *flags]
    assert call(ppo, *flags, "--no-norm-reward", "--eval-episodes", 1, "--run-dir", run_dir) == 0
    agent = ppo.Agent((1,), 2, False)
    agent.load_state_dict(ppo.load(run_dir / "checkpoint.pt")["agent"])
    with torch.no_grad():
        logits, values = agent(torch.tensor([[0.0], [1.0]]))
    return values.tolist(), logits.softmax(-1).tolist()


@pytest.mark.parametrize(
    "probe, known",
    [("OneStep", [1, None]), ("Delayed", [0.9, 1]), ("Constant", [10, None]), ("Copycat", [1, 1])],
)
def test_probe_environments(ppo, call, tmp_path, probe, known):
    """The answers can be computed by hand; `Constant` is cut every 5 steps and must still be worth 1 / (1 - 0.9)."""
    values, policy = trained(ppo, call, tmp_path / "run", "--env", f"probes:{probe}-v0", "--total-timesteps", 12_800)
    for value, expected in zip(values, known, strict=True):
        assert expected is None or value == pytest.approx(expected, abs=0.1)
    if probe == "Copycat":
        assert policy[0][0] > 0.95 and policy[1][1] > 0.95


# ---- environments and rewards


def test_reward_scaler_divides_by_the_deviation_of_the_discounted_return(ppo):
    rng = np.random.default_rng(0)
    rewards, dones = rng.normal(3, 50, (400, 3)), rng.random((400, 3)) < 0.1
    scaler, discounted, returns = ppo.RewardScaler(3, 0.9), np.zeros(3), []
    for start in range(0, 400, 40):
        rollout = slice(start, start + 40)
        scaled = scaler(rewards[rollout], dones[rollout])
        for reward, done in zip(rewards[rollout], dones[rollout], strict=True):
            discounted = 0.9 * discounted + reward
            returns.append(discounted.copy())
            discounted[done] = 0
        np.testing.assert_allclose(scaled, np.clip(rewards[rollout] / np.std(returns), -10, 10), rtol=1e-4)


def test_frames_repeat_the_action_and_stop_at_the_end(ppo):
    env = ppo.make_env("probes:Screen-v0")
    obs, _ = env.reset()
    assert obs.shape == (4, 84, 84) and env.metadata["render_fps"] == 15
    for step in range(1, 16):
        obs, reward, terminated, _, _ = env.step(0)
        assert reward == (4 if step < 15 else 2) and terminated == (step == 15)
        newest = 4 * step if step < 15 else 58
        assert [int(frame.max()) for frame in obs] == [max(4 * (step - k), 0) for k in (3, 2, 1)] + [newest]


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


def test_actions_that_do_not_start_at_zero(ppo, call, tmp_path):
    assert call(ppo, *SHORT, "--env", "probes:FromOne-v0", "--total-timesteps", 64, "--run-dir", tmp_path / "run") == 0


# ---- resume and evaluation


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(ppo, call, monkeypatch, tmp_path):
    """Clockwork's episodes end where rollouts end, so both runs meet the same episodes."""
    flags = [*SHORT, "--total-timesteps", 320, "--eval-every", 64]
    assert call(ppo, *flags, "--run-dir", tmp_path / "whole") == 0
    calls, original = SimpleNamespace(n=0), ppo.update

    def interrupted(*args):
        calls.n += 1
        figures = original(*args)
        if calls.n == 5:
            signal.raise_signal(signal.SIGTERM)  # the weights have changed, nothing was logged or saved yet
        return figures

    monkeypatch.setattr(ppo, "update", interrupted)
    assert call(ppo, *flags, "--run-dir", tmp_path / "cut") == 143
    assert ppo.load(tmp_path / "cut" / "checkpoint.pt")["global_step"] == 160
    assert call(ppo, "--resume", tmp_path / "cut") == 0
    assert calls.n == 10
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    whole, cut, clocks = metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), ("time", "charts/SPS")
    for a, b in zip(whole, cut, strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {k: v for k, v in b.items() if k not in clocks}
    assert [row["time"] for row in cut] == sorted(row["time"] for row in cut)


def test_evaluating_changes_nothing(ppo, call, tmp_path):
    for every in (32, 0):
        call(ppo, *SHORT, "--total-timesteps", 320, "--eval-every", every, "--run-dir", tmp_path / str(every))
    assert len([row for row in metrics(tmp_path / "32") if "eval/episodes" in row]) == 10
    assert_same(weights(tmp_path / "32"), weights(tmp_path / "0"))


def test_the_seed_decides(ppo, call, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(ppo, *SHORT, "--env", "CartPole-v1", "--total-timesteps", 96, "--seed", seed, "--run-dir", tmp_path / name)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))
