"""gymnasium's and stable-baselines3's own checks, the batched forms beside the plain one, and what imports bring."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scripted import Scripted, ScriptedCritic, poser

gymnasium = pytest.importorskip("gymnasium")
import fastdiff.poser  # noqa: E402
from fastdiff.poser.environment import ID, Batch, PoserEnv, PoserVectorEnv, vec_env  # noqa: E402
from fastdiff.poser.poser import Poser  # noqa: E402

REQUEST = "draw a pilot, then make the skin dark"


@pytest.mark.parametrize("extended", [False, True])
def test_their_checks_pass_without_a_warning(extended):
    from gymnasium.utils.env_checker import check_env

    sb3 = pytest.importorskip("stable_baselines3.common.env_checker")
    fastdiff.poser.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ID, extended=extended)
        check_env(env.unwrapped)
        sb3.check_env(env.unwrapped, warn=True)


def test_gymnasium_makes_the_batched_one(seed):
    made = gymnasium.make_vec(f"fastdiff.poser.environment:{ID}", num_envs=3, vectorization_mode="vector_entry_point")
    assert isinstance(made.unwrapped, PoserVectorEnv)
    observations, info = made.reset(seed=seed)
    assert observations in made.observation_space
    assert info["action_mask"].shape == (3, 6)


def test_determinism_by_seed(seed):
    def walk(env):
        found = [env.reset(seed=seed)[0]]
        for action in np.random.default_rng(seed).integers(0, 6, 40):
            observation, reward, terminated, truncated, _ = env.step(action)
            found += [observation, np.array([reward, terminated, truncated])]
            if terminated or truncated:
                found.append(env.reset()[0])
        return np.concatenate(found)

    assert np.array_equal(walk(PoserEnv()), walk(PoserEnv()))
    other = PoserEnv()
    assert len({other.reset(seed=seed + i)[0].tobytes() for i in range(5)}) > 1


def test_an_episode(seed):
    env = PoserEnv(poser(critic=ScriptedCritic(1.0, 0.0, 0.0, 0.0)))
    _, info = env.reset(seed=seed, options={"request": REQUEST})
    assert info["action_mask"].tolist() == env.action_masks().tolist() == [True, False]
    _, reward, terminated, truncated, info = env.step(np.int64(0))
    assert (reward, terminated, truncated) == (pytest.approx(0.95), False, False)
    assert info["action_mask"].tolist() == [True, True]
    ends = [env.step(1)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (True, False)]


def test_the_horizon_truncates():
    env = PoserEnv(poser(critic=ScriptedCritic(*[0.0] * 9), attempts=9))
    env.reset(options={"request": REQUEST})
    assert [env.step(0)[2:4] for _ in range(6)] == [(False, False)] * 5 + [(False, True)]


def test_a_batch_is_what_single_environments_are(seed):
    """Each environment of both batched forms is a PoserEnv of its seed; an ended episode begins anew at once."""
    number, rng = 4, np.random.default_rng(seed)
    single = [PoserEnv() for _ in range(number)]
    vector, stable = PoserVectorEnv(number), vec_env(None, number)
    seen = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(single)])
    stable.seed(seed)
    assert np.array_equal(vector.reset(seed=seed)[0], seen)
    assert np.array_equal(stable.reset(), seen)
    ended = 0
    for _ in range(30):
        actions = rng.integers(0, 6, number)
        steps = [env.step(action) for env, action in zip(single, actions, strict=True)]
        last = np.stack([step[0] for step in steps])
        for env, step in zip(single, steps, strict=True):
            if step[2] or step[3]:
                env.batch.renew([env.batch.episodes[0].steps[-1]])
        now = np.stack([env.batch.observations()[0] for env in single])
        observations, rewards, terminated, truncated, info = vector.step(actions)
        assert np.array_equal(observations, now)
        assert rewards.tolist() == [step[1] for step in steps]
        assert [terminated.tolist(), truncated.tolist()] == [[s[2] for s in steps], [s[3] for s in steps]]
        theirs, gained, done, infos = stable.step(actions)
        assert np.array_equal(theirs, now)
        assert gained == pytest.approx(rewards)
        assert done.tolist() == (terminated | truncated).tolist()
        for i in np.flatnonzero(done):
            ended += 1
            assert np.array_equal(info["final_obs"][i], last[i])
            assert np.array_equal(infos[i]["terminal_observation"], last[i])
            assert infos[i]["TimeLimit.truncated"] == truncated[i]
        assert np.array_equal(np.stack([i["action_mask"] for i in infos]), np.stack([e.action_masks() for e in single]))
        assert np.array_equal(info["action_mask"], np.stack([e.action_masks() for e in single]))
    assert ended > number


def test_one_call_an_expert_and_step():
    experts = [Scripted("a"), Scripted("b", "edit")]
    batch = Batch(poser(experts), 8, [REQUEST])
    batch.step([0] * 8)
    batch.step([1, 0] * 4)
    assert [len(call[1]) for call in experts[0].calls] == [8, 4]
    assert [len(call[1]) for call in experts[1].calls] == [4]


def test_refusals():
    with pytest.raises(ValueError, match="extended: a Poser has its rules already"):
        PoserEnv(Poser.of(), extended=True)
    with pytest.raises(ValueError, match="requests must hold at least one"):
        PoserEnv(requests=[])
    with pytest.raises(ValueError, match="request is empty"):
        PoserEnv().reset(options={"request": ""})
    with pytest.raises(AttributeError, match="no method 'close_all'"):
        vec_env(None, 1).env_method("close_all")


@pytest.mark.slow
def test_imports_bring_neither_gymnasium_nor_httpx(tmp_path):
    """A policy is loaded and a run made where none of the extra is installed."""
    from fastdiff.poser.policy import About, Policy

    process = Poser.of()
    about = About(tuple(process.names), process.embedding.name, False)
    Policy([process.width, 8, 8, 6], about).save(tmp_path / "p.safetensors")
    code = f"""
import sys
for name in ("gymnasium", "stable_baselines3", "httpx"):
    sys.modules[name] = None
from fastdiff.poser import Policy, Poser, run, replay
from fastdiff.poser.run import run
policy = Policy.load({str(tmp_path / "p.safetensors")!r})
poser = Poser.of(folder={str(tmp_path / "out")!r})
policy.check(poser)
print(list(run(poser, policy.choose, {REQUEST!r}))[-1].ends)
try:
    import fastdiff.poser; fastdiff.poser.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in ("done", "horizon")
    assert 'the environment needs gymnasium: pip install "fastdiff-torch[poser]"' in done.stdout
