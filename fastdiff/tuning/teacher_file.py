"""A teacher's ends, kept in a file: what a second tuning, of another number of steps, need not compute again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from fastdiff.files import atomic_write, check_writable
from fastdiff.plan.plan import Plan
from fastdiff.sampling.belongs import as_told, sha256_of
from fastdiff.tuning.teacher import Teacher

WHAT, VERSION = "fastdiff teacher's ends", 1


@dataclass(frozen=True)
class TeacherFile:
    """A safetensors file of one tensor, ``ends``: float32 [N, …], where the teacher takes each x_T.

    Its metadata hold, as JSON, what the ends are of: ``run``, the teacher's plan and its steps, and by how much its
    result moved when these were last doubled.

    Attributes:
        run: what else the ends depend on, by name, as text and numbers.
    """

    path: Path
    run: Mapping[str, Any]

    def read(self, make: Callable[[int | None], Plan], steps: int | None) -> tuple[Teacher, Tensor] | None:
        """What the file holds; None where there is none.

        make: the teacher's plan of so many steps, as asked for now; steps: how many were asked for, if any.
        ValueError for a file of another run, saying what differs, and for one that is no such file.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads((file.metadata() or {})["header"])
                if (told["what"], told["version"]) != (WHAT, VERSION):
                    raise ValueError(f"it is {told['what']!r}, version {told['version']}")
                plan, ends = Plan.from_json(told["plan"]), file.get_tensor("ends")
                run, kept, moved = told["run"], told["steps"], told["moved"]
        except Exception as error:  # damaged bytes raise nearly anything
            raise ValueError(f"teacher_file: {self.path} holds no teacher's ends: {error}") from error
        differs = [f"its {name} was {run.get(name)} and is {now}" for name, now in self.run.items()
                   if run.get(name) != now]  # fmt: skip
        if not differs and (steps not in (None, kept) or make(kept) != plan):
            differs.append(f"its teacher, {plan.name} of {len(plan)} rows, is not the one that is asked for")
        if differs:
            raise ValueError(f"teacher_file: {self.path} is of another run: {'; '.join(differs)}; name another file")
        return Teacher(plan, kept, moved), ends

    def write(self, teacher: Teacher, ends: Tensor) -> None:
        """Whole or not at all."""
        told = {"what": WHAT, "version": VERSION, "run": dict(self.run), "plan": teacher.plan.to_json(),
                "steps": teacher.steps, "moved": teacher.moved}  # fmt: skip
        with atomic_write(self.path) as file:
            file.write(safetensors.torch.save({"ends": ends.contiguous()}, {"header": json.dumps(told)}))


def teacher_file(
    path: Any, model: Any, shape: tuple[int, ...], seed: int, options: Mapping[str, Any], how: Mapping[str, Any]
) -> TeacherFile:
    """The file of a run; TypeError, ValueError and OSError for a path that cannot be one, before any work.

    options, how: ``tune``'s, of the plans and of ``sample``.
    """
    network = sha256_of(model)
    if network is None:
        raise ValueError(
            f"teacher_file: the model is a {type(model).__name__}, whose weights have no hash, so that nobody could "
            "tell whose ends a file holds; give the nn.Module"
        )
    conditions = [how[name] for name in ("model_kwargs", "uncond_kwargs")]
    run = {
        "network's SHA-256": network, "shape": list(shape), "seed": seed, "schedule": repr(options["schedule"]),
        "prediction": options["prediction"], "guidance scale": as_told(how["guidance_scale"]),
        "guidance rescale": how["guidance_rescale"], "guidance interval": repr(how["guidance_interval"]),
        "thresholding": repr(how["thresholding"]), "dtype": str(how["model_dtype"]),
        "conditions' SHA-256": _sha256(conditions),
    }  # fmt: skip
    return TeacherFile(check_writable(path, suffix=".safetensors"), run)


def _sha256(value: Any) -> str:
    """Of conditions: the bytes of their tensors, whatever device these are on, and else what is printed of them."""
    if isinstance(value, Tensor):
        told = value.detach().cpu().contiguous()
        whole = told.reshape(-1).view(torch.uint8).numpy().tobytes() if told.numel() else b""
        return hashlib.sha256(f"{told.dtype} {list(told.shape)}".encode() + whole).hexdigest()
    if isinstance(value, Mapping):
        value = [part for item in sorted(value.items()) for part in item]
    text = " ".join(map(_sha256, value)) if isinstance(value, (list, tuple)) else repr(value)
    return hashlib.sha256(f"{type(value).__name__} {text}".encode()).hexdigest()
