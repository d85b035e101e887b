"""The decision process: rewards, drops, the horizon, masks, what experts and critics are given, and refusals."""

import pytest
import torch
from scripted import Scripted, ScriptedCritic, poser

from fastdiff.poser.poser import NO_PICTURE, Poser
from fastdiff.poser.records import Picture

THREE = "draw a pilot, then make the skin dark, then in flat style"


def test_rewards_drops_and_the_end():
    """Three failures of the first command, which is dropped; then a success each."""
    process = poser(critic=ScriptedCritic(0.5, 0.0, 0.8, 0.9, 1.0), step_cost=0.25)
    episode = process.begin(THREE)
    steps = [process.step([episode], [action])[0] for action in (0, 0, 0, 1, 1)]
    assert [step.outcome for step in steps] == ["failed", "failed", "dropped", "done", "done"]
    assert [step.reward for step in steps] == pytest.approx([-0.25, -0.25, -0.25, 0.65, 0.75])
    assert [step.ends for step in steps] == ["", "", "", "", "done"]
    assert [step.attempts for step in steps] == [0, 1, 2, 0, 0]
    assert (episode.done, episode.dropped) == (["make the skin dark", "in flat style"], ["draw a pilot"])
    with pytest.raises(ValueError, match="an episode has ended"):
        process.step([episode], [0])


def test_the_horizon():
    process = poser(critic=ScriptedCritic(*[0.0] * 20), attempts=100)
    episode = process.begin(THREE)
    for number in range(6):
        assert process.step([episode], [0])[0].ends == ("horizon" if number == 5 else "")
    assert episode.todo[0] == "draw a pilot"


def test_what_experts_and_critics_are_given():
    experts = [Scripted("a"), Scripted("b", "edit"), Scripted("c", "image-to-image", given="merged")]
    critic = ScriptedCritic(1.0, 0.5, 1.0)
    process = poser(experts, critic)
    episode = process.begin(THREE, seed=3)
    process.step([episode], [0])
    drawn = episode.picture.pixels
    process.step([episode], [1])
    failed = episode.picture.pixels
    process.step([episode], [2])
    assert experts[0].calls[0][:2] == (None, ["a pilot"])
    assert torch.equal(experts[1].calls[0][0][0], drawn)
    assert torch.equal(experts[2].calls[0][0][0], failed)
    assert experts[2].calls[0][1] == ["dark skin, a pilot"] or "pilot" in experts[2].calls[0][1][0]
    seeds = [expert.calls[0][2][0] for expert in experts]
    assert len(set(seeds)) == 3  # a second try of the same words is another picture
    # The critic compares with the picture before the command's first try, whatever was tried since.
    assert [before if before is None else before.sum() for *_, before in critic.asked] == [
        None,
        drawn.sum(),
        drawn.sum(),
    ]
    assert [(command, request) for _, command, request, _ in critic.asked] == [
        (command, THREE) for command in ("draw a pilot", "make the skin dark", "make the skin dark")
    ]


def test_an_expert_without_its_picture_fails_uncalled():
    process = poser()
    episode = process.begin(THREE)
    assert process.masks([episode]).tolist() == [[True, False]]
    step = process.step([episode], [1])[0]
    assert (step.critique, step.after, step.cost, step.reward) == (NO_PICTURE, "", 0.0, pytest.approx(-0.05))
    assert process.experts[1].calls == []
    process.step([episode], [0])
    assert process.masks([episode]).tolist() == [[True, True]]


@pytest.mark.parametrize("keep_best", [True, False])
def test_keep_best(keep_best):
    process = poser(critic=ScriptedCritic(1.0, 0.6, 0.2, 0.7), keep_best=keep_best, attempts=9)
    episode = process.begin(THREE)
    shas = [process.step([episode], [action])[0].after for action in (0, 1, 1, 1)]
    assert (shas[2] == shas[1]) == keep_best
    assert shas[3] != shas[2]


def test_no_reflection_says_the_same_again():
    for reflection in (True, False):
        process = poser(critic=ScriptedCritic(1.0, 0.0, 0.0), reflection=reflection)
        episode = process.begin(THREE)
        texts = [process.step([episode], [action])[0].text for action in (0, 1, 1)]
        assert (texts[1] != texts[2]) == reflection


def test_a_batch_is_what_its_episodes_are_alone(seed):
    """One call an expert and step for all; pictures, steps and observations are those of one by one."""
    requests = Poser.of().domain.requests(12, seed)
    together, alone = Poser.of(extended=True), Poser.of(extended=True)
    both = [[process.begin(request, i) for i, request in enumerate(requests)] for process in (together, alone)]
    while live := [episode for episode in both[0] if not episode.ends]:
        actions = [(e.seed + len(e.steps)) % 6 if e.picture else 0 for e in live]
        together.step(live, actions)
        for episode, action in zip(live, actions, strict=True):
            alone.step([both[1][episode.seed]], [action])
        assert torch.equal(together.observe(live), torch.cat([alone.observe([both[1][e.seed]]) for e in live]))
    for mine, theirs in zip(*both, strict=True):
        assert [(s.after, s.reward, s.text, s.ends) for s in mine.steps] == [
            (s.after, s.reward, s.text, s.ends) for s in theirs.steps
        ]


def test_observations(seed):
    """[e(current), e(remaining)], of length 1 each; extended by attempts, score and whether there is a picture."""
    paper, extended = poser(), poser(extended=True)
    episode = paper.begin(THREE)
    seen = paper.observe([episode])
    assert seen.shape == (1, 32) == (1, paper.width)
    assert seen[0, :16].norm().item() == pytest.approx(1)
    assert torch.equal(seen[0, :16], paper.embedding(["draw a pilot"])[0])
    assert torch.equal(seen[0, 16:], paper.embedding(["make the skin dark in flat style"])[0])
    episode.attempts, episode.score = 1, 0.5
    episode.picture = Picture.batch(torch.zeros(1, 3, 4, 4))[0]
    more = extended.observe([episode])
    assert torch.equal(more[:, :32], seen)
    assert more[0, 32:].tolist() == pytest.approx([1 / 3, 0.5, 1.0])
    episode.todo = []
    assert paper.observe([episode]).abs().sum() == 0


def test_refusals():
    process = poser()
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="action must be in"):
            process.step([process.begin(THREE)], [wrong])
    with pytest.raises(ValueError, match="no expert can draw: b; one must start from words"):
        poser([Scripted("b", "edit")])
    with pytest.raises(ValueError, match="a is there twice"):
        poser([Scripted("a"), Scripted("a")])
    with pytest.raises(ValueError, match="request is empty"):
        process.begin("  ")
    with pytest.raises(ValueError, match="rules: "):
        Poser.of(step_cost=-1)
    with pytest.raises(ValueError, match=r"seed must be in"):
        process.begin(THREE, seed=-1)
