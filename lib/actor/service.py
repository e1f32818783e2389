"""The trainer and its thread: TRL's own loop, fed with one finished generation batch at a time.

Owns when the thread does what: the batches, what is done between two of them, and what whoever waits is told. Must not
know processes, tasks, or where rollouts come from.

    python -c "from lib.actor import Actor; print(Actor('outputs/decisions').initialize())"
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib import WorkbenchError, memory, models, without
from lib.config import Config
from lib.generate import chat_of
from lib.roles import ActorError, ActorState, Canary, Method, Release, StepReport
from lib.runfolder import read_run
from lib.sync import canary_of, make_canaries, publish
from lib.task import Row
from lib.trainer import Batch, check_batch, make_trainer_class
from lib.training import (
    complete_checkpoint,
    explain,
    finish_tracker,
    kept_rows,
    last_checkpoint,
    make_trainer,
    save_trained,
    step_metrics,
    train_or_load,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

logger = logging.getLogger(__name__)


_SEEN = 64
"""Rows whose prompts canaries are made from."""

_LARGEST_BLOCK = 32
"""Tokens of a block of a worker's KV cache where nothing is configured, at most (16 on a GPU)."""

_FINISHING = 60.0
"""Seconds that a tracker gets to hand over what it holds."""


class _ClosedError(Exception):
    """Nothing more will be asked: leaves TRL's loop."""


class _Job(NamedTuple):
    """What the trainer's thread is asked for: to train on a batch, or to do something between two batches."""

    work: Batch | Callable[[], Any]
    phase: str
    answer: Future[Any]


