"""One request from its first command to its last picture, and many of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from fastdiff.poser.ledger import Begin, End, Line
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.records import BudgetError, ExpertError
from fastdiff.version import __version__

# Of observations [B, width], masks [B, experts] and episodes: an action each, and values [B, experts] or nothing.
Chosen = tuple[list[int], Sequence[Sequence[float]] | Tensor]
Choose = Callable[[Tensor, Tensor, Sequence[Episode]], Chosen]


class Rule:
    """An expert for each kind of command. kinds: by kind, its name; another kind is done by the first one's expert.

    start: who draws where there is no picture, and the expert of the kind needs one.
    """

    def __init__(self, poser: Poser, kinds: Mapping[str, str], start: str) -> None:
        self.poser, self.kinds = poser, {kind: poser.names.index(name) for kind, name in kinds.items()}
        self.start, self.first = poser.names.index(start), poser.names.index(next(iter(kinds.values())))

    def __call__(self, observations: Tensor, masks: Tensor, episodes: Sequence[Episode]) -> Chosen:
        return [self._of(mask, episode) for mask, episode in zip(masks, episodes, strict=True)], []

    def _of(self, mask: Tensor, episode: Episode) -> int:
        kind = self.poser.domain.kind(episode.todo[0]).partition("+")[0]
        action = self.kinds.get(kind, self.first)
        return action if mask[action] else self.start


def hand_rule(poser: Poser, hand: Mapping[str, str | Sequence[str]]) -> Rule | None:
    """The rule of an experts.toml, of those experts that are there; None where the file names none of them.

    hand: by kind of command a name, or several, of which the first that is there is taken.
    """
    named = {kind: [names] if isinstance(names, str) else names for kind, names in hand.items()}
    there = {kind: [name for name in names if name in poser.names] for kind, names in named.items()}
    kinds = {kind: names[0] for kind, names in there.items() if names}
    return Rule(poser, kinds, drawing(poser)[0]) if kinds else None


def drawing(poser: Poser) -> list[str]:
    """The names of the experts that draw."""
    return [expert.spec.name for expert in poser.experts if expert.spec.draws]


def run(poser: Poser, choose: Choose, request: str | Episode, seed: int = 0) -> Iterator[Line]:
    """A request's lines, as they are written to the ledger's run.jsonl: the beginning, each step, the end.

    request: a text, or an episode that ``poser.begin`` made of one. Where a budget is spent or an endpoint fails the
    run ends with the picture that it has, and says why; the same call goes on from there, what was paid for being taken
    from the file.
    """
    episode = request if isinstance(request, Episode) else poser.begin(request, seed)
    ledger, why = poser.ledger, ""
    satisfied: tuple[bool, ...] = ()
    cost, calls, seconds = ledger.cost, ledger.calls, ledger.seconds
    yield from _written(
        poser,
        Begin(request=episode.request, commands=episode.commands, seed=episode.seed, experts=tuple(poser.names),
              version=__version__),
    )  # fmt: skip
    try:
        while not episode.ends:
            actions, q = choose(poser.observe([episode]), poser.masks([episode]), [episode])
            yield from _written(poser, *poser.step([episode], actions, q.tolist() if isinstance(q, Tensor) else q))
        satisfied = poser.verdict([episode])[0]
    except (BudgetError, ExpertError) as error:
        why = str(error)
    yield from _written(
        poser,
        End(ends=why or episode.ends, image=episode.sha, done=tuple(episode.done), dropped=tuple(episode.dropped),
            satisfied=satisfied, cost=ledger.cost - cost, calls=ledger.calls - calls, seconds=ledger.seconds - seconds),
    )  # fmt: skip


def _written(poser: Poser, *lines: Line) -> Iterator[Line]:
    for line in lines:
        poser.ledger.write(line)
        yield line


def rollout(poser: Poser, choose: Choose, requests: Sequence[str], *, seed: int = 0, batch: int = 64) -> list[Episode]:
    """Finished episodes, one a request, ``batch`` of them side by side; episode i has the seed ``seed + i``."""
    episodes = [poser.begin(request, seed + i) for i, request in enumerate(requests)]
    for start in range(0, len(episodes), batch):
        live = episodes[start : start + batch]
        while live:
            actions, _ = choose(poser.observe(live), poser.masks(live), live)
            for step in poser.step(live, actions):
                poser.ledger.write(step)
            live = [episode for episode in live if not episode.ends]
    return episodes
