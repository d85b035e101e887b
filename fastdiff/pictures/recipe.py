"""A recipe: the arguments of ``fastdiff.sample`` as data, with the network's identity, to be kept in a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from fastdiff.checks import check_int, check_shape
from fastdiff.pictures.network import Identity, environment, identify
from fastdiff.pictures.values import from_plain, to_plain, unpacked_bytes
from fastdiff.plan.plan import Plan
from fastdiff.sampling.model import inspect as inspect_model
from fastdiff.sampling.request import Request
from fastdiff.sampling.sample import SIGNATURE, bind, sample, sample_iter
from fastdiff.sampling.state import State
from fastdiff.sampling.stepper import plain_tensors

FORMAT, VERSION = "fastdiff.recipe", 1
MOST = 16_000_000  # characters of its text

# What becomes of each argument of ``sample``.
IN_THE_PLAN = ("sampler", "steps", "schedule", "prediction", "variance", "spacing", "eta", "clip", "sampler_options")
KEPT = (
    "seed", "seeds", "sample_offset", "x_T", "x_init", "start_step", "strength", "mask", "known", "model_kwargs",
    "uncond_kwargs", "guidance_scale", "guidance_rescale", "guidance_interval", "thresholding", "model_dtype",
)  # fmt: skip
WITHOUT_EFFECT = ("device", "backend", "cuda_graph", "callback", "progress")  # on the bits, but for the device's own
BESIDE = ("return_log_prob",)  # asks for more than the images
# Others (generator, noise_fn, resume, cond_fn) are no data: a recipe is refused.

_PAIRS = ("guidance_interval", "thresholding")  # JSON has no tuples
_MOST_BYTES = 1 << 28  # of all tensors of a recipe that is read, beside eight batches of its images
_DTYPES = ("float32", "bfloat16", "float16")

Size = Annotated[int, Meta(ge=1, le=1 << 24)]


class Words(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a pipeline's text encoder is given: a prompt for each image, and what to keep away from, one or one each.

    first: of an editing checkpoint, whether the words are followed first, without the picture (guidance_order).
    """

    prompts: list[str]
    negative_prompts: list[str] | None = None
    first: bool = False

    def of(self, begin: int, count: int) -> Words:
        """Those of some of the images."""
        negatives = self.negative_prompts
        if negatives is not None and len(negatives) > 1:
            negatives = negatives[begin : begin + count]
        prompts = self.prompts[begin : begin + count]
        return msgspec.structs.replace(self, prompts=prompts, negative_prompts=negatives)


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe's fields but for the plan, which has a text of its own."""

    shape: Annotated[list[Size], Meta(min_length=1, max_length=16)]
    batch_size: Size
    arguments: dict[str, Any]
    network: Identity
    made_with: dict[str, str]
    words: Words | None = None


