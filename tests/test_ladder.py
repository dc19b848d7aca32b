"""The ladder: shared code that cannot drift, equalities between the rungs, gradients against exact ones."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LADDER, ROOT, SCRIPTS, metrics, short
from torch import nn

sys.path.append(str(ROOT / "benchmark"))
import ladder

reinforce, baseline, actor_critic, a2c, trpo, ppo = map(importlib.import_module, LADDER[:6])


# ---- the text


@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda rung: f"{rung.before}-{rung.after}")
def test_what_two_scripts_share_is_byte_identical(rung):
    before, after = (ladder.definitions(ladder.read(name)) for name in rung[:2])
    different = {name for name in before if name in after and before[name] != after[name]}
    assert different == set(rung.changes.split())
    assert sum(ladder.changed_lines(ladder.read(rung.before), ladder.read(rung.after))) <= rung.lines


def test_definitions_stand_in_the_same_order():
    names = {script: list(ladder.definitions(ladder.read(script))) for script in SCRIPTS}
    for a, b in itertools.combinations(names.values(), 2):
        assert [name for name in a if name in b] == [name for name in b if name in a]


def test_readme_shows_the_table():
    assert ladder.table() in (ROOT / "README.md").read_text()


def test_changed_lines_counts_what_diff_shows():
    before = 'x = 1\n\n\ndef f():\n    """Old."""\n    return 1  # one\n'
    after = 'x = 1\n\n\ndef f():\n    """New,\n    longer."""\n    # why\n    return 2\n'
    assert ladder.changed_lines(before, after) == (1, 2)


# ---- equalities between the rungs


def rollout(T=12, N=3, seed=0):
    rng = np.random.default_rng(seed)
    return (torch.as_tensor(rng.normal(size=(T, N))) for _ in range(3))


def test_gae_with_lambda_1_is_monte_carlo_minus_baseline():
    rewards, values, _ = rollout()
    next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])  # the episode terminates at the end
    dones = torch.zeros_like(values, dtype=torch.bool)
    dones[-1] = True
    advantages, returns = a2c.gae(rewards, values, next_values, dones, 0.9, 1.0)
    G = torch.as_tensor(reinforce.reward_to_go(rewards.numpy(), 0.9))
    torch.testing.assert_close(advantages, G - values)
    torch.testing.assert_close(returns, G)


def test_gae_with_lambda_0_is_the_td_error():
    rewards, values, next_values = rollout()
    dones = torch.zeros_like(values, dtype=torch.bool)
    dones[4, 1] = True
    advantages, returns = a2c.gae(rewards, values, next_values, dones, 0.9, 0.0)
    errors, targets = actor_critic.td_errors(rewards, values, next_values, 0.9)
    torch.testing.assert_close(advantages, errors)
    torch.testing.assert_close(returns, targets)


def agents(*scripts, seed=0):
    """The same weights in the agent of each script, far from a uniform policy."""
    torch.manual_seed(seed)
    made = [script.Agent((3,), 4, False) for script in scripts]
    made[0].actor.weight.data *= 300
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return made


def batch_of(agent, n, seed=0):
    torch.manual_seed(seed)
    obs = torch.randn(n, 3)
    with torch.no_grad():
        actions, log_probs, values = agent.act(obs)
    batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values}
    return batch | {"advantages": torch.randn(n), "returns": torch.randn(n)}


def sgd(agent):
    return torch.optim.SGD(agent.parameters(), 0.1)


def parameters(agent):
    return [*agent.actor_trunk.parameters(), *agent.actor.parameters()]


def assert_same_weights(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_a2c_on_one_environment_and_one_step_is_actor_critic():
    one, other = agents(actor_critic, a2c)
    rewards, values, next_values = rollout(T=1, N=1)
    advantages, returns = a2c.gae(rewards, values, next_values, torch.zeros(1, 1, dtype=torch.bool), 0.9, 1.0)
    errors, targets = actor_critic.td_errors(rewards[0], values[0], next_values[0], 0.9)
    torch.testing.assert_close((advantages[0], returns[0]), (errors, targets))
    batch = batch_of(one, 1) | {"advantages": errors.float(), "returns": targets.float()}
    actor_critic.update(one, sgd(one), batch)
    args = a2c.Args(num_envs=1, num_steps=1, vf_coef=1.0, max_grad_norm=1e9)
    a2c.update(other, sgd(other), args, batch, 0.0)
    assert_same_weights(one, other)


def test_ppo_with_one_epoch_and_one_minibatch_is_a2c():
    """Huang et al. 2022 (arXiv 2205.09123): the ratio is 1, so the surrogate's gradient is the policy gradient."""
    one, other = agents(a2c, ppo)
    before = one.actor.weight.clone()
    batch = batch_of(one, 64)
    a2c.update(one, sgd(one), a2c.Args(num_envs=4, num_steps=16), batch, 0.3)
    args = ppo.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1, norm_adv=False)
    ppo.update(other, sgd(other), args, batch, 0.3)
    assert_same_weights(one, other)
    assert not torch.equal(before, one.actor.weight)


