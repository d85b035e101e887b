"""RELIABILITY.md, from what was measured."""

from __future__ import annotations

from typing import Any

from processes import LAUNCHERS, SHARD

IMAGES, WORKERS, RATE = 10**9, 1000, 10.0  # of the paper's job, and images a second of one of its workers
SIZES = (1024, 16384)  # images a shard
PAGE = 1000  # names that an object store lists in a request


def render(measured: dict[str, Any]) -> str:
    parts = [
        "# What `fastdiff generate` stands",
        "Written by `python tools/reliability` from `tools/reliability/measured.json`; no number is typed by hand. "
        "Every set is one of digits, made by `fastdiff generate` in processes of its own and checked by `fastdiff "
        "verify`: each number once, each image and file as its hash says, nothing left beside the shards, and the "
        "whole set's SHA-256 that of a run that nothing disturbed.",
        kills(measured.get("kills", {})),
        faults(measured.get("faults", {})),
        long(measured.get("long", {}).get("long")),
        paper(measured.get("scale", {}).get("scale")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def kills(cases: dict[str, Any]) -> str:
    if not cases:
        return ""
    rows = ["| who makes the set | digits, steps | kill -9 | while images were made | sets | in the end |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, case in cases.items():
        if "not_run" in case:
            rows.append(f"| {name} | | | | | not run: {case['not_run']} |")
            continue
        killed = ", ".join(f"{count} of a {who}" for who, count in case.get("kills", {}).items() if count) or "none"
        of = f"{case['num']:,}, {case['steps']}"
        during, sets = case.get("while_it_made", ""), case.get("sets", 1)
        rows.append(f"| {name} | {of} | {killed} | {during} | {sets} | {verdict(case)} |")
    rows += [f"| {name} | | | | | not run yet |" for name in LAUNCHERS if name not in cases]
    hashes = {case["sha256"]: case["num"] for case in cases.values() if case.get("sha256")}
    told = ", ".join(f"`{sha256}` of {num:,} digits" for sha256, num in hashes.items())
    left = max((case.get("left_over", 0.0) for case in cases.values()), default=0.0)
    return "\n".join(
        ["## Kills", "",
         "At moments drawn evenly from the first file that the processes write to the time that an undisturbed run "
         "takes from there, one in ten while they start; the same command then goes on. A set that was whole before "
         "the kill is checked, and the next one begun. torchrun ends all its workers when one was killed; when a "
         f"launcher was killed its workers were gone within {left:.1f} s.",
         "", *rows, "", "The bar is 50 kills of each over sets of 2,000 digits.", "",
         f"SHA-256 of the sets: {told}.", "", machines(cases)]
    )  # fmt: skip


def faults(cases: dict[str, Any]) -> str:
    if not cases:
        return ""
    rows = [f"| {name} | {case.get('told', '')} | {verdict(case)} |" for name, case in cases.items()]
    return "\n".join(
        ["## Faults", "",
         "The disks are small tmpfs, one of which is remounted read-only; a process hangs by SIGSTOP, and goes on when "
         "all is done; the clock is Python's, which jumps by up to a year with every look, while the files' times are "
         "set anywhere from 1970 to 2100; of the damaged shards one has a bit flipped, one is cut, one is empty.", "",
         "| fault | what came of it | in the end |", "|---|---|---|", *rows, "", machines(cases)]
    )  # fmt: skip


def long(case: dict[str, Any] | None) -> str:
    if case is None:
        return (
            "## A long run\n\nNot run yet: `python tools/reliability --only long`, on a machine that nothing else uses."
        )
    grown, ratio = case["resident_end"] / case["resident_tenth"] - 1, case["ratio"]
    return "\n".join(
        ["## A long run", "",
         f"{case['num']:,} digits in one process, {case['steps']} steps, shards of 1,024, batches of 64.", "",
         "| | measured | bar |", "|---|---|---|",
         f"| resident memory, MB, at a tenth and at the end | {case['resident_tenth']:,.0f} and "
         f"{case['resident_end']:,.0f}: {100 * grown:+.1f}% | within 5%: {held(abs(grown) <= 0.05)} |",
         f"| images a second, beside a bare loop of `fastdiff.sample` over the same grid | {case['rate']:,.1f}, beside "
         f"{case['bare_before']:,.1f} before and {case['bare_after']:,.1f} after: {ratio:.3f} | at least 0.97: "
         f"{held(ratio >= 0.97)} |",
         f"| the same by the processor's time, writing included | {case['ratio_of_processor_time']:.3f} | |",
         "", machines({"": case})]
    )  # fmt: skip


def paper(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    seconds = IMAGES / WORKERS / RATE
    rows = []
    for size in SIZES:
        shards, batches = IMAGES // size, size // PAPER_BATCH
        pages = -(-shards // PAGE)
        requests = shards * requests_of_a_shard(batches) + LISTINGS * pages * WORKERS
        cells = (
            f"{size:,}", f"{shards:,}", f"{size * case['bytes_an_image'] / 1e6:,.0f} MB",
            f"{shards * case['list_a_name']:.2f} s, {pages:,}",
            f"{requests / 1e6:,.0f} million: {requests / seconds:,.0f}",
            f"{shards / seconds:.1f}", f"{shards * LINE / 1e6:,.0f} MB",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    constants = (
        f"{1e6 * case['list_a_name']:.2f} µs to list the name of a shard; {1e6 * case['look_at_a_name']:.1f} µs to "
        f"look whether one is there; {1e3 * case['publish_a_shard']:.1f} ms to write and publish a shard of {SHARD}; "
        f"{case['bytes_an_image']:,.0f} bytes a digit with its recipe and record"
    )
    return "\n".join(
        ["## A thousand million images, on paper", "",
         f"{IMAGES:,} images on {WORKERS:,} workers of {RATE:g} images a second take {seconds / 3600:.0f} hours, in "
         f"batches of {PAPER_BATCH}. Measured here: {constants}.", "",
         "| images a shard | shards | bytes of one | a listing: of a folder, requests to a store | requests of all, "
         "and a second | shards a second | manifest |", "|---|---|---|---|---|---|---|", *rows, "", LIMITS, "",
         machines({"": case})]
    )  # fmt: skip


PAPER_BATCH = 64
LINE = 450  # bytes of a shard's line in manifest.jsonl
LISTINGS = 3  # of each worker: as it begins, before it helps, at the end


def requests_of_a_shard(batches: int) -> int:
    """For each batch two looks, its writing, reading and removal; the shard's own, and a list of its batches."""
    return 5 * batches + 4


LIMITS = f"""What limits it, and what was done about it:

- *Looking at what is done.* A worker that has made its share helps others, and would look at every shard of theirs,
  once a batch. It goes by a listing instead, which costs what the table says, and looks at names only where a shard was
  missing in it.
- *Batches.* A shard's batches are kept one by one until it is whole, so that a kill costs one batch, and requests grow
  with their number. In an object store they are nine tenths of all requests: the larger the batch, the fewer. At the
  rate above they stay below the thousands a second that stores allow one prefix.
- *One folder.* All shards lie in one folder, or under one prefix; publishing adds a few names a second.
- *The last shards.* Helpers of one shard begin at different places of it. With hundreds at the last few shards some
  batches are made twice, which is harmless, and costs each worker at most a batch and shard.
- *The end.* Who finds the set whole derives the manifest, where there is none yet: one read of all shards by one
  process, and by each of those that end in the meantime. For terabytes this is the longest part; end the workers when
  the last shard is there, and let one `fastdiff verify` derive it.
- *Memory.* A worker keeps the numbers of the published shards, some 60 bytes each:
  {60 * IMAGES // SIZES[0] // 10**6} MB at {SIZES[0]:,} images a shard.
- *Sample numbers* end at 2³², four times this job."""


def verdict(case: dict[str, Any]) -> str:
    if "not_run" in case:
        return f"not run: {case['not_run']}"
    return "every number once, every hash right, the same SHA-256" if case["right"] else f"**WRONG**: {case['wrong']}"


def held(right: bool) -> str:
    return "held" if right else "**missed**"


def machines(cases: dict[str, Any]) -> str:
    found = dict.fromkeys(case["machine"].split(", load")[0] for case in cases.values())
    loads = [float(case["machine"].split("load ")[1].split(",")[0]) for case in cases.values()]
    return f"({'; '.join(found)}; the machine's load was {min(loads):.0f} to {max(loads):.0f}.)"
