"""Where a learned plan comes from: what a plan's JSON says of it beside the rows."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Provenance(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan was learned for, how, and how near it comes (``fastdiff.tune``). Printed, it is a table.

    Attributes:
        model: the network's class, or the function's name.
        model_sha256: of its configuration and weights (``pictures.network.weights_sha256``); None for a function.
        shape: of one sample.
        guidance_scale: what it was learned under: 1, a number, a pair, or one a call; "function" of a function.
        start: the sampler's name, and steps: its steps, n. start_levels: σ/α of its calls, None where that is infinite.
        learned: what was learned of the table.
        teacher: the fine solver's name, teacher_calls: its network calls, and teacher_error: by how much its result
            moved when its steps were last doubled, root of the mean square; None for a plan that was given.
        seed, iterations, images, held_out: of the noise; of the optimiser; learned from; and kept apart.
        measured_in: "x", or "features" where the caller gave some.
        errors: name → network calls → distance to the teacher on held-out noise, root of the mean square. "tuned" and
            the start's "start" are the first two names.
        made_with: versions and the device.
    """

    model: str
    model_sha256: str | None
    shape: list[int]
    guidance_scale: Any
    start: str
    start_levels: list[float | None]
    steps: int
    learned: str
    teacher: str
    teacher_calls: int
    teacher_error: float | None
    seed: int
    iterations: int
    images: int
    held_out: int
    measured_in: str
    errors: dict[str, dict[str, float]]
    made_with: dict[str, str]

    @property
    def error(self) -> float:
        """The plan's own distance to the teacher on held-out noise."""
        return next(iter(self.errors["tuned"].values()))

    def __str__(self) -> str:
        counts = sorted({int(count) for of_name in self.errors.values() for count in of_name})
        heading = ["network calls", *map(str, counts)]
        lines = [
            [name, *(f"{of_name[str(count)]:.4g}" if str(count) in of_name else "·" for count in counts)]
            for name, of_name in self.errors.items()
        ]
        widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
        moved = "" if self.teacher_error is None else f"; doubling its steps moved it by {self.teacher_error:.2g}"
        before = (
            f"distance ({self.measured_in}, root of the mean square) to {self.teacher} in {self.teacher_calls} calls, "
            f"on {self.held_out} held-out samples{moved}"
        )
        cells = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in (heading, *lines)
        ]
        return "\n".join([before, *cells])
