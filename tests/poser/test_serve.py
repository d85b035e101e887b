"""The local page over HTTP: what comes line by line, clients that wait or go away, and what is refused."""

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image
from scripted import Scripted, ScriptedCritic, poser

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
import uvicorn

from fastdiff.poser.poser import Poser
from fastdiff.poser.records import ExpertError
from fastdiff.poser.run import Rule
from fastdiff.poser.serve import LARGEST, application, serve

REQUEST = "draw a pilot, then make the skin dark"


class Served:
    """An application at a free port of the loopback."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def post(self, told, **more):
        return httpx.post(f"{self.url}/runs", json=told, timeout=30, **more)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def served():
    made = []

    def make(process, choose=None):
        choose = choose or Rule(process, {"subject": process.names[0], "tone": process.names[-1]}, process.names[0])
        made.append(Served(application(process, choose)))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def until(true):
    for _ in range(1000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


def lines(reply):
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


class Slow(Scripted):
    """Waits in each call until it is let go."""

    def __init__(self, *about, **more):
        super().__init__(*about, **more)
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, *about):
        self.begun.release()
        assert self.go.acquire(timeout=20)
        return super().run(*about)


def test_a_run_comes_line_by_line(served, tmp_path):
    process = Poser.of("simulated", folder=tmp_path)
    site = served(process, Rule(process, {"subject": "slow", "tone": "tone"}, "slow"))
    begin, *steps, end = lines(site.post({"request": REQUEST, "seed": 5}))
    assert (begin["kind"], begin["commands"]) == ("begin", ["draw a pilot", "make the skin dark"])
    assert [step["number"] for step in steps] == list(range(len(steps)))
    for step in steps:
        head, _, content = step["picture"].partition(",")
        assert head == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert shown.tobytes() == Image.open(tmp_path / "images" / f"{step['after']}.png").tobytes()
    assert end["kind"] == "end"
    assert end["spent"] == pytest.approx(sum(step["cost"] for step in steps))
    again = lines(site.post({"request": REQUEST, "seed": 5}))
    assert [line["after"] for line in again[1:-1]] == [step["after"] for step in steps]
    assert all(line["cached"] for line in again[1:-1])


def test_the_page_runs_no_script_of_others(served):
    site = served(poser())
    reply = httpx.get(site.url)
    assert "<title>fastdiff poser</title>" in reply.text
    assert "http" not in reply.text.replace("http-equiv", "")  # nothing is fetched from elsewhere
    assert reply.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'")
    about = httpx.get(f"{site.url}/about").json()
    assert [(each["name"], each["price"]) for each in about["experts"]] == [("a", 0.0), ("b", 0.5)]


def test_one_at_a_time_and_one_who_goes_away(served):
    """Another waits; a client that leaves in the middle of a step ends its run, not the other's."""
    slow = Slow("a")
    site = served(poser([slow, Scripted("b", "edit")]))
    with httpx.stream("POST", f"{site.url}/runs", json={"request": REQUEST}, timeout=30) as leaving:
        come = leaving.iter_lines()
        assert json.loads(next(come))["kind"] == "begin"
        assert slow.begun.acquire(timeout=20)  # in the middle of its first step
        found = []
        other = threading.Thread(target=lambda: found.extend(lines(site.post({"request": "draw a cook"}))))
        with httpx.stream("POST", f"{site.url}/runs", json={"request": "draw an elf"}, timeout=30) as bored:
            assert json.loads(next(bored.iter_lines()))["kind"] == "waiting"
        other.start()
        until(lambda: len(site.server.server_state.connections) >= 2)
    slow.go.release()
    assert slow.begun.acquire(timeout=20)  # the other's
    slow.go.release()
    other.join(20)
    assert [line["kind"] for line in found if line["kind"] != "waiting"] == ["begin", "step", "end"]
    assert [commands for _, commands, _ in slow.calls] == [["a pilot"], ["a cook"]]


