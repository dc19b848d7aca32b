"""DreamerV3's numbers against their definitions, its replay and its loop against environments with known answers."""

import copy
import functools
import math
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same, metrics, short, weights
from torch import nn
from torch.nn import functional as F

import dreamerv3 as d

VECTOR, IMAGE = {"vector": (3,)}, {"image": (64, 64, 3)}


def agent_of(senses=VECTOR, num_actions=4, discrete=True, seed=0, noisy=True, dtype=torch.float32, **flags):
    """An agent; `noisy`: its zero heads say something, too."""
    torch.manual_seed(seed)
    agent = d.Agent(senses, num_actions, discrete, d.Args(**flags), dtype)
    if noisy:
        for head in (agent.reward, agent.critic, agent.slow_critic, agent.actor):
            nn.init.normal_(head[-1].weight, std=0.2)
    return agent


def batch_of(agent, T=6, B=3, seed=0):
    """Replayed columns (T + 1, B, ...) with the end of an episode in stream 0, a time limit in 1."""
    torch.manual_seed(seed)
    flags = torch.zeros(3, T + 1, B, dtype=torch.bool)
    first, last, terminal = flags
    last[2, 0] = terminal[2, 0] = first[3, 0] = last[3, 1] = first[4, 1] = True
    batch = {"vector": torch.randn(T + 1, B, 3), "reward": torch.randn(T + 1, B), "first": first, "last": last}
    batch |= {"terminal": terminal, "action": F.one_hot(torch.randint(4, (T + 1, B)), 4).float()}
    batch["deter"] = torch.randn(T + 1, B, agent.rssm.deter_size).tanh()
    return batch | {"stoch": torch.randint(agent.rssm.classes, (T + 1, B, 32), dtype=torch.uint8)}


# ---- sizes and initial weights

COUNTS = {
    "1m": (686_585, 637_381),
    "12m": (10_493_129, 9_724_165),
    "25m": (23_487_785, 21_762_181),
    "50m": (41_648_009, 38_584_325),
    "100m": (93_465_161, 86_580_997),
    "200m": (165_944_585, 153_714_181),
    "400m": (372_890_249, 345_390_085),
}