class Actor:
    """The trainer and its thread. Methods take and return plain JSON values, and raise ActorError.

    The thread runs TRL's `train()`. Where TRL would sample, it answers for the batch before and waits for the next; all
    that touches the model in between (publishing, saving) runs there as well, on a model that nobody is changing.
    """

    def __init__(self, folder: str) -> None:
        self._run = read_run(folder)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._dead: ActorError | None = None
        self._busy: Future[Any] = Future()
        """The start, or the batch that is being trained on."""
        self._began = time.monotonic()
        self._consumed = 0
        self._records: list[dict[str, Any]] = []
        self._saved: Path | None = None
        self._resumed: Path | None = None
        """A checkpoint whose random numbers are still to be taken up."""
        self._model = ""
        self._trainer: Any = None
        self._canaries: list[list[int]] = []
        self._published: Release | None = None
        self._thread = threading.Thread(target=self._live, name="trainer", daemon=True)

    def initialize(self) -> dict[str, Any]:
        """Load the model and go on from the newest complete checkpoint; an ActorState. Once."""
        self._thread.start()
        self._busy.result()
        return self.state()

    def state(self) -> dict[str, Any]:
        """The ActorState, also in the middle of a step."""
        state = self._trainer.state
        ends = tuple(self._trainer.eos_token_ids)
        return ActorState(state.global_step, state.max_steps, self._consumed, self._model, ends)._asdict()

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Train on one generation batch (lib.trainer.Batch as a dict), all of its optimizer steps; a StepReport.

        Raises BatchError where it is not one (nothing has happened then), ActorError where training broke on it.
        """
        ready = Batch(**batch)
        check_batch(ready, self._trainer.args.generation_batch_size)
        report: StepReport = self._ask(ready, "loss")
        return report._asdict()

    def publish(self, version: int, method: Method) -> dict[str, Any]:
        """Write the current weights as a version; a Release."""
        release: Release = self._ask(lambda: self._publish(version, method), "publishing weights")
        return release._asdict()

    def canary(self, version: int) -> dict[str, Any]:
        """What the current weights, published as this version, say about the canaries; a Canary."""
        canary: Canary = self._ask(lambda: self._canary(version), "answering canaries")
        return canary._asdict()

    def save_checkpoint(self, logs: Mapping[str, int] | None = None) -> str:
        """A complete checkpoint of the current step; its folder. `logs`: see ActorRole."""
        return str(self._ask(lambda: self._save(self._run.log_sizes() if logs is None else logs), "saving"))

    def save_trained(self) -> str:
        """The adapter, or the whole model, in the run folder; its path."""
        return str(self._ask(lambda: save_trained(self._trainer, self._run), "saving"))

    def close(self) -> None:
        """End the thread where it waits; a step that has begun is not waited for."""
        self._jobs.put(None)
        if self._busy.done() and self._thread.is_alive():
            self._thread.join(_FINISHING)

    # the caller's side ------------------------------------------------------------------------------------------------
    def _ask(self, work: Batch | Callable[[], Any], phase: str) -> Any:
        job = _Job(work, phase, Future())
        with self._lock:
            if self._dead:
                raise self._dead
            self._jobs.put(job)
        return job.answer.result()

    # the trainer's thread ---------------------------------------------------------------------------------------------
    def _live(self) -> None:
        try:
            checkpoint = last_checkpoint(self._run)
            self._trainer = self._load()
            if checkpoint:
                logger.info("training: resuming from %s", checkpoint.name)
                self._saved = self._resumed = checkpoint
                self._consumed = json.loads((checkpoint / "actor.json").read_text())["consumed"]
            train_or_load(self._trainer, checkpoint)
            while True:
                self._wait().answer.set_exception(ActorError(f"training is over: all {self._step} steps are done"))
        except _ClosedError:
            finish_tracker(self._run.config)
            self._die(ActorError("the actor is closed"))
        except BaseException as error:  # the edge of the thread: whatever it is, whoever waits has to be told
            logger.error("training broke", exc_info=error)
            self._die(self._reason(error, self._trainer.phase if self._trainer else "loading the model"))

    def _load(self) -> Any:
        config = self._run.config
        with without("vllm"):  # TRL imports all of it where it is installed, and samples nothing here
            make_trainer_class()
        rows = self._run.read_rows("train")
        self._model = models.resolve_model(config, rows)
        if config.model.name != models.STARTER:  # a toy fits anywhere
            memory.check(config, models.load_shape(self._model, config.model), samples_here=False)
        tokenizer = models.load_tokenizer(self._model, config.model)
        model = models.load_model(self._model, config.model, train_all=not config.lora.enabled, purpose="train")
        # TRL sees as many rows as there are, for its epochs; which of them a batch holds is decided elsewhere.
        chat = chat_of(config.as_served, model, tokenizer)
        kept = kept_rows(rows, chat, config)
        prompts = [chat.prompt_ids(rows[index]["prompt"], rows[index].get("tools")) for index in kept[:_SEEN]]
        self._canaries = make_canaries(prompts, *_canary_lengths(config, model))
        trainer = make_trainer(
            config, model, tokenizer, range(len(kept)), self._run, use_vllm=False, save_strategy="no"
        )
        trainer.sampled_elsewhere = True
        trainer.source = self._next_batch
        trainer.add_callback(self._collector())
        return trainer

    def _collector(self) -> TrainerCallback:
        from transformers import TrainerCallback

        records = self._records

        class Collect(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
                metrics = step_metrics(logs)
                if metrics is not None:
                    records.append({"step": state.global_step, **metrics})

        return Collect()

    def _next_batch(self, trainer: Any, rows: list[Row]) -> Batch:
        """TRL wants samples: the batch before is done, and the next one is waited for."""
        if self._resumed:
            # Saved at this very place: what was drawn on the way here (a new epoch's seed) is drawn already.
            trainer._load_rng_state(str(self._resumed))
            self._resumed = None
        job = self._wait()
        assert isinstance(job.work, Batch)
        self._busy, self._began = job.answer, time.monotonic()
        self._consumed += 1
        return job.work

    def _wait(self) -> _Job:
        """Answer for what is done, then do what is asked until it is a batch."""
        self._settle()
        while (job := self._jobs.get()) is not None:
            if isinstance(job.work, Batch):
                return job
            before, self._trainer.phase = self._trainer.phase, job.phase
            try:
                job.answer.set_result(job.work())
            except Exception as error:  # the asker's; the model is as it was, and training can go on
                logger.error("%s failed", job.phase, exc_info=error)
                job.answer.set_exception(self._reason(error, job.phase))
            self._trainer.phase = before
        raise _ClosedError

    def _settle(self) -> None:
        if self._busy.done():
            return
        records, seconds = list(self._records), time.monotonic() - self._began
        self._records.clear()
        metrics = {name: value for name, value in (records or [{}])[-1].items() if name != "step"}
        self._busy.set_result(StepReport(self._step, metrics, seconds, records))

    def _die(self, reason: ActorError) -> None:
        with self._lock:
            self._dead = reason
            waiting = [self._busy]
            with suppress(queue.Empty):
                while True:
                    job = self._jobs.get_nowait()
                    waiting += [job.answer] if job else []
        for answer in waiting:
            if not answer.done():
                answer.set_exception(reason)

    def _reason(self, error: BaseException, phase: str) -> ActorError:
        """The error as the orchestrator is told it."""
        reason: ActorError | None = error if isinstance(error, ActorError) else None
        if reason is None:
            text = None
            with suppress(OSError):
                text = explain(error, phase, self._run.config, self._run)
            if text is None:
                text = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
            reason = ActorError(text)
            reason.__cause__ = error
        return reason

    @property
    def _step(self) -> int:
        return int(self._trainer.state.global_step)

    # what is done between two batches ---------------------------------------------------------------------------------
    def _save(self, logs: Mapping[str, int]) -> Path:
        """TRL's checkpoint, with the batches that it has consumed; the last one where no step was done since."""
        if self._saved is None or self._saved.name != f"step-{self._step}":
            self._trainer._save_checkpoint(self._trainer.model, trial=None)
            self._saved = complete_checkpoint(self._run, self._step, logs, actor={"consumed": self._consumed})
        return self._saved

    def _publish(self, version: int, method: Method) -> Release:
        """The weights as a folder.

        Memory beyond the model: a few merged weights at a time for `reload` and `volume`, the adapter for `lora`; for
        `checkpoint`, and where transformers renames weights (experts), one merged copy of all weights.
        """
        config, trainer = self._run.config, self._trainer
        release = publish(
            trainer.model,
            self._run.folder / "weights",
            version=version,
            step=self._step,
            method=method,
            run=self._run.name,
            tokenizer=trainer.processing_class,
            # Weights that are all trained are float32 here, for small updates; workers serve the model's own type.
            dtype=None if config.lora.enabled else models.torch_dtype(config.model),
        )
        self._published = release
        return release

    def _canary(self, version: int) -> Canary:
        """With dropout off, drawing no random numbers. Memory: the logits of some 40 tokens, in float32, twice."""
        published = self._published
        if published is None or (published.version, published.step) != (version, self._step):
            last = f"version {published.version} of step {published.step}" if published else "none"
            raise ActorError(
                f"the canary of weights version {version} is asked for at step {self._step}; published last: {last}"
            )
        return canary_of(self._trainer.model, version, self._canaries)


def _canary_lengths(config: Config, model: PreTrainedModel) -> tuple[int, int]:
    """Tokens of a block of the workers' KV cache, and tokens that their engines take."""
    engine = config.sampling.vllm
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some models have no limit
    needed = config.sampling.prompt_limit + config.sampling.completion_limit
    return engine.block_size or _LARGEST_BLOCK, engine.max_length or context or needed
