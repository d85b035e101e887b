"""The definitions of k-diffusion's samplers in float64."""

import itertools
import math

import torch
from numpy.polynomial import Polynomial

SHAPE = (2, 3, 4, 5)


def model(x, sigma, shift=0.2):
    """A denoiser: σ-aware, smooth, near x where there is little noise."""
    assert sigma.shape == x.shape[:1]
    assert sigma.dtype == x.dtype
    sigma = sigma.view(-1, 1, 1, 1)
    return x / (1 + sigma**2) + sigma**2 / (1 + sigma**2) * torch.tanh(x / (1 + sigma) + shift)


# ---- float64 formulas. D is the denoised image, d = (x − D)/σ its slope; primes are the next σ's.


class Exact:
    """The samplers' definitions, on float64 numbers; ``noise`` is called as the samplers call for it."""

    def __init__(self, x, sigmas, noise, own):
        self.x, self.sigmas, self.noise, self.own = x.double(), sigmas, noise, own
        self.history = []  # (σ, D, or d for lms)

    def denoised(self, x, sigma):
        return model(x, torch.full(SHAPE[:1], sigma, dtype=torch.float64))

    def slope(self, x, sigma):
        return (x - self.denoised(x, sigma)) / sigma

    def run(self, step):
        for i, (s, t) in enumerate(itertools.pairwise(self.sigmas)):
            self.x = step(i, self.x, s, t)
        return self.x

    # EDM's churn

    def churned(self, i, x, s):
        own = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0, **self.own}
        gamma = min(own["s_churn"] / (len(self.sigmas) - 1), math.sqrt(2) - 1)
        if gamma == 0 or not own["s_tmin"] <= s <= own["s_tmax"]:
            return x, s
        hat = s * (1 + gamma)
        return x + own["s_noise"] * math.sqrt(hat**2 - s**2) * self.noise(i), hat

    def sample_euler(self, i, x, s, t):
        x, s = self.churned(i, x, s)
        return x + (t - s) * self.slope(x, s)

    def sample_heun(self, i, x, s, t):
        x, s = self.churned(i, x, s)
        d = self.slope(x, s)
        end = x + (t - s) * d
        return end if t == 0 else x + (t - s) * (d + self.slope(end, t)) / 2

    def sample_dpm_2(self, i, x, s, t):
        x, s = self.churned(i, x, s)
        return self.midpoint(x, s, t)

    def midpoint(self, x, s, t):
        middle = math.sqrt(s * t)
        d = self.slope(x, s)
        return x + (t - s) * (d if t == 0 else self.slope(x + (middle - s) * d, middle))

    # ancestral: down to a lower σ, and noise back up

    def split(self, s, t):
        up = self.own.get("eta", 1.0) * t * math.sqrt(1 - (t / s) ** 2)
        return math.sqrt(t**2 - up**2), up * self.own.get("s_noise", 1.0)

    def raised(self, i, x, up):
        return x + up * self.noise(i) if up else x

    def sample_euler_ancestral(self, i, x, s, t):
        down, up = self.split(s, t)
        return self.raised(i, x + (down - s) * self.slope(x, s), up)

    def sample_dpm_2_ancestral(self, i, x, s, t):
        down, up = self.split(s, t)
        return self.raised(i, self.midpoint(x, s, down), up)

    def exponential(self, x, s, t, denoised):
        """x' = (σ'/σ) x + (1 − σ'/σ) D, exact for a constant D."""
        return t / s * x + (1 - t / s) * denoised

    def sample_dpmpp_2s_ancestral(self, i, x, s, t):
        down, up = self.split(s, t)
        first = self.denoised(x, s)
        if down == 0:
            return first
        middle = math.sqrt(s * down)
        second = self.denoised(self.exponential(x, s, middle, first), middle)
        return self.raised(i, self.exponential(x, s, down, second), up)

    def sample_dpmpp_sde(self, i, x, s, t):
        first, r = self.denoised(x, s), self.own.get("r", 0.5)
        if t == 0:
            return first
        middle = s ** (1 - r) * t**r
        down, up = self.split(s, middle)
        second = self.denoised(self.raised((i, middle), self.exponential(x, s, down, first), up), middle)
        down, up = self.split(s, t)
        return self.raised(i, self.exponential(x, s, down, first + (second - first) / (2 * r)), up)

    # multistep

    def sample_lms(self, i, x, s, t):
        self.history = [(s, self.slope(x, s)), *self.history][: self.own.get("order", 4)]
        nodes = [node for node, _ in self.history]
        for node, d in self.history:
            others = [other for other in nodes if other != node]
            lagrange = math.prod((Polynomial([-o, 1]) / (node - o) for o in others), start=Polynomial([1.0]))
            integral = lagrange.integ()
            x = x + float(integral(t) - integral(s)) * d
        return x

    def sample_dpmpp_2m(self, i, x, s, t):
        denoised = self.denoised(x, s)
        self.history = [(s, denoised), *self.history]
        if t == 0 or i == 0:
            return self.exponential(x, s, t, denoised)
        before, older = self.history[1]
        share = math.log(s / t) / math.log(before / s) / 2
        return self.exponential(x, s, t, denoised + share * (denoised - older))

    def sde(self, i, x, s, t, correction):
        denoised, eta = self.denoised(x, s), self.own.get("eta", 1.0)
        self.history = [(s, denoised), *self.history]
        if t == 0:
            return denoised
        h = math.log(s / t)
        k = h * (1 + eta)
        x = math.exp(-k) * x + (1 - math.exp(-k)) * denoised + correction(h, k)
        return self.raised(i, x, t * math.sqrt(1 - math.exp(-2 * eta * h)) * self.own.get("s_noise", 1.0))

    def difference(self, j):
        """ΔD/Δλ between entries j and j + 1 of the history, λ = −ln σ; None where there is no such entry."""
        if len(self.history) < j + 2:
            return None
        (s, a), (before, b) = self.history[j : j + 2]
        return (a - b) / math.log(before / s)

    def sample_dpmpp_2m_sde(self, i, x, s, t):
        def correction(h, k):
            weight = (1 - math.exp(-k)) / 2
            if self.own.get("solver_type") == "heun":
                weight = 1 - (1 - math.exp(-k)) / k
            return 0.0 if self.difference(0) is None else weight * h * self.difference(0)

        return self.sde(i, x, s, t, correction)

    def sample_dpmpp_3m_sde(self, i, x, s, t):
        def correction(h, k):
            phi2 = 1 - (1 - math.exp(-k)) / k
            phi3 = phi2 / k - 0.5
            first, second = self.difference(0), self.difference(1)
            if first is None:
                return 0.0
            if second is None:
                return phi2 * h * first
            (a, _), (b, _), (c, _) = self.history[:3]
            bend = (first - second) / math.log(c / a)  # second divided difference
            return phi2 * h * (first + bend * math.log(b / a)) - phi3 * h**2 * bend

        return self.sde(i, x, s, t, correction)


