"""`solve`: a run's networks simplify an expression that a person names."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from distributed_muzero.cli import checkpoints, options
from distributed_muzero.cli.elsewhere import in_environment, read_kwargs
from distributed_muzero.cli.opponents import with_search
from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.errors import ConfigError, DistributedMuZeroError, EnvironmentFailure, RunError

if TYPE_CHECKING:
    from distributed_muzero.run_folder import RunFolder
    from distributed_muzero.workers.solving import Branch, Step

FAMILY = "mathy:"
FIXED = {"problem", "max_nodes", "sound"}  # kwargs of the environment that aren't anybody's choice here
LOOKED_THROUGH = 1000  # of the newest runs, for one to solve with


class SolveCommand(TyperCommand):
    """Tells what to do where a problem such as -4x was taken for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # that of click, of which newer typers have a copy
            option = getattr(error, "option_name", "")
            if not option.startswith("-") or option.startswith("--"):
                raise
            problem = next(word for word in words if word.startswith(option))
            raise ConfigError(
                f"{problem!r} begins with a minus and was taken for an option; a problem goes last and behind --: "
                f'solve -- "{problem}"'
            ) from error


def solve(
    problem: Annotated[
        str, typer.Argument(help="Such as '4x + 2x + 7 - 3'. One that begins with a minus goes behind --.")
    ],
    run: Annotated[
        str | None,
        typer.Option(
            help="A run's name, or the path or URI of its folder; the newest one of a mathy: environment unless given."
        ),
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(metavar="mathy:…", help="Whose rules and whose aim count; the run's own unless given."),
    ] = None,
    env_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="For --env, such as '{preferred_term_commute: true}'; the run's own aren't used there.",
        ),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(min=1, help="After so many, it isn't solved; what the environment says unless given."),
    ] = None,
    simulations: Annotated[int | None, typer.Option(min=1, help="In place of the run's own.")] = None,
    search_policy: options.SearchPolicy = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="With each step, what the search tried most often.")
    ] = False,
    checkpoint: checkpoints.Checkpoint = checkpoints.BEST,
    runs_dir: options.RunsDir = options.RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Solve a problem of algebra with a run's networks, step by step: greedy and without noise, as in an evaluation.

    Also a problem that isn't solved ends in exit code 0: how it went is what is printed, as `solved` in --json.
    """
    from distributed_muzero.algorithm.acting import Game
    from distributed_muzero.cli.solve_view import View
    from distributed_muzero.workers.actor import PolicyModel
    from distributed_muzero.workers.builder import Builder
    from distributed_muzero.workers.solving import solve as steps_of

    folder = with_search(find_run(run, runs_dir), simulations, search_policy)
    trained_on = folder.config.environment.id
    folder = with_problem(folder, problem, env, read_kwargs(env, env_kwargs), max_moves)
    saved = checkpoints.load_checkpoint(folder, checkpoint)
    config, builder = folder.config, Builder(folder.config, folder.name)
    model = PolicyModel(builder.networks())
    model.load_checkpoint(saved)
    assert model.search_model is not None
    with closing(builder.environment()) as environment:
        game = Game(environment, config.environment.history_length, seed=0)
        view = View(problem)
        if not as_json:
            title = f"{config.environment.id}, {folder.name} at {saved.path.name}"
            view.introduce(title, config.search, game.env.written)
        discount = config.algorithm.discount
        steps = list(steps_of(game, model.search_model, config.search, discount, with_trees=tree))
        if as_json:
            made = [as_dict(step, tree) for step in steps]
            print(json.dumps({"problem": problem, "solved": game.env.won, "steps": made}))
            return
        view.tell(steps)
        view.tell_end(len(steps), game.env.won, game.env.end, trained_on)


def find_run(run: str | None, runs_dir: str) -> RunFolder:
    """The run of that name; without one, the newest run of a mathy: environment that has a checkpoint.

    Raises RunError.
    """
    from distributed_muzero.mirror.uri import is_uri
    from distributed_muzero.workers.runs import names_in, open_to_read

    if run is not None:
        return open_to_read(run, runs_dir, exclude=("replay",))
    if is_uri(runs_dir):  # to look through them, all would be fetched
        raise RunError(f"no run is named, and the runs lie at {runs_dir}: name one with --run")
    for name in names_in(runs_dir)[:LOOKED_THROUGH]:
        with suppress(DistributedMuZeroError):  # of others' runs, any may be damaged
            folder = open_to_read(name, runs_dir)
            if is_mathys(folder.config.environment.id) and any(folder.checkpoints.glob("step_*/DONE")):
                print(
                    f"with run {name}, the newest of a {FAMILY} environment; --run names another",
                    file=sys.stderr,
                )
                return folder
    raise RunError(
        f"no run of a {FAMILY} environment with a checkpoint in {runs_dir}: train one, such as by `train --env "
        f"{FAMILY}poly-easy --set network.name=node_sequence`, or name one with --run or --runs-dir"
    )


def with_problem(
    folder: RunFolder, problem: str, env: str | None, env_kwargs: Mapping[str, Any], max_moves: int | None
) -> RunFolder:
    """The same run in an environment of this one problem, with room for it: as much as its networks can read.

    Raises as `in_environment` does, and ConfigError for an environment that isn't mathy's.
    """
    from distributed_muzero.environments.registry import make_environment
    from distributed_muzero.workers.builder import Builder
    from distributed_muzero.workers.solving import room_for

    own = folder.config.environment
    id = own.id if env is None else env
    if not is_mathys(id):
        whose = f"run {folder.name} plays {id}" if env is None else f"--env {id}"
        raise ConfigError(f"{whose}: expected one of mathy's environments, such as {FAMILY}poly-easy")
    if fixed := FIXED & env_kwargs.keys():
        raise ConfigError(f"--env-kwargs: {', '.join(sorted(fixed))}: solve itself sets that; leave it out")
    given = own.kwargs if env is None else env_kwargs
    kwargs = {**given, "problem": problem, "sound": True}
    if max_moves is not None:
        kwargs["max_moves"] = max_moves

    def section(max_nodes: int) -> EnvironmentConfig:
        return own.model_copy(update={"id": id, "kwargs": {**kwargs, "max_nodes": max_nodes}})

    own_max_nodes = Builder(folder.config, folder.name).spec.observation_shape[0]
    max_nodes = room_for(lambda max_nodes: make_environment(section(max_nodes)), own_max_nodes)
    try:
        return in_environment(folder, id, section(max_nodes).kwargs)
    except EnvironmentFailure:  # networks for one length have no more room, which may be enough
        with suppress(EnvironmentFailure):
            return in_environment(folder, id, section(own_max_nodes).kwargs)
        raise


def is_mathys(id: str) -> bool:
    return id.startswith(FAMILY)


def as_dict(step: Step, with_tree: bool) -> dict[str, Any]:
    told = {"rule": step.rule, "node": step.node, "expression": step.expression, "value": step.value}
    return {**told, "tree": list(map(branch_as_dict, step.tree))} if with_tree else told


def branch_as_dict(branch: Branch) -> dict[str, Any]:
    return {**branch._asdict(), "branches": list(map(branch_as_dict, branch.branches))}
