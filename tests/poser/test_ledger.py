"""What calls cost: budgets before a call, the cache, run.jsonl, runs that die and go on, replay, pages."""

import re

import pytest
import torch
from scripted import Scripted, ScriptedCritic, poser

from fastdiff.poser.ledger import Budget, Ledger, Paid, load_picture, read_lines
from fastdiff.poser.records import BudgetError, ExpertError, Picture, Step
from fastdiff.poser.replay import replay, told, transitions, write_page
from fastdiff.poser.run import run

REQUEST = "draw a pilot, then make the skin dark, then in flat style"


def rule(observations, masks, episodes):
    return [1 if mask[1] else 0 for mask in masks], torch.arange(2.0 * len(masks)).reshape(-1, 2)


def words(lines):
    return "\n".join(filter(None, map(told, lines)))


def test_a_budget_is_checked_before_the_call():
    for budget, calls in ((Budget(cost=0.9), 1), (Budget(calls=2), 1), (Budget(cost=0.0), 0), (Budget(seconds=0.0), 0)):
        process = poser(budget=budget)
        lines = list(run(process, rule, REQUEST))
        assert len(process.experts[1].calls) == calls
        assert lines[-1].ends.startswith("the budget of")
        assert lines[-1].image == (lines[-2].after if isinstance(lines[-2], Step) else "")
    assert process.ledger.cost <= 0.9


def test_a_priced_critic_counts():
    process = poser(critic=ScriptedCritic(price=0.3), budget=Budget(cost=0.5))
    end = list(run(process, rule, REQUEST))[-1]
    assert (end.cost, end.calls) == (pytest.approx(0.3), 2)  # the edit would cost 0.5
    assert end.ends == "the budget of cost is 0.5, and with the next call it would be 0.8"


def test_nothing_is_called_twice(tmp_path):
    first = poser(folder=tmp_path)
    lines = list(run(first, rule, REQUEST, seed=5))
    again = poser(folder=tmp_path, critic=ScriptedCritic(0.0, 0.0))  # an answer of which would be other
    cached = list(run(again, rule, REQUEST, seed=5))
    assert [e.calls for e in again.experts] == [[], []]
    assert again.critic.asked == []
    assert [line.cached for line in cached if isinstance(line, Step)] == [True] * 3
    assert [s.after for s in cached[1:4]] == [s.after for s in lines[1:4]]
    assert cached[-1].cost == 0
    assert lines[-1].cost == pytest.approx(1.0)
    # Another seed, price aside, is another call; and so are other options.
    assert list(run(poser(folder=tmp_path), rule, REQUEST, seed=6))[-1].calls == 3
    other = [Scripted("a", options={"steps": 3}), Scripted("b", "edit", price=0.5)]
    assert len(other[0].calls) == 0
    list(run(poser(other, folder=tmp_path), rule, REQUEST, seed=5))
    assert len(other[0].calls) == 1


def test_equal_calls_of_a_batch_are_made_once(tmp_path):
    process = poser(folder=tmp_path)
    drawn = process.ledger.draw(process.experts[0], [None] * 3, ["x", "y", "x"], [1, 1, 1])
    assert process.experts[0].calls[0][1] == ["x", "y"]
    assert drawn[0].picture.sha == drawn[2].picture.sha != drawn[1].picture.sha


def test_a_run_that_dies_ends_with_what_it_has_and_goes_on(tmp_path):
    experts = [Scripted("a"), Scripted("b", "edit", price=0.5, raises={2: ExpertError("b: gone", billed=[True])})]
    lines = list(run(poser(experts, folder=tmp_path), rule, REQUEST))
    assert lines[-1].ends == "b: gone"
    assert lines[-1].image == lines[2].after != ""
    assert lines[-1].cost == pytest.approx(1.0)  # what failed may have been billed
    whole = poser(folder=tmp_path)
    after = list(run(whole, rule, REQUEST))
    assert after[-1].ends == "done"
    assert after[-1].cost == pytest.approx(0.5)
    assert [e.calls != [] for e in whole.experts] == [False, True]
    # As if nothing had happened.
    alone = list(run(poser(), rule, REQUEST))
    assert [s.after for s in after[1:4]] == [s.after for s in alone[1:4]]


def test_what_came_back_before_a_failure_is_kept(tmp_path):
    one = torch.zeros(3, 4, 4)
    failing = Scripted("a", price=1.0, raises={1: ExpertError("half", [one, None], [True, False])})
    process = poser([failing], folder=tmp_path)
    with pytest.raises(ExpertError, match="half"):
        process.ledger.draw(failing, [None, None], ["x", "y"], [1, 2])
    assert (process.ledger.cost, process.ledger.calls) == (1.0, 2)
    again = Ledger(folder=tmp_path).draw(failing, [None, None], ["x", "y"], [1, 2])
    assert failing.calls[1][1] == ["y"]
    assert [d.cached for d in again] == [True, False]


