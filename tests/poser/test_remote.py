"""Experts and chats behind HTTP, against a server on the loopback: what is sent, what is tried again, what is shown."""

import io
import json
import logging

import pytest
import torch
from PIL import Image
from scripted import Scripted, chat_reply, image_reply, poser

pytest.importorskip("httpx")
from fastdiff.poser import remote
from fastdiff.poser.chat import ChatCritic, ChatDecomposer
from fastdiff.poser.domain import Domain
from fastdiff.poser.experts import make_expert
from fastdiff.poser.ledger import Budget, Paid, read_lines
from fastdiff.poser.poser import Poser
from fastdiff.poser.records import BudgetError, Critique, ExpertError, Spec, Step
from fastdiff.poser.run import run

SECRET = "sk-this-is-not-to-be-seen"
GOOD = {"score": 0.8, "satisfied": False, "issues": ["tone: light"], "suggestion": "make the skin dark"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.001)


def expert(stub, kind="generations", **more):
    told = {"name": "far", "url": stub.url, "model": "m", "timeout": 5.0, "size": 8, **more}
    return make_expert(Spec(kind=kind, **told), Domain())


def test_generations_send_what_the_protocol_says(stub):
    stub.usual = image_reply((255, 0, 51))
    images = expert(stub, options={"quality": "low", "response_format": ""}, seeded=True).run(None, ["x", "y"], [7, 8])
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, 0, 0].tolist() == pytest.approx([1.0, -1.0, 51 / 127.5 - 1])
    asked = sorted((json.loads(body) for _, _, body in stub.asked), key=lambda each: each["seed"])
    assert asked == [{"model": "m", "prompt": p, "n": 1, "quality": "low", "seed": s} for p, s in (("x", 7), ("y", 8))]
    assert {path for path, _, _ in stub.asked} == {"/v1/images/generations"}


def test_edits_send_the_picture_as_a_file(stub, seed):
    stub.usual = image_reply(side=16)
    before = torch.rand(1, 3, 8, 8) * 2 - 1
    assert expert(stub, "edits").run(before, ["make it red"], [0]).shape == (1, 3, 8, 8)
    path, headers, body = stub.asked[0]
    assert path == "/v1/images/edits"
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert b'name="prompt"' in body
    assert b"make it red" in body
    start = body.index(b"\x89PNG")
    sent = torch.tensor(list(Image.open(io.BytesIO(body[start:])).tobytes())).reshape(8, 8, 3).permute(2, 0, 1)
    assert (sent / 127.5 - 1 - before[0]).abs().max() <= 0.5 / 127.5 + 1e-6
    assert b"b64_json" in body
    assert b'name="seed"' not in body


@pytest.mark.parametrize(
    ("replies", "calls", "message"),
    [
        ([(429, {}), (429, {})], 3, None),  # refused before it began: may be sent again
        ([(429, {"error": "slow"}, ("Retry-After", "0"))] * 3, 3, r"HTTP 429.*3 tries"),
        ([(500, {"error": "boom"})], 1, "HTTP 500.*boom"),
        ([(503, {})], 1, "HTTP 503"),
        ([(400, {"error": "no such size"})], 1, "no such size"),
        (["hang up"], 1, "may have been billed and is not sent again"),
        (["hang"], 1, "may have been billed and is not sent again"),
        ([(200, b"<html>")], 1, "its reply is no JSON"),
        ([(200, {"data": [{"url": "https://x"}]})], 1, "no picture as data"),
        ([(200, {"data": [{"b64_json": "aGVsbG8="}]})], 1, "no picture as data"),
        ([(200, [])], 1, "no picture as data"),
    ],
)
def test_only_what_cannot_have_been_billed_is_sent_again(stub, replies, calls, message):
    stub.replies, stub.usual = list(replies), image_reply()
    far = expert(stub, timeout=0.4)
    if message is None:
        assert far.run(None, ["x"], [0]).shape == (1, 3, 8, 8)
    else:
        with pytest.raises(ExpertError, match=f"(?s)far: .*{message}") as error:
            far.run(None, ["x"], [0])
        refused = "429" in message or "no such size" in message
        assert error.value.billed == [not refused]
    assert len(stub.asked) == calls


