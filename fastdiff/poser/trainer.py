"""Learning a policy by stable-baselines3's DQN with n-step returns, or by sb3-contrib's QR-DQN or masked PPO."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdiff.checks import check_choice, check_int
from fastdiff.poser.policy import About, Policy
from fastdiff.poser.poser import Poser
from fastdiff.poser.replay import lines_of, transitions
from fastdiff.poser.run import rollout

HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": 0.001, "buffer_size": 50_000, "learning_starts": 500, "batch_size": 128, "gamma": 0.97,
    "n_steps": 3, "train_freq": 1, "gradient_steps": 4, "target_update_interval": 1000, "exploration_fraction": 0.4,
    "exploration_final_eps": 0.05, "policy_kwargs": {"net_arch": [128, 128]},
}  # fmt: skip
# In place of those; "qr-dqn" is Dabney et al. 2018, "ppo" is Schulman et al. 2017 with masks (Huang & Ontañón 2022).
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dqn": HYPERPARAMETERS,
    "qr-dqn": {**HYPERPARAMETERS, "policy_kwargs": {"net_arch": [128, 128], "n_quantiles": 25}},
    "ppo": {"learning_rate": 0.001, "n_steps": 32, "batch_size": 128, "n_epochs": 10, "gamma": 0.97, "ent_coef": 0.01,
            "policy_kwargs": {"net_arch": [128, 128], "activation_fn": nn.ReLU}},
}  # fmt: skip
CLASSES = {
    "dqn": ("stable_baselines3", "DQN"),
    "qr-dqn": ("sb3_contrib", "QRDQN"),
    "ppo": ("sb3_contrib", "MaskablePPO"),
}
STEPS, EPISODES = 8000, 16  # of a training in all; side by side
VALIDATION = 128  # requests by which the best policy of a training is selected
CHECKS = 10  # how often in a training


def train(
    poser: Poser,
    *,
    steps: int = STEPS,
    seed: int = 0,
    algorithm: str = "dqn",
    pool: int | None = None,
    logs: Sequence[str | os.PathLike[str]] = (),
    offline: bool = False,
    validation: int = VALIDATION,
    told: Callable[[str], object] = lambda line: None,
    **changes: Any,
) -> Policy:
    """Learn which expert to call.

    Args:
        poser: the experts, the critic, the rules and the budget.
        steps: of the environment in all. Offline: gradient steps.
        seed: of the first weights, the requests and the exploration.
        algorithm: "dqn"; "qr-dqn" or "ppo", masked, of sb3-contrib. All of them are kept as the same plain policy.
        pool: how many pairs of a request and a seed there are in all, the same ones for every seed of a training: a
            ledger with a folder then calls an expert once for what comes again. None never repeats one.
        logs: runs whose steps fill the replay buffer before the first step, so that what was paid for is learned from.
        offline: learn from these alone, without a call; the last policy is kept, as no episode selects one.
        validation: requests of the selection, drawn once.
        told: is given a line at each validation.
        changes: of the algorithm's arguments, in place of ``ALGORITHMS``'.

    Returns:
        The policy whose validation episodes left most requests whole in the final picture, then of the highest return.

    Raises:
        ImportError where stable-baselines3 or sb3-contrib is missing; ValueError, TypeError for arguments; what calls
        raise.
    """
    check_int("steps", steps, 1, 1 << 40)
    check_choice("algorithm", algorithm, tuple(ALGORITHMS))
    if pool is not None:
        check_int("pool", pool, 1, 1 << 31)
    if logs and algorithm == "ppo":
        raise ValueError("algorithm 'ppo' learns from its own steps alone; logs go with 'dqn' and 'qr-dqn'")
    if offline and not logs:
        raise ValueError("offline needs logs: there is nothing else to learn from")
    model = _model(poser, seed, changes, algorithm, pool)
    filled = sum(_fill(model, poser, log) for log in logs)
    if logs:
        told(f"{filled} steps of the logs are in the replay buffer")
    if offline:
        from stable_baselines3.common.logger import Logger

        if not filled:
            raise ValueError(f"the logs hold no step: {', '.join(str(log) for log in logs)}")
        model.set_logger(Logger(None, []))
        model.train(gradient_steps=steps, batch_size=min(model.batch_size, filled))
        return extract(model, poser)
    keeper = _keeper(
        poser, poser.domain.requests(validation, 10_000 + (0 if pool else seed)), max(1, steps // CHECKS), told
    )
    model.learn(steps, callback=keeper)
    keeper.validate()
    return keeper.best


def _model(poser: Poser, seed: int, changes: dict[str, Any], algorithm: str = "dqn", pool: int | None = None) -> Any:
    """An algorithm on its environment."""
    package, name = CLASSES[algorithm]
    try:
        kind = getattr(import_module(package), name)
    except ImportError as error:
        raise ImportError(f'training needs {package}: pip install "fastdiff-torch[poser]"') from error
    from fastdiff.poser.environment import vec_env

    if unknown := sorted(set(changes) - set(inspect.signature(kind).parameters)):
        raise ValueError(f"{name} has no argument {', '.join(unknown)}")
    random.seed(seed)
    told = {**ALGORITHMS[algorithm], **changes}
    return kind("MlpPolicy", vec_env(poser, EPISODES, seed=seed, pool=pool), seed=seed, device="cpu", **told)


def _fill(model: Any, poser: Poser, log: str | os.PathLike[str]) -> int:
    """Put a log's steps into the replay buffer; how many. Each stands in the place of every environment beside."""
    number, buffer = 0, model.replay_buffer
    for before, action, reward, after, terminated, truncated in transitions(lines_of(log), poser):
        wide = [np.repeat(x.numpy()[None], buffer.n_envs, 0) for x in (before, after)]
        infos = [{"TimeLimit.truncated": truncated and not terminated}] * buffer.n_envs
        ends = np.full(buffer.n_envs, terminated or truncated)
        buffer.add(*wide, np.full((buffer.n_envs, 1), action), np.full(buffer.n_envs, reward), ends, infos)
        number += 1
    return number


