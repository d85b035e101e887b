"""How good a policy is: what it did with requests that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from fastdiff.evaluation.judge import wilson
from fastdiff.poser.critics import Critic
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.run import Choose, rollout


class Scores(msgspec.Struct, kw_only=True):
    """What a policy did with some requests.

    whole: by request, whether the final picture satisfies every command; second: the same by another critic, None
    where there is none. share: of all commands. damage: commands that were done and are not in the final picture, a
    request. steps, calls, price: a request's; those of a call that was answered from the ledger's folder count too.
    """

    whole: list[bool]
    second: list[bool] | None = None
    share: float
    damage: float
    steps: float
    calls: float
    price: float

    def table(self) -> str:
        """Lines of text: the shares of requests, with Wilson's 95% intervals, and what a request took."""
        lines = [f"{'':30} share  95% interval"]
        judges = {"all commands done": self.whole, "by the second judge": self.second}
        for name, hits in judges.items():
            if hits is not None:
                share = sum(hits) / len(hits)
                low, high = wilson(share, len(hits))
                lines.append(f"{name:30} {share:.3f}  {low:.3f} … {high:.3f}")
        means = {"commands done": self.share, "commands lost again, a request": self.damage,
                 "steps a request": self.steps, "calls": self.calls, "price": self.price}  # fmt: skip
        return "\n".join([*lines, *(f"{name:30} {value:.3f}" for name, value in means.items())])

    def to_json(self) -> dict[str, Any]:
        """The same and each request's own; intervals as "all_done" and "second_done": share, low, high."""
        judges = {"all_done": self.whole, "second_done": self.second}
        shares = {name: sum(hits) / len(hits) for name, hits in judges.items() if hits is not None}
        ends = {name: [share, *wilson(share, len(self.whole))] for name, share in shares.items()}
        return {"requests": len(self.whole), **ends, **msgspec.to_builtins(self)}


def evaluate(
    poser: Poser, choose: Choose, requests: Sequence[str], *, seed: int = 0, second: Critic | None = None
) -> Scores:
    """Carry out requests, which must not be none, and rate the final pictures; request i has the seed ``seed + i``.

    Raises BudgetError and ExpertError.
    """
    if not requests:
        raise ValueError("requests must hold at least one request")
    return scores_of(poser, rollout(poser, choose, requests, seed=seed), second)


def scores_of(poser: Poser, episodes: Sequence[Episode], second: Critic | None = None) -> Scores:
    """Of finished episodes."""
    final, number = poser.verdict(episodes), len(episodes)
    other = poser.changed(second, "second").verdict(episodes) if second is not None else None
    lost = [not ok and c in e.done for e, each in zip(episodes, final, strict=True)
            for ok, c in zip(each, e.commands, strict=True)]  # fmt: skip
    steps = [step for episode in episodes for step in episode.steps]
    called = [step for step in steps if step.key]
    prices = {expert.spec.name: expert.spec.price + poser.critic.price for expert in poser.experts}
    return Scores(
        whole=[all(each) for each in final], second=None if other is None else [all(each) for each in other],
        share=sum(map(sum, final)) / sum(map(len, final)), damage=sum(lost) / number, steps=len(steps) / number,
        calls=len(called) / number, price=sum(prices[step.expert] for step in called) / number,
    )  # fmt: skip
