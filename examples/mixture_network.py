"""The mixture of ``mixture.py`` in any number of dimensions, as a network of torch: exact, differentiable, and told any
t."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule
from fastdiff.schedules.level import Schedule


class MixtureNetwork(nn.Module):
    """E[ε | x], or another prediction, of a mixture of isotropic Gaussians in ``dimensions``.

    x is [B, dimensions], t is [B]; between two indices of a table ln(σ/α) is linear, as the schedule has it.
    """

    def __init__(
        self, dimensions: int, schedule: Schedule, prediction: str = "epsilon", components: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.means = nn.Parameter(0.8 * torch.randn(components, dimensions, generator=generator))
        self.register_buffer("deviations", 0.2 + 0.3 * torch.rand(components, generator=generator))
        self.register_buffer("weights", torch.softmax(0.5 * torch.randn(components, generator=generator), 0))
        if isinstance(schedule, NoiseSchedule):
            bar = schedule.alphas_cumprod
            self.register_buffer("log_ratios", (0.5 * ((1 - bar) / bar).log()).float())
        self.schedule, self.prediction = schedule, prediction

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B], at what the network is told."""
        t = t.float()
        if isinstance(self.schedule, EDMSchedule):
            return torch.ones_like(t), (4 * t).exp()
        if isinstance(self.schedule, FlowSchedule):
            return 1 - t / self.schedule.T, t / self.schedule.T
        low = t.floor().clamp(0, len(self.log_ratios) - 2).long()
        here, above = self.log_ratios[low], self.log_ratios[low + 1]
        ratio = (here + (t - low) * (above - here)).exp()
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (part[:, None] for part in self.level(t))
        if isinstance(self.schedule, EDMSchedule):
            data = self.schedule.sigma_data
            x = x * (sigma**2 + data**2).sqrt()
        variance = (alpha * self.deviations) ** 2 + sigma**2  # [B, components]
        away = x[:, None] - alpha[:, :, None] * self.means
        logits = self.weights.log() - 0.5 * (away.square().sum(-1) / variance + x.shape[1] * variance.log())
        share = torch.softmax(logits, 1)[:, :, None]
        x0 = (share * (self.means + (alpha * self.deviations**2 / variance)[:, :, None] * away)).sum(1)
        epsilon = (share * (sigma / variance)[:, :, None] * away).sum(1)
        if self.prediction == "flow_prediction":
            return epsilon - x0
        if self.prediction == "v_prediction":
            return alpha * epsilon - sigma * x0
        if self.prediction == "sample":
            return x0
        if self.prediction == "edm":  # D = c_skip·x + c_out·F (Karras et al. 2022, Equation 7)
            return (x0 - data**2 / (sigma**2 + data**2) * x) * (sigma**2 + data**2).sqrt() / (sigma * data)
        return epsilon
