"""What is learned on simulated experts, that policies are their networks, logs, and refusals."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted import Scripted, poser

pytest.importorskip("stable_baselines3")
from fastdiff.poser import trainer
from fastdiff.poser.policy import About, Policy
from fastdiff.poser.poser import Poser
from fastdiff.poser.run import Rule, rollout
from fastdiff.poser.trainer import EPISODES, HYPERPARAMETERS, STEPS, _fill, _model, extract, train

KINDS = ("subject", "tone", "style")
SMALL = {"policy_kwargs": {"net_arch": [16, 16]}}


def chance(seed):
    rng = random.Random(seed)
    return lambda observations, masks, episodes: ([rng.choice(m.nonzero()[:, 0].tolist()) for m in masks], [])


def only(process, name):
    return Rule(process, dict.fromkeys(KINDS, name), "slow")


def whole(process, choose, requests, seed=0):
    return [all(each) for each in process.verdict(rollout(process, choose, requests, seed=seed))]


@pytest.mark.slow
def test_dqn_beats_chance_and_every_single_expert():
    """On held-out requests, with delayed effects, at a fixed seed: p < 0.01 by the sign test against each."""
    process = Poser.of("simulated-delayed")
    policy = train(process, steps=3200, seed=0, validation=64)
    requests = process.domain.requests(200, 1, held_out=True, commands=3)
    ours = whole(process, policy.choose, requests)
    rivals = {"chance": chance(0)} | {name: only(process, name) for name in process.names}
    for name, rival in rivals.items():
        pairs = list(zip(ours, whole(process, rival, requests), strict=True))
        wins, losses = pairs.count((True, False)), pairs.count((False, True))
        assert wins > losses, name
        tail = sum(math.comb(wins + losses, k) for k in range(losses + 1)) / 2 ** (wins + losses)
        assert 2 * tail < 0.01, name


def test_a_policy_is_its_network(seed, tmp_path):
    """Its choice is sb3's own, for random observations and weights, before and after a file."""
    process = Poser.of()
    model = _model(process, seed % 1000, SMALL)
    policy = extract(model, process)
    observations, all_of_them = torch.randn(50, process.width), torch.ones(50, 6, dtype=torch.bool)
    theirs, _ = model.predict(observations.numpy(), deterministic=True)
    ours, q = policy.choose(observations, all_of_them)
    assert ours == theirs.tolist()
    policy.save(tmp_path / "policy.safetensors")
    again = Policy.load(tmp_path / "policy.safetensors")
    assert again.about == policy.about
    assert torch.equal(again.choose(observations, all_of_them)[1], q)
    masks = torch.rand(50, 6) < 0.5
    masks[:, 0] = True
    for row, mask, action in zip(q, masks, again.choose(observations, masks)[0], strict=True):
        assert action == max(mask.nonzero()[:, 0].tolist(), key=lambda a: row[a])


@pytest.mark.parametrize("algorithm", ["qr-dqn", "ppo"])
def test_other_algorithms_are_kept_as_the_same_policy(algorithm, seed):
    """The plain network chooses what sb3-contrib's own does, for random weights and observations."""
    pytest.importorskip("sb3_contrib")
    process, arch = Poser.of(), {"net_arch": [16, 16], "activation_fn": torch.nn.ReLU}
    more = {"n_quantiles": 5} if algorithm == "qr-dqn" else {}
    model = _model(process, seed % 1000, {"policy_kwargs": {**arch, **more}}, algorithm)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(seed))
    observations, masks = torch.randn(50, process.width), torch.rand(50, 6) < 0.5
    masks[:, 0] = True
    if algorithm == "ppo":
        theirs, _ = model.predict(observations.numpy(), deterministic=True, action_masks=masks.numpy())
    else:
        theirs, _ = model.predict(observations.numpy(), deterministic=True)
        masks = torch.ones_like(masks)
    assert extract(model, process).choose(observations, masks)[0] == theirs.tolist()


@pytest.mark.parametrize("algorithm", ["qr-dqn", "ppo"])
def test_other_algorithms_learn(algorithm):
    pytest.importorskip("sb3_contrib")
    lines = []
    policy = train(Poser.of(), steps=64, algorithm=algorithm, validation=4, told=lines.append)
    assert lines
    assert policy.about.experts == tuple(Poser.of().names)


def test_of_a_pool_requests_and_their_seeds_come_again():
    from fastdiff.poser.environment import Batch

    seen = []
    for seed in (0, 1):
        batch = Batch("simulated", 50, pool=6)
        batch.seed(range(seed * 50, seed * 50 + 50))
        batch.reset()
        seen.append({(episode.request, episode.seed) for episode in batch.episodes})
    assert seen[0] == seen[1]  # all six are there but for a chance of 6·(5/6)⁵⁰
    assert {seed for _, seed in seen[0]} == set(range(6))


def test_training_keeps_what_validation_liked_best():
    process, lines = Poser.of(), []
    policy = train(process, steps=160, seed=1, validation=8, told=lines.append, learning_starts=32, **SMALL)
    marks = [tuple(float(w.strip(",")) for w in (line.split()[2], line.split()[-1])) for line in lines]
    assert len(lines) >= 10
    requests = process.domain.requests(8, 10_001)
    episodes = rollout(process, policy.choose, requests, seed=1 << 40)
    share = np.mean([all(each) for each in process.verdict(episodes)])
    gained = np.mean([sum(s.reward for s in e.steps) for e in episodes])
    assert (share, gained) == pytest.approx(max(marks), abs=6e-4)