class Recipe(Head, frozen=True, kw_only=True):
    """How images were made: ``recipe.sample(model)`` makes them again. Make one with ``Recipe.of``.

        recipe = fastdiff.Recipe.of(model, (64, 3, 32, 32), sampler="ddim", steps=50, seed=42)
        fastdiff.save_grid("samples.png", recipe.sample(model), recipe=recipe)
        print(fastdiff.reproduce("samples.png", model))        # identical, to the bit

    Attributes:
        shape: [B, …] of all images.
        batch_size: how many are made at a time, on which a network's rounding depends.
        arguments: arguments of ``sample`` that were given and that the plan does not hold, as JSON has them.
        network: which network.
        made_with: versions, device and threads, by name.
        words: what a pipeline encodes, of one that draws from words (``Pipeline.recipe``): its images are those that
            the autoencoder decodes, its other tensors latents. None for a network by itself.
        plan: the rows.
    """

    plan: Plan

    @classmethod
    def of(
        cls, model: Callable[..., Any], shape: Sequence[int], *, batch_size: int | None = None, **arguments: Any
    ) -> Recipe:
        """The recipe of ``fastdiff.sample(model, shape, **arguments)``, which it checks, but does not run.

        batch_size: images at a time; None makes all at once. Tensors of B entries are cut along.

        Raises:
            TypeError, ValueError: as ``sample`` does; and ValueError for generator, noise_fn, cond_fn and resume, and
                for what else is no data.
        """
        bound = bind(model, shape, **arguments)
        sizes = list(check_shape("shape", shape))
        size = check_int("batch_size", max(1, sizes[0]) if batch_size is None else batch_size, 1, 1 << 24)
        told = {name: value for name, value in bound.arguments.items() if not _is_default(name, value)}
        for name in set(told) - {"model", "shape", *IN_THE_PLAN, *KEPT, *WITHOUT_EFFECT, *BESIDE}:
            raise ValueError(f"a recipe cannot hold {name}, which is no data")
        scale = told.pop("guidance_scale", 1.0)
        kept = {name: _plain(name, told[name]) for name in KEPT if name in told}
        if "seeds" not in kept:
            kept.setdefault("seed", 0)
        check_int("sample_offset", kept.get("sample_offset", 0), 0, (1 << 32) - sizes[0])  # of the last batch, too
        rest = {name: value for name, value in told.items() if name in (*IN_THE_PLAN, "device")}
        first = _batch(kept, 0, min(size, sizes[0]), sizes[0], device_of(model, told.get("device")))
        bound = bind(model, (min(size, sizes[0]), *sizes[1:]), guidance_scale=scale, **rest, **first)
        bound.apply_defaults()
        with plain_tensors():
            request = Request.of(*bound.args, **bound.kwargs)
        if not _is_default("guidance_scale", scale):
            kept["guidance_scale"] = _scale(scale, request)
        for name in ("start_step", "strength"):
            kept.pop(name, None)
        if request.start == len(request.plan):
            kept["strength"] = 0.0  # x_init itself
        elif request.start:
            kept["start_step"] = request.start
        return cls(
            shape=sizes, batch_size=size, plan=request.plan, arguments=kept, network=identify(model),
            made_with=environment(request.network.device),
        )  # fmt: skip

    def sample(self, model: Callable[..., Any], **how: Any) -> Tensor:
        """The images, float32 [B, …], of this or of another network; of several batches on the CPU.

        model: a network; of a recipe of words a pipeline (``fastdiff.load``).
        how: device, backend, cuda_graph, callback and progress, as ``fastdiff.sample`` has them.
        """
        count, size = self.shape[0], self.batch_size
        if count <= size:
            return self._draw(model, how, 0, count)
        begins = range(0, count, size)
        if how.get("progress"):
            from tqdm.auto import tqdm

            begins, how = tqdm(begins, unit="batch"), {**how, "progress": False}
        parts = []
        for begin in begins:
            n = min(size, count - begin)
            parts.append(self._draw(model, how, begin, n).cpu())
        return torch.cat(parts)

    def states(self, model: Callable[..., Any], **how: Any) -> Iterator[State]:
        """Every state on the way, as ``fastdiff.sample_iter`` yields them; of one batch alone. Of words: latents'."""
        if self.shape[0] > self.batch_size:
            raise ValueError(f"states are those of one batch; the recipe has {self.shape[0]} images in batches")
        network, shape, arguments = self._run(model, how, 0, self.shape[0])
        return sample_iter(network, shape, **arguments)

    def _draw(self, model: Any, how: Mapping[str, Any], begin: int, count: int) -> Tensor:
        network, shape, arguments = self._run(model, how, begin, count)
        drawn = sample(network, shape, **arguments)
        if self.words is None:
            return drawn
        images: Tensor = model.decode(drawn)
        return images

    def _run(
        self, model: Any, how: Mapping[str, Any], begin: int, count: int
    ) -> tuple[Any, Sequence[int], dict[str, Any]]:
        """The network, shape and arguments of ``sample`` for some of the images."""
        unknown = sorted(set(how) - set(WITHOUT_EFFECT))
        if unknown:
            raise TypeError(f"a recipe fixes {', '.join(unknown)}; it takes {', '.join(WITHOUT_EFFECT)}")
        device = device_of(model, how.get("device"))
        shape = [count, *self.shape[1:]]
        arguments = {**how, "sampler": self.plan, **_batch(self.arguments, begin, count, self.shape[0], device)}
        if self.words is None:
            return model, shape, arguments
        if not hasattr(model, "conditioned"):
            raise TypeError(
                f"the recipe is of words, which a pipeline of fastdiff.load draws; got {type(model).__name__}"
            )
        conditioned: tuple[Any, Sequence[int], dict[str, Any]] = model.conditioned(
            self.words.of(begin, count), shape[2:], arguments
        )
        return conditioned

    def __str__(self) -> str:
        count, first = self.shape[0], self.arguments.get("sample_offset", 0)
        seed = "a seed each" if "seeds" in self.arguments else f"seed {self.arguments['seed']}"
        numbers = f", numbers {first} … {first + count - 1}" if first else ""
        run = () if self.arguments.get("strength") == 0 else self.plan.rows[self.arguments.get("start_step", 0) :]
        calls = sum(row.runs_network for row in run)
        what = f"{count} image{'' if count == 1 else 's'} {self.shape[1:]}, {seed}{numbers}"
        if self.words is not None:
            what += f", of {self.words.prompts[0]!r}{' …' * (len(set(self.words.prompts)) > 1)}"
        return f"{what}, {self.plan.name} in {calls} network calls, {self.network.name.rpartition('.')[2]}"

    __repr__ = __str__

    # ---- as text

    def to_json(self, **more: Any) -> str:
        """The recipe as a JSON object in ASCII (format "fastdiff.recipe"), beside other fields of the object.

        ValueError where tensors of many megabytes make it longer than pictures keep.
        """
        fields = {name: msgspec.to_builtins(getattr(self, name)) for name in Head.__struct_fields__}
        if self.words is None:
            del fields["words"]
        content = {"format": FORMAT, "version": VERSION, **more, **fields, "plan": json.loads(self.plan.to_json())}
        text = json.dumps(content, separators=(",", ":"))
        if len(text) > MOST:
            raise ValueError(f"the recipe has {len(text):,} characters, and a picture keeps at most {MOST:,}")
        return text


