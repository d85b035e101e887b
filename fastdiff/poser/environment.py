"""The decision process as gymnasium's "fastdiff/Poser-v0", and batched for gymnasium and for stable-baselines3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError('the environment needs gymnasium: pip install "fastdiff-torch[poser]"') from error
import numpy as np

from fastdiff.poser.config import Config
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.records import Step

ID = "fastdiff/Poser-v0"
Source = Poser | Config | str | None


class Batch:
    """Some episodes side by side, each with a generator of its own; one that has ended is begun anew at once.

    poser: a ``Poser``, or what ``Poser.of`` takes (None: simulated experts); rules: of it. requests: those to draw
    from; None makes compound ones by the domain's grammar. pool: how many pairs of a request and a seed there are in
    all, so that calls come again, which a ledger with a folder makes once; None never repeats one.
    """

    def __init__(
        self, poser: Source, number: int, requests: Sequence[str] | None = None, pool: int | None = None, **rules: Any
    ) -> None:
        if rules and isinstance(poser, Poser):
            raise ValueError(f"{', '.join(rules)}: a Poser has its rules already")
        self.poser = poser if isinstance(poser, Poser) else Poser.of(poser, **rules)
        self.requests, self.pool = None if requests is None else list(requests), pool or 1 << 31
        if self.requests is not None and not self.requests:
            raise ValueError("requests must hold at least one request")
        self.generators = [np.random.default_rng() for _ in range(number)]
        self.episodes: list[Episode] = []
        low, high = np.full(self.poser.width, -1, np.float32), np.ones(self.poser.width, np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Discrete(len(self.poser.experts))
        self.reset()

    def seed(self, seeds: Iterable[int | None]) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def reset(self, request: str | None = None) -> np.ndarray:
        self.episodes = [self._new(i, request) for i in range(len(self.generators))]
        return self.observations()

    def _new(self, i: int, request: str | None = None) -> Episode:
        seed = int(self.generators[i].integers(self.pool))
        if request is None and self.requests is not None:
            request = self.requests[seed % len(self.requests)]
        if request is None:  # of the grammar's own making, which takes it apart again
            return self.poser.begin(self.poser.domain.requests(1, seed)[0], seed, by_rules=True)
        return self.poser.begin(request, seed)

    def observations(self) -> np.ndarray:
        return self.poser.observe(self.episodes).numpy()

    def masks(self) -> np.ndarray:
        return self.poser.masks(self.episodes).numpy()

    def step(self, actions: Iterable[int]) -> list[Step]:
        return self.poser.step(self.episodes, [int(action) for action in actions])

    def renew(self, steps: Sequence[Step]) -> None:
        """Begin anew where an episode has ended."""
        self.episodes = [self._new(i) if step.ends else self.episodes[i] for i, step in enumerate(steps)]


def _info(step: Step, mask: np.ndarray) -> dict[str, Any]:
    return {"action_mask": mask, "outcome": step.outcome, "cost": step.cost, "score": step.critique.score}


class PoserEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One episode at a time, of a ``Batch``'s arguments.

    ``reset(options={"request": …})`` asks for one request. ``action_masks()``, ``info["action_mask"]``: which experts
    can be called.
    """

    def __init__(self, poser: Source = None, requests: Sequence[str] | None = None, **rules: Any) -> None:
        self.batch = Batch(poser, 1, requests, **rules)
        self.observation_space, self.action_space = self.batch.observation_space, self.batch.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.batch.generators[0] = self.np_random
        return self.batch.reset((options or {}).get("request"))[0], {"action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        step = self.batch.step([action])[0]
        info = _info(step, self.action_masks())
        return self.batch.observations()[0], step.reward, step.ends == "done", step.ends == "horizon", info

    def action_masks(self) -> np.ndarray:
        return self.batch.masks()[0]


class PoserVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many episodes, one call an expert and step for all of them; an ended one is begun anew in the same step, its
    last observation and info being ``info["final_obs"]`` and ``info["final_info"]``.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, num_envs: int = 1, poser: Source = None, requests: Sequence[str] | None = None, **rules: Any
    ) -> None:
        self.batch, self.num_envs = Batch(poser, num_envs, requests, **rules), num_envs
        self.single_observation_space, self.single_action_space = self.batch.observation_space, self.batch.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self.batch.seed([seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed)
        return self.batch.reset((options or {}).get("request")), {"action_mask": self.batch.masks()}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        steps = self.batch.step(actions)
        last, masks = self.batch.observations(), self.batch.masks()
        infos: dict[str, Any] = {}
        self.batch.renew(steps)
        for i, (step, mask) in enumerate(zip(steps, self.batch.masks(), strict=True)):
            infos = self._add_info(infos, _info(step, mask), i)
            if step.ends:
                infos = self._add_info(infos, {"final_obs": last[i], "final_info": _info(step, masks[i])}, i)
        rewards = np.array([step.reward for step in steps])
        done, horizon = (np.array([step.ends == name for step in steps]) for name in ("done", "horizon"))
        return self.batch.observations(), rewards, done, horizon, infos


def vec_env(poser: Source, number: int, *, seed: int = 0, pool: int | None = None) -> Any:
    """The same batch as a VecEnv of stable-baselines3; ImportError with the command that helps where it lacks."""
    try:
        from stable_baselines3.common.vec_env import VecEnv
    except ImportError as error:
        raise ImportError('training needs stable-baselines3: pip install "fastdiff-torch[poser]"') from error

    class PoserVecEnv(VecEnv):
        render_mode = None

        def __init__(self, batch: Batch) -> None:
            self.batch = batch
            self.actions: Any = None
            super().__init__(len(batch.episodes), batch.observation_space, batch.action_space)

        def seed(self, seed: int | None = None) -> Sequence[int | None]:
            first = int(np.random.default_rng().integers(1 << 31)) if seed is None else seed
            seeds = [first + i for i in range(self.num_envs)]
            self.batch.seed(seeds)
            return seeds

        def reset(self) -> np.ndarray:
            seen = self.batch.reset()
            self.reset_infos = [{"action_mask": mask} for mask in self.batch.masks()]
            return seen

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            steps = self.batch.step(self.actions)
            last, episodes = self.batch.observations(), self.batch.episodes
            self.batch.renew(steps)
            infos = [_info(step, mask) for step, mask in zip(steps, self.batch.masks(), strict=True)]
            for i, step in enumerate(steps):
                if step.ends:
                    infos[i]["terminal_observation"] = last[i]
                    infos[i]["TimeLimit.truncated"] = step.ends == "horizon"
                    taken = episodes[i].steps
                    infos[i]["episode"] = {"r": sum(s.reward for s in taken), "l": len(taken), "t": 0.0}
            rewards = np.array([step.reward for step in steps], np.float32)
            return self.batch.observations(), rewards, np.array([bool(step.ends) for step in steps]), infos

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            if method_name == "action_masks":  # which sb3-contrib's MaskablePPO asks for
                masks = self.batch.masks()
                return [masks[i] for i in self._get_indices(indices)]
            raise AttributeError(f"the episodes of a batch have no method {method_name!r}")

        def has_attr(self, attr_name: str) -> bool:
            return attr_name in ("render_mode", "action_masks")

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            if attr_name != "render_mode":  # which the base class asks for
                raise AttributeError(f"the episodes of a batch have no attribute {attr_name!r}")
            return [None for _ in self._get_indices(indices)]

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise AttributeError(f"the episodes of a batch have no attribute {attr_name!r}")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False for _ in self._get_indices(indices)]

        def close(self) -> None:
            pass

    env = PoserVecEnv(Batch(poser, number, pool=pool))
    env.seed(seed)
    return env


if ID not in gymnasium.registry:
    gymnasium.register(
        ID, entry_point="fastdiff.poser.environment:PoserEnv",
        vector_entry_point="fastdiff.poser.environment:PoserVectorEnv",
    )  # fmt: skip
