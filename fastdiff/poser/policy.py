"""A learned policy as a plain torch module: it needs neither gymnasium nor stable-baselines3."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import torch
from torch import Tensor, nn

from fastdiff.files import atomic_write, check_writable
from fastdiff.poser.poser import Episode, Poser


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a policy was trained for. experts: their names, in the order of the actions. embedding: by its name."""

    experts: tuple[str, ...]
    embedding: str
    extended: bool


class Policy(nn.Module):
    """Linear layers with ReLU between them; the output is a value of each expert.

    sizes: of the observation, of the hidden layers, and the number of experts.
    """

    def __init__(self, sizes: Sequence[int], about: About) -> None:
        super().__init__()
        self.about = about
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(before, after))
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Tensor:
        """float32 [B, experts] of observations [B, width]. ValueError for another width."""
        width = self.layers[0].in_features
        if observations.ndim != 2 or observations.shape[1] != width:
            raise ValueError(f"observations must be [B, {width}], as in training; got {list(observations.shape)}")
        return self.layers(observations)

    @torch.no_grad()
    def choose(self, observations: Tensor, masks: Tensor, episodes: Sequence[Episode] = ()) -> tuple[list[int], Tensor]:
        """The best expert of those that masks [B, experts] allow, and the values [B, experts]."""
        q = self(observations)
        return q.masked_fill(~masks, -torch.inf).argmax(1).tolist(), q

    def check(self, poser: Poser) -> None:
        """ValueError where the policy was trained for other experts, another embedding or other observations."""
        if list(self.about.experts) != poser.names:
            raise ValueError(
                f"the policy was trained for the experts {', '.join(self.about.experts)}; got {', '.join(poser.names)}"
            )
        if self.about.embedding != poser.embedding.name or self.about.extended != poser.rules.extended:
            theirs, ours = ((e, "extended" if x else "paper's") for e, x in (
                (self.about.embedding, self.about.extended), (poser.embedding.name, poser.rules.extended)))  # fmt: skip
            raise ValueError(
                f"the policy observes {theirs[1]} states of {theirs[0]}; here they are {ours[1]}, {ours[0]}"
            )
        if self.layers[0].in_features != poser.width:
            raise ValueError(f"the policy observes {self.layers[0].in_features} numbers; here there are {poser.width}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """As one .safetensors file, which holds what it was trained for, too."""
        from safetensors.torch import save

        told = {"format": "pt", "poser": msgspec.json.encode(self.about).decode()}
        content = save({name: value.contiguous() for name, value in self.state_dict().items()}, metadata=told)
        with atomic_write(check_writable(path, suffix=".safetensors")) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """ValueError for a file that is none of ``save``."""
        from safetensors import SafetensorError, safe_open

        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no policy {os.fspath(path)}; fastdiff poser train makes one")
        try:
            with safe_open(path, "pt") as file:
                about = msgspec.json.decode((file.metadata() or {}).get("poser", ""), type=About)
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = [value.shape for name, value in weights.items() if name.endswith("weight")]
            policy = cls([shapes[0][1], *(shape[0] for shape in shapes)], about)
            policy.load_state_dict(weights)
        except (SafetensorError, msgspec.MsgspecError, LookupError, RuntimeError, OSError) as error:
            raise ValueError(f"{os.fspath(path)} holds no policy: {error}") from None
        if len(about.experts) != shapes[-1][0]:
            raise ValueError(f"{os.fspath(path)} names {len(about.experts)} experts and has {shapes[-1][0]} outputs")
        return policy.eval()