def from_object(content: dict[str, Any]) -> Recipe:
    """The recipe of what ``to_json`` wrote, without the other fields; ValueError says what is wrong, and where."""
    if content.get("format") != FORMAT or type(content.get("version")) is not int or content["version"] != VERSION:
        got = f"{content.get('format')!r}, version {content.get('version')!r}"
        raise ValueError(f"its format must be {FORMAT!r}, version {VERSION}; got {got}")
    fields = {name: value for name, value in content.items() if name not in ("format", "version", "plan")}
    head = msgspec.convert(fields, Head)
    told = head.arguments
    unknown = sorted(set(told) - set(KEPT))
    if unknown:
        raise ValueError(f"it has arguments that a recipe does not keep: {', '.join(unknown)}")
    good = isinstance(told.get("seeds", []), list) and type(told.get("sample_offset", 0)) is int
    if not good or ("seeds" in told) == ("seed" in told) or told.get("model_dtype", "float32") not in _DTYPES:
        raise ValueError("its seed, seeds, sample_offset or model_dtype are not those of a run")
    if (words := head.words) is not None:
        counts = {len(words.prompts), head.shape[0]}
        negatives = 1 if words.negative_prompts is None else len(words.negative_prompts)
        if len(counts) > 1 or negatives not in (1, head.shape[0]):
            raise ValueError(f"its prompts are not those of {head.shape[0]} images")
    if unpacked_bytes(told) > _MOST_BYTES + 32 * math.prod(head.shape):
        raise ValueError(f"its tensors would take {unpacked_bytes(told):,} bytes")
    plan = Plan.from_json(json.dumps(content.get("plan")))
    return Recipe(**{name: getattr(head, name) for name in Head.__struct_fields__}, plan=plan)


def _is_default(name: str, value: Any) -> bool:
    default = 0 if name == "sample_offset" else SIGNATURE.parameters[name].default
    return value is None or (type(value) is type(default) and value == default)


def _plain(name: str, value: Any) -> Any:
    if name == "model_dtype":
        return str(value).removeprefix("torch.")
    if name == "seeds":  # any sequence of ints
        value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
        value = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return to_plain(name, value)


def _scale(scale: Any, request: Request) -> Any:
    """A guidance scale as data: one a network call, where it is a sequence or a function of the level."""
    if isinstance(scale, Real):
        return to_plain("guidance_scale", scale)
    scales = request.guidance.scales
    if len(set(scales)) < 2:
        return to_plain("guidance_scale", scales[0]) if scales else 1.0
    return to_plain("guidance_scale", list(scales))


def device_of(model: Any, device: Any = None) -> torch.device:
    """Where a network, or that of a pipeline or trained model, is, as ``sample`` finds it."""
    network = model if isinstance(model, torch.nn.Module) else getattr(model, "unet", model)
    return inspect_model(network, (1,), device, None).device


def _batch(kept: Mapping[str, Any], begin: int, count: int, total: int, device: torch.device) -> dict[str, Any]:
    """The kept arguments as ``sample`` takes them, of ``count`` images from number ``begin`` on."""
    arguments: dict[str, Any] = {}
    for name, value in kept.items():
        value = _cut(from_plain(value), begin, count, total, device)
        arguments[name] = tuple(value) if name in _PAIRS and isinstance(value, list) else value
    if "model_dtype" in arguments:
        arguments["model_dtype"] = getattr(torch, arguments["model_dtype"])
    if count < total and "seeds" in arguments:
        arguments["seeds"] = arguments["seeds"][begin : begin + count]
    elif count < total:
        arguments["sample_offset"] = arguments.get("sample_offset", 0) + begin
    return arguments


def _cut(value: Any, begin: int, count: int, total: int, device: torch.device) -> Any:
    """Tensors of one entry an image, cut to some of the images, on the network's device."""
    if isinstance(value, Tensor):
        cut = value[begin : begin + count] if value.ndim and len(value) == total and count < total else value
        return cut.to(device)
    if isinstance(value, dict):
        return {name: _cut(entry, begin, count, total, device) for name, entry in value.items()}
    return [_cut(entry, begin, count, total, device) for entry in value] if isinstance(value, list) else value
