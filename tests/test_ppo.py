"""PPO's numbers against their definitions."""

import copy
import math

import numpy as np
import pytest
import torch

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
    dones, terminated = np.zeros((2, 12, 4), bool)
    dones[5, 1] = dones[3, 2] = dones[7, 2] = dones[11, 3] = True  # cut in the middle, both kinds, at the rollout's end
    terminated[3, 2] = terminated[11, 3] = True
    next_values[terminated] = 0
    going_on = ~dones[:-1]
    next_values[:-1][going_on] = values[1:][going_on]
    tensors = (torch.as_tensor(array) for array in (rewards, values, next_values, dones))
    advantages, returns = ppo.gae(*tensors, gamma, lam)
    expected = gae_by_definition(rewards, values, next_values, dones, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-12, atol=1e-12)


def test_constant_reward_with_a_time_limit_is_worth_the_infinite_sum(ppo):
    gamma = 0.9
    values = torch.full((10, 1), 1 / (1 - gamma), dtype=torch.float64)
    dones = torch.zeros_like(values, dtype=torch.bool)
    dones[4] = dones[9] = True  # cut: the true V goes on
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
    assert ppo.value_loss(torch.tensor([1.0, 3.0]), torch.zeros(2)).item() == pytest.approx(2.5)


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
    returns, old_values = torch.tensor([target]).double(), torch.tensor([old]).double()
    result = ppo.value_loss(ppo.clip_values(v, returns, old_values, 0.2), returns)
    result.backward()
    assert result.item() == pytest.approx(loss) and v.grad.item() == pytest.approx(gradient)


# ---- one update


def batch_of(ppo, agent, n=64):
    torch.manual_seed(3)
    obs = torch.randn(n, 3)
    with torch.no_grad():
        actions, log_probs, values = agent.act(obs)
    batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values}
    return batch | {"advantages": torch.randn(n), "returns": torch.randn(n)}


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


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_clip_vloss_holds_values_near_the_old_ones(ppo, clip_vloss):
    """With old values 1 below and returns 1 above the present ones, held values are 0.8 further from the returns."""
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1, clip_vloss=clip_vloss)
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    batch["values"], batch["returns"] = batch["values"] - 1, batch["values"] + 1
    figures = ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch, 0.0)
    assert figures["losses/value_loss"] == pytest.approx(0.5 * 1.8**2 if clip_vloss else 0.5, rel=1e-4)


@pytest.mark.parametrize("norm_adv", [True, False])
def test_norm_adv_takes_scale_and_mean_out_of_the_advantages(ppo, norm_adv):
    losses = []
    for scale, shift in ((1, 0), (7, 3)):
        args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1, norm_adv=norm_adv)
        torch.manual_seed(0)
        agent = ppo.Agent((3,), 4, False)
        batch = batch_of(ppo, agent)
        batch["log_probs"] -= torch.linspace(-0.1, 0.1, 64)  # without it the loss is minus the mean advantage: 0
        batch["advantages"] = scale * batch["advantages"] + shift
        optimizer = torch.optim.SGD(agent.parameters(), 0.0)
        losses.append(float(ppo.update(agent, optimizer, args, batch, 0.01)["losses/policy_loss"]))
    assert (losses[0] == pytest.approx(losses[1], abs=1e-5)) == norm_adv


def test_approx_kl_and_clipfrac_tell_how_far_the_policy_moved(ppo):
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1)
    agent = ppo.Agent((3,), 4, False)
    batch = batch_of(ppo, agent)
    batch["log_probs"] = batch["log_probs"] - math.log(1.5)  # as if all actions had become 1.5 times as likely
    figures = ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch, 0.0)
    assert figures["losses/clipfrac"] == 1
    assert figures["losses/approx_kl"] == pytest.approx(0.5 - math.log(1.5), rel=1e-4)


def test_an_update_by_definition(ppo):
    """Each minibatch step of two epochs, written down again: standardised advantages, (5), (6), value loss, entropy."""
    agent = ppo.Agent((3,), 4, False)
    agent.actor.weight.data *= 300
    other, batch = copy.deepcopy(agent), batch_of(ppo, agent)
    flags = {"num_minibatches": 4, "update_epochs": 2, "clip_coef": 0.1, "vf_coef": 0.7, "max_grad_norm": 0.2}
    torch.manual_seed(5)
    args = ppo.Args(num_envs=4, num_steps=16, **flags)
    ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.3), args, batch, 0.4)
    torch.manual_seed(5)
    clipped = 0
    for _ in range(2):
        order = torch.randperm(64)
        for begin in range(0, 64, 16):
            b = {name: tensor[order[begin : begin + 16]] for name, tensor in batch.items()}
            logits, values = other(b["obs"])
            policy = torch.distributions.Categorical(logits=logits)
            ratio = (policy.log_prob(b["actions"]) - b["log_probs"]).exp()
            A = (b["advantages"] - b["advantages"].mean()) / b["advantages"].std()
            surrogate = torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A).mean()
            error = 0.5 * ((values - b["returns"]) ** 2).mean()
            other.zero_grad()
            (-surrogate - 0.4 * policy.entropy().mean() + 0.7 * error).backward()
            norm = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
            clipped += bool(norm > 0.2)
            with torch.no_grad():
                for p in other.parameters():
                    p -= 0.3 * p.grad * min(1, 0.2 / norm)
    assert clipped == 8
    for p, q in zip(agent.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_target_kl_compares_the_mean_of_an_epoch(ppo):
    def steps(target, epochs=2):
        made, agent = [], ppo.Agent((3,), 4, False)
        agent.load_state_dict(weights)
        optimizer = torch.optim.SGD(agent.parameters(), 0.5)
        optimizer.register_step_post_hook(lambda *_: made.append(1))
        torch.manual_seed(1)
        args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=4, update_epochs=epochs, target_kl=target)
        moved = ppo.update(agent, optimizer, args, batch, 0.0)["losses/approx_kl"].item()
        return len(made), moved

    weights = ppo.Agent((3,), 4, False).state_dict()
    agent = ppo.Agent((3,), 4, False)
    agent.load_state_dict(weights)
    batch = batch_of(ppo, agent)
    _, first = steps(0.0, epochs=1)
    assert [steps(target)[0] for target in (0.99 * first, 1.01 * first)] == [4, 8]


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
