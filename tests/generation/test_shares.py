"""Which part of a job a process makes first."""

import os

import pytest

from fastdiff.generation.shares import Share, launcher, local_rank, share_of


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8"}, (2, 8)),
        ({"SLURM_PROCID": "2"}, (0, 1)),  # not of srun's making
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3",
          "SLURM_ARRAY_TASK_STEP": "2"}, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (7, 8)),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "2"}, (1, 3)),  # 2,5,9
        ({"JOB_COMPLETION_INDEX": "5", "WORLD_SIZE": "6"}, (5, 6)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (0, 2)),  # torchrun under srun
    ],
)  # fmt: skip
def test_the_environment_says_which(environment, share):
    assert share_of(environment=environment) == share


def test_kubernetes_says_its_index_alone():
    assert share_of(world_size=4, environment={"JOB_COMPLETION_INDEX": "1"}) == (1, 4)
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX is set, but not of how many"):
        share_of(environment={"JOB_COMPLETION_INDEX": "1"})


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK in the environment must be a whole number; got 'two'"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK in the environment must be at least 0; got -1"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"rank must be in \[0, 3\], of 4 processes; got 4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be at least 1; got 0"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
    ],
)
def test_an_environment_that_is_wrong(environment, told):
    with pytest.raises(ValueError, match=told):
        share_of(environment=environment)


def test_arguments_that_disagree_with_the_environment():
    environment = {"RANK": "1", "WORLD_SIZE": "4"}
    assert share_of(1, 4, environment) == (1, 4)
    with pytest.raises(ValueError, match="world_size is 2, but the environment says 4"):
        share_of(None, 2, environment)
    with pytest.raises(ValueError, match="rank is 0, but the environment says 1"):
        share_of(0, 4, environment)


def test_every_shard_is_in_one_share_and_in_everybodys_order(rng):
    for _ in range(50):
        shards, world = rng.randrange(40), rng.randrange(1, 12)
        shares = [Share(rank, world) for rank in range(world)]
        assert [shard for share in shares for shard in share.own(shards)] == list(range(shards))
        for share in shares:
            order = list(share.order(shards))
            assert sorted(order) == list(range(shards))
            assert order[: len(share.own(shards))] == list(share.own(shards))
        for shard in range(shards):
            places = [share.place(shard, shards) for share in shares]
            assert [shard in share.own(shards) for share in shares] == [place is None for place in places]
            helpers = sorted(place for place in places if place is not None)
            assert helpers == [i / (world - 1) for i in range(world - 1)]
    assert list(Share(1, 3).order(6)) == [2, 3, 5, 4, 1, 0]


def test_the_gpu_is_the_local_number():
    assert local_rank({}) == 0
    assert local_rank({"LOCAL_RANK": "3", "RANK": "11"}) == 3
    assert local_rank({"SLURM_LOCALID": "2"}) == 2


def test_the_launcher_is_the_parent_while_it_lives(monkeypatch):
    launched = {"TORCHELASTIC_RUN_ID": "none"}
    assert launcher({}) is None
    for link, expected in (("/usr/bin/python3.11", os.getppid()), ("/usr/sbin/init", 0), (PermissionError(), 0),
                           (FileNotFoundError(), os.getppid())):  # fmt: skip

        def readlink(path, link=link):
            if isinstance(link, Exception):
                raise link
            return link

        monkeypatch.setattr(os, "readlink", readlink)
        assert launcher(launched) == expected
