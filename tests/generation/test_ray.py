"""A set made by actors of a Ray cluster that the tests start: an actor, and a driver, that are killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastdiff
from fastdiff.generation.ray_engine import Driver
from fastdiff.generation.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"steps": 1, "shard_size": 8, "batch_size": 2, "guidance_scale": 1.0, "device": "cpu"}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    "RAY_raylet_start_wait_time_s": "300",
}  # fmt: skip


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'engine "ray" needs ray: pip install "fastdiff-torch\[ray\]"'):
        fastdiff.generate(None, 8, tmp_path / "set", engine="ray", **SMALL)
    assert not (tmp_path / "set").exists()


class Cluster:
    """Enough of Ray for a ``Driver``: what each task does is what the test says, and all are done at once."""

    def __init__(self, answers, cpus=4, gpus=0):
        self.answers, self.resources, self.options_of, self.killed = answers, {"CPU": cpus, "GPU": gpus}, [], []

        class Died(Exception):
            pass

        self.exceptions = type("exceptions", (), {"RayActorError": Died})

    def cluster_resources(self):
        return self.resources

    def remote(self, kind):
        return self

    def options(self, **options):
        self.options_of.append(options)
        cluster, number = self, len(self.options_of) - 1

        class Method:
            def __init__(self, name):
                self.name = name

            def remote(self, *arguments):
                return (number, self.name, *arguments)

        class Actor:
            ready, make, stop = Method("ready"), Method("make"), Method("stop")

            def remote(self, asked):
                return self

        del cluster
        return Actor()

    def wait(self, busy, timeout):
        done = [task for task in busy if not self.answers.hangs(task)]
        return done, []

    def get(self, task):
        answer = self.answers(task)
        if answer == "died":
            raise self.exceptions.RayActorError("it died")
        return answer

    def kill(self, actor):
        self.killed.append(actor)


class Answers:
    def __init__(self, died=(), failed=(), hung=()):
        self.died, self.failed, self.hung, self.made = list(died), set(failed), set(hung), []

    def hangs(self, task):
        return task in self.hung

    def __call__(self, task):
        if task[1] == "make":
            self.made.append(task)
            if task[2] in self.died:
                self.died.remove(task[2])
                return "died"
            return "NaN" if task[2] in self.failed else None
        return "died" if task[:2] in self.died else None


def drive(answers, *, shards=6, workers=None, gpus=None, cpus=4, cards=0, device="cpu"):
    cluster = Cluster(answers, cpus, cards)
    asked = type("Asked", (), {"device": device})
    driver, made = Driver(cluster, asked, workers, gpus, list(range(shards))), []
    driver.run(type("Signals", (), {"asked": None}), made.append)
    driver.end()
    return cluster, driver, made


def test_actors_never_take_the_last_cpu():
    for cpus, workers, expected in ((4, None, 3), (4, 2, 2), (4, 9, 3), (1, None, 1), (2, 5, 1)):
        cluster, driver, made = drive(Answers(), cpus=cpus, workers=workers)
        assert len(driver.actors) == len(cluster.killed) == expected
        assert sorted(made) == list(range(6))
        assert all(options["num_cpus"] == 1 and options["num_gpus"] == 0 for options in cluster.options_of)
    cluster, driver, _ = drive(Answers(), cpus=8, cards=2, gpus="all", device="auto")
    assert len(driver.actors) == 2
    assert cluster.options_of[0]["num_gpus"] == 1
    with pytest.raises(ValueError, match="gpus is all, and the cluster has none"):
        drive(Answers(), gpus="all", device="auto")


def test_a_shard_whose_actor_died_is_made_again():
    _, driver, made = drive(Answers(died=[2, 2]))
    assert (sorted(made), driver.failed) == (list(range(6)), {})


def test_a_shard_that_kills_actors_is_given_up_and_the_rest_made():
    _, driver, made = drive(Answers(died=[2] * 9))
    assert sorted(made) == [0, 1, 3, 4, 5]
    assert "an actor died of it 3 times: it died" in driver.failed[2]


def test_a_shard_that_fails_is_reported():
    _, driver, made = drive(Answers(failed=[4]))
    assert (sorted(made), driver.failed) == ([0, 1, 2, 3, 5], {4: "NaN"})


def test_an_actor_that_hangs_is_done_without():
    answers = Answers(hung=[(0, "make", 0, None)])
    cluster, asked = Cluster(answers), type("Asked", (), {"device": "cpu"})
    driver, made = Driver(cluster, asked, 2, None, list(range(4))), []
    driver.run(type("Signals", (), {"asked": None}), made.append)
    assert sorted(made) == [0, 1, 2, 3]
    assert (1, "make", 0, 0.0) in answers.made  # from its far end


def test_actors_that_cannot_start_are_said():
    with pytest.raises(RuntimeError, match="no actor could start: it died"):
        drive(Answers(died=[(0, "ready"), (1, "ready"), (2, "ready")]))


def test_a_node_that_comes_is_used():
    cluster = Cluster(Answers(), cpus=2)
    driver = Driver(cluster, type("Asked", (), {"device": "cpu"}), None, None, [0])
    driver._grow()
    assert len(driver.actors) == 1
    cluster.resources = {"CPU": 6}
    driver._grow()
    assert len(driver.actors) == 5


def free_ports(count):
    """Ports that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    """The environment of a cluster of four CPUs that ends with the tests."""
    pytest.importorskip("ray")
    # Ray waits fifteen seconds for its agents to say which ports they took, which is little on a busy machine.
    told = zip(("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", ""),
               free_ports(5), strict=True)  # fmt: skip
    ports = [f"--{name}{'-' * bool(name)}port={port}" for name, port in told]
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {**os.environ, **ENVIRONMENT}
    how = {"env": environment, "capture_output": True, "text": True}
    asked = ["start", "--head", "--num-cpus=4", "--include-dashboard=false", *ports]
    begun = subprocess.run([*command, *asked], **how)
    if begun.returncode:
        pytest.skip(f"no cluster starts here: {(begun.stdout + begun.stderr)[-500:]}")
    yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{ports[-1].rpartition('=')[2]}"}
    subprocess.run([*command, "stop", "--force"], **how)


