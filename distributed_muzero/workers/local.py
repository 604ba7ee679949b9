"""The whole loop in one process, without Ray: for tests, for debugging, for tiny machines."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing

from distributed_muzero import checkpoint
from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.types import Batch, Episode
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.evaluator import Evaluator
from distributed_muzero.workers.learner import Learner
from distributed_muzero.workers.learner_group import DeviceLost
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.reanalyser import Reanalyser
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from distributed_muzero.workers.run_state import STOPPED, Crew, Ending, ReanalyseReport

MAX_LEARNER_STEPS_A_TURN = 32


def turns(
    config: Config, run_name: str, book: Bookkeeper, stop_requested: Callable[[], bool]
) -> Generator[None, None, Ending]:
    """Plays and learns until a limit of `config.run` or a request to stop, a turn of the loop at a time."""
    builder = Builder(config, run_name)
    with ExitStack() as opened:  # each is closed, also when another can't be, or can't be made
        shards = [
            opened.enter_context(closing(builder.replay_shard(index, book.folder.replay)))
            for index in range(config.replay.num_shards)
        ]
        learner = opened.enter_context(closing(builder.learner()))
        evaluator = opened.enter_context(closing(builder.evaluator()))
        saved = checkpoint.latest_checkpoint(book.folder.checkpoints)
        learner.begin(saved and saved.tensors, saved and saved.state, book.first_version)
        actors = [
            opened.enter_context(closing(builder.actor(index, book.next_incarnation(index))))
            for index in range(config.actor.num_actors)
        ]

        def insert(offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
            return {index: shards[index].insert(episodes) for index, episodes in offers.items()}

        reanalysers = builder.reanalysers()
        give_back = (
            (lambda shard, update: shards[shard].update_priorities(update))
            if config.replay.priority_exponent > 0
            else None
        )

        def is_over() -> bool:
            """Asked between steps: on a busy machine a turn takes long."""
            return stop_requested() or book.state.is_out_of_time

        outboxes = [Outbox(insert, len(shards), config.actor.max_unacknowledged) for _ in actors]
        try:
            while True:
                for actor, outbox in zip(actors, outboxes, strict=True):
                    if is_over():
                        break
                    actor.set_weights(*learner.weights(), learner.num_steps)
                    actor.set_stage(book.curriculum.stage)
                    book.add_actor_report(actor.play(outbox, iter((False, True)).__next__, no_sleep))
                for reanalyser in reanalysers:
                    reanalyser.set_weights(*learner.weights())
                    book.state.add_reanalyse_report(reanalyse(reanalyser, shards))
                book.add_learner_report(learner.learn(ready_batches(shards, is_over), give_back))
                stats = [shard.stats() for shard in shards]
                crew = Crew(
                    len(actors),
                    len(actors),
                    reanalysers=len(reanalysers),
                    unacknowledged=sum(map(len, outboxes)),
                )
                if book.tick(stats, crew):
                    for shard in shards:
                        shard.flush()
                if stop_requested():
                    save(learner, book)
                    return STOPPED
                reason = book.state.stop_reason()
                is_last = reason and learner.num_steps > book.evaluated_step
                if is_last or book.evaluation_is_due(learner.num_steps):
                    evaluate(learner, evaluator, book)
                    reason = reason or book.state.stop_reason()
                elif book.checkpoint_is_due(learner.num_steps):
                    save(learner, book)
                if reason:
                    return Ending(reason)
                yield
        except DeviceLost as error:
            save(learner, book)  # its own weights are whole
            raise RunError(f"{error}. What was learnt is saved: resume goes on from there") from None


def reanalyse(reanalyser: Reanalyser, shards: list[ReplayShard]) -> ReanalyseReport:
    """One turn: about a batch from every shard that may give one."""
    return reanalyser.work(
        lambda shard, number: shards[shard].take_for_reanalyse(number, reanalyser.version),
        lambda shard, targets: shards[shard].update_targets(targets),
        iter([False] * len(shards) + [True]).__next__,
        no_sleep,
    )


def ready_batches(shards: list[ReplayShard], is_over: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
    """Batches from the shards in turn, until none has any, the actors' turn has come, or all is over."""
    for _ in range(MAX_LEARNER_STEPS_A_TURN):
        batches = [batch for shard in shards if not is_over() and (batch := shard.sample()) is not None]
        if not batches:
            return
        yield from batches


def save(learner: Learner, book: Bookkeeper) -> None:
    """Writes a checkpoint, if there is anything to lose."""
    if learner.num_steps:
        book.write_checkpoint(*learner.state())


def evaluate(learner: Learner, evaluator: Evaluator, book: Bookkeeper) -> None:
    """Writes a checkpoint and plays with just what it holds."""
    arrays, state = learner.state()
    path = book.write_checkpoint(arrays, state)
    book.begin_evaluation(learner.num_steps)
    seeds = (evaluator.config.run.seed, learner.num_steps)
    rivals = book.league.rivals(learner.num_steps)
    result = evaluator.assess(learner.version, learner.average_weights(), seeds, rivals)
    book.add_evaluation(result, path, state["learner_steps"])


def no_sleep(seconds: float) -> None:
    """Nobody to wait for: in one process, the others have their turn when this one returns."""
