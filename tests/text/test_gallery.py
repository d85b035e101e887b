"""``fastdiff gallery``: the page shows what its calls draw, is whole, and takes no folder that is not its own."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import random_pipeline

import fastdiff
from fastdiff import cli
from fastdiff.gallery.page import prepare, write_gallery
from fastdiff.gallery.sections import SECTIONS
from fastdiff.images import to_uint8
from fastdiff.text import load as loading

pytestmark = pytest.mark.filterwarnings("ignore:the model does not know")
EDITING = "StableDiffusionInstructPix2PixPipeline"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page's elements, opened and closed in pairs; rows as [pictures' attributes, code]."""

    def __init__(self, path):
        super().__init__()
        self.open, self.seen, self.links, self.rows, self.codes = [], [], [], [], []
        self.anchors = set()
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.seen.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.links += [told[name] for name in ("src", "href") if name in told]
        self.anchors |= {told["id"]} if "id" in told else set()
        if tag == "article":
            self.rows.append([[], ""])
        if tag == "img":
            self.rows[-1][0].append(told)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["pre"]:
            if "article" in self.open:
                self.rows[-1][1] += data
            else:
                self.codes.append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    editor = random_pipeline.make(root / "edit", in_channels=8, kind=EDITING)
    return random_pipeline.make(root / "words"), editor


def run(*arguments):
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        cli.app, ["gallery", *map(str, arguments)]
    )


def check_whole(out):
    """The page names every other file of the folder, all of which open, and nothing else but its own sections."""
    page = Page(out / "index.html")
    anchors = [link for link in page.links if link.startswith("#")]
    named = [link for link in page.links if not link.startswith("#")]
    assert {anchor.removeprefix("#") for anchor in anchors} == page.anchors
    assert sorted([*named, "index.html"]) == sorted(path.name for path in out.iterdir())
    assert not {"script", "link", "iframe"} & set(page.seen)
    assert "url(" not in (out / "index.html").read_text()
    for pictures, code in page.rows:
        assert pictures
        assert code
        for told in pictures:
            assert told["alt"]
            Image.open(out / told["src"]).load()
    return page


@pytest.mark.slow
def test_the_calls_on_the_page_draw_its_pictures(folders, tmp_path):
    out = tmp_path / "gallery"
    done = run("--out", out, "--model", folders[0], "--edit-model", folders[1], "--quick", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "index.html: 40 pictures" in done.output
    page = check_whole(out)
    assert len(page.rows) == 2 * len(SECTIONS)
    names = {}
    exec(page.codes[0], names)
    assert isinstance(names["editor"], fastdiff.Pipeline)
    for pictures, code in page.rows:
        made = dict(names)
        exec(code, made)
        for i, told in enumerate(pictures):
            shown = Image.open(out / told["src"])
            if "film" in made:
                assert shown.n_frames == len(made["film"]) == 4
            else:
                drawn = to_uint8(made["images"][i]).permute(1, 2, 0)
                assert shown.tobytes() == bytes(drawn.flatten().tolist())


@pytest.mark.slow
def test_without_an_editor_and_over_an_earlier_one(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PACKAGED", {"emoji": folders[0], "emoji-edit": tmp_path / "none"})
    (tmp_path / "index.html").write_text('<meta name="generator" content="fastdiff gallery">')
    for leftover in ("picture-3-9-9.png", ".picture-0-0-0.png.0123456789abcdef.tmp"):
        (tmp_path / leftover).touch()
    done = run("--out", tmp_path, "--quick", "--quiet", "--device", "cpu")
    assert done.exit_code == 0, done.output
    page = check_whole(tmp_path)
    assert len(page.rows) == 2 * len(SECTIONS) - 2
    assert "--edit-model" in (tmp_path / "index.html").read_text()


def test_a_run_that_ends_early_leaves_a_whole_page(folders, tmp_path):
    def told(title):
        if title == "Samplers × steps":
            raise KeyboardInterrupt

    pipe = fastdiff.load(folders[0], device="cpu", accelerate=False)
    with pytest.raises(KeyboardInterrupt):
        write_gallery(pipe, tmp_path, quick=True, told=told)
    page = Page(tmp_path / "index.html")
    assert len(page.rows) == 4
    assert sum(path.suffix == ".png" for path in tmp_path.iterdir()) == 8
    assert prepare(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_folder_of_something_else_is_left_alone(folders, tmp_path):
    wrong = {"notes.txt": "", "index.html": "<p>mine</p>", "picture-0-0-0.png": ""}
    for i, (name, content) in enumerate(wrong.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(FileExistsError, match=f"{folder} holds {name}, which is no gallery's"):
            prepare(folder)
        assert (folder / name).read_text() == content
    own = tmp_path / "own"
    own.mkdir()
    (own / "index.html").write_text('<meta name="generator" content="fastdiff gallery">')
    (own / "sub").mkdir()
    with pytest.raises(FileExistsError, match="holds sub"):
        prepare(own)


def test_bad_input(folders, tmp_path):
    cases = [
        ((tmp_path / "0" / "notes.txt",), "must be a folder"),
        ((tmp_path / "none" / "out",), "No such file"),
        ((tmp_path / "a", "--model", folders[1]), "model must draw from prompts"),
        ((tmp_path / "a", "--edit-model", folders[0]), "edit_model must edit by instruction"),
        ((tmp_path / "a", "--edit-model", tmp_path / "missing"), "there is no file and no folder"),
    ]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").touch()
    for (out, *more), why in cases:
        done = run("--out", out, *(["--model", folders[0]] if "--model" not in more else []), *more, "--quick")
        assert done.exit_code == 2
        assert why in done.output
        assert not Path(out).is_dir()


def test_a_row_has_a_name_for_every_picture():
    for section in SECTIONS:
        for quick in (False, True):
            for label, names, code in section.rows(64, quick=quick):
                assert label
                assert len(set(names)) == len(names) > 1
                assert "$" not in code
                compile(code, section.title, "exec")


def test_the_pictures_need_no_editor_but_in_its_section():
    assert [section.title for section in SECTIONS if "editor(" in section.code] == ["Edits by instruction"]