STARTED = []


@pytest.fixture(autouse=True)
def none_left():
    """A test that fails leaves no process behind."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(out, num, environment):
    command = [sys.executable, "-m", "fastdiff", "generate", "-n", str(num), "--out", str(out), "--steps", "1",
               "--shard-size", "8", "--batch-size", "2", "--guidance", "1", "--device", "cpu", "--engine", "ray",
               "--workers", "3"]  # fmt: skip
    STARTED.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def actors():
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().startswith(b"ray::Maker"):
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def until(condition, process):
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds actors by /proc")
def test_kills_on_a_cluster(tmp_path, cluster):
    """An actor is killed and the driver after it; a second driver makes the rest, which is the set of one process."""
    alone = fastdiff.generate(None, 400, tmp_path / "alone", **SMALL)
    out = tmp_path / "set"
    driver = start(out, 400, cluster)
    until(lambda: list(out.glob("shard-*")), driver)
    os.kill(actors()[0], signal.SIGKILL)
    before = len(list(out.glob("shard-*")))
    until(lambda: len(list(out.glob("shard-*"))) > before + 3, driver)
    driver.kill()
    driver.wait()
    end = time.monotonic() + 120
    while actors():  # they end with their driver
        assert time.monotonic() < end
        time.sleep(0.2)
    assert verify(out).damaged == {}
    second = start(out, 400, cluster)
    assert second.wait(400) == 0, second.stderr.read()
    assert verify(out).sha256 == alone.sha256
    assert not (out / ".unfinished").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds actors by /proc")
def test_a_signal_to_the_driver(tmp_path, cluster):
    out = tmp_path / "set"
    driver = start(out, 100_000, cluster)
    until(lambda: list(out.glob("shard-*")), driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 75, driver.stderr.read()
    assert verify(out).damaged == {}
