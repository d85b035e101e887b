"""A bar of what all processes of a job have made."""

from __future__ import annotations

import time

from tqdm.auto import tqdm

from fastdiff.generation.job import Folder, Job

REFRESH = 5.0  # seconds between looks at what others have made: a listing of the folder
SHARE = 20  # of a long listing: as many times its own duration pass until the next


class Bar:
    """Images that are published, by whomever, and this process's own of the shards that are not."""

    def __init__(self, folder: Folder, job: Job, shown: bool) -> None:
        self._folder, self._job, self._shown, self._own = folder, job, shown, dict[int, int]()
        self._next = 0.0  # look then

    def __enter__(self) -> Bar:
        done = self._published() if self._shown else 0
        self._tqdm = tqdm(
            total=self._job.num, initial=done, unit="image", disable=not self._shown, smoothing=0, dynamic_ncols=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._tqdm.close()

    def advanced(self, shard: int, images: int) -> None:
        """This process made some images of a shard."""
        if self._shown:
            self._own[shard] = self._own.get(shard, 0) + images
            self._tqdm.update(images)
            if time.monotonic() > self._next:
                self._look()

    def _look(self) -> None:
        if self._shown:
            began = time.monotonic()
            done = self._published()
            self._tqdm.update(done + sum(self._own.values()) - self._tqdm.n)
            now = time.monotonic()
            self._next = now + max(REFRESH, SHARE * (now - began))

    def _published(self) -> int:
        published = self._folder.published(self._job)
        for shard in published & self._own.keys():
            del self._own[shard]
        return self._job.count(published)