# ---- DPM-Solver in x_0 + σ ε (Lu et al. 2022a): Algorithms 1 and 2, h = ln(σ/σ')


def epsilon(x, sigma, calls):
    calls.append(sigma)
    return (x - model(x, torch.full(SHAPE[:1], sigma, dtype=torch.float64))) / sigma


def dpm_steps(x, s, t, order, calls, low=False):
    """x at σ' = t by DPM-Solver-``order``; with ``low`` also by the order below from the same calls."""
    h, e = math.log(s / t), epsilon(x, s, calls)
    first = x - t * math.expm1(h) * e
    if order == 1:
        return first
    r = 1 / 2 if order == 2 else 1 / 3
    between = s * math.exp(-r * h)
    u = x - between * math.expm1(r * h) * e
    change = epsilon(u, between, calls) - e
    second = first - t / (2 * r) * math.expm1(h) * change
    if order == 2:
        return (second, first) if low else second
    between = s * math.exp(-2 / 3 * h)
    u = x - between * math.expm1(2 / 3 * h) * e - between * 2 * (math.expm1(2 / 3 * h) / (2 / 3 * h) - 1) * change
    third = first - t * 3 / 2 * (math.expm1(h) / h - 1) * (epsilon(u, between, calls) - e)
    return (third, second) if low else third


def down_and_up(s, t, end, eta):
    """σ_down, σ_up of k-diffusion's ancestral steps, σ_down not beyond the end."""
    up = eta * math.sqrt(t**2 * (s**2 - t**2) / s**2) if eta else 0.0
    down = max(math.sqrt(t**2 - up**2), end) if eta else t
    return down, math.sqrt(max(t**2 - down**2, 0.0))


def dpm_fast(x, end, start, n, noise, own):
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    stops = [math.exp(math.log(start) + i / len(orders) * math.log(end / start)) for i in range(len(orders) + 1)]
    calls = []
    for i, order in enumerate(orders):
        down, up = down_and_up(stops[i], stops[i + 1], end, own.get("eta", 0.0))
        x = dpm_steps(x, stops[i], down, order, calls) + up * own.get("s_noise", 1.0) * noise[i].double()
    return x, calls


def dpm_adaptive(x, end, start, noise, own):
    own = {"rtol": 0.05, "atol": 0.0078, "h_init": 0.05, "pcoeff": 0.0, "dcoeff": 0.0, "eta": 0.0, **own}
    order, up_or_down = own["order"], 1 if end < start else -1
    h, s, before, errors = up_or_down * own["h_init"], start, x, None
    power = 1.5 if own["eta"] else order
    steps = accepted = 0
    sigmas = [start]
    while up_or_down * math.log(s / end) > 1e-5:
        t = s * math.exp(-h)
        t = max(t, end) if up_or_down > 0 else min(t, end)
        down, up = down_and_up(s, t, end, own["eta"])
        high, low = dpm_steps(x, s, down, order, [], low=True)
        allowed = torch.maximum(torch.tensor(own["atol"]), own["rtol"] * torch.maximum(low.abs(), before.abs()))
        error = float((((low - high) / allowed) ** 2).mean().sqrt())
        now = 1 / (error + 1e-8)
        last, older = errors or (now, now)
        factor = now ** ((own["pcoeff"] + 1 + own["dcoeff"]) / power)
        factor *= last ** (-(own["pcoeff"] + 2 * own["dcoeff"]) / power) * older ** (own["dcoeff"] / power)
        factor = 1 + math.atan(factor - 1)
        h, steps = h * factor, steps + 1
        errors = (last, older)
        if factor >= 0.81:
            x, before, s = high + up * noise[accepted].double(), low, t
            accepted, errors = accepted + 1, (now, last)
            sigmas.append(s)
    return x, {"steps": steps, "nfe": order * steps, "n_accept": accepted, "n_reject": steps - accepted}, sigmas
