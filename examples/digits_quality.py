"""Judge a digits model by what a classifier of real digits sees in its samples.

    python examples/digits_quality.py [--model FOLDER] [--seed 0]

A small convolutional network learns the training part of scikit-learn's digits; the 500 held-out ones give its
accuracy. It then judges 1000 samples, 100 a class, drawn as the folder's training.json says unless told otherwise:

*classified as asked*  the share of samples in which it sees the class that was asked for: at least 98 %.

*Fréchet ratio*  the Fréchet distance (Heusel et al. 2017, with this network's 64 penultimate features) between n
    samples and n held-out digits, over the one between n and n held-out digits: at most 2. The distance depends on n,
    so both are taken at the largest n that the held-out part allows, half of it. It is split in two, class by class,
    20 times at random; each time the halves are compared with each other, and as many samples of each class with the
    second half. The ratio is that of the means; 1 means as near as real digits are to each other.

*variance of pixels*  the variance of a class's samples, summed over the pixels, over that of its real digits (all
    1797): within 20 % of 1 for every class. Below 1, samples are less varied than digits are.

*variance of features*  the same over the features, against the held-out digits: within 20 % of 1 in the mean over the
    classes. (Of one class there are only 50, whose variance a few odd ones decide.)

*distance to the nearest training digit*  its mean over the samples, over that of the held-out digits. Well below 1
    would mean that training digits are being recited. For information.

Exits with status 1 if one of these is missed. Everything is seeded: the same machine prints the same table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.models import UNet
from fastdiff.training.data import ImageData, load_digits

PACKAGED = Path(fastdiff.__file__).parent / "assets" / "digits"
CLASSES = 10


class Classifier(nn.Module):
    """A small convolutional network: images [B, 1, 8, 8] to logits [B, 10], with 64 features before them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(digits: ImageData, epochs: int = 40, batch: int = 64) -> Classifier:
    """AdamW with one learning-rate cycle, the digits shifted by up to a pixel; about 15 seconds on one core."""
    torch.manual_seed(0)
    classifier = Classifier()
    steps = epochs * len(digits) // batch
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    images = F.pad(digits.images(), (1, 1, 1, 1), value=-1.0)  # [N, 1, 10, 10]
    for _ in range(steps):
        index = torch.randint(len(digits), (batch,))
        top, left = torch.randint(3, (2,)).tolist()
        logits = classifier(images[index, :, top : top + 8, left : left + 8])
        loss = F.cross_entropy(logits, digits.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return classifier.eval()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of two sets of features [n, d] (Dowson & Landau 1982).

    The trace of the root is the sum of the roots of the eigenvalues of Σ_a Σ_b, which are real and not negative.
    """
    difference = a.mean(0) - b.mean(0)
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0)
    traces = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(eigenvalues).sum()
    return float(difference @ difference + traces)


def frechet_distances(
    samples: np.ndarray, asked: np.ndarray, real: np.ndarray, labels: np.ndarray, splits: int = 20
) -> tuple[float, float, int]:
    """Mean distance between samples and real features, the same between real ones, and the number n of each."""
    generator = np.random.default_rng(0)
    between_real, to_real = [], []
    for _ in range(splits):
        first, second, drawn = [], [], []
        for digit in range(CLASSES):
            of_class = generator.permutation(np.flatnonzero(labels == digit))
            half = len(of_class) // 2
            first += list(of_class[:half])
            second += list(of_class[half : 2 * half])
            drawn += list(generator.permutation(np.flatnonzero(asked == digit))[:half])
        between_real.append(frechet_distance(real[first], real[second]))
        to_real.append(frechet_distance(samples[drawn], real[second]))
    return float(np.mean(to_real)), float(np.mean(between_real)), len(first)


def variance_ratios(samples: Tensor, asked: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """For each class, the summed variance of its samples over that of its real ones, [10]."""
    parts = [(samples[asked == digit], real[labels == digit]) for digit in range(CLASSES)]
    return torch.stack([a.flatten(1).var(0).sum() / b.flatten(1).var(0).sum() for a, b in parts])


def nearest_distance(images: Tensor, others: Tensor) -> float:
    """Mean Euclidean distance from each image to the nearest of the others."""
    return torch.cdist(images.flatten(1), others.flatten(1)).amin(1).mean().item()


def draw_samples(folder: Path, labels: Tensor, seed: int, changes: dict[str, float | None]) -> tuple[Tensor, str]:
    """Samples [B, 1, 8, 8] of a trained folder, one for each label, and how they were drawn."""
    model = UNet.from_pretrained(folder)
    options = json.loads((folder / "training.json").read_text())["sampling"]
    options |= {name: value for name, value in changes.items() if value is not None}
    told = ", ".join(f"{name} {value}" for name, value in options.items())
    if options["guidance_scale"] != 1:
        options["uncond_kwargs"] = {"class_labels": torch.full_like(labels, CLASSES)}
    samples = fastdiff.sample(
        model,
        (len(labels), 1, 8, 8),
        schedule=fastdiff.NoiseSchedule.from_diffusers(folder),
        model_kwargs={"class_labels": labels},
        seed=seed,
        **options,
    )
    return samples, told


@torch.no_grad()
def judge(classifier: Classifier, samples: Tensor, asked: Tensor) -> bool:
    """Print the table; whether every criterion is met."""
    train, held_out = load_digits("train"), load_digits("held_out")
    every = torch.cat([train.images(), held_out.images()])
    features, real_features = classifier.features(samples), classifier.features(held_out.images())

    accuracy = (classifier(held_out.images()).argmax(1) == held_out.labels).double().mean().item()
    recognised = (classifier(samples).argmax(1) == asked).double().mean().item()
    to_real, between_real, n = frechet_distances(
        features.numpy(), asked.numpy(), real_features.numpy(), held_out.labels.numpy()
    )
    pixels = variance_ratios(samples, asked, every, torch.cat([train.labels, held_out.labels]))
    deep = variance_ratios(features, asked, real_features, held_out.labels)
    nearest = nearest_distance(samples, train.images()) / nearest_distance(held_out.images(), train.images())

    rows = [
        ("classifier's accuracy on held-out digits", f"{accuracy:.1%}", ">= 98.5%", accuracy >= 0.985),
        ("samples classified as asked", f"{recognised:.1%}", ">= 98%", recognised >= 0.98),
        (f"Fréchet distance to real digits, n = {n}", f"{to_real:.2f}", "", True),
        (f"Fréchet distance of real digits, n = {n}", f"{between_real:.2f}", "", True),
        ("Fréchet ratio", f"{to_real / between_real:.2f}", "<= 2", to_real <= 2 * between_real),
        ("variance of pixels, over real, lowest class", f"{pixels.min():.2f}", ">= 0.8", bool(pixels.min() >= 0.8)),
        ("variance of pixels, over real, highest class", f"{pixels.max():.2f}", "<= 1.2", bool(pixels.max() <= 1.2)),
        ("variance of features, over real, mean", f"{deep.mean():.2f}", "0.8 to 1.2", bool(0.8 <= deep.mean() <= 1.2)),
        ("distance to the nearest training digit, over real", f"{nearest:.2f}", "", True),
    ]
    for name, value, needs, met in rows:
        verdict = ("met" if met else "MISSED") if needs else ""
        print(f"{name:<51}{value:>8}   {needs:<11}{verdict}")
    print("variance of pixels by class  ", *(f"{ratio:.2f}" for ratio in pixels.tolist()))
    print("variance of features by class", *(f"{ratio:.2f}" for ratio in deep.tolist()))
    return all(met for *_, met in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge a digits model by what a classifier sees in its samples.")
    parser.add_argument("--model", type=Path, default=PACKAGED, help="a trained folder (default: the packaged one)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--steps", type=int, help="instead of what the folder's training.json says")
    parser.add_argument("--eta", type=float, help="likewise")
    parser.add_argument("--guidance-scale", type=float, help="likewise")
    arguments = parser.parse_args()

    asked = torch.arange(CLASSES).repeat_interleave(100)
    changes = {name: getattr(arguments, name) for name in ("steps", "eta", "guidance_scale")}
    samples, told = draw_samples(arguments.model, asked, arguments.seed, changes)
    print(f"{len(samples)} samples, seed {arguments.seed}: {told}")
    return 0 if judge(train_classifier(load_digits("train")), samples, asked) else 1


if __name__ == "__main__":
    sys.exit(main())
