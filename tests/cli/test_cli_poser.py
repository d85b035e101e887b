"""``fastdiff poser``: the commands on simulated experts, and what they say where they are asked wrongly."""

import json

import pytest
from helpers import run

REQUEST = "draw a pilot, then make the skin dark"
COMMON = ("--experts", "simulated", "--quiet")


def test_run_and_replay(tmp_path):
    out = tmp_path / "out"
    first = run("poser", "run", REQUEST, "--experts", "simulated", "--out", out)
    assert first.exit_code == 0, first.output
    assert (out / "index.html").exists()
    again = run("poser", "replay", out)
    assert again.exit_code == 0, again.output
    assert again.output == first.output
    assert "slow: 'a pilot'" in first.output
    assert "2 of 2 commands" in first.output


def test_a_policy_is_trained_and_used(tmp_path):
    pytest.importorskip("stable_baselines3")
    policy, log = tmp_path / "policy.safetensors", tmp_path / "log"
    assert run("poser", "run", REQUEST, "--out", log, *COMMON).exit_code == 0
    done = run("poser", "train", "--out", policy, "--log", log, "--offline", "--steps", 3, *COMMON)
    assert done.exit_code == 0, done.output
    done = run("poser", "run", REQUEST, "--policy", policy, "--out", tmp_path / "out", *COMMON)
    assert done.exit_code == 0, done.output
    (tmp_path / "experts.toml").write_text(TOML + DRAWS)
    done = run("poser", "run", REQUEST, "--policy", policy, "--experts", tmp_path / "experts.toml", "--out", tmp_path)
    assert done.exit_code == 2
    assert "the policy was trained for the experts fast, slow, tone, style, generalist, careless; got a" in done.output


def test_a_rule_is_evaluated(tmp_path):
    """The table and the file say what the library counts for the same requests, which are no training's."""
    from fastdiff.evaluation import wilson
    from fastdiff.poser.evaluate import evaluate
    from fastdiff.poser.poser import Poser
    from fastdiff.poser.run import Rule

    asked = ("poser", "evaluate", "--experts", "simulated", "--n", 40, "--seed", 3)
    done = run(*asked, "--out", tmp_path / "scores.json", "--folder", tmp_path / "calls")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "scores.json").read_text())
    process = Poser.of()
    rule = Rule(process, {"subject": "slow", "tone": "tone", "style": "style"}, "fast")
    requests = process.domain.requests(40, 3, held_out=True)
    whole = {request for request in requests if len(process.domain.split(request)) == 3}  # others name no whole cell
    assert whole
    assert not whole & set(process.domain.requests(2000, 0))
    scores = evaluate(process, rule, requests, seed=3)
    assert found["whole"] == scores.whole
    assert found["all_done"] == pytest.approx([sum(scores.whole) / 40, *wilson(sum(scores.whole) / 40, 40)])
    assert found["calls"] == process.ledger.calls / 40
    assert found["price"] == pytest.approx(process.ledger.cost / 40)
    assert f"all commands done              {sum(scores.whole) / 40:.3f}" in done.output
    again = run(*asked, "--folder", tmp_path / "calls")
    assert again.output == done.output  # what a call costs counts where it is answered from the folder, too
    with pytest.raises(ValueError, match="requests must hold at least one request"):
        evaluate(process, rule, [])


TOML = '[critic]\nkind = "simulated"\n[budget]\ncalls = 1\n[hand]\nsubject = "a"\n[[expert]]\nname = "a"\n'
DRAWS = 'kind = "simulated-draw"\noptions = {success = {subject = 1.0}}\n'


def test_a_run_that_ends_early_says_so(tmp_path):
    (tmp_path / "experts.toml").write_text(TOML + DRAWS)
    done = run("poser", "run", REQUEST, "--experts", tmp_path / "experts.toml", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "the budget of calls is 1, and with the next call it would be 2; the same command goes on" in done.output
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "  ", "--out", "out", *COMMON), "request is empty"),
        (("run", REQUEST, "--experts", "none.toml"), "there is no file none.toml"),
        (("run", REQUEST, "--policy", "none.safetensors", *COMMON), "there is no policy none.safetensors"),
        (("train", "--out", "policy.pt", *COMMON), "must end in .safetensors"),
        (("evaluate", "--out", "scores.txt", *COMMON), "must end in .json"),
        (("evaluate", "--second", *COMMON), "the critic 'simulated' has no second judge"),
        (("evaluate", "--policy", "none.safetensors", *COMMON), "there is no policy none.safetensors"),
        (("replay", "nowhere"), "there is no run nowhere"),
        (("run", REQUEST, "--experts", "edits.toml"), "no expert can draw: a"),
        (("run", REQUEST, "--experts", "handless.toml"), "--policy must be given: handless.toml has no [hand] rule"),
    ],
)
def test_what_is_asked_wrongly(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.toml").write_text(TOML + DRAWS.replace("-draw", "-edit"))
    (tmp_path / "handless.toml").write_text(TOML.replace('[hand]\nsubject = "a"\n', "") + DRAWS)
    done = run("poser", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out" / "run.jsonl").exists()