def test_what_breaks_is_said(served):
    failing = Scripted("a", raises={1: ExpertError("a: HTTP 500"), 2: RuntimeError("boom")})
    site = served(poser([failing]))
    assert lines(site.post({"request": "draw a cook"}))[-1]["ends"] == "a: HTTP 500"
    assert lines(site.post({"request": "draw a cook"}))[-1]["error"] == "RuntimeError: boom"
    assert lines(site.post({"request": "draw a cook"}))[-1]["ends"] == "done"


@pytest.mark.parametrize(
    ("told", "headers", "status", "why"),
    [
        ({"request": " "}, {}, 400, "request is empty"),
        ({"request": 3}, {}, 400, "Expected `str`, got `int` - at `$.request`"),
        ({"request": "x" * 2001}, {}, 400, "length <= 2000"),
        ({"request": "draw", "seed": -1}, {}, 400, ">= 0"),
        ({"request": "draw", "colour": 1}, {}, 400, "unknown field `colour`"),
        ({"request": "draw", "more": "x" * LARGEST}, {}, 413, f"at most {LARGEST} bytes"),
        ({"request": "draw"}, {"Content-Type": "text/plain"}, 415, "must be application/json"),
        ({"request": "draw"}, {"Origin": "http://elsewhere.example"}, 403, "must not send requests here"),
        ({"request": "draw"}, {"Origin": "null"}, 403, "must not send requests here"),
        ({"request": "draw"}, {"Host": "[::1"}, 400, "the host or the origin is none: Invalid IPv6 URL"),
        ({"request": "draw"}, {"Host": "elsewhere.example"}, 403, "got elsewhere.example"),
    ],
)
def test_what_is_refused(served, told, headers, status, why):
    process = poser(critic=ScriptedCritic())
    site = served(process)
    reply = site.post(told, headers=headers)
    assert reply.status_code == status
    assert why in reply.json()["error"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert process.experts[0].calls == []
    own = {"Origin": site.url, "Host": site.url.removeprefix("http://").replace("127.0.0.1", "localhost")}
    assert site.post({"request": "draw"}, headers={"Host": own["Host"]}).status_code == 200
    assert site.post({"request": "draw"}, headers={"Origin": own["Origin"]}).status_code == 200
    assert httpx.get(site.url, headers={"Host": "elsewhere.example"}).status_code == 403
    assert httpx.get(f"{site.url}/runs").status_code == 405


def test_broken_bytes_and_other_methods(served):
    site = served(poser())
    for content in (b"", b"{", b"\xff\xfe", b"[]"):
        reply = httpx.post(f"{site.url}/runs", content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, content
        assert reply.json()["error"]
    assert httpx.options(f"{site.url}/runs").status_code == 405  # no other site is ever allowed


def test_at_an_address_of_the_network_its_own_name_is_not_known(served):
    """There any Host is served, and Origin still has to be it."""
    process = poser()
    site = Served(application(process, Rule(process, {"subject": "a"}, "a"), host="0.0.0.0"))
    try:
        assert site.post({"request": "draw"}, headers={"Host": "studio.example:8000"}).status_code == 200
        other = {"Host": "studio.example:8000", "Origin": "http://elsewhere.example"}
        assert site.post({"request": "draw"}, headers=other).status_code == 403
    finally:
        site.stop()


def test_a_port_that_is_taken(served):
    process = poser()
    site = served(process)
    with pytest.raises(OSError, match=r"port .* cannot be served at"):
        serve(process, Rule(process, {"subject": "a"}, "a"), port=int(site.url.rpartition(":")[2]))


def test_the_command(tmp_path):
    """`fastdiff poser serve` says where, serves, and ends at an interrupt."""
    asked = ["poser", "serve", "--experts", "simulated", "--port", "0", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "fastdiff", *asked], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().partition(": the page")[0]
            reply = httpx.post(f"{url}/runs", json={"request": REQUEST}, timeout=60)
            assert [line["kind"] for line in lines(reply)][-1] == "end"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130, -signal.SIGINT)
    assert (tmp_path / "run.jsonl").exists()
