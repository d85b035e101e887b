"""A step of a sampling by itself, run as ``fastdiff.sample`` runs its rows: on a GPU from a captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.sampling.graph import stepping
from fastdiff.sampling.model import eval_mode
from fastdiff.sampling.request import Request
from fastdiff.sampling.stepper import Stepper


def prepared(
    model: nn.Module, shape: tuple[int, ...], number: int, kwargs: dict[str, Tensor], graph: bool = False
) -> Stepper:
    """What ``fastdiff.sample`` makes of its arguments before its first row: DDPM of ``number`` steps."""
    schedule = fastdiff.NoiseSchedule.linear(number)
    arguments = inspect.signature(fastdiff.sample).bind(
        model, shape, schedule=schedule, clip=1.0, seed=1, model_kwargs=kwargs, cuda_graph=graph
    )
    arguments.apply_defaults()
    return Stepper(Request.of(*arguments.args, **arguments.kwargs))


def on_gpu(model: nn.Module) -> bool:
    """Whether a model's steps are captured."""
    return next(model.parameters()).device.type == "cuda"


def steps(model: nn.Module, shape: tuple[int, ...], number: int, kwargs: dict[str, Tensor]) -> Callable[[], None]:
    """What runs the next step at each call. The last is followed by the first of a new sampling."""

    def rows() -> Iterator[None]:
        while True:
            run = prepared(model, shape, number, kwargs, on_gpu(model))
            with eval_mode(model), stepping(run) as step:
                for index in range(number):
                    step(index)
                    yield

    following = rows()

    @torch.no_grad()
    def call() -> None:
        next(following)

    return call


@torch.no_grad()
def first_step(model: nn.Module, shape: tuple[int, ...], number: int, kwargs: dict[str, Tensor]) -> Tensor:
    """The state after the first step of ``steps``."""
    run = prepared(model, shape, number, kwargs, on_gpu(model))
    with eval_mode(model), stepping(run) as step:
        step(0)
    return run.x


@torch.no_grad()
def eager_step(model: nn.Module, shape: tuple[int, ...], number: int, kwargs: dict[str, Tensor]) -> Tensor:
    """The same state, run eagerly."""
    run = prepared(model, shape, number, kwargs)
    with eval_mode(model):
        run.step(0)
    return run.x