def _keeper(poser: Poser, requests: Sequence[str], every: int, told: Callable[[str], object]) -> Any:
    """sb3's callback that keeps the best policy by validation episodes, which are the same ones each time."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Keeper(BaseCallback):
        best: Policy
        mark = (-1.0, -np.inf)
        next = every

        def _on_step(self) -> bool:
            if self.num_timesteps >= self.next:
                self.next += every
                self.validate()
            return True

        def validate(self) -> None:
            policy = extract(self.model, poser)
            episodes = rollout(poser, policy.choose, requests, seed=1 << 40)
            whole = float(np.mean([all(each) for each in poser.verdict(episodes)]))
            gained = float(np.mean([sum(step.reward for step in e.steps) for e in episodes]))
            told(f"{self.num_timesteps} steps: {whole:.3f} of {len(requests)} requests whole, return {gained:.3f}")
            if (whole, gained) > self.mark:
                self.best, self.mark = policy, (whole, gained)

    return Keeper()


def extract(model: Any, poser: Poser) -> Policy:
    """The network of a trained model as a plain policy: its values are DQN's, the means of QR-DQN's quantiles, or the
    logarithms of PPO's probabilities, but for a constant.
    """
    if hasattr(model, "q_net"):
        layers = list(model.q_net.q_net)
    elif hasattr(model, "quantile_net"):
        layers = list(model.quantile_net.quantile_net)
        layers[-1] = _mean_of_quantiles(layers[-1], len(poser.names))
    else:
        layers = [*model.policy.mlp_extractor.policy_net, model.policy.action_net]
    theirs = [layer for layer in layers if isinstance(layer, nn.Linear)]
    about = About(tuple(poser.names), poser.embedding.name, poser.rules.extended)
    policy = Policy([theirs[0].in_features, *(layer.out_features for layer in theirs)], about)
    mine = [layer for layer in policy.layers if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, other in zip(mine, theirs, strict=True):
            layer.load_state_dict(other.state_dict())
    return policy.eval()


def _mean_of_quantiles(layer: nn.Linear, actions: int) -> nn.Linear:
    """A layer of [quantiles · actions] outputs as one of their means, which are linear, too."""
    mean = nn.Linear(layer.in_features, actions)
    with torch.no_grad():
        mean.weight.copy_(layer.weight.reshape(-1, actions, layer.in_features).mean(0))
        mean.bias.copy_(layer.bias.reshape(-1, actions).mean(0))
    return mean
