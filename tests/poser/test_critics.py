"""The domain's critic on pictures whose truth is known."""

import sys
from pathlib import Path

import pytest
import torch

from fastdiff.evaluation.judge import Judge
from fastdiff.poser.config import CriticSpec, make_critic
from fastdiff.poser.critics import NoisyCritic, emoji_critic, simulated_critic
from fastdiff.poser.domain import Domain
from fastdiff.poser.simulated import paint, quality, shown

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from factors import factorial

DOMAIN = Domain()


def painted(**goal):
    return paint({name: goal.get(name, values[0]) for name, values in DOMAIN.values.items()}, 1.0, DOMAIN)


def rate(image, command, request, before=None, critic=None):
    return (critic or simulated_critic(DOMAIN)).rate(image[None], [command], [request], [before])[0]


def test_simulated_pictures_show_what_was_painted(rng):
    cells = [{name: rng.choice(values) for name, values in DOMAIN.values.items()} for _ in range(60)]
    images = torch.stack([paint(cell, q / 60, DOMAIN) for q, cell in enumerate(cells)])
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # as a file keeps them
    assert shown(images, DOMAIN) == cells
    assert quality(images) == pytest.approx([q / 60 for q in range(60)], abs=0.5 / 127)


def test_a_command_is_judged_by_its_factors_and_by_what_must_stay():
    request = "draw a pilot, then make the skin dark, then in noto style"
    right, plain = painted(subject="pilot", tone="dark"), painted(subject="pilot")
    assert (
        rate(right, "make the skin dark", request, plain)
        == simulated_critic(DOMAIN).rate(right[None], ["make the skin dark"], [request], [plain])[0]
    )
    assert rate(right, "make the skin dark", request, plain).satisfied
    failed = rate(plain, "make the skin dark", request, plain)
    assert (failed.score, failed.satisfied) == (0.5, False)
    assert failed.issues == ("tone: it is yellow, not dark",)
    assert failed.suggestion == "make the skin dark"
    # A subject that was right and is lost counts; one that was wrong before, or that nobody asked for, does not.
    lost = painted(subject="cook", tone="dark")
    assert rate(lost, "make the skin dark", request, plain).issues == ("subject: it is cook, not pilot",)
    assert rate(lost, "make the skin dark", request, painted(subject="elf")).satisfied
    assert rate(lost, "make the skin dark", "draw something, then make the skin dark", plain).satisfied
    assert rate(lost, "make the skin dark", request).satisfied
    assert rate(lost, "put on a hat", request).score == 0


def test_a_noisy_critic_turns_so_many_verdicts(rng):
    """At a fixed seed the share lies within four standard errors; the same question has the same answer, whatever is
    asked beside.
    """
    cells = [{"subject": rng.choice(DOMAIN.values["subject"]), "tone": t} for t in DOMAIN.values["tone"] for _ in "xy"]
    images = torch.stack([painted(**cell) for cell in cells])
    commands = [f"draw a {subject}" for subject in DOMAIN.values["subject"]]
    told = [(image, command) for image in images for command in commands]

    def verdicts(critic, told):
        pictures, asked = zip(*told, strict=True)
        return [c.satisfied for c in critic.rate(torch.stack(pictures), asked, asked, [None] * len(asked))]

    truth, noisy = verdicts(simulated_critic(DOMAIN), told), NoisyCritic(simulated_critic(DOMAIN), 0.2, 7)
    found = verdicts(noisy, told)
    assert verdicts(noisy, told[::-1]) == found[::-1]
    assert verdicts(NoisyCritic(simulated_critic(DOMAIN), 0.0), told) == truth
    assert verdicts(NoisyCritic(simulated_critic(DOMAIN), 1.0), told) == [not each for each in truth]
    # Pictures of one cell are one question, so that fewer are independent than are asked.
    distinct = {(tuple(cell.values()), command): a != b for (cell, command), a, b in zip(
        ((cell, command) for cell in cells for command in commands), truth, found, strict=True)}  # fmt: skip
    share, number = sum(distinct.values()) / len(distinct), len(distinct)
    assert abs(share - 0.2) < 5 * (0.16 / number) ** 0.5
    assert verdicts(NoisyCritic(simulated_critic(DOMAIN), 0.2, 8), told) != found


def test_a_noisy_critic_of_a_file():
    critic = make_critic(CriticSpec(kind="simulated", flip=0.5, flip_seed=3), DOMAIN)
    assert (critic.flip, critic.seed, critic.price) == (0.5, 3, 0.0)
    assert not isinstance(make_critic(CriticSpec(kind="simulated"), DOMAIN), NoisyCritic)


def test_the_exact_judge_of_pictures(rng):
    """Of every real picture it says what the picture is; twins are what is asked for."""
    data = factorial()
    domain = Domain.of_rows(data.rows)
    pixels = data.pixels.clone()
    pixels[4] = pixels[0]  # two cells that look the same
    critic = emoji_critic(Judge(data.rows, pixels), data.rows, domain)
    images = pixels.float() / 127.5 - 1
    for i, row in enumerate(data.rows):
        goal = {name: row[name] for name in domain.values}
        command = f"draw a {domain.caption(goal)}"
        assert domain.goal(command) == goal or not row["tone"]
        assert rate(images[i], command, command, critic=critic).satisfied
        other = rng.choice([r for j, r in enumerate(data.rows) if r["subject"] != row["subject"] and {i, j} != {0, 4}])
        wrong = rate(images[i], f"draw a {other['subject']}", "draw a thing", critic=critic)
        assert wrong.satisfied == (
            i in (0, 4) and other["subject"] in (data.rows[0]["subject"], data.rows[4]["subject"])
        )
