"""A small data set with factors: discs, squares and crosses in three colours and two styles."""

import torch

from fastdiff.training.captioned import Captioned

SUBJECTS, TONES, STYLES = ("disc", "square", "cross"), ("", "light", "dark"), ("flat", "outline")


def picture(subject: str, tone: str, style: str, side: int = 16) -> torch.Tensor:
    """uint8 [3, side, side], on white."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    distance = {"disc": (x**2 + y**2).sqrt(), "square": torch.maximum(x.abs(), y.abs()),
                "cross": torch.minimum(x.abs(), y.abs()) + 0.4}[subject]  # fmt: skip
    inside = distance < 0.7 if style == "flat" else (distance < 0.7) & (distance > 0.55)
    colour = {"": (250, 200, 40), "light": (240, 160, 120), "dark": (70, 40, 20)}[tone]
    return torch.where(inside, torch.tensor(colour).view(3, 1, 1), 255).to(torch.uint8)


def factorial(side: int = 16) -> Captioned:
    """All 18 cells, of which every third is held out."""
    cells = [(subject, style, tone) for subject in SUBJECTS for style in STYLES for tone in TONES]
    rows = tuple(
        {"caption": f"{style} style {subject} {tone}".strip(), "subject": subject, "style": style, "tone": tone,
         "subset": "emoji-240", "part": "held_out" if i % 3 == 1 else "train"}
        for i, (subject, style, tone) in enumerate(cells)
    )  # fmt: skip
    pixels = torch.stack([picture(row["subject"], row["tone"], row["style"], side) for row in rows])
    return Captioned(pixels, tuple((row["caption"],) for row in rows), rows)
