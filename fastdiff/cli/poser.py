"""``fastdiff poser train``, ``run``, ``evaluate``, ``replay`` and ``serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.app import app, command
from fastdiff.cli.arguments import Device, Quiet, Threads

poser_app = typer.Typer(
    name="poser", no_args_is_help=True, rich_markup_mode=None,
    help="Learn which expert to call for which part of a request (Image-POSER), and call them.",
)  # fmt: skip
app.add_typer(poser_app)

Experts = Annotated[
    str,
    typer.Option(help='An experts.toml; or "emoji", the packaged model; "simulated", "simulated-delayed": by a table.'),
]
Policy = Annotated[
    Path | None,
    typer.Option(help="What `fastdiff poser train` wrote. [default: the hand-written rule of the experts' file]"),
]
Folder = Annotated[
    Path, typer.Option(help="The folder of run.jsonl and its pictures; what it paid for is not called again.")
]


@command(poser_app)
def train(
    out: Annotated[Path, typer.Option(help="The policy to write, a .safetensors file.")],
    experts: Experts,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 8000,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the requests and the exploration.")] = 0,
    algorithm: Annotated[str, typer.Option(help='"dqn"; or "qr-dqn" or "ppo", masked, of sb3-contrib.')] = "dqn",
    pool: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs of a request and a seed in all, whose calls --folder keeps. [default: no end]"),
    ] = None,
    log: Annotated[
        list[Path] | None, typer.Option(help="A run whose steps are learned from, too; may be repeated.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Learn from --log alone, without a call.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep every call in this folder's run.jsonl. [default: none]")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Learn which expert to call; the policy that did best on validation requests is kept."""
    from fastdiff.files import check_writable
    from fastdiff.ops.native import cpu_threads
    from fastdiff.poser import trainer
    from fastdiff.poser.poser import Poser

    check_writable(out, suffix=".safetensors")
    with cpu_threads(threads):
        poser = Poser.of(experts, folder=folder, device=device)
        policy = trainer.train(
            poser, steps=steps, seed=seed, algorithm=algorithm, pool=pool, logs=log or (), offline=offline,
            told=(lambda line: None) if quiet else typer.echo,
        )  # fmt: skip
    policy.save(out)
    if not quiet:
        typer.echo(f"{out}: a policy for {', '.join(poser.names)}")


@command(poser_app)
def run(
    request: Annotated[str, typer.Argument(help='Such as "draw a pilot, then make the skin dark".')],
    experts: Experts = "emoji",
    policy: Policy = None,
    out: Folder = Path("poser"),
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Carry out a request; the same command goes on where a run ended early. Open index.html in the folder."""
    from fastdiff.ops.native import cpu_threads
    from fastdiff.poser.ledger import End
    from fastdiff.poser.poser import Poser
    from fastdiff.poser.replay import told, write_page
    from fastdiff.poser.run import run as steps_of

    ended = None
    with cpu_threads(threads):
        poser = Poser.of(experts, folder=out, device=device)
        for line in steps_of(poser, _choose(poser, experts, policy), request, seed):
            ended = line
            if not quiet:
                typer.echo(told(line))
    page = write_page(out)
    if not quiet:
        typer.echo(f"{page}: the steps")
    if isinstance(ended, End) and ended.ends not in ("done", "horizon"):
        raise RuntimeError(f"{ended.ends}; the same command goes on from here")


@command(poser_app)
def evaluate(
    experts: Experts,
    policy: Policy = None,
    n: Annotated[int, typer.Option(min=1, help="Requests, about cells that are kept from training.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests and of what is drawn.")] = 0,
    second: Annotated[bool, typer.Option("--second", help="Rate the final pictures by another judge, too.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep every call in this folder's run.jsonl. [default: none]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was found to this .json file, too.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Carry out requests about cells that are kept from training; say how many are whole in the final picture."""
    from fastdiff.files import check_writable
    from fastdiff.ops.native import cpu_threads
    from fastdiff.poser import evaluate as evaluating
    from fastdiff.poser.config import Config, second_critic
    from fastdiff.poser.poser import Poser
    from fastdiff.training.folder import write_json

    if out is not None:
        check_writable(out, suffix=".json")
    config = Config.read(experts)
    with cpu_threads(threads):
        poser = Poser.of(config, folder=folder, device=device)
        choose = _choose(poser, experts, policy)
        other = second_critic(config.critic, poser.domain) if second else None
        if second and other is None:
            raise ValueError(f"--second: the critic {config.critic.kind!r} has no second judge; 'emoji' has")
        requests = poser.domain.requests(n, seed, held_out=True)
        scores = evaluating.evaluate(poser, choose, requests, seed=seed, second=other)
    if out is not None:
        told = {"experts": poser.names, "policy": str(policy or "hand rule"), "seed": seed}
        write_json(out, {"asked": told, **scores.to_json()})
    if not quiet:
        typer.echo(scores.table())


@command(poser_app)
def replay(run: Annotated[Path, typer.Argument(help="A run.jsonl, or its folder.")]) -> None:
    """Show a run again, without a call, and write its page."""
    from fastdiff.poser import replay as replaying

    typer.echo(replaying.replay(run))
    typer.echo(f"{replaying.write_page(run)}: the steps")


@command(poser_app)
def serve(
    experts: Experts = "emoji",
    policy: Policy = None,
    out: Folder = Path("poser"),
    host: Annotated[
        str, typer.Option(help="The address to serve at. Whoever reaches it calls the experts, which may cost.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to serve at; 0 takes a free one.")] = 8000,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Serve a local page where one types a request and watches its steps come; Ctrl-C ends it."""
    from fastdiff.ops.native import cpu_threads
    from fastdiff.poser import serve as serving
    from fastdiff.poser.poser import Poser

    with cpu_threads(threads):
        poser = Poser.of(experts, folder=out, device=device)
        choose = _choose(poser, experts, policy)
        serving.serve(
            poser, choose, host, port, lambda url: None if quiet else typer.echo(f"{url}: the page; Ctrl-C ends it")
        )


def _choose(poser: Any, experts: str, policy: Path | None) -> Any:
    """A policy of a file, or the hand-written rule."""
    from fastdiff.poser.config import Config
    from fastdiff.poser.policy import Policy as Learned
    from fastdiff.poser.run import hand_rule

    if policy is not None:
        learned = Learned.load(policy)
        learned.check(poser)
        return learned.choose
    rule = hand_rule(poser, Config.read(experts).hand)
    if rule is None:
        raise ValueError(f"--policy must be given: {experts} has no [hand] rule of the experts that there are")
    return rule
