"""Which part of a job a process makes first: torchrun, SLURM and Kubernetes say so in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fastdiff.checks import check_int

MOST = 1 << 20  # processes


class Share(NamedTuple):
    """Process ``rank`` of ``world``. No process waits for another, and a wrong share only costs time."""

    rank: int = 0
    world: int = 1

    def own(self, shards: int) -> range:
        return range(shards * self.rank // self.world, shards * (self.rank + 1) // self.world)

    def order(self, shards: int) -> Iterator[int]:
        """All shards: its own, and then the others' from the far end, for who is slow or dead."""
        yield from self.own(shards)
        for i in range(1, self.world):
            yield from reversed(Share((self.rank + i) % self.world, self.world).own(shards))

    def place(self, shard: int, shards: int) -> float | None:
        """Where this process stands among those that may help with a shard, from 0 to below 1; None for its own."""
        owner = ((shard + 1) * self.world - 1) // shards
        return None if owner == self.rank else ((owner - self.rank) % self.world - 1) / (self.world - 1)


def share_of(
    rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] | None = None
) -> Share:
    """This process's share: as asked, or as the environment says.

    Read are RANK and WORLD_SIZE (torchrun), SLURM_ARRAY_TASK_ID with its COUNT, MIN and STEP, SLURM_PROCID and
    SLURM_NTASKS, within each task of an array, and JOB_COMPLETION_INDEX (Kubernetes), whose count is ``world_size``, or
    WORLD_SIZE. ValueError where one of two is missing, a number is none, or ``world_size`` is not the environment's.
    """
    found = _found(os.environ if environment is None else environment, world_size)
    if rank is None and found is None:
        if world_size not in (None, 1):
            raise ValueError(f"world_size is {world_size}, but neither rank nor the environment says which this one is")
        return Share()
    if found is not None and world_size is not None and world_size != found.world:
        raise ValueError(f"world_size is {world_size}, but the environment says {found.world}")
    if rank is not None and found is not None and rank != found.rank:
        raise ValueError(f"rank is {rank}, but the environment says {found.rank}")
    if found is None:
        if world_size is None:
            raise ValueError(f"rank is {rank}, but nothing says of how many: give world_size")
        found = Share(check_int("rank", rank, 0, MOST), check_int("world_size", world_size, 1, MOST))
    if not 0 <= found.rank < found.world:
        raise ValueError(f"rank must be in [0, {found.world - 1}], of {found.world} processes; got {found.rank}")
    return found


def local_rank(environment: Mapping[str, str] | None = None) -> int:
    """Which of the processes on this machine it is: the GPU that it takes."""
    environment = os.environ if environment is None else environment
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), None)
    return 0 if name is None else _int(environment, name)


def launcher(environment: Mapping[str, str] | None = None) -> int | None:
    """The process number of the torchrun that started this process, which is to end with it; None without one.

    One that has ended by now left this process to the system's own, which is no Python, or another user's: 0.
    """
    if "TORCHELASTIC_RUN_ID" not in (os.environ if environment is None else environment):
        return None
    parent = os.getppid()
    try:
        return parent if "python" in os.path.basename(os.readlink(f"/proc/{parent}/exe")) else 0
    except PermissionError:
        return 0
    except OSError:  # this system has no /proc
        return parent


def _found(environment: Mapping[str, str], count: int | None) -> Share | None:
    if "RANK" in environment:
        return Share(_int(environment, "RANK"), _int(environment, "WORLD_SIZE", 1))
    if "JOB_COMPLETION_INDEX" in environment:
        if count is None and "WORLD_SIZE" not in environment:
            raise ValueError("JOB_COMPLETION_INDEX is set, but not of how many: give world_size, or set WORLD_SIZE")
        world = _int(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in environment else count
        return Share(_int(environment, "JOB_COMPLETION_INDEX"), check_int("world_size", world, 1, MOST))
    share = None
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = _int(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
        step = _int(environment, "SLURM_ARRAY_TASK_STEP", 1) if "SLURM_ARRAY_TASK_STEP" in environment else 1
        index, count = _int(environment, "SLURM_ARRAY_TASK_ID") - first, _int(environment, "SLURM_ARRAY_TASK_COUNT", 1)
        share = Share(index // step % count, count)  # the numbers of an array may be a list with gaps
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        rank, world = _int(environment, "SLURM_PROCID"), _int(environment, "SLURM_NTASKS", 1)
        share = Share(rank, world) if share is None else Share(share.rank * world + rank, share.world * world)
    return share


def _int(environment: Mapping[str, str], name: str, low: int = 0) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name} is not set, but goes with what is set: see the launcher's environment")
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name} in the environment must be a whole number; got {text!r}") from None
    if value < low:
        raise ValueError(f"{name} in the environment must be at least {low}; got {value}")
    return value
