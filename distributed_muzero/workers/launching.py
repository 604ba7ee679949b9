"""One launch of a run, from its folder to its ending. Who launches it says where it plays, and takes its turns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import DistributedMuZeroError, RunError, RunIsOver, first_line
from distributed_muzero.observability.exporter import check_port, serve_metrics
from distributed_muzero.observability.progress import Progress
from distributed_muzero.run_folder import RunFolder
from distributed_muzero.workers.bookkeeper import Bookkeeper, why_over, why_over_by
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.importing import import_stored
from distributed_muzero.workers.layout import lay_out
from distributed_muzero.workers.run_copy import Copies
from distributed_muzero.workers.run_state import STOPPED, Ending
from distributed_muzero.workers.runs import Opened

RELOCATED_VERSIONS = 10**6  # of the weights: more than a launch gives out between two copies


class Loop(Protocol):
    """`workers.local.turns`, or `cluster.session.turns`."""

    def __call__(
        self, config: Config, run_name: str, book: Bookkeeper, stop_requested: Callable[[], bool], /
    ) -> Generator[None, None, Ending]: ...


Turns = Generator[Bookkeeper, None, tuple[Bookkeeper, Ending] | None]


def launch(
    run: Opened,
    config: Config,
    in_process: bool,
    loop: Loop,
    progress: Progress,
    stop_requested: Callable[[], bool],
    datasets: Sequence[Path | str] = (),
    check: Callable[[Config], object] = lambda config: None,
    evaluates: bool = True,
) -> Turns:
    """Trains a run from where it stands with the `config`; yields its book before the loop and after each of its turns.

    in_process: whether this process is the one that plays and learns.   datasets: to be imported first.
    check: of the config, before anything is changed.   evaluates: whether the loop does so on its way.

    Returns None if a stop was asked for before anything was played. To close the generator is to end the launch at
    once, without a checkpoint. Raises RunIsOver, RunError, and what is raised in the loop.
    """
    folder, copies = run
    folder = folder.with_config(config)
    check_not_over(folder.name, why_over(folder))
    if copies is None:  # else `check_can_begin` has done so
        check(config)
    with serve_metrics(folder) as exporter:
        with starting(folder, copies):
            if copies is None:
                lay_out(folder.replay, config)
            folder.write_config()
            datasets = datasets or folder.read_datasets()
            if copies and (in_process or datasets):
                # What is fetched may be much: meanwhile the run's own copy shows that somebody is at work.
                with copies.keep_pushing(once_more=False):
                    copies.claim_shards(config.replay.num_shards)
            import_stored(folder, datasets, copies, progress.message, stop_requested)
        if stop_requested():
            folder.write_counts("stopped", STOPPED.reason)
            if copies:
                copies.push()
            return None
        if copies:
            copies.push()
        launch = folder.begin_launch(RELOCATED_VERSIONS if copies and copies.was_fetched else 0)
        if copies:
            copies.settle()
            # Before anything is played: whoever goes on from the copy gives other ids than this launch, and sees it.
            copies.push()
            if not in_process:
                copies.release_shards()
        book = Bookkeeper(
            config,
            folder,
            progress,
            launch=launch,
            copies=copies,
            exporter=exporter,
            evaluates=evaluates,
        )
        return book, (yield from _play(book, loop, stop_requested))


def _play(
    book: Bookkeeper, loop: Loop, stop_requested: Callable[[], bool]
) -> Generator[Bookkeeper, None, Ending]:
    """One launch of the run, to its end."""
    progress, folder = book.progress, book.folder
    progress.message(f"run {folder.name} in {folder.place}")
    if book.launch.number:
        progress.message(
            f"going on from {book.state.env_steps} environment steps, "
            f"{book.state.learner.learner_steps} learner steps"
        )
    progress.message("starting its workers")
    status, reason = "failed", None
    # The last copy holds what `close` writes.
    with book.copies.keep_pushing() if book.copies else nullcontext():
        turns = loop(book.config, folder.name, book, stop_requested)
        try:
            yield book
            ending = yield from _told(turns, book)
            status, reason = "stopped" if ending.was_stopped else "finished", ending.reason
        except GeneratorExit:
            status, reason = (
                "stopped",
                "it was ended at once: what was learnt since the last checkpoint is lost",
            )
            raise
        except Exception as error:
            reason = first_line(error)
            raise
        finally:
            turns.close()
            book.close(status, reason)
    book.tell_of_copies()
    progress.message(f"{status} after {book.state.seconds:.1f} s: {ending.reason}")
    return ending


def _told(turns: Generator[None, None, Ending], book: Bookkeeper) -> Generator[Bookkeeper, None, Ending]:
    """The turns, each with the book."""
    while True:
        try:
            next(turns)
        except StopIteration as over:
            return over.value
        yield book


def check_can_begin(folder: RunFolder, counts: Mapping[str, Any]) -> None:
    """Before a run at a URI is taken over. Raises RunIsOver, RunError for a port in use, and as `check_parts` does."""
    check_port(folder.config.metrics)
    check_not_over(folder.name, why_over_by(folder.config.run, counts))
    check_parts(folder.config)


def check_not_over(run: str, reason: str | None) -> None:
    """reason: the limit that the run has reached. Raises RunIsOver if there is one."""
    if reason:
        raise RunIsOver(
            f"run {run} is over: {reason}; resume it with a higher limit to go on, or with none, such as "
            "--set run.stop_at_return=null"
        )


@contextmanager
def starting(folder: RunFolder, copies: Copies | None) -> Iterator[None]:
    """While the replay is made ready. The run's status, and its copy's, no longer tells of an earlier launch."""
    try:
        folder.write_counts("starting")
        if copies:
            # Before an import, which may take long: whoever finds the copy sees that somebody is at work.
            copies.push()
        yield
    except DistributedMuZeroError as error:
        with suppress(RunError):
            folder.write_counts("failed", first_line(error))
            if copies:
                copies.push()
        raise


def check_parts(config: Config) -> EnvironmentSpec:
    """That environments, networks and opponent of a run can be made. Raises ConfigError and EnvironmentFailure."""
    from distributed_muzero.networks.registry import check_name, check_observations

    check_name(config.network.name)
    builder = Builder(config, "")
    builder.check_stages()
    check_observations(config.network.name, builder.spec, config.environment.history_length)
    if config.evaluator.opponent != "random":
        from distributed_muzero.workers.match_evaluator import make_opponent

        make_opponent(config.evaluator.opponent, builder.environment)
    return builder.spec