def test_trpo_starts_along_the_policy_gradient():
    """At theta_old the surrogate's gradient is A2C's; seen through trpo.update's own report of it and of its step."""
    one, other = agents(a2c, trpo)
    batch = batch_of(one, 64)
    figures = trpo.update(other, trpo.Args(num_envs=4, num_steps=16, norm_adv=False), batch)
    loss = a2c.policy_loss(one(batch["obs"])[0].log_softmax(-1)[range(64), batch["actions"]], batch["advantages"])
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in parameters(one)])
    assert figures["losses/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    with torch.no_grad():
        improved = other(batch["obs"])[0].log_softmax(-1)[range(64), batch["actions"]] - batch["log_probs"]
        gain = (improved.exp() * batch["advantages"]).mean() - batch["advantages"].mean()
    assert gain.item() == pytest.approx(figures["losses/improvement"].item(), rel=1e-3) and gain > 0


def test_losses_by_hand():
    log_probs, weights = torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert reinforce.policy_loss(log_probs, weights, 4).item() == pytest.approx((3 + 10) / 4)
    assert a2c.policy_loss(log_probs, weights).item() == pytest.approx((3 + 10) / 2)
    assert a2c.value_loss(torch.tensor([1.0, 3.0]), torch.zeros(2)).item() == pytest.approx(0.5 * (1 + 9) / 2)


def test_a2c_loss_and_clipping_by_definition():
    one, other = agents(a2c, a2c)
    batch = batch_of(one, 64)
    a2c.update(one, sgd(one), a2c.Args(num_envs=4, num_steps=16, vf_coef=0.7, max_grad_norm=0.2), batch, 0.3)
    logits, values = other(batch["obs"])
    policy = torch.distributions.Categorical(logits=logits)
    loss = -(policy.log_prob(batch["actions"]) * batch["advantages"]).mean() - 0.3 * policy.entropy().mean()
    (loss + 0.7 * 0.5 * ((values - batch["returns"]) ** 2).mean()).backward()
    nn.utils.clip_grad_norm_(other.parameters(), 0.2)
    sgd(other).step()
    assert_same_weights(one, other)


@pytest.mark.parametrize("script", [reinforce, baseline, actor_critic, a2c], ids=lambda script: script.SCRIPT)
def test_an_update_begins_with_no_gradient(script):
    agent = agents(script)[0]
    batch = batch_of(agents(a2c)[0], 64)
    batch |= {"weights": batch["advantages"], "discounts": torch.ones(64)}
    groups = [{"params": parameters(agent)}, {"params": [*agent.critic.parameters()]}] if script == baseline else None
    optimizer = torch.optim.SGD(groups or agent.parameters(), 0.0)
    given = {reinforce: [script.Args()], baseline: [script.Args()], actor_critic: [], a2c: [a2c.Args()]}[script]
    last = [0.0] if script == a2c else []
    norms = [script.update(agent, optimizer, *given, batch, *last)["losses/grad_norm"].item() for _ in range(3)]
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3)