def test_a_server_that_is_not_there_is_not_billed(stub):
    stub.server_close()
    far = expert(stub)
    stub.shutdown()
    with pytest.raises(ExpertError, match=r"no connection.*3 tries") as error:
        far.run(None, ["x"], [0])
    assert error.value.billed == [False]


def test_of_several_calls_the_good_ones_are_kept(stub):
    stub.replies, stub.usual = [image_reply(), (500, {}), image_reply()], image_reply()
    with pytest.raises(ExpertError, match="HTTP 500") as error:
        expert(stub, concurrency=1).run(None, ["x", "y", "z"], [0, 1, 2])
    assert [image is not None for image in error.value.images] == [True, False, True]
    assert error.value.billed == [True, True, True]


def test_no_more_calls_at_once_than_asked(stub):
    import threading

    there, most, lock = [0], [0], threading.Lock()

    def one(*about):
        with lock:
            there[0] += 1
            most[0] = max(most[0], there[0])
        stub.release.wait(0.05)
        with lock:
            there[0] -= 1
        return torch.zeros(3, 8, 8)

    far = expert(stub, concurrency=2)
    far._one = one
    assert far.run(None, ["x"] * 6, [0] * 6).shape == (6, 3, 8, 8)
    assert most[0] == 2


def test_the_secret_comes_from_the_environment_and_is_nowhere_else(stub, tmp_path, monkeypatch, caplog, capsys):
    with pytest.raises(ValueError, match="the environment variable 'POSER_KEY' is not set"):
        expert(stub, key="POSER_KEY")
    monkeypatch.setenv("POSER_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    stub.replies = [image_reply(), (401, {"error": f"the key {SECRET} is wrong"})]
    far = [expert(stub, key="POSER_KEY", price=1.0), expert(stub, "edits", name="edit", key="POSER_KEY")]
    lines = list(run(poser(far, folder=tmp_path), lambda o, m, e: ([int(m[0][1])], []), "draw a pilot, then dark skin"))
    assert stub.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert lines[-1].ends == 'edit: HTTP 401: {"error": "the key … is wrong"}'
    written = "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())
    printed = capsys.readouterr()
    assert SECRET not in written + caplog.text + printed.out + printed.err + repr(lines) + repr(far[0].spec)


def test_a_billed_call_that_failed_is_paid_for_and_not_repeated(stub, tmp_path):
    stub.replies, stub.usual = ["hang up"], image_reply()
    process = poser([expert(stub, price=0.25)], folder=tmp_path)
    end = list(run(process, lambda o, m, e: ([0], []), "draw a pilot"))[-1]
    assert "may have been billed" in end.ends
    assert (end.cost, len(stub.asked)) == (0.25, 1)
    assert [line.error for line in read_lines(tmp_path / "run.jsonl") if isinstance(line, Paid)] == [end.ends]


# ---- chats


def critic(stub):
    return ChatCritic(stub.url, "vlm", price=0.1)


def rated(stub, before=None):
    return critic(stub).rate(torch.zeros(1, 3, 8, 8), ["dark skin"], ["draw a pilot, then dark skin"], [before])[0]


@pytest.mark.parametrize("content", [GOOD, "```json\n" + json.dumps(GOOD) + "\n```", "Sure! " + json.dumps(GOOD)])
def test_a_critique_of_a_chat(stub, content):
    stub.replies = [chat_reply(content)]
    assert rated(stub, torch.ones(3, 8, 8)) == Critique(0.8, False, ("tone: light",), "make the skin dark")
    asked = json.loads(stub.asked[0][2])
    assert asked["response_format"]["json_schema"]["schema"]["$defs"]["Critique"]["required"] == ["score", "satisfied"]
    text, *pictures = asked["messages"][1]["content"]
    assert "Command: dark skin" in text["text"]
    assert len(pictures) == 2  # the one before, and the one to rate
    assert all(p["image_url"]["url"].startswith("data:image/png;base64,") for p in pictures)


@pytest.mark.parametrize(
    "content",
    ["", "no", "{}", json.dumps({**GOOD, "score": 8}), json.dumps({**GOOD, "satisfied": "yes"}), '{"score": 1', None,
     json.dumps({**GOOD, "more": 1}), json.dumps({"score": 1.0})],
)  # fmt: skip
def test_a_malformed_critique_is_none(stub, content):
    stub.replies = [chat_reply(content) if content is not None else (200, {"choices": []})]
    with pytest.raises(ExpertError, match=r"the critic: (its answer is no Critique|its reply has no choices)") as error:
        rated(stub)
    assert error.value.billed == [True]
    assert len(stub.asked) == 1


def test_a_run_with_a_malformed_critique_goes_on_where_it_was(stub, tmp_path):
    stub.replies = [chat_reply("I cannot rate this"), chat_reply({"score": 1.0, "satisfied": True})]
    choose, draws = (lambda o, m, e: ([0], [])), Scripted("a", price=1.0)
    end = list(run(poser([draws], critic(stub), tmp_path), choose, "draw a pilot"))[-1]
    assert "its answer is no Critique" in end.ends
    assert end.cost == pytest.approx(1.1)
    stub.usual = chat_reply({"score": 1.0, "satisfied": True})
    lines = list(run(poser([draws], critic(stub), tmp_path), choose, "draw a pilot"))
    assert lines[-1].ends == "done"
    assert len(draws.calls) == 1
    assert sum(isinstance(line, Step) for line in lines) == 1


# ---- decomposers


def test_a_chat_takes_requests_apart_and_is_paid_once(stub, tmp_path):
    stub.usual = chat_reply({"commands": ["draw a castle", 'write "HELLO"']})
    process = poser([Scripted("a")], folder=tmp_path)
    process.decomposer = ChatDecomposer(stub.url, "llm", price=0.25)
    for _ in range(2):
        assert process.begin('a castle that says "HELLO"').todo == ["draw a castle", 'write "HELLO"']
    assert (process.ledger.cost, process.ledger.calls, len(stub.asked)) == (0.25, 1, 1)
    asked = json.loads(stub.asked[0][2])
    assert asked["messages"][1]["content"] == 'a castle that says "HELLO"'
    assert asked["response_format"]["json_schema"]["name"] == "Commands"
    again = poser([Scripted("a")], folder=tmp_path)  # another process takes it from the file
    again.decomposer = process.decomposer
    assert again.begin('a castle that says "HELLO"').todo == ["draw a castle", 'write "HELLO"']
    assert again.ledger.cost == 0
    assert process.begin("draw a pilot, then dark skin", by_rules=True).todo == ["draw a pilot", "dark skin"]
    with pytest.raises(ValueError, match="request is empty"):
        process.begin(" ")
    assert len(stub.asked) == 1


@pytest.mark.parametrize("content", ["no", {"commands": []}, {"commands": [" "]}, {"commands": ["x"] * 21}, {}])
def test_a_malformed_answer_takes_nothing_apart(stub, content):
    stub.usual = chat_reply(content)
    process = poser([Scripted("a")], budget=Budget(cost=0.3))
    process.decomposer = ChatDecomposer(stub.url, "llm", price=0.25)
    with pytest.raises(ExpertError, match="the decomposer: its answer is no Commands"):
        process.begin("draw a pilot")
    assert process.ledger.cost == 0.25
    with pytest.raises(BudgetError, match=r"the budget of cost is 0\.3"):
        process.begin("draw a pilot")
    assert len(stub.asked) == 1


def test_the_decomposer_of_a_file(stub, tmp_path):
    told = f'[decomposer]\nkind = "chat"\nurl = "{stub.url}"\n[critic]\nkind = "simulated"\n'
    (tmp_path / "experts.toml").write_text(told + '[[expert]]\nname = "a"\nkind = "simulated-draw"\n'
                                           "options = {success = {subject = 1.0}}\n")  # fmt: skip
    stub.usual = chat_reply({"commands": ["draw an elf"]})
    process = Poser.of(tmp_path / "experts.toml")
    assert process.begin("somebody with pointed ears").todo == ["draw an elf"]
    (tmp_path / "experts.toml").write_text(told.replace("chat", "clever"))
    with pytest.raises(ValueError, match=r"experts\.toml: Invalid enum value 'clever'"):
        Poser.of(tmp_path / "experts.toml")


@pytest.mark.parametrize("url", ["ftp://x/v1", "x.org/v1", "http://", "file:///etc/passwd", "https://u:p@x.org"])
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match=r"url of far must"):
        make_expert(Spec(name="far", kind="generations", url=url), Domain())