def parameters(size, senses, num_actions, discrete=True):
    with torch.device("meta"):
        agent = d.Agent(senses, num_actions, discrete, d.Args(size=size))
    return sum(p.numel() for p in agent.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", COUNTS)
def test_every_size_has_the_parameters_of_the_original(size):
    assert parameters(size, IMAGE, 7) == COUNTS[size][0]
    assert parameters(size, {"vector": (4,)}, 2) == COUNTS[size][1]


def test_walker_has_the_parameters_of_the_original():
    assert parameters("1m", {"vector": (24,)}, 6, discrete=False) == 640_867


def test_weights_begin_as_a_cut_normal_of_variance_one_over_fan_in():
    agent = agent_of(IMAGE, noisy=False, size="12m")
    layers = {
        agent.rssm.from_deter[0].weight: 2048,
        agent.encoder.cnn[1].conv.weight: 32 * 25,
        agent.rssm.hidden.weight: 2048 + 8 * 3 * 256,  # the whole input, not a block's
    }
    for weight, fan_in in layers.items():
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        bound = 2 * 1.1368 * fan_in**-0.5
        assert bound * 0.95 < weight.abs().max() <= bound
    assert agent.actor[-1].weight.std().item() == pytest.approx(0.01 * 256**-0.5, rel=0.1)
    assert all((module.bias == 0).all() for module in agent.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    assert torch.equal(agent.critic[-1].weight, agent.slow_critic[-1].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_agent_expects_nothing(dtype):
    agent = agent_of(noisy=False, dtype=dtype)
    with agent.autocast():
        states = torch.randn(5, 640)
        assert (d.two_hot_mean(agent.reward(states), agent.bins) == 0).all()
        assert (d.two_hot_mean(agent.critic(states), agent.bins) == 0).all()
    assert (agent.judge(states, torch.eye(4)[:1].expand(5, 4))[1] > 0.999 * math.log(4)).all()


# ---- symlog, two-hot, distributions


def test_symlog_and_symexp():
    x = torch.tensor([-1000.0, -1.0, 0.0, 0.5, math.e - 1])
    torch.testing.assert_close(d.symlog(x), torch.tensor([-math.log(1001), -math.log(2), 0, math.log(1.5), 1]))
    torch.testing.assert_close(d.symexp(d.symlog(x)), x)


def test_bins():
    bins = agent_of().bins
    assert len(bins) == 255 and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    assert bins[-1].item() == pytest.approx(math.exp(20) - 1, rel=1e-6)
    assert bins[128].item() == pytest.approx(math.exp(20 / 127) - 1, rel=1e-5)


@pytest.mark.parametrize("x", [0.0, 15.0, -15.0, 0.01, -3.3, 12345.0])
def test_two_hot_is_undone_by_the_mean(x):
    bins, x = agent_of().bins, torch.tensor([x])
    below, above, weight = d.two_hot(x, bins)
    assert bins[below] <= x <= bins[above] and above - below == 1 and 0 <= weight <= 1
    code = torch.zeros(1, 255).scatter_(1, below[:, None], 1 - weight[:, None])
    code.scatter_add_(1, above[:, None], weight[:, None])
    torch.testing.assert_close(d.two_hot_mean(code.log().clamp(min=-100), bins), x)
    logits = torch.randn(1, 255)
    torch.testing.assert_close(d.two_hot_loss(logits, x, bins), -(code * logits.log_softmax(-1)).sum(-1))


def test_two_hot_beyond_the_bins():
    bins, logits = agent_of().bins, torch.randn(1, 255)
    for x, index in ((1e9, 254), (-1e9, 0)):
        loss = d.two_hot_loss(logits, torch.tensor([x]), bins)
        torch.testing.assert_close(loss, -logits.log_softmax(-1)[:, index])


def test_the_mean_of_symmetric_logits_is_zero_to_the_digit():
    half = torch.randn(100, 127)
    logits = torch.cat([half, torch.randn(100, 1), half.flip(-1)], -1)
    assert (d.two_hot_mean(logits, agent_of().bins) == 0).all()
    assert logits.softmax(-1).mul(agent_of().bins).sum(-1).abs().max() > 0  # as a plain sum would have it


def test_without_unimix_nothing_is_infinite():
    agent = agent_of(actor_unimix=0, unimix=0)
    agent.actor[-1].bias.data = torch.tensor([300.0, -300, 0, 0])
    log_probs, entropy = agent.judge(torch.randn(4, 640), torch.eye(4))
    assert log_probs.isfinite().all() and entropy.isfinite().all() and log_probs[0] == 0 > log_probs[1]
    certain, other = d.unimix(torch.tensor([[[300.0, -300]], [[-300.0, 300]]]), 0)
    assert d.latent_kl(certain, other).isfinite()


def test_unimix_and_pick():
    probs = d.unimix(torch.tensor([100.0, 0.0, 0.0, 0.0]), 0.01)
    torch.testing.assert_close(probs, torch.tensor([0.9925, 0.0025, 0.0025, 0.0025]))
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(40_000, 4)
    torch.manual_seed(0)
    picked = d.pick(probs, d.exponential(probs, *probs.shape))
    assert (picked.sum(-1) == 1).all() and set(picked.unique().tolist()) == {0, 1}
    torch.testing.assert_close(picked.mean(0), probs[0], atol=0.01, rtol=0)


def test_samples_pass_the_gradient_to_the_mixed_probabilities():
    rssm = agent_of().rssm
    logits, noise = torch.randn(2, 32, 4, requires_grad=True), torch.rand(2, 32, 4)
    weight = torch.randn(2, 128)
    sample = rssm.sample(logits, noise, torch.float32)
    assert (sample.sum(-1) == 32).all() and set(sample.unique().tolist()) == {0, 1}  # nothing is rounded
    (sample * weight).sum().backward()
    other = logits.detach().clone().requires_grad_()
    (d.unimix(other, 0.01).flatten(1) * weight).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_kl_is_summed_over_variables_before_the_free_nats():
    p, q = torch.randn(2, 5, 32, 4).softmax(-1)
    P, Q = (torch.distributions.Independent(torch.distributions.Categorical(probs=x), 1) for x in (p, q))
    torch.testing.assert_close(d.latent_kl(p, q), torch.distributions.kl_divergence(P, Q))


@pytest.mark.parametrize("discrete", [True, False])
def test_judge_by_definition(discrete):
    agent = agent_of(num_actions=3, discrete=discrete)
    states = torch.randn(4000, 640)
    actions = agent.draw(states, agent.noise(4000))
    log_probs, entropy = agent.judge(states, actions)
    out = agent.actor(states)
    if discrete:
        policy = torch.distributions.Categorical(probs=0.99 * out.softmax(-1) + 0.01 / 3)
        assert (actions.sum(-1) == 1).all() and actions.max() == 1
        expected = policy.log_prob(actions.argmax(-1)), policy.entropy()
    else:
        mean, std = out[:, :3].tanh(), 0.9 * torch.sigmoid(out[:, 3:] + 2) + 0.1
        policy = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
        assert ((actions - mean) / std).std().item() == pytest.approx(1, abs=0.03)
        expected = policy.log_prob(actions), policy.entropy()
    torch.testing.assert_close((log_probs, entropy), expected)
    assert (-log_probs).mean().item() == pytest.approx(entropy.mean().item(), abs=0.1)  # E[-log pi] is the entropy


# ---- network


def test_rms_norm_and_layers_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(d.RMSNorm(2)(x), x / math.sqrt(12.5 + 1e-4))
    net = d.mlp(3, 2, 1, 1)
    x, (linear, norm, _, out) = torch.randn(5, 3), net
    norm.scale.data = torch.tensor([2.0, -1.0])
    hidden = x @ linear.weight.T + linear.bias
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.scale
    torch.testing.assert_close(net(x), (hidden * hidden.sigmoid()) @ out.weight.T + out.bias)


def test_the_gru_by_hand_block_after_block():
    rssm = agent_of().rssm
    for p in rssm.parameters():
        nn.init.normal_(p, std=0.3)
    deter, stoch, action = torch.randn(2, 512), torch.randn(2, 128), torch.tensor([[0.5, -3, 0, 1], [0, 1, 0, 0]])
    inputs = torch.cat([rssm.from_deter(deter), rssm.from_stoch(stoch)], -1)
    inputs = torch.cat([inputs, rssm.from_action(torch.tensor([[0.5, -1, 0, 1], [0, 1, 0, 0]]))], -1)
    blocks = deter.split(64, -1)
    hidden = [torch.cat([blocks[g], inputs], -1) @ rssm.hidden.weight[g] + rssm.hidden.bias[g] for g in range(8)]
    hidden = F.silu(rssm.norm(torch.cat(hidden, -1)))
    new = []
    for g in range(8):
        gates = hidden[:, 64 * g : 64 * g + 64] @ rssm.gates.weight[g] + rssm.gates.bias[g]
        reset, cand, update = gates[:, :64].sigmoid(), gates[:, 64:128], (gates[:, 128:] - 1).sigmoid()
        new.append(update * (reset * cand).tanh() + (1 - update) * blocks[g])
    torch.testing.assert_close(rssm.core(deter, stoch, rssm.embed(action)), torch.cat(new, -1), atol=1e-5, rtol=1e-5)


def test_encoder_and_decoder_by_hand():
    agent = agent_of(IMAGE | VECTOR)
    obs = {"image": torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8), "vector": torch.randn(2, 3) * 10}
    x = obs["image"].permute(0, 3, 1, 2) / 255 - 0.5
    for stage in agent.encoder.cnn:
        x = F.max_pool2d(F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=2), 2)
        x = F.silu(x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt())
    tokens = torch.cat([agent.encoder.mlp(d.symlog(obs["vector"])), x.permute(0, 2, 3, 1).flatten(1)], -1)
    assert x.shape == (2, 16, 4, 4) and tokens.shape[1] == agent.encoder.size
    torch.testing.assert_close(agent.encoder(obs), tokens, atol=1e-5, rtol=1e-4)
    deter, stoch, net = torch.randn(2, 512), torch.randn(2, 128), agent.decoder
    x = [deter[:, 64 * g : 64 * g + 64] @ net.from_deter.weight[g] for g in range(8)]  # (h, w, c / 8) each
    x = torch.cat([part.view(2, 4, 4, 2) for part in x], -1) + net.from_stoch(stoch).view(2, 4, 4, 16)
    x = F.silu(net.norm(x)).permute(0, 3, 1, 2)
    for stage in net.cnn:
        x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), stage.conv.weight, padding=2)
        x = F.silu(x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt()) if stage.norm else x
    out = net(deter, stoch)
    torch.testing.assert_close(out["image"], x.sigmoid().permute(0, 2, 3, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["vector"], net.mlp(torch.cat([stoch, deter], -1)))


def test_a_doubled_image_is_convolved_as_if_it_had_been_drawn():
    shapes = (2, 3, 4, 6), (5, 3, 5, 5), (5,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, bias = inputs
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected, out = F.conv2d(large, weight, bias, padding=2), d.doubled_conv(x, weight, bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    toward = torch.randn_like(out)
    grads = [torch.autograd.grad(images, inputs, toward) for images in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_close_to_float32_and_reaches_every_weight():
    agents = [agent_of(IMAGE | VECTOR, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    results = []
    for agent in agents:
        batch = batch_of(agent)
        batch |= {"image": torch.randint(0, 255, (7, 3, 64, 64, 3), dtype=torch.uint8)}
        columns = batch | {"deter": batch["deter"].to(agent.dtype)}
        rows, streams = torch.arange(7)[:, None].expand(7, 3), torch.arange(3)[None]
        optimizer = d.LaProp([p for p in agent.parameters() if p.requires_grad], 1e-3, 0, 0.3)
        torch.manual_seed(1)
        figures = d.update(agent, optimizer, d.Args(batch_size=3, batch_length=6), columns, rows, streams)
        results.append(figures)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in optimizer.param_groups[0]["params"])
    for name in ("image", "vector", "reward", "continue", "value"):
        exact, rounded = (float(figures[f"losses/{name}"]) for figures in results)
        assert exact != rounded == pytest.approx(exact, rel=0.03), name


# ---- sequences


def test_a_reset_inside_a_sequence_is_a_fresh_start_and_leaks_no_gradient():
    agent = agent_of()
    batch = batch_of(agent)
    batch["deter"].requires_grad_()
    torch.manual_seed(5)
    deter, stoch, _ = d.observe(agent, batch)
    torch.manual_seed(5)
    noise = d.exponential(deter, 6, 3, 32, 4)  # what observe has drawn
    zero_deter, zero_stoch, zero_action = agent.initial(1)
    token = agent.encoder({"vector": batch["vector"][3, :1]})
    goes_on = torch.zeros(1, 1, dtype=torch.bool)
    fresh = agent.rssm.observe(zero_deter, zero_stoch, zero_action[None], token[None], noise[2:3, :1], goes_on)
    torch.testing.assert_close((deter[2:3, :1], stoch[2:3, :1]), fresh[:2])  # record 3 of stream 0 is a first one
    deter[3:, 0].sum().backward(retain_graph=True)
    assert batch["deter"].grad.abs().max() == 0
    deter[:, 2].sum().backward()
    assert batch["deter"].grad[0, 2].abs().max() > 0 and batch["deter"].grad[1:].abs().max() == 0


def test_a_sequence_begins_in_the_stored_state_with_the_stored_action():
    agent = agent_of()
    batch = batch_of(agent)
    batch["first"][0, 1] = True  # the stored state has seen the first observation already
    torch.manual_seed(5)
    deter, stoch, logits = d.observe(agent, batch)
    torch.manual_seed(5)
    noise = d.exponential(deter, 6, 3, 32, 4)
    old = F.one_hot(batch["stoch"][0].long(), 4).float().flatten(1)
    state, goes_on = (batch["deter"][0], old), torch.zeros(1, 3, dtype=torch.bool)
    for t in range(2):
        token = agent.encoder({"vector": batch["vector"][t + 1]})
        step = agent.rssm.observe(*state, batch["action"][t : t + 1], token[None], noise[t : t + 1], goes_on)
        torch.testing.assert_close((deter[t : t + 1], stoch[t : t + 1], logits[t : t + 1]), step)
        state = step[0][0], step[1][0]


@pytest.mark.parametrize("piece", [1, 4, 6])
def test_a_sequence_may_be_cut_into_pieces(piece, monkeypatch):
    """States and gradients are those of a sequence that is followed in one go, whether pieces are equal or not."""
    results = []
    for length in (100, piece):
        monkeypatch.setattr(d, "PIECE", length)
        agent = agent_of()
        batch = batch_of(agent)
        states = d.observe(agent, batch)
        sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in states).backward()
        results.append([*states, *(p.grad for p in agent.rssm.parameters() if p.grad is not None)])
    assert len(results[0]) > 20
    torch.testing.assert_close(*results)


# ---- losses


def test_model_losses_by_definition():
    agent = agent_of()
    batch = batch_of(agent)
    deter, stoch, logits = d.observe(agent, batch)
    states, t = torch.cat([deter, stoch], -1), slice(1, None)
    error = agent.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))["vector"].view(6, 3, 3) - d.symlog(
        batch["vector"][t]
    )
    going_on = agent.going_on(states).squeeze(-1).sigmoid()
    target = torch.where(batch["terminal"][t], 0, 1 - 1 / 333)
    expected = {
        "vector": error.square().sum(-1).mean(),
        "reward": d.two_hot_loss(agent.reward(states), batch["reward"][t], agent.bins).mean(),
        "continue": -(target * going_on.log() + (1 - target) * (1 - going_on).log()).mean(),
    }
    prior = agent.rssm.prior(deter).unflatten(-1, (32, 4))
    kl = d.latent_kl(d.unimix(logits, 0.01), d.unimix(prior, 0.01))
    for nats in (1.0, kl.median().item()):  # the latter holds for some steps, and not for others
        losses = d.model_losses(agent, d.Args(free_nats=nats), batch, deter, stoch, logits)
        held = kl.clamp(min=nats).mean()
        torch.testing.assert_close(losses, expected | {"dynamics": held, "representation": held})


def test_pixels_are_told_from_0_to_1():
    agent, batch = agent_of(IMAGE), batch_of(agent_of())
    batch["image"] = torch.randint(256, (7, 3, 64, 64, 3), dtype=torch.uint8)
    for off in (0.0, 0.1):
        agent.decoder.forward = lambda *_: {"image": batch["image"][1:].flatten(0, 1) / 255 + off}  # noqa: B023
        losses = d.model_losses(
            agent, d.Args(), batch, torch.randn(6, 3, 512), torch.randn(6, 3, 128), torch.randn(6, 3, 32, 4)
        )
        assert losses["image"].item() == pytest.approx(
            64 * 64 * 3 * off**2, rel=1e-4
        )  # a sum over pixels, a mean over steps


def test_free_nats_stop_the_gradient_step_by_step_and_each_side_of_the_kl_has_its_loss():
    agent = agent_of()
    batch = batch_of(agent)
    for nats, moves in ((0.0, True), (1e9, False)):
        for name, side in (("dynamics", "prior"), ("representation", "posterior")):
            deter, stoch, logits = d.observe(agent, batch)
            loss = d.model_losses(agent, d.Args(free_nats=nats), batch, deter.detach(), stoch.detach(), logits)[name]
            agent.zero_grad()
            loss.backward()
            moved = {n.split(".")[1] for n, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
            assert (side in moved) == moves and ({"prior": "posterior", "posterior": "prior"}[side] not in moved)


def returns_by_definition(rewards, discounts, values, decay):
    """The mixture of all n-step returns, each written out, for one stream."""
    K, total = len(values), 0.0
    weight, paid, discount = 1.0, 0.0, 1.0
    for n in range(K):
        paid += discount * rewards[n]
        discount *= discounts[n]
        share = weight * (1 - decay[n]) if n < K - 1 else weight
        total += share * (paid + discount * values[n])
        weight *= decay[n]
    return total


def test_lambda_returns_with_termination_and_truncation():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 9, 4))
    discounts, decay = np.full((9, 4), 0.99), np.full((9, 4), 0.95)
    discounts[3, 1] = decay[3, 1] = 0  # ended for good
    decay[5, 2] = 0  # cut by a time limit: bootstraps, and nothing of what follows comes back
    arrays = rewards, discounts, values, decay
    returns = d.lambda_returns(*map(torch.as_tensor, arrays))
    for k in range(9):
        for i in range(4):
            expected = returns_by_definition(*(a[k:, i] for a in arrays))
            assert returns[k, i].item() == pytest.approx(expected, rel=1e-12)
    assert returns[3, 1] == rewards[3, 1] and returns[5, 2].item() == pytest.approx(rewards[5, 2] + 0.99 * values[5, 2])


def test_percentiles_interpolate():
    x = torch.randn(7, 31)
    torch.testing.assert_close(d.percentiles(x, (0.05, 0.95)).numpy(), np.percentile(x, [5, 95]).astype(np.float32))


@pytest.mark.parametrize("true_root", [False, True])
def test_behaviour_losses_by_definition(true_root):
    agent, args, H = agent_of(), d.Args(true_root=true_root, ent_coef=0.1), 5
    agent.range[:] = torch.tensor([-50.0, 50.0])
    deter, stoch = torch.randn(20, 512).tanh(), F.one_hot(torch.randint(4, (20, 32)), 4).float().flatten(1)
    terminal = torch.arange(20) % 4 == 0
    states, actions = d.imagine(agent, deter, stoch, H)
    assert states.shape == (H + 1, 20, 640) and actions.shape == (H, 20, 4)
    assert torch.equal(states[0], torch.cat([deter, stoch], -1))
    losses, _, returns = d.behaviour_losses(agent, args, states, actions, terminal)
    rewards = d.two_hot_mean(agent.reward(states), agent.bins)
    values, slow = (d.two_hot_mean(net(states), agent.bins) for net in (agent.critic, agent.slow_critic))
    going_on = agent.going_on(states).squeeze(-1).sigmoid()
    if true_root:
        going_on[0] = torch.where(terminal, 0, 1 - 1 / 333)
    R = values[-1]
    for k in reversed(range(H)):
        R = rewards[k + 1] + going_on[k + 1] * (0.05 * values[k + 1] + 0.95 * R)
        torch.testing.assert_close(returns[k], R, rtol=1e-5, atol=1e-5)
    low, high = np.percentile(returns.detach(), [5, 95])
    range_ = 0.99 * np.array([-50, 50]) + 0.01 * np.array([low, high])
    torch.testing.assert_close(agent.range, torch.tensor(range_, dtype=torch.float32))
    scale = max(1, range_[1] - range_[0])
    policy_loss = value_loss = 0
    for k in range(H):
        weight = going_on[: k + 1].prod(0).detach()
        log_probs, entropy = agent.judge(states[k], actions[k])
        advantage = ((returns[k] - values[k]) / scale).detach()
        policy_loss += (-weight * (log_probs * advantage + 0.1 * entropy)).mean() / H
        both = d.two_hot_loss(agent.critic(states[k]), returns[k].detach(), agent.bins)
        both += d.two_hot_loss(agent.critic(states[k]), slow[k].detach(), agent.bins)
        value_loss += (weight * both).mean() / H
    torch.testing.assert_close((losses["policy"], losses["value"]), (policy_loss, value_loss))


def test_small_returns_are_not_blown_up():
    agent = agent_of(noisy=False)
    states, actions = d.imagine(agent, torch.randn(8, 512), torch.zeros(8, 128), 3)
    _, figures, _ = d.behaviour_losses(agent, d.Args(), states, actions, torch.zeros(8, dtype=torch.bool))
    assert figures["return_scale"] == 1


def test_replay_value_loss_by_definition():
    agent, args = agent_of(), d.Args()
    batch, bootstrap = batch_of(agent), torch.randn(6, 3)
    states = torch.randn(6, 3, 640)
    loss = d.replay_value_loss(agent, args, states, batch, bootstrap)
    slow = d.two_hot_mean(agent.slow_critic(states), agent.bins)
    reward, last, terminal = (batch[name][1:] for name in ("reward", "last", "terminal"))
    total, R = 0.0, bootstrap[-1]
    for t in reversed(range(5)):
        go, keep = (1 - 1 / 333) * ~terminal[t + 1], 0.95 * ~last[t + 1]
        R = reward[t + 1] + go * ((1 - keep) * bootstrap[t + 1] + keep * R)
        logits = agent.critic(states[t])
        errors = d.two_hot_loss(logits, R, agent.bins) + d.two_hot_loss(logits, slow[t], agent.bins)
        total += (errors * ~last[t]).sum() / 15
    torch.testing.assert_close(loss, total)


MODEL = {"encoder", "decoder", "rssm", "reward", "going_on"}


def test_which_losses_reach_the_world_model():
    agent, args = agent_of(), d.Args(horizon=4)
    batch = batch_of(agent)
    deter, stoch, logits = d.observe(agent, batch)
    model = d.model_losses(agent, args, batch, deter, stoch, logits)
    states, actions = d.imagine(agent, deter.flatten(0, 1), stoch.flatten(0, 1), 4)
    terminal = batch["terminal"][1:].flatten()
    behaviour, _, returns = d.behaviour_losses(agent, args, states, actions, terminal)
    bootstrap = returns[0].view(6, 3)
    replayed = d.replay_value_loss(agent, args, torch.cat([deter, stoch], -1), batch, bootstrap)

    def moved(loss):
        agent.zero_grad()
        loss.backward(retain_graph=True)
        return {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None and p.grad.any()}

    assert moved(behaviour["policy"]) == {"actor"}
    assert moved(behaviour["value"]) == {"critic"}
    assert moved(replayed) == {"critic", "rssm", "encoder"}
    assert moved(model["reward"]) == {"reward", "rssm", "encoder"}
    assert moved(sum(model.values())) == MODEL


def test_the_slow_critic_follows():
    agent = agent_of()
    before = copy.deepcopy(agent.slow_critic.state_dict())
    one_update(agent)
    for name, slow in agent.slow_critic.state_dict().items():
        torch.testing.assert_close(slow, 0.98 * before[name] + 0.02 * agent.critic.state_dict()[name])


def one_update(agent, columns=None, streams=(0, 1, 2), **flags):
    columns = columns or batch_of(agent)
    rows, streams = torch.arange(7)[:, None].expand(7, len(streams)), torch.tensor([streams])
    optimizer = d.LaProp([p for p in agent.parameters() if p.requires_grad], 1e-3, 0, 0.3)
    torch.manual_seed(1)
    return d.update(agent, optimizer, d.Args(horizon=3, **flags), columns, rows, streams)


def test_the_loss_is_the_weighted_sum():
    figures = one_update(agent_of(), dyn_scale=0.5)
    weight = {"dynamics": 0.5, "representation": 0.1, "replay_value": 0.3}
    weight |= dict.fromkeys(("loss", "grad_norm", "entropy", "return_scale"), 0)
    total = sum(weight.get(name.partition("/")[2], 1) * f for name, f in figures.items() if name.startswith("losses"))
    torch.testing.assert_close(figures["losses/loss"], total)


def test_an_update_dreams_on_from_every_step_and_hands_each_its_return(monkeypatch):
    """Dream t B + b begins in step t of stream b, and its first return is that step's bootstrap."""
    agent, seen = agent_of(), {}
    behaviour, replayed, observe = d.behaviour_losses, d.replay_value_loss, d.observe

    def observing(*args):
        seen["deter"], seen["stoch"], logits = observe(*args)
        return seen["deter"], seen["stoch"], logits

    def behaving(agent, args, states, actions, terminal):
        losses, figures, returns = behaviour(agent, args, states, actions, terminal)
        seen.update(dreams=states, actions=actions, terminal=terminal)
        return losses, figures, torch.arange(18.0).expand_as(returns)

    def replaying(agent, args, states, batch, bootstrap):
        seen.update(states=states, bootstrap=bootstrap)
        return replayed(agent, args, states, batch, bootstrap)

    for name, spy in (("observe", observing), ("behaviour_losses", behaving), ("replay_value_loss", replaying)):
        monkeypatch.setattr(d, name, spy)
    columns = batch_of(agent)
    columns["terminal"][4, 1] = True
    one_update(agent, columns)
    states = torch.cat([seen["deter"], seen["stoch"]], -1)
    assert seen["dreams"].shape == (4, 18, 640) and seen["actions"].shape == (3, 18, 4)  # a horizon of 3
    assert torch.equal(seen["dreams"][0].view(6, 3, 640), states) and not torch.equal(states[0], states[1])
    assert torch.equal(seen["terminal"].view(6, 3), columns["terminal"][1:])
    assert torch.equal(seen["bootstrap"], torch.arange(18.0).view(6, 3))
    assert torch.equal(seen["states"], states) and seen["states"].requires_grad  # the critic's loss reaches the model
    assert not seen["dreams"].requires_grad


def test_each_action_of_a_dream_is_drawn_in_the_state_before_it():
    agent = agent_of()
    nn.init.normal_(agent.actor[-1].weight, std=100)
    agent.share = 0.0  # so the policy is all but certain
    states, actions = d.imagine(agent, torch.randn(9, 512).tanh(), torch.randn(9, 128), 5)
    assert torch.equal(actions.argmax(-1), agent.actor(states[:-1]).argmax(-1))
    assert (actions[1:] != actions[:-1]).any()


def test_each_step_of_a_dream_takes_the_action_just_drawn_and_new_noise():
    agent, seen = agent_of(), []
    original = agent.rssm.imagine
    agent.rssm.imagine = lambda *args: seen.append(args) or original(*args)
    states, actions = d.imagine(agent, torch.randn(9, 512).tanh(), torch.randn(9, 128), 5)
    for k, (deter, stoch, action, _) in enumerate(seen):
        assert torch.equal(torch.cat([deter, stoch], -1), states[k]) and torch.equal(action, actions[k])
    assert len({noise.sum().item() for *_, noise in seen}) == len(seen) == 5


def test_dreams_too_are_mixed_with_the_uniform():
    """Of two alarms the second is a billion times earlier: it wins, if its class has any probability at all."""
    for share, winner in ((0.01, 1), (0.0, 0)):
        agent = agent_of(unimix=share)
        for net in (agent.rssm.prior, agent.rssm.posterior):
            nn.init.zeros_(net[-1].weight)
            net[-1].bias.data = torch.tensor([200.0, 0, 0, 0]).repeat(32)
        noise, token = torch.ones(1, 32, 4), agent.encoder({"vector": torch.zeros(1, 3)})
        noise[..., 1] = 1e-9
        deter, stoch, action = agent.initial(1)
        _, dreamt = agent.rssm.imagine(deter, stoch, action, noise)
        goes_on = torch.zeros(1, 1, dtype=torch.bool)
        _, seen, _ = agent.rssm.observe(deter, stoch, action[None], token[None], noise[None], goes_on)
        for drawn in (dreamt, seen):
            assert (drawn.view(32, 4).argmax(-1) == winner).all()


def test_actions_too_are_mixed_with_the_uniform():
    for share, winner in ((0.01, 1), (0.0, 0)):
        agent = agent_of(actor_unimix=share)
        nn.init.zeros_(agent.actor[-1].weight)
        agent.actor[-1].bias.data = torch.tensor([200.0, 0, 0, 0])
        assert agent.draw(torch.randn(1, 640), torch.tensor([[1, 1e-9, 1, 1]])).argmax(-1) == winner


def test_the_range_of_returns_is_saved():
    agent, other = agent_of(), agent_of()
    one_update(agent)
    other.load_state_dict(agent.state_dict())
    assert agent.range.abs().sum() > 0 and torch.equal(agent.range, other.range)


def test_an_update_refreshes_the_latent_states_that_it_replayed():
    agent = agent_of()
    columns, other, same = batch_of(agent), agent_of(), batch_of(agent)
    torch.manual_seed(1)
    deter, stoch, _ = d.observe(other, same)
    before = columns["deter"][0].clone()
    one_update(agent, columns)
    torch.testing.assert_close(columns["deter"][1:], deter)
    assert torch.equal(columns["stoch"][1:], stoch.view(6, 3, 32, 4).argmax(-1).to(torch.uint8))
    assert torch.equal(columns["deter"][0], before)


def test_where_windows_overlap_the_later_one_is_kept_as_a_whole():
    """Two threads that write the same row at a time would leave a mixture of both, another one each time."""
    agent, other, streams = agent_of(), agent_of(), [0, 1, 2] * 20
    columns, windows = batch_of(agent), {name: column[:, streams] for name, column in batch_of(agent).items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.manual_seed(1)
    deter, stoch, _ = d.observe(other, windows)
    one_update(agent, columns, streams)
    torch.set_num_threads(threads)
    assert not torch.equal(deter[:, -3:], deter[:, :3])
    torch.testing.assert_close(columns["deter"][1:], deter[:, -3:])
    assert torch.equal(columns["stoch"][1:], stoch[:, -3:].view(6, 3, 32, 4).argmax(-1).to(torch.uint8))


# ---- optimiser


def test_laprop_with_clipping_and_warm_up_by_hand():
    params = [torch.tensor([3.0, 4.0]), torch.tensor([[1e-5, 0.0]])]
    mine = [nn.Parameter(p.clone()) for p in params]
    optimizer = d.LaProp(mine, lr=0.1, warmup=2, agc=0.3)
    squares, momenta = ([torch.zeros_like(p) for p in params] for _ in range(2))
    grads = [[[6.0, 8.0], [[0.0, 1.0]]], [[0.3, -0.4], [[0.0, 1e-5]]], [[1.0, 1.0], [[0.0, 0.0]]]]
    for k, step in enumerate(grads):
        for i, grad in enumerate(step):
            mine[i].grad = g = torch.tensor(grad)
            g = g.clone()
            limit = 0.3 * max(params[i].norm().item(), 1e-3)
            g = g / max(1.0, g.norm().item() / limit)
            squares[i] = 0.999 * squares[i] + 0.001 * g**2
            u = g / ((squares[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-20)
            momenta[i] = 0.9 * momenta[i] + 0.1 * u
            params[i] = params[i] - 0.1 * min(1, k / 2) * momenta[i] / (1 - 0.9 ** (k + 1))
        norm = optimizer.step()
        assert norm.item() == pytest.approx(math.sqrt(sum((torch.tensor(g) ** 2).sum().item() for g in step)))
        for p, expected in zip(mine, params, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-9)
        if k == 0:
            assert torch.equal(mine[0].detach(), torch.tensor([3.0, 4.0]))  # the first update changes nothing


def test_laprop_goes_on_from_its_state():
    def steps(optimizer, p, numbers):
        for n in numbers:
            p.grad = torch.full_like(p, math.sin(n))
            optimizer.step()

    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    whole, cut = d.LaProp([a], 0.1, 3, 0.3), d.LaProp([b], 0.1, 3, 0.3)
    steps(whole, a, range(6))
    steps(cut, b, range(3))
    again = d.LaProp([b], 0.1, 3, 0.3)
    again.load_state_dict(copy.deepcopy(cut.state_dict()))
    steps(again, b, range(3, 6))
    assert torch.equal(a, b)


# ---- replay


class Streams:
    """The Envs of a replay that is filled by hand."""

    obs, num_actions = {"vector": np.zeros((3, 1), np.float32)}, 2


def replay_of(tmp_path, total=60, **flags):
    args = d.Args(
        num_envs=3, total_timesteps=total, batch_size=2, batch_length=4, run_dir=str(tmp_path), train_ratio=4, **flags
    )
    return d.Replay(args, Streams, agent_of({"vector": (1,)}, 2), torch.device("cpu"))


def fill(replay, steps):
    """Record t of stream i has the vector 100 t + i."""
    for _ in range(steps):
        t, none = replay.count, np.zeros(3, bool)
        vector = np.array([[100 * t + i] for i in range(3)], np.float32)
        record = {"vector": vector, "reward": np.zeros(3), "first": none, "last": none, "terminal": none}
        record |= {"action": np.zeros((3, 2)), "deter": torch.full((3, 512), float(t)), "stoch": torch.zeros(3, 32)}
        replay.add(record)


def test_windows_are_contiguous_and_of_one_stream_whatever_was_overwritten(tmp_path):
    replay, together = replay_of(tmp_path), set()  # 20 records of each stream
    for steps in (9, 11, 7, 100):
        fill(replay, steps)
        replay.online.clear()
        seen = set()
        for _ in range(200):
            rows, streams = replay.sample()
            window = replay.columns["vector"][rows, streams].squeeze(-1)
            assert window.shape == (5, 2) and (window.diff(dim=0) == 100).all()
            seen |= {int(x) for x in window[0]}
            together.add(tuple(streams[0].tolist()))
        oldest = max(0, replay.count - 20)
        assert seen == {100 * t + i for t in range(oldest, replay.count - 4) for i in range(3)}  # all items, no others
    assert together == {(i, j) for i in range(3) for j in range(3)}


def test_the_online_queue_serves_each_step_once_in_order(tmp_path):
    replay, served = replay_of(tmp_path), []
    for _ in range(40):
        fill(replay, 1)
        while waiting := len(replay.online):
            rows, streams = replay.sample()
            window = replay.columns["vector"][rows, streams].squeeze(-1)
            served += [int(x) for x in window[0][:waiting]]  # the rest of the batch is drawn at random
    assert served == [100 * t + i for t in range(1, 36, 5) for i in range(3)]


def test_a_fresh_window_that_was_overwritten_is_not_served(tmp_path):
    replay = replay_of(tmp_path)
    fill(replay, 200)
    assert replay.online[0][0] < replay.oldest
    for only_old in (False, True):
        if only_old:
            replay.online = type(replay.online)([(1, 0), (6, 1)])
        rows, streams = replay.sample()
        window = replay.columns["vector"][rows, streams]
        assert (window.diff(dim=0) == 100).all() and window.min() >= 100 * replay.oldest
        assert all(start >= replay.oldest for start, _ in replay.online)


def test_updates_fall_due_as_the_train_ratio_says(tmp_path):
    replay, due = replay_of(tmp_path), []
    for _ in range(30):
        fill(replay, 1)
        if replay.ready:
            due.append(int(replay.owed))
            replay.owed -= due[-1]
    assert not replay.ready or replay.args.ready_at == 7  # ceil(2 x 4 / 3) + 4
    assert len(due) == 24 and sum(due) == 1 + 24 * 3 * 4 // (2 * 4)  # each record is replayed 4 times


def test_a_saved_replay_is_read_back_bit_for_bit_and_a_kill_between_loses_nothing(tmp_path):
    replay = replay_of(tmp_path)
    fill(replay, 9)
    replay.state_dict()
    replay.columns["deter"][3] = 7.5  # refreshed
    fill(replay, 25)
    replay.owed = 2.75
    state = copy.deepcopy(replay.state_dict())
    torch.manual_seed(3)
    expected = [replay.sample() for _ in range(8)]
    columns = {name: column.clone() for name, column in replay.columns.items()}
    fill(replay, 2)
    replay.state_dict()  # a checkpoint that the kill did not let through
    again = replay_of(tmp_path)
    again.load_state_dict(state)
    assert again.owed == 2.75
    assert {name for name in columns if not torch.equal(columns[name], again.columns[name])} == set()
    torch.manual_seed(3)
    for (rows, streams), (r, s) in zip(expected, [again.sample() for _ in range(8)], strict=True):
        assert torch.equal(rows, r) and torch.equal(streams, s)
    fill(again, 20)
    again.state_dict()
    again.state_dict()
    assert sum(path.name.startswith("latents") for path in (tmp_path / "replay").iterdir()) == 1  # no litter
    small = replay_of(tmp_path, replay_size=30)
    small.load_state_dict(again.state_dict())
    assert small.oldest == again.count - 10
    kept = [replay.read("vector", small.oldest, small.count) for replay in (small, again)]
    assert torch.equal(*kept)
    assert kept[0][:, 0, 0].tolist() == [100 * t for t in range(small.oldest, small.count)]


def test_a_kill_before_the_checkpoint_of_a_smaller_replay_leaves_the_larger_one_whole(tmp_path):
    """As when a run is resumed with a smaller --replay-size: it saves at once, and saving can be cut off."""
    replay = replay_of(tmp_path)
    fill(replay, 18)
    replay.columns["deter"].normal_()
    state = copy.deepcopy(replay.state_dict())
    torch.save({"replay": state}, tmp_path / "checkpoint.pt")
    small = replay_of(tmp_path, replay_size=30)
    small.load_state_dict(copy.deepcopy(state))
    small.state_dict()  # its checkpoint never came to be
    again = replay_of(tmp_path)
    again.load_state_dict(state)
    for name in replay.columns:
        assert torch.equal(again.read(name, 0, 18), replay.read(name, 0, 18)), name


def test_a_longer_replay_serves_only_what_the_shorter_one_still_had(tmp_path):
    """As when a run that is over goes on with more --total-timesteps."""
    short = replay_of(tmp_path)  # 20 records of each stream
    fill(short, 34)
    long = replay_of(tmp_path, total=600)
    for column in long.columns.values():
        column.fill_(1)  # whatever the memory held
    long.load_state_dict(short.state_dict())
    for steps in (0, 5, 300):
        fill(long, steps)
        oldest = 14 if steps < 300 else long.count - 200
        assert long.oldest == oldest
        for _ in range(200):
            rows, streams = long.sample()
            window = long.columns["vector"][rows, streams]
            assert (window.diff(dim=0) == 100).all() and window.min() >= 100 * oldest


def test_only_what_is_new_is_written(tmp_path):
    replay = replay_of(tmp_path, total=30_000)
    fill(replay, 1000)
    replay.state_dict()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "replay").glob("steps*")}
    fill(replay, 10)
    replay.state_dict()
    after = {path: path.stat() for path in (tmp_path / "replay").glob("steps*")}
    assert all(after[path].st_mtime_ns == time for path, time in before.items())
    (new,) = after.keys() - before.keys()
    assert after[new].st_size < max(after[path].st_size for path in before) / 5


# ---- the loop


def spy_on_records(monkeypatch):
    records, original = [], d.Replay.add

    def add(self, record):
        records.append({name: torch.as_tensor(value).float().numpy().copy() for name, value in record.items()})
        original(self, record)

    monkeypatch.setattr(d.Replay, "add", add)
    return records


def test_records_are_what_happened(call, monkeypatch, tmp_path):
    """Diary's observation is (episode, step), its reward episode + step / 100; odd episodes end, even ones are cut."""
    records, drawn, original = spy_on_records(monkeypatch), [], d.Agent.act

    def act(self, *args):
        action, latent = original(self, *args)
        drawn.append((action.clone(), [part.clone() for part in latent]))
        return action, latent

    monkeypatch.setattr(d.Agent, "act", act)
    flags = [*short("dreamerv3"), "--env", "probes:Diary-v0", "--total-timesteps", 60, "--eval-episodes", 1]
    assert call(d, *flags, "--run-dir", tmp_path / "run") == 0
    expected = [(e, s) for e in range(20) for s in range(3 + e % 5)]  # the last observation of an episode is a record
    for k, (record, (action, latent)) in enumerate(zip(records, drawn, strict=False)):
        e, s = expected[k]
        over = s == 2 + e % 5
        for i in range(2):
            assert record["vector"][i].tolist() == [s, e] or record["vector"][i].tolist() == [e, s]
            assert record["reward"][i] == pytest.approx(e + s / 100 if s else 0)
            assert record["first"][i] == (s == 0) and record["last"][i] == over
            assert record["terminal"][i] == (over and e % 2)
            assert record["action"][i].tolist() == ([0, 0] if over else action[i].tolist())
            assert record["deter"][i].tolist() == latent[0][i].tolist()
            assert record["stoch"][i].tolist() == latent[1][i].view(32, -1).argmax(-1).tolist()
    rows = metrics(tmp_path / "run")
    assert rows[-1]["global_step"] == 60 and len(records) > 30  # reset records are not agent steps
    told = [row["charts/episodic_return"] for row in rows if "charts/episodic_return" in row]
    paid = [sum(e + s / 100 for s in range(1, 3 + e % 5)) for e in range(10) for _ in range(2)]
    assert len(told) > 7 and told == pytest.approx(paid[: len(told)])


def test_an_abandoned_episode_is_cut_when_replayed():
    agent = agent_of()
    batch, plain = batch_of(agent), batch_of(agent)
    batch["last"][2, 0] = batch["terminal"][2, 0] = batch["last"][3, 1] = False  # only `first` tells
    plain["terminal"][2, 0] = False
    a, b = one_update(agent_of(), batch), one_update(agent_of(), plain)
    assert a == b


@pytest.mark.parametrize("ratio", [3, 4.5])
def test_as_many_updates_are_made_as_the_train_ratio_asks_for(ratio, call, monkeypatch, tmp_path):
    """0.75 or 1.125 updates per step of both environments: what is not due yet is not forgotten."""
    made, original, records = [], d.update, spy_on_records(monkeypatch)
    monkeypatch.setattr(d, "update", lambda *args: made.append(1) or original(*args))
    flags = [*short("dreamerv3"), "--total-timesteps", 64, "--train-ratio", ratio, "--run-dir", tmp_path / "run"]
    assert call(d, *flags) == 0
    due = 1 + (len(records) - d.Args(num_envs=2, batch_size=2, batch_length=4).ready_at + 1) * 2 * ratio / 8
    assert len(made) in (int(due), int(due) + 1) and len(records) > 30  # the last step always has one


def test_an_evaluation_forgets_the_episode_before(monkeypatch):
    """Diary's episodes: every one begins afresh, and only there."""
    agent, firsts, seen, original = agent_of({"vector": (2,)}, 2), [], [], d.Agent.act

    def act(self, obs, latent, first, generator=None):
        firsts.append(first.tolist())
        seen.append(obs["vector"][:, 1].tolist())  # the step in the episode
        return original(self, obs, latent, first, generator)

    monkeypatch.setattr(d.Agent, "act", act)
    envs = d.Envs("probes:Diary-v0", 2)
    d.evaluate(agent, envs, 8, 1)
    assert firsts == [[step == 0 for step in steps] for steps in seen] and sum(map(sum, firsts)) >= 8


def test_each_environment_of_an_evaluation_plays_its_share(monkeypatch):
    envs, played = d.Envs("probes:TwoLengths-v0", 4), []
    step = envs.step
    monkeypatch.setattr(envs, "step", lambda *args: step(*args) or played.extend(envs.finished))
    d.evaluate(agent_of({"vector": (1,)}, 2), envs, 10, 1)
    assert sorted(played) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_acting_forgets_the_episode_before():
    agent = agent_of()
    obs, first = {"vector": torch.randn(2, 3)}, torch.tensor([True, False])
    latent = tuple(torch.randn_like(part) for part in agent.initial(2))
    fresh, old = (torch.Generator().manual_seed(0) for _ in range(2))
    a, (deter, stoch, action) = agent.act(obs, latent, first, fresh)
    _, (other, *_) = agent.act(obs, agent.initial(2), torch.tensor([True, True]), old)
    torch.testing.assert_close(deter[0], other[0])
    assert not torch.allclose(deter[1], other[1]) and torch.equal(action, a) and stoch.sum() == 64


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(call, monkeypatch, tmp_path):
    """Clockwork's episodes last 8 steps, 9 records. The 14th update follows the last record of an episode."""
    flags = [*short("dreamerv3"), "--total-timesteps", 96, "--eval-every", 32, "--log-every", 1, "--warmup", 4]
    assert call(d, *flags, "--run-dir", tmp_path / "whole") == 0
    records, calls, original = spy_on_records(monkeypatch), [], d.update

    def interrupted(*args):
        calls.append(1)
        figures = original(*args)
        if len(records) == 27 and len(calls) == stop[0]:
            signal.raise_signal(signal.SIGTERM)
        return figures

    monkeypatch.setattr(d, "update", interrupted)
    stop = [27 - 8 + 2]  # one per record from the 8th on, and the first is owed twice
    assert call(d, *flags, "--run-dir", tmp_path / "cut") == 143
    state = d.load(tmp_path / "cut" / "checkpoint.pt")
    assert state["global_step"] == 48 and state["replay"]["count"] == 27
    assert call(d, "--resume", tmp_path / "cut") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    clocks = ("time", "charts/SPS")
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {k: v for k, v in b.items() if k not in clocks}


def test_a_checkpoint_that_cannot_be_written_costs_nothing_of_the_last(call, tmp_path, monkeypatch, capsys):
    """The disk takes the replay's files but not the checkpoint, twice: when it was due and at the end."""
    run, save, written = tmp_path / "run", d.save, []

    def full(path, state):
        written.append(path.name)
        if path.name == "checkpoint.pt" and written.count("checkpoint.pt") > 2:
            raise OSError("no space left")
        save(path, state)

    flags = [*short("dreamerv3"), "--total-timesteps", 96, "--save-every", 32, "--run-dir", run]
    monkeypatch.setattr(d, "save", full)
    assert call(d, *flags) == 1 and written.count("checkpoint.pt") == 4
    monkeypatch.setattr(d, "save", save)
    assert call(d, "--resume", run) == 0
    assert metrics(run)[-1]["global_step"] == 96


def test_what_is_due_comes_where_updates_are_rare(call, tmp_path):
    """One environment and an update every 16 steps: what falls due between two updates comes with the second."""
    flags = [*short("dreamerv3"), "--num-envs", 1, "--train-ratio", 0.5, "--total-timesteps", 400, "--eval-every", 40]
    assert call(d, *flags, "--eval-episodes", 1, "--log-every", 40, "--run-dir", tmp_path / "run") == 0
    rows = metrics(tmp_path / "run")
    evaluated = [row["global_step"] for row in rows if "eval/episodes" in row]
    assert [step // 40 for step in evaluated] == list(range(1, 11))
    assert len([row for row in rows if "losses/loss" in row]) == 10


def test_windows_may_be_longer_after_a_resume(tmp_path):
    replay = replay_of(tmp_path)  # windows of 5 records
    fill(replay, 20)
    state = replay.state_dict()
    assert any(start + 13 > 20 for start, _ in state["online"])
    replay.args.batch_length = 12
    longer = d.Replay(replay.args, Streams, agent_of({"vector": (1,)}, 2), torch.device("cpu"))
    longer.load_state_dict(state)
    for _ in range(8):
        rows, streams = longer.sample()
        assert (longer.columns["vector"][rows, streams].diff(dim=0) == 100).all() and rows.shape[0] == 13


def test_flags_that_do_not_fit_what_was_saved(call, tmp_path, capsys):
    run = tmp_path / "run"
    assert call(d, *short("dreamerv3"), "--total-timesteps", 64, "--run-dir", run) == 0
    capsys.readouterr()
    for flags, sentence in {
        ("--evaluate", run, "--size", "12m"): "--size 12m does not fit the checkpoint, which is of --size 1m",
        ("--resume", run, "--size", "12m", "--total-timesteps", 99): "--size 12m does not fit the checkpoint",
        (
            "--resume",
            run,
            "--num-envs",
            3,
            "--total-timesteps",
            99,
        ): "--num-envs 3 does not fit the replay, which has 2",
    }.items():
        assert call(d, *flags) == 2
        err = capsys.readouterr().err
        assert sentence in err and len(err.splitlines()) == 1


def test_a_replay_that_is_gone_gets_a_sentence(call, tmp_path, capsys):
    flags = [*short("dreamerv3"), "--total-timesteps", 64, "--run-dir", tmp_path / "run"]
    assert call(d, *flags) == 0
    for path in (tmp_path / "run" / "replay").iterdir():
        path.unlink()
    capsys.readouterr()
    assert call(d, "--resume", tmp_path / "run", "--total-timesteps", 128) == 2
    assert "a run is resumed with its replay" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_goes_on_where_bfloat16_is_not_what_it_was(fast, call, tmp_path, monkeypatch):
    """As when a run of a CPU without it goes on on a GPU."""
    flags, dtypes = [*short("dreamerv3"), "--total-timesteps", 64, "--run-dir", tmp_path / "run"], []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert call(d, *flags) == 0
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not fast)
    update = d.update
    monkeypatch.setattr(d, "update", lambda agent, *rest: dtypes.append(agent.dtype) or update(agent, *rest))
    assert call(d, "--resume", tmp_path / "run", "--total-timesteps", 96) == 0
    assert set(dtypes) == {torch.float32 if fast else torch.bfloat16}


def test_evaluating_changes_nothing_and_the_seed_decides(call, tmp_path):
    for name, seed, every in (("often", 1, 16), ("never", 1, 0), ("other", 2, 0)):
        flags = [*short("dreamerv3"), "--env", "CartPole-v1", "--total-timesteps", 64, "--eval-every", every]
        assert call(d, *flags, "--seed", seed, "--run-dir", tmp_path / name) == 0
    assert len([row for row in metrics(tmp_path / "often") if "eval/episodes" in row]) == 4
    assert_same(weights(tmp_path / "often"), weights(tmp_path / "never"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "often"), weights(tmp_path / "other"))


def test_learning_to_look(call, tmp_path):
    """Loud pays 1 for the action that tells what was observed, else -1. Perfect would be 0.99, but for the latents' 1 %
    of noise. The best of four evaluations counts: so large a step size can lose again what it has found."""
    flags = "--env probes:Loud-v0 --num-envs 8 --total-timesteps 1600 --batch-size 8 --batch-length 8 --horizon 3"
    flags += " --train-ratio 16 --learning-rate 1e-3 --warmup 50 --eval-every 400 --eval-episodes 200"
    assert call(d, *flags.split(), "--run-dir", tmp_path / "run") == 0
    returns = [row["eval/return_mean"] for row in metrics(tmp_path / "run") if "eval/return_mean" in row]
    assert max(returns) > 0.7  # a policy that does not look earns 0 +- 0.07


# ---- environments


class Both(gym.Env):
    observation_space = gym.spaces.Dict(
        {
            "far": gym.spaces.Box(0, 255, (32, 48, 3), np.uint8),
            "near": gym.spaces.Box(0, 255, (80, 64, 1), np.uint8),
            "kind": gym.spaces.Discrete(3),
            "arm": gym.spaces.Box(-1, 1, (2, 2), np.float64),
        }
    )
    action_space = gym.spaces.Box(np.float32([-2, 0, -np.inf]), np.float32([2, 10, np.inf]))

    def obs(self):
        images = {"far": np.full((32, 48, 3), 10, np.uint8), "near": np.full((80, 64, 1), 20, np.uint8)}
        return images | {"kind": 1, "arm": np.arange(4.0).reshape(2, 2)}

    def reset(self, *, seed=None, options=None):
        self.actions = []
        return self.obs(), {}

    def step(self, action):
        self.actions.append(action)
        return self.obs(), 1.0, False, False, {}


def test_senses_take_any_mixture_of_images_and_vectors():
    env = d.Senses(Both())
    obs, _ = env.reset()
    assert obs["image"].shape == (64, 64, 4) and obs["image"].dtype == np.uint8
    assert [set(obs["image"][..., c].flat) for c in range(4)] == [{10}, {10}, {10}, {20}]
    assert sorted(obs["vector"]) == [0, 0, 0, 1, 1, 2, 3] and env.observation_space["vector"].shape == (7,)
    _, reward, *_ = env.step([0.5, -3.0, 7.0])
    assert reward == 4 and len(env.unwrapped.actions) == 4  # an action lasts 4 frames
    np.testing.assert_allclose(env.unwrapped.actions[0], [1.0, 0.0, 7.0])  # scaled, cut off, left alone
    assert not env.discrete and env.action_space.shape == (3,)


def test_mario_is_small_and_in_colour():
    envs = d.Envs("SuperMarioBros-1-1-v0", 2)
    envs.reset(1)
    before = envs.obs["image"].copy()
    assert envs.num_actions == 7 and envs.discrete and before.shape == (2, 64, 64, 3) and before.std() > 10
    assert len({tuple(pixel) for pixel in before[0].reshape(-1, 3)}) > 50
    for _ in range(10):
        envs.step(np.eye(7)[[3, 0]].tolist())  # the one runs right, the other stands
    assert (before[0] != envs.obs["image"][0]).mean() > 0.1 > 2 * (before[1] != envs.obs["image"][1]).mean()
    assert envs.returns[0] > 20 > envs.returns[1]


def test_a_dead_mario_is_terminal(tmp_path):
    envs = d.Envs("SuperMarioBros-1-1-v0", 1)
    envs.reset(1)
    while not envs.finished:
        envs.step(np.eye(7)[[3]].tolist())  # into the first goomba
    assert envs.terminated[0] and not envs.truncated[0] and envs.finished[0]["flag"] == 0


@pytest.mark.parametrize(
    "env", ["FromOne", "BoxActions", "ByteActions", "UnevenActions", "DictObs", "Scalar", "Screen"]
)
def test_other_spaces_run(env, call, tmp_path):
    flags = [*short("dreamerv3"), "--env", f"probes:{env}-v0", "--total-timesteps", 24, "--run-dir", tmp_path / "run"]
    assert call(d, *flags) == 0
    assert metrics(tmp_path / "run")[-1]["eval/episodes"] == 2


def test_actions_lie_in_their_space():
    """Also where rounding leads out of it, and where it has a bound on one side only."""
    env = d.make_env("probes:UnevenActions-v0")
    env.reset()
    for action in ([1, -9.0], [-1, 9.0], [0, 0.5]):
        env.step(action)  # asserts that it is one


def test_no_dream_is_compiled_for_its_length():
    agent, compiled = agent_of(IMAGE), []
    agent.decoder.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward, dynamic=False)
    obs = {"image": torch.zeros(6, 64, 64, 3, dtype=torch.uint8)}
    for steps in (5, 6):
        d.dream(agent, {"image": obs["image"][:steps]}, torch.zeros(steps, 4), 3)
    assert compiled == []


def test_the_video_of_a_dream_keeps_no_more_than_it_shows(call, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(d, "draw_dream", lambda agent, seen, *rest: shown.append(len(seen)))
    monkeypatch.setattr(d, "DREAM", 5)
    flags = [*short("dreamerv3"), "--env", "probes:Screen-v0", "--total-timesteps", 24, "--capture-video"]
    assert call(d, *flags, "--run-dir", tmp_path / "run") == 0
    assert shown == [5]  # of 15 steps


def test_a_resumed_run_that_cannot_learn_any_more_is_evaluated_and_saved(call, tmp_path):
    """A small replay has kept too little for the larger batches, and the steps that are left do not fill it."""
    run, flags = tmp_path / "run", [*short("dreamerv3"), "--replay-size", 16]
    assert call(d, *flags, "--total-timesteps", 100, "--run-dir", run) == 0
    assert call(d, "--resume", run, "--total-timesteps", 180, "--replay-size", 160, "--batch-size", 32) == 0
    assert d.load(run / "checkpoint.pt")["global_step"] == 180
    assert metrics(run)[-1]["global_step"] == 180 and metrics(run)[-1]["eval/episodes"] == 2


def test_a_replay_leaves_room_for_what_learns_from_it(tmp_path, monkeypatch, capsys):
    size = sum(column.nbytes for column in replay_of(tmp_path).columns.values())
    for share, fits in ((0.7, True), (0.8, False)):
        room = {"SC_PHYS_PAGES": int(size / share), "SC_PAGE_SIZE": 1}
        monkeypatch.setattr(d.os, "sysconf", room.get)
        if fits:
            replay_of(tmp_path)
            continue
        with pytest.raises(SystemExit) as end:
            replay_of(tmp_path)
        assert end.value.code == 2 and "at most 56 steps fit" in capsys.readouterr().err  # 0.75 / 0.8 of 60


def test_dreams_begin_as_what_was_seen_and_then_look_no_more():
    agent = agent_of(IMAGE)
    obs = {"image": torch.randint(0, 255, (10, 64, 64, 3), dtype=torch.uint8)}
    actions = F.one_hot(torch.randint(4, (10,)), 4).float()
    dreamt = d.dream(agent, obs, actions, 4)
    assert dreamt.shape == (10, 64, 64, 3) and dreamt.min() >= 0 and dreamt.max() <= 1
    late, early = obs["image"].clone(), obs["image"].clone()
    late[4:], early[2] = 0, 0
    assert torch.equal(dreamt, d.dream(agent, {"image": late}, actions, 4))
    other = d.dream(agent, {"image": early}, actions, 4)
    assert torch.equal(dreamt[:2], other[:2]) and not torch.equal(dreamt[4:], other[4:])


# ---- dreams


def test_a_dream_follows_its_actions():
    """Action t leads from step t to step t + 1, among the steps that are shown and among those that are dreamt."""
    torch.manual_seed(0)
    agent = agent_of({"image": (64, 64, 3)}, 3).eval()
    obs = {"image": torch.randint(256, (6, 64, 64, 3), dtype=torch.uint8)}
    actions = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()
    first = d.dream(agent, obs, actions, 3)
    for t in range(6):
        other = actions.clone()
        other[t] = 5 * actions[t].roll(1)
        same = [torch.equal(a, b) for a, b in zip(first, d.dream(agent, obs, other, 3), strict=True)]
        assert all(same[: t + 1]) and not any(same[t + 1 : t + 2]), t


def test_the_rows_of_a_dream_video(monkeypatch, tmp_path):
    frames = []

    class Writer:
        write_frame, close = frames.append, staticmethod(lambda: None)

    monkeypatch.setattr(d, "open_video", lambda *_: Writer)
    monkeypatch.setattr(d, "dream", lambda agent, obs, actions, context: torch.full((len(actions), 64, 64, 3), 0.2))
    seen = [({"image": torch.full((1, 64, 64, 3), 51 * k, dtype=torch.uint8)}, torch.zeros(1, 3)) for k in range(5)]
    d.draw_dream(None, seen, tmp_path / "dream.mp4", 15.0)
    for k, frame in enumerate(frames):
        assert frame.shape == (768, 256, 3) and frame.dtype == np.uint8
        rows = frame.reshape(3, -1)
        assert rows.min(1).tolist() == rows.max(1).tolist()
        assert rows[:, 0].tolist() == pytest.approx([51 * k, 51, 127.5 + (1 - k) * 25.5], abs=1)
    assert len(frames) == 5


# ---- compiled


@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself is not ours
def test_compiled_and_eager_agree_over_several_updates(monkeypatch):
    """The noise is drawn outside of what is compiled, so both see the same. COMPILER=inductor takes two minutes."""
    backend = os.environ.get("COMPILER", "aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    results = []
    for compiled in (False, True):
        agent = agent_of()
        if compiled:
            d.compile_parts(agent)
        columns, optimizer = batch_of(agent), None
        rows, streams = torch.arange(7)[:, None].expand(7, 3), torch.arange(3)[None]
        optimizer = d.LaProp([p for p in agent.parameters() if p.requires_grad], 1e-4, 0, 0.3)
        torch.manual_seed(1)
        args = d.Args(horizon=3)
        figures = [d.update(agent, optimizer, args, columns, rows, streams) for _ in range(3)]
        results.append([float(f["losses/loss"]) for f in figures])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
