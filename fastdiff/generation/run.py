"""One process's run of a job that is prepared: claim the folder, make what is missing."""

from __future__ import annotations

import warnings

from fastdiff.generation.job import MANIFEST, Folder, Job
from fastdiff.generation.progress import Bar
from fastdiff.generation.request import Prepared, Request
from fastdiff.generation.shares import Share
from fastdiff.generation.worker import Worker
from fastdiff.pictures.network import environment
from fastdiff.pictures.recipe import device_of
from fastdiff.training.signals import Interrupted, Signals


def run(
    ready: Prepared, asked: Request, share: Share, signals: Signals, parent: int | None, progress: bool
) -> tuple[Folder, Job, dict[int, str]]:
    """Make all that is missing; of each shard that could not be made, why. Raises Interrupted."""
    folder, job = ready.folder, claimed(ready, asked)
    signals.at_once = False
    with Bar(folder, job, progress) as bar:
        worker = Worker(folder, job, ready.model, ready.given, share, signals, bar.advanced, parent)
        try:
            worker.run()
        except Interrupted as interrupted:
            raise with_progress(interrupted, folder, job) from None
    return folder, job, worker.failed


def claimed(ready: Prepared, asked: Request) -> Job:
    """The folder's job, which is the one that is asked for, or ValueError."""
    folder = ready.folder
    job = folder.claim(ready.job, adopt=asked.batch_size is None)
    then, now = job.images.made_with, environment(device_of(ready.model.network))
    differ = [f"{name} {then.get(name)} (now {now[name]})" for name in now if then.get(name) != now[name]]
    if differ:
        warnings.warn(f"{folder.path} was begun with {', '.join(differ)}: equal bits are not assured", stacklevel=4)
    if len(folder.published(job)) < job.shards:
        folder.store.remove(MANIFEST)  # it tells of a whole set
    return job


def with_progress(interrupted: Interrupted, folder: Folder, job: Job) -> Interrupted:
    """The same, with what there is by now."""
    kept = f"{job.count(folder.published(job)):,} of {job.num:,} images are in shards, and further batches are kept"
    return Interrupted(f"{interrupted}; {kept}: the same command goes on", interrupted.signal)