def test_training_is_reproducible_by_seed():
    weights = []
    for seed in (3, 3, 4):
        policy = train(Poser.of(), steps=96, seed=seed, validation=4, learning_starts=32, **SMALL)
        weights.append(torch.cat([w.flatten() for w in policy.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_logs_fill_the_replay_buffer(tmp_path, seed):
    """What the buffer gives back are the log's own transitions; offline, no expert is called."""
    process = Poser.of(folder=tmp_path)
    requests = process.domain.requests(20, seed)
    rollout(process, Rule(process, dict(zip(KINDS, ("slow", "tone", "style"), strict=True)), "slow"), requests)
    from fastdiff.poser.replay import lines_of, transitions

    kept = list(transitions(lines_of(tmp_path), process))
    silent = poser([Scripted(name, "draw" if name in ("fast", "slow") else "edit") for name in process.names])
    silent.embedding = process.embedding
    lines = []
    policy = train(silent, steps=30, logs=[tmp_path], offline=True, told=lines.append, **SMALL)
    assert lines == [f"{len(kept)} steps of the logs are in the replay buffer"]
    assert [expert.calls for expert in silent.experts] == [[]] * 6
    assert list(policy.about.experts) == process.names
    model = _model(process, 0, {**SMALL, "n_steps": 1})
    assert _fill(model, process, tmp_path) == len(kept)
    buffer = model.replay_buffer
    for i, (before, action, reward, after, terminated, truncated) in enumerate(kept):
        assert np.array_equal(buffer.observations[i, 0], before.numpy())
        assert np.array_equal(buffer.next_observations[i, 0], after.numpy())
        assert (buffer.actions[i, 0, 0], buffer.rewards[i, 0]) == (action, pytest.approx(reward))
        assert buffer.dones[i, 0] == (terminated or truncated)


@pytest.mark.slow
def test_an_offline_policy_learns_what_the_log_shows(tmp_path):
    """Steps by chance, of which the tone command was rewarded by one expert alone: that is whom the policy calls."""
    process = Poser.of(folder=tmp_path)
    rollout(process, chance(0), process.domain.requests(150, 0, commands=3), batch=150)
    policy = train(process, steps=400, logs=[tmp_path], offline=True, gamma=0.5)
    episode = process.begin("draw a pilot, then make the skin dark")
    process.step([episode], [process.names.index("slow")])
    if not episode.done:
        process.step([episode], [process.names.index("slow")])
    chosen, _ = policy.choose(process.observe([episode]), process.masks([episode]))
    assert process.names[chosen[0]] in ("tone", "generalist")


def test_the_file_for_rl_zoo3_says_the_same():
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load((Path(trainer.__file__).with_name("hyperparams.yml")).read_text())["fastdiff/Poser-v0"]
    assert (told.pop("policy"), told.pop("n_envs"), told.pop("n_timesteps")) == ("MlpPolicy", EPISODES, STEPS)
    told["policy_kwargs"] = eval(told["policy_kwargs"], {"dict": dict})
    assert told == HYPERPARAMETERS


# ---- refusals


def test_bad_arguments():
    process = Poser.of()
    with pytest.raises(ValueError, match="DQN has no argument colour"):
        train(process, colour=1)
    with pytest.raises(ValueError, match="algorithm is 'sac'"):
        train(process, algorithm="sac")
    with pytest.raises(ValueError, match="algorithm 'ppo' learns from its own steps alone"):
        train(process, algorithm="ppo", logs=["nowhere.jsonl"])
    with pytest.raises(ValueError, match="pool must be in"):
        train(process, pool=0)
    with pytest.raises(ValueError, match="offline needs logs"):
        train(process, offline=True)
    with pytest.raises(ValueError, match=r"steps must be in"):
        train(process, steps=0)
    with pytest.raises(FileNotFoundError, match="there is no run"):
        train(process, logs=["nowhere.jsonl"])


def test_a_policy_for_others_is_refused(tmp_path):
    process = Poser.of()
    about = About(tuple(process.names), "words:64", False)
    Policy([128, 8, 6], about).check(process)
    with pytest.raises(ValueError, match=r"trained for the experts fast, slow, .*; got a, b"):
        Policy([128, 8, 6], about).check(poser())
    with pytest.raises(ValueError, match="observes paper's states of words:64; here they are extended, words:64"):
        Policy([128, 8, 6], about).check(Poser.of(extended=True))
    with pytest.raises(ValueError, match="observes 100 numbers; here there are 128"):
        Policy([100, 8, 6], about).check(process)
    with pytest.raises(ValueError, match=r"observations must be \[B, 128\], as in training; got \[1, 131\]"):
        Policy([128, 8, 6], about)(torch.zeros(1, 131))
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="holds no policy"):
        Policy.load(tmp_path / "broken.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no policy"):
        Policy.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no policy"):
        Policy.load(tmp_path / "none.safetensors")
    Policy([128, 8, 5], about).save(tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="names 6 experts and has 5 outputs"):
        Policy.load(tmp_path / "five.safetensors")