@pytest.mark.parametrize("script", [reinforce, baseline, actor_critic, trpo, ppo], ids=lambda script: script.SCRIPT)
def test_adam_has_the_epsilon_and_the_weights_that_main_gives_it(script, call, tmp_path):
    """On images, where trunks are shared: the policy's step size, the first group's, is that of the shared one, too."""
    assert (
        call(
            script,
            *short(script.SCRIPT),
            "--env",
            "probes:Screen-v0",
            "--total-timesteps",
            60,
            "--run-dir",
            tmp_path / "run",
        )
        == 0
    )
    groups = script.load(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"]
    assert all(group["eps"] == 1e-5 for group in groups)
    sizes = {"reinforce": [10], "reinforce_baseline": [10, 10], "actor_critic": [10, 2], "trpo": [10], "ppo": [12]}
    assert [len(group["params"]) for group in groups] == sizes[script.SCRIPT]  # a trunk has 8 tensors, a head 2


def test_a2c_has_its_epsilon_under_the_root(call, tmp_path):
    flags = "--env CartPole-v1 --num-envs 2 --total-timesteps 10 --eval-episodes 1".split()
    assert call(a2c, *flags, "--run-dir", tmp_path / "run") == 0
    (group,) = a2c.load(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"]
    assert group["alpha"] == 0.99 and group["eps"] ** 2 == pytest.approx(1e-5)


# ---- the policy gradient on a decision process small enough to be enumerated

GAMMA = 0.9
# state -> action -> (probability, next state or None for the end, reward)
PROCESS = {
    0: {0: [(0.7, 1, 1.0), (0.3, None, -2.0)], 1: [(1.0, 2, 0.5)]},
    1: {0: [(1.0, None, 3.0)], 1: [(0.5, 2, 0.0), (0.5, None, 1.0)]},
    2: {0: [(1.0, None, 4.0)], 1: [(0.6, None, -1.0), (0.4, None, 7.0)]},
}
LOGITS = torch.tensor([[0.3, -0.2], [-1.0, 0.4], [0.1, 0.8]], dtype=torch.float64)


def trajectories(state=0):
    """All ways to play on from a state: [(probability of the world's part, [(state, action, reward), ...])]."""
    for action, outcomes in PROCESS[state].items():
        for probability, following, reward in outcomes:
            rests = [(1.0, [])] if following is None else trajectories(following)
            for rest_probability, rest in rests:
                yield probability * rest_probability, [(state, action, reward), *rest]


def chance(logits, world, steps):
    return world * torch.stack([logits.log_softmax(-1)[s, a] for s, a, _ in steps]).sum().exp()


def exact_gradient():
    """grad J by differentiating J itself, the sum over all trajectories of probability x discounted return."""
    logits = LOGITS.clone().requires_grad_()
    J = sum(
        chance(logits, world, steps) * sum(GAMMA**t * r for t, (_, _, r) in enumerate(steps))
        for world, steps in trajectories()
    )
    (gradient,) = torch.autograd.grad(J, logits)
    return gradient


def exact_values():
    """V(s) of the policy by backward induction."""
    values = {None: 0.0}
    for s in (2, 1, 0):
        pi = LOGITS[s].softmax(-1)
        values[s] = sum(pi[a].item() * p * (r + GAMMA * values[n]) for a in (0, 1) for p, n, r in PROCESS[s][a])
    return values


class Table(nn.Module):
    """A policy and a critic with one number for each entry."""

    def __init__(self, critic):
        super().__init__()
        self.logits, self.critic = nn.Parameter(LOGITS.clone()), critic

    def forward(self, obs):
        logits = self.logits[obs[:, 0].long()]
        return (logits, torch.zeros(len(obs))) if self.critic else logits


def estimate(script, episodes, b):
    """The gradient that the script's update() takes from these episodes, with a baseline b(s)."""
    agent = Table(script is not reinforce)
    optimizer = torch.optim.SGD([agent.logits], 1.0)
    rewards = np.zeros((max(map(len, episodes)), len(episodes)))
    for n, steps in enumerate(episodes):
        rewards[: len(steps), n] = [r for _, _, r in steps]
    returns = script.reward_to_go(rewards, GAMMA)
    rows = [
        (s, a, returns[t, n] - b(s), np.float64(GAMMA**t))
        for n, e in enumerate(episodes)
        for t, (s, a, _) in enumerate(e)
    ]
    obs, actions, weights, discounts = (torch.tensor(column) for column in zip(*rows, strict=True))
    batch = {"obs": obs[:, None], "actions": actions, "weights": weights, "discounts": discounts}
    script.update(agent, optimizer, SimpleNamespace(norm_adv=False, discount_start=True, num_envs=len(episodes)), batch)
    return agent.logits.detach() - LOGITS


def moments(script, b):
    """Mean and total variance of the estimate from one episode, over all trajectories."""
    cases = [(chance(LOGITS, world, steps), estimate(script, [steps], b)) for world, steps in trajectories()]
    assert sum(p for p, _ in cases).item() == pytest.approx(1)
    mean = sum(p * gradient for p, gradient in cases)
    return mean, sum(p * ((gradient - mean) ** 2).sum() for p, gradient in cases).item()


def test_reinforce_expects_the_exact_gradient():
    mean, _ = moments(reinforce, lambda s: 0.0)
    torch.testing.assert_close(mean, exact_gradient(), rtol=0, atol=1e-9)


def test_episodes_of_different_length_do_not_bias_the_mean():
    """Every pair of episodes: an average over steps instead of episodes would weigh short ones more."""
    single = list(trajectories())
    assert {len(steps) for _, steps in single} == {1, 2, 3}
    mean = sum(
        chance(LOGITS, *one) * chance(LOGITS, *other) * estimate(reinforce, [one[1], other[1]], lambda s: 0.0)
        for one, other in itertools.product(single, single)
    )
    torch.testing.assert_close(mean, exact_gradient(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("script", [reinforce, baseline])
def test_the_discount_of_the_start_comes_after_the_standardisation(script):
    """What is paid alike at every step says nothing about any of them, early or late."""
    agent, (obs, actions) = Table(script is not reinforce), torch.tensor([[0, 1, 2], [0, 1, 1]])
    batch = {"obs": obs[:, None], "actions": actions, "weights": torch.ones(3), "discounts": GAMMA ** torch.arange(3)}
    args = SimpleNamespace(norm_adv=True, discount_start=True, num_envs=1)
    figures = script.update(agent, torch.optim.SGD([agent.logits], 1.0), args, batch)
    assert figures["losses/policy_loss"] == 0 and torch.equal(agent.logits.detach(), LOGITS)


def test_a_baseline_keeps_the_mean_and_shrinks_the_variance():
    values = exact_values()
    _, plain = moments(baseline, lambda s: 0.0)
    mean, variance = moments(baseline, values.__getitem__)
    torch.testing.assert_close(mean, exact_gradient(), rtol=0, atol=1e-9)
    silly_mean, _ = moments(baseline, lambda s: 100.0 * s - 7)
    torch.testing.assert_close(silly_mean, exact_gradient(), rtol=0, atol=1e-9)
    assert variance < 0.6 * plain


def test_each_batch_holds_one_episode_of_each_environment(call, tmp_path):
    """Episodes of 1 or 40 steps: who takes the first that finish gets too many of the short ones."""
    for script in (reinforce, baseline):
        run = tmp_path / script.SCRIPT
        flags = "--env probes:TwoLengths-v0 --num-envs 8 --total-timesteps 3000 --eval-episodes 1 --log-every 1"
        assert call(script, *flags.split(), "--run-dir", run) == 0
        rows, lengths, seen = metrics(run), [], 0
        for row in rows:
            if "charts/episodic_length" in row:
                lengths.append(row["charts/episodic_length"])
            if "losses/entropy" in row:
                assert len(lengths) % 8 == 0 and len(lengths) > seen
                assert row["global_step"] == sum(lengths)
                seen = len(lengths)
        assert np.mean(lengths) == pytest.approx(20.5, abs=6)  # about 150 episodes: standard error 1.6


# ---- TRPO


class Small(nn.Module):
    """A policy and a critic in double precision."""

    def __init__(self, trunk=None, width=3):
        super().__init__()
        self.actor_trunk, self.actor = trunk or nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(width, 4)
        self.critic_trunk, self.critic = nn.Identity(), nn.Linear(3, 1)
        self.double()

    def forward(self, obs):
        return self.actor(self.actor_trunk(obs)), self.critic(self.critic_trunk(obs)).squeeze(-1)


def small(seed=0):
    """A policy in double precision and a batch for it."""
    batch = batch_of(agents(trpo)[0], 40, seed)
    return Small(width=5), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def test_fisher_product_is_the_fisher_matrix():
    torch.manual_seed(0)
    agent, obs = Small(width=5), torch.randn(7, 3, dtype=torch.float64)
    log_probs = agent(obs)[0].log_softmax(-1)
    fisher = 0
    for s, a in itertools.product(range(7), range(4)):  # E over states and actions of the outer product of the score
        score = trpo.flatten(torch.autograd.grad(log_probs[s, a], parameters(agent), retain_graph=True))
        fisher = fisher + log_probs[s, a].exp().detach() * score[:, None] * score / 7
    product = trpo.fisher_product(agent, parameters(agent), obs, 0.1)
    columns = torch.stack([product(e) for e in torch.eye(len(fisher), dtype=torch.float64)])
    torch.testing.assert_close(columns, fisher + 0.1 * torch.eye(len(fisher)).double(), rtol=0, atol=1e-10)


def test_a_trpo_step_by_definition():
    """x = (F + damping I)^-1 g by linear algebra, F from every third state, its length from the damped model."""
    agent, batch = small()
    old, actions = agent(batch["obs"])[0].log_softmax(-1), batch["actions"]
    advantages = (batch["advantages"] - batch["advantages"].mean()) / batch["advantages"].std(correction=0)
    gain = ((old - old.detach())[range(40), actions].exp() * advantages).mean()
    g = trpo.flatten(torch.autograd.grad(gain, parameters(agent), retain_graph=True))
    F = 0.3 * torch.eye(len(g), dtype=torch.float64)
    states = range(0, 40, 3)
    for s, a in itertools.product(states, range(4)):
        score = trpo.flatten(torch.autograd.grad(old[s, a], parameters(agent), retain_graph=True))
        F = F + old[s, a].exp().detach() * score[:, None] * score / len(states)
    x = torch.linalg.solve(F, g)
    before = trpo.flatten(parameters(agent)).detach()
    args = trpo.Args(num_envs=4, num_steps=10, max_kl=1e-4, cg_damping=0.3, cg_iterations=60, fisher_every=3)
    figures = trpo.update(agent, args, batch)
    assert figures["losses/line_search_steps"] == 1  # so the full step was taken
    step = trpo.flatten(parameters(agent)).detach() - before
    torch.testing.assert_close(step, (2e-4 / (x @ F @ x)).sqrt() * x, rtol=1e-3, atol=1e-7)


def test_conjugate_gradient_solves_and_tells_its_residual():
    torch.manual_seed(0)
    A = torch.randn(12, 12, dtype=torch.float64)
    A, g = A @ A.T + torch.eye(12), torch.randn(12, dtype=torch.float64)
    x, residual = trpo.conjugate_gradient(A.__matmul__, g, 20)
    torch.testing.assert_close(x, torch.linalg.solve(A, g), rtol=1e-4, atol=1e-5)
    x, residual = trpo.conjugate_gradient(A.__matmul__, g, 5)
    assert residual.item() == pytest.approx((A @ x - g).square().sum().item(), rel=1e-6) and residual > 1e-8
    Q = torch.linalg.qr(A).Q
    five = Q @ torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5]).double()) @ Q.T
    residuals = [trpo.conjugate_gradient(five.__matmul__, g, iterations)[1].item() for iterations in (4, 5)]
    assert residuals[0] > 1e-6 and residuals[1] < 1e-20  # as many iterations as different eigenvalues


def test_accepted_steps_stay_inside_the_trust_region():
    accepted = 0
    for seed, max_kl in itertools.product(range(15), (1e-4, 1e-2, 0.5, 2)):
        agent, batch = small(seed)
        old = agent(batch["obs"])[0].log_softmax(-1).detach()
        args = trpo.Args(num_envs=4, num_steps=10, max_kl=max_kl, norm_adv=False)
        figures = trpo.update(agent, args, batch)
        new = agent(batch["obs"])[0].log_softmax(-1).detach()
        kl = (old.exp() * (old - new)).sum(-1).mean().item()
        ratio = (new - old)[range(40), batch["actions"]].exp()
        gain = ((ratio - 1) * batch["advantages"]).mean().item()
        assert kl <= max_kl and kl == pytest.approx(figures["losses/kl"].item(), abs=1e-9)
        assert gain == pytest.approx(figures["losses/improvement"].item(), abs=1e-9)
        assert (gain > 0) == bool(figures["losses/accepted"])
        accepted += gain > 0
    assert accepted >= 12


def test_a_small_step_goes_just_as_far_as_it_may():
    """Where the quadratic model is exact, sqrt(2 delta / x'F x) makes the KL delta, and the gain the expected one."""
    agent, batch = small()
    args = trpo.Args(num_envs=4, num_steps=10, max_kl=1e-7, cg_damping=1e-5, cg_iterations=200, fisher_every=1)
    figures = {name.removeprefix("losses/"): float(figure) for name, figure in trpo.update(agent, args, batch).items()}
    assert figures["kl"] <= 1e-7 and figures["line_search_steps"] <= 2
    assert figures["kl"] == pytest.approx(1e-7 * 0.64 ** (figures["line_search_steps"] - 1), rel=0.04)
    expected = figures["expected_improvement"] * 0.8 ** (figures["line_search_steps"] - 1)
    assert figures["improvement"] == pytest.approx(expected, rel=0.04)


def test_the_natural_gradient_does_not_care_what_parameters_are_called():
    """Scaling an input and unscaling its weights is the same policy: the step must do the same to it."""
    results = []
    for scale in (1.0, 50.0):
        torch.manual_seed(1)
        agent = Small(nn.Identity())
        agent.actor.weight.data[:, 0] /= scale
        batch = small()[1]
        obs = batch["obs"] * torch.tensor([scale, 1, 1])
        args = trpo.Args(num_envs=4, num_steps=10, cg_damping=1e-12, cg_iterations=100, fisher_every=1)
        trpo.update(agent, args, batch | {"obs": obs})
        results.append(agent(obs)[0].log_softmax(-1).detach())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_a_rejected_step_leaves_the_policy_as_it_was(monkeypatch):
    original = trpo.kl_divergence
    far = lambda old, new: original(old, new) + (0.0 if torch.is_grad_enabled() else 1e9)  # noqa: E731
    for case in ("too far at any length", "nothing to gain"):
        agent, batch = agents(trpo)[0], batch_of(agents(trpo)[0], 40)
        with monkeypatch.context() as patch:
            if case == "nothing to gain":
                batch["advantages"][:] = 1.0
            else:
                patch.setattr(trpo, "kl_divergence", far)
            before = {name: p.clone() for name, p in agent.state_dict().items()}
            figures = trpo.update(agent, trpo.Args(num_envs=4, num_steps=10), batch)
        assert figures["losses/line_search_steps"] == 10 and not figures["losses/accepted"]
        assert figures["losses/kl"] == figures["losses/improvement"] == 0
        assert all(torch.equal(p, before[name]) for name, p in agent.state_dict().items())


def test_the_critics_fit_leaves_the_policy_alone():
    agent, batch = agents(trpo)[0], batch_of(agents(trpo)[0], 40)
    before = {name: p.clone() for name, p in agent.state_dict().items()}
    critic = [*agent.critic_trunk.parameters(), *agent.critic.parameters()]
    args = trpo.Args(num_envs=4, num_steps=10, value_epochs=300, value_batch_size=10)
    first = trpo.fit_values(agent, torch.optim.Adam(critic, 1e-2), args, batch)["losses/value_loss"]
    after = agent(batch["obs"])[1]
    assert trpo.value_loss(after, batch["returns"]) < 0.2 * first
    assert all(torch.equal(p, before[n]) == n.startswith("actor") for n, p in agent.state_dict().items())


def test_one_optimiser_for_policy_and_critic_moves_one_at_a_time():
    """Momentum from the other's steps must not carry it on."""
    agent = agents(baseline)[0]
    critic = [*agent.critic_trunk.parameters(), *agent.critic.parameters()]
    optimizer = torch.optim.Adam([{"params": parameters(agent)}, {"params": critic}], 1e-2)
    batch = batch_of(agent, 40)
    batch["weights"] = batch["advantages"]
    for _ in range(2):
        for step, moves in ((baseline.update, "actor"), (baseline.fit_values, "critic")):
            before = {name: p.clone() for name, p in agent.state_dict().items()}
            step(agent, optimizer, baseline.Args(num_envs=4, value_batch_size=10), batch)
            assert all(torch.equal(p, before[n]) != n.startswith(moves) for n, p in agent.state_dict().items())


def test_the_reported_value_loss_is_the_mean_over_the_fit():
    agent, batch = agents(trpo)[0], batch_of(agents(trpo)[0], 40)
    args = trpo.Args(num_envs=4, num_steps=10, value_epochs=3, value_batch_size=10)
    loss = trpo.fit_values(agent, torch.optim.SGD(agent.parameters(), 0.0), args, batch)["losses/value_loss"]
    assert loss.item() == pytest.approx(0.5 * (batch["values"] - batch["returns"]).square().mean().item(), rel=1e-5)


def test_a_batch_in_pieces_has_the_gradient_of_the_whole():
    one, other = agents(baseline, a2c)
    batch = batch_of(one, 5000)
    batch["weights"] = batch["advantages"]
    args = baseline.Args(num_envs=8, norm_adv=True)
    figures = baseline.update(one, torch.optim.SGD(parameters(one), 0.1), args, batch)
    weights = (batch["weights"] - batch["weights"].mean()) / batch["weights"].std(correction=0)
    log_probs = other(batch["obs"])[0].log_softmax(-1)
    loss = -(log_probs[range(5000), batch["actions"]] * weights).sum() / 8
    loss.backward()
    sgd(other).step()
    for name in ("actor.weight", "actor_trunk.1.weight"):
        torch.testing.assert_close(one.get_parameter(name), other.get_parameter(name), rtol=1e-3, atol=1e-4)
    assert figures["losses/policy_loss"].item() == pytest.approx(loss.item(), rel=1e-3)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    assert figures["losses/entropy"].item() == pytest.approx(entropy, rel=1e-4)
