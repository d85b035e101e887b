"""The textbook loops do what the books say, and fastdiff does the same."""

import math

import pytest
import torch
from helpers import assert_same_bits, dummy
from torch import nn

import fastdiff
from fastdiff import textbook

LINEAR = fastdiff.NoiseSchedule.linear()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_ddpm_step_is_the_samplers_row(seed, clip):
    plan = fastdiff.samplers.ddpm(LINEAR, clip=clip)
    for t in (999, 500, 20, 2, 0):
        x, epsilon, z = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(3))
        epsilon = epsilon.float()
        ours = fastdiff.ops.update(x, epsilon, plan, 999 - t, noise=z).x
        theirs = textbook.ddpm_step(x, epsilon.double(), t, LINEAR, noise=z, clip=clip)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_ddim_step_is_the_samplers_row(seed, clip):
    plan = fastdiff.samplers.ddim(LINEAR, 10, clip=clip)
    for row, t in enumerate(plan.timesteps):
        x, epsilon = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5)
        following = plan.timesteps[row + 1] if row < 9 else -1
        theirs = textbook.ddim_step(x, epsilon.double(), t, following, LINEAR, clip=clip)
        torch.testing.assert_close(fastdiff.ops.update(x, epsilon, plan, row).x, theirs, rtol=1e-9, atol=1e-9)


def test_sample_is_fastdiffs_with_torchs_noise():
    """A whole run of Algorithm 2, from the same generator."""
    schedule = fastdiff.NoiseSchedule.linear(50)
    torch.manual_seed(5)
    theirs = textbook.sample(dummy, (3, 2, 4, 4), schedule, clip=1.0)
    ours = fastdiff.sample(dummy, (3, 2, 4, 4), schedule=schedule, clip=1.0, generator=torch.manual_seed(5))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_process_has_the_datas_law():
    """Data N(m, s²) has an exact ε_θ, linear in x, so the process is Gaussian: its mean and variance by recursion."""
    m, s, schedule, n = 0.4, 0.6, fastdiff.NoiseSchedule.linear(200, 5e-4, 0.1), 10_000
    gains = schedule.sigmas / (schedule.alphas_cumprod * s**2 + schedule.sigmas**2)

    def model(x, t):
        gain, alpha = (table[t].float().view(-1, 1) for table in (gains, schedule.alphas))
        return gain * (x - alpha * m)

    mean, variance = 0.0, 1.0
    for t in reversed(range(200)):
        bar, bar_p = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[t - 1]) if t else 1.0
        alpha, beta = bar / bar_p, 1 - bar / bar_p
        shrink = beta / math.sqrt(1 - bar) * float(gains[t])
        mean = (mean * (1 - shrink) + shrink * math.sqrt(bar) * m) / math.sqrt(alpha)
        variance = variance * (1 - shrink) ** 2 / alpha + (1 - bar_p) / (1 - bar) * beta
    assert mean == pytest.approx(m, abs=0.01)  # the data's law, but for the number of steps
    assert math.sqrt(variance) == pytest.approx(s, rel=0.05)

    torch.manual_seed(0)
    for x in (textbook.sample(model, (n, 1), schedule), fastdiff.sample(model, (n, 1), schedule=schedule)):
        assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
        assert float(x.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_add_noise_is_equation_4(seed):
    x0, noise, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 500, 999])
    bar = LINEAR.alphas_cumprod[t].view(-1, 1, 1)
    exact = bar.sqrt() * x0.double() + (1 - bar).sqrt() * noise.double()
    torch.testing.assert_close(textbook.add_noise(x0, t, LINEAR, noise).double(), exact, rtol=0, atol=1e-5)
    ours = fastdiff.add_noise(x0, t, LINEAR, noise=noise)[0]
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)


def test_train_step_learns():
    """A network that knows t learns the best linear ε_θ of unit-variance data: √(1 − ᾱ)·x."""
    torch.manual_seed(0)
    T = 8
    schedule = fastdiff.NoiseSchedule.linear(T, 0.05, 0.5)
    gains = nn.Embedding(T, 1)

    def model(x, t):
        return x * gains(t)

    optimizer = torch.optim.Adam(gains.parameters(), lr=0.05)
    before = gains.weight.detach().clone()
    losses = [float(textbook.train_step(model, optimizer, torch.randn(512, 4), schedule)) for _ in range(300)]
    assert not torch.equal(gains.weight, before)
    torch.testing.assert_close(gains.weight.detach()[:, 0].double(), schedule.sigmas, rtol=0, atol=0.06)
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


def test_the_loops_use_no_kernel(monkeypatch):
    for name in ("randn", "add_noise", "update"):
        monkeypatch.setattr(fastdiff.ops, name, None)
    monkeypatch.setenv("FASTDIFF_BACKEND", "nothing")
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    textbook.train_step(lambda x, t: model(x), optimizer, torch.randn(2, 4), LINEAR)
    assert textbook.sample(lambda x, t: model(x), (2, 4), fastdiff.NoiseSchedule.linear(3)).shape == (2, 4)


def test_one_step_from_the_same_state(seed):
    x = torch.randn(2, 3, 4, 4)
    z = torch.randn(2, 3, 4, 4)
    states = fastdiff.sample_iter(dummy, x.shape, x_T=x, start_step=300, clip=1.0, noise_fn=lambda *a: z)
    assert_same_bits(next(states).x, x)
    ours = next(states).x
    theirs = textbook.ddpm_step(x, dummy(x, torch.full((2,), 699)), 699, LINEAR, noise=z, clip=1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(x.abs().max())))