def test_replay_equals_the_run(tmp_path):
    lines = list(run(poser(folder=tmp_path, critic=ScriptedCritic(1.0, 0.4, 0.95, 1.0)), rule, REQUEST))
    assert replay(tmp_path) == words(lines) == replay(tmp_path / "run.jsonl")
    kept = [line for line in read_lines(tmp_path / "run.jsonl") if not isinstance(line, Paid)]
    assert kept == lines
    assert [line.q for line in lines if isinstance(line, Step)] == [(0.0, 1.0)] * 4
    for step in lines[1:-1]:
        assert load_picture(tmp_path, step.after).sha == step.after


def test_a_line_that_was_cut_off_is_left_out(tmp_path, rng):
    list(run(poser(folder=tmp_path), rule, REQUEST))
    path = tmp_path / "run.jsonl"
    whole = path.read_bytes()
    for _ in range(20):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        process = poser(folder=tmp_path)
        assert list(run(process, rule, REQUEST))[-1].ends == "done"
        replay(tmp_path)  # every line of it is whole
    path.write_bytes(whole.replace(b'"kind":"paid"', b'"kind":"pain"', 1))
    with pytest.raises(ValueError, match=r"run.jsonl, line \d+ is none of a run"):
        poser(folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no run"):
        replay(tmp_path / "elsewhere.jsonl")


def test_another_picture_under_the_name_is_told(tmp_path):
    list(run(poser(folder=tmp_path), rule, REQUEST))
    one, other = sorted((tmp_path / "images").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="is another picture than its name says"):
        replay(tmp_path)
    one.unlink()
    with pytest.raises(ValueError, match="cannot read the picture"):
        replay(tmp_path)


def test_the_page_shows_every_step_and_nothing_from_elsewhere(tmp_path):
    critic = ScriptedCritic(1.0, 0.4, 0.95, 1.0)
    lines = list(run(poser(folder=tmp_path, critic=critic), rule, 'draw a pilot, then write "<b>&", then dark skin'))
    text = write_page(tmp_path).read_text()
    assert re.findall(r'src="([^"]+)"', text) == [f"images/{s.after}.png" for s in lines[1:-1]]
    assert all((tmp_path / source).exists() for source in re.findall(r'src="([^"]+)"', text))
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert "it is light, not dark" in text
    assert not re.search(r"https?://|<script|<link", text)


def test_pictures_keep_their_bytes(seed):
    images = torch.rand(5, 3, 7, 9) * 2 - 1
    pictures = Picture.batch(images)
    again = Picture.batch(torch.stack([p.pixels for p in pictures]))
    assert [p.sha for p in pictures] == [p.sha for p in again]
    assert len({p.sha for p in pictures}) == 5
    assert torch.equal(pictures[0].pixels, again[0].pixels)
    assert Picture.batch(images[:1].transpose(2, 3))[0].sha != pictures[0].sha


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 4, 4), torch.full((1, 3, 4, 4), torch.nan), torch.zeros(1, 1, 4, 4), None]
)
def test_what_is_no_picture_is_refused(wrong):
    expert = Scripted("a")
    expert.run = lambda images, commands, seeds: wrong
    with pytest.raises(ExpertError, match=r"must give pictures|no finite"):
        Ledger().draw(expert, [None], ["x"], [0])


# ---- logs to learn from


def test_logs_are_the_transitions_of_the_run(tmp_path, seed):
    critic = ScriptedCritic(0.5, 1.0, 0.3, 0.2, 0.1, 1.0)
    process = poser(folder=tmp_path, critic=critic, extended=True)
    episode = process.begin(REQUEST)
    expected, after = [], process.observe([episode])[0]
    while not episode.ends:
        before, action = after, 1 if episode.picture else 0
        step = process.step([episode], [action])[0]
        process.ledger.write(step)
        after = process.observe([episode])[0]
        expected.append((before, action, step.reward, after, step.ends == "done", step.ends == "horizon"))
    found = list(transitions(read_lines(tmp_path / "run.jsonl"), process))
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[3], theirs[3])
        assert mine[1:3] + mine[4:] == theirs[1:3] + theirs[4:]
    with pytest.raises(ValueError, match="the log's expert 'b' is none of a, c"):
        list(transitions(read_lines(tmp_path / "run.jsonl"), poser([Scripted("a"), Scripted("c", "edit")])))


def test_budget_error_is_told_with_numbers():
    with pytest.raises(BudgetError, match="the budget of calls is 3, and with the next call it would be 4"):
        Ledger(Budget(calls=3)).afford(0.0, 4)
