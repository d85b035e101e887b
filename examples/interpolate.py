"""Interpolation between handwritten digits through the diffusion process (Ho et al. 2020, Section 4.4).

    python examples/interpolate.py [--out examples/interpolation.png] [--timesteps 30] [--noise independent]

One pair a row: the first image, its reconstruction (λ = 0), five mixes, the reconstruction of the second (λ = 1), and
the second image. Needs scikit-learn for the digits: pip install "fastdiff-torch[train]".
"""

from __future__ import annotations

import argparse

import torch

import fastdiff
from fastdiff.images import check_writable, save_grid
from fastdiff.training.data import load_digits

PAIRS = [(3, 8), (1, 7), (0, 6), (4, 9), (5, 2)]
WEIGHTS = [0, 0.2, 0.35, 0.5, 0.65, 0.8, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="examples/interpolation.png", help="the PNG to write")
    parser.add_argument("--timesteps", type=int, help="how far to noise; by default what the images' size asks for")
    parser.add_argument("--noise", choices=["independent", "shared"], default="independent")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_writable(arguments.out, suffix=".png")

    trained = fastdiff.models.digits()
    data = load_digits("held_out")
    assert data.labels is not None
    rows = []
    for first, second in PAIRS:
        a, b = (data.images(torch.nonzero(data.labels == digit)[0])[0] for digit in (first, second))
        mixes = fastdiff.interpolate(
            trained.unet, a, b, WEIGHTS, t=arguments.timesteps, noise=arguments.noise, seed=arguments.seed,
            schedule=trained.sampling["schedule"], clip=1.0,
        )  # fmt: skip
        rows += [a[None], mixes, b[None]]
    save_grid(arguments.out, torch.cat(rows), columns=len(WEIGHTS) + 2, scale=6)
    print(f"{arguments.out}: {len(PAIRS)} pairs, {len(WEIGHTS)} weights")


if __name__ == "__main__":
    main()
