"""The rollout worker: one thread steps the engine; calls side by side share its steps.

Owns the queue of calls, the wait before a swap of weights, and what a call gets when the engine breaks. Must not know
the wire, tasks, or where it runs.

    python -c "from lib.rollout_worker.worker import RolloutWorker; help(RolloutWorker)"
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lib.roles import Facts, Release, Sampled, Sampling
from lib.rollout_worker.engine import Engine, EngineError, begin_canary, read_canary, sampling_parameters
from lib.rollout_worker.settings import EngineSettings
from lib.sync import SyncError, check

logger = logging.getLogger(__name__)


class _Asked:
    """Requests of one call; done when the last of them is."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = prompts
        self.future: Future[Any] = Future()
        self.keys: list[list[str]] = []
        """Of each prompt, its requests."""
        self.outputs: dict[str, Any] = {}
        self.version = 0

    def begin(self, engine: Engine) -> None:
        for index, prompt in enumerate(self.prompts):
            self.keys.append(self.requests(engine, prompt, index))

    def requests(self, engine: Engine, prompt: Sequence[int], index: int) -> list[str]:
        raise NotImplementedError

    def read(self, prompt: Sequence[int], outputs: Sequence[Any]) -> Any:
        raise NotImplementedError

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys for key in keys]

    def result(self) -> list[Any]:
        return [
            self.read(prompt, [self.outputs[key] for key in keys])
            for prompt, keys in zip(self.prompts, self.keys, strict=True)
        ]


class _Turns(_Asked):
    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        super().__init__(prompts)
        self.sampling = sampling

    def requests(self, engine: Engine, prompt: Sequence[int], index: int) -> list[str]:
        return [engine.submit(prompt, **sampling_parameters(self.sampling, index))]

    def read(self, prompt: Sequence[int], outputs: Sequence[Any]) -> Sampled:
        answer = outputs[0].outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a turn for the reason {answer.finish_reason!r}")
        ids = list(answer.token_ids)
        logprobs = [float(row[token].logprob) for row, token in zip(answer.logprobs, ids, strict=True)]
        return Sampled(ids, logprobs, answer.finish_reason, self.version)


class _Canaries(_Asked):
    def requests(self, engine: Engine, prompt: Sequence[int], index: int) -> list[str]:
        return begin_canary(engine, prompt)

    def read(self, prompt: Sequence[int], outputs: Sequence[Any]) -> list[float]:
        return read_canary(outputs, prompt)


class _Swap:
    """New weights: begun when all before it is done, and nothing after it begins before."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.future: Future[Any] = Future()


_Job = _Asked | _Swap


class RolloutWorker:
    """The worker as it is served: methods take and return plain JSON values."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the engine on the base policy. Raises what vLLM raises."""
        self.settings = settings
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._backlog: deque[_Job] = deque()
        self._running: list[_Asked] = []
        self._engine: Engine | None = None
        self._broken = "it is starting"
        """Why it cannot answer, where it has no engine that can."""
        self._version = 0
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=(started,), name="engine", daemon=True)
        self._thread.start()
        started.result()

    async def generate(self, prompts: list[list[int]], sampling: Mapping[str, Any]) -> list[list[Any]]:
        """One turn for every prompt; the fields of Sampled. `sampling`: the fields of Sampling."""
        turns = await self._ask(_Turns(prompts, Sampling(**sampling)))
        return [list(turn) for turn in turns]

    async def update_weights(self, release: Mapping[str, Any]) -> float:
        """Serve this version from now on; seconds that it took once the turns before it were done.

        Raises SyncError where it refuses them: then it serves what it served before.
        """
        return float(await self._ask(_Swap(Release(**release))))

    async def canary(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of each prompt's tokens after the first, as the engine serves them now."""
        return list(await self._ask(_Canaries(prompts)))

    def facts(self) -> dict[str, Any]:
        """What the engine came to be; the fields of Facts."""
        engine = self._working()
        return Facts(self._version, engine.max_length, engine.block_size, self.settings.dtype, engine.on_gpu)._asdict()

    def close(self) -> None:
        """End the thread and free the engine; what has not been answered fails."""
        self._jobs.put(None)
        self._thread.join()

    async def _ask(self, job: _Job) -> Any:
        if not self._thread.is_alive():
            raise EngineError("the worker is closed")
        self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    # the engine's thread ----------------------------------------------------------------------------------------------
    def _live(self, started: Future[None]) -> None:
        try:
            self._engine = Engine(self.settings)
            self._engine.warm_up()
        except BaseException as error:  # the edge of the thread: whoever waits has to be told
            started.set_exception(error)
            return
        self._broken = ""
        started.set_result(None)
        while self._take():
            try:
                self._begin()
                if self._running:
                    self._step()
            except Exception as error:  # whatever it is, this thread goes on: only a new engine can help
                logger.exception("the engine broke")
                self._break(f"the engine broke: {type(error).__name__}: {error}")
        self._fail([*self._running, *self._backlog], "the worker is closed")
        if self._engine:
            self._engine.shutdown()

    def _take(self) -> bool:
        """Take in what was asked; wait for it where there is nothing else to do. False at the end."""
        while True:
            try:
                job = self._jobs.get(block=not self._running and not self._backlog)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._backlog.append(job)

    def _begin(self) -> None:
        """Begin what may begin, in the order of asking."""
        while self._backlog:
            job = self._backlog[0]
            if isinstance(job, _Swap):
                if self._running:
                    return
                self._backlog.popleft()
                self._swap(job)
            else:
                self._backlog.popleft()
                self._admit(job)

    def _admit(self, job: _Asked) -> None:
        if job.future.cancelled():
            return
        try:
            engine = self._working()
            job.version = self._version
            job.begin(engine)
        except Exception as error:  # one call's own: the others go on
            if job.keys and self._engine:
                self._engine.abort(job.all_keys())
            _settle(job.future, error)
            return
        if job.all_keys():
            self._running.append(job)
        else:
            _settle(job.future, job.result())

    def _step(self) -> None:
        self._drop_given_up()
        outputs = {output.request_id: output for output in self._working().step()}
        for job in list(self._running):
            job.outputs |= {key: outputs[key] for key in job.all_keys() if key in outputs}
            if len(job.outputs) == len(job.all_keys()):
                self._running.remove(job)
                try:
                    _settle(job.future, job.result())
                except Exception as error:  # one call's own: the others go on
                    _settle(job.future, error)

    def _drop_given_up(self) -> None:
        """A caller that waits no more needs no answer."""
        for job in [job for job in self._running if job.future.cancelled()]:
            self._working().abort(job.all_keys())
            self._running.remove(job)

    def _swap(self, job: _Swap) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        release, began = job.release, time.perf_counter()
        try:
            check(release, self.settings.run)
        except (SyncError, OSError) as error:  # nothing has happened yet: it serves what it served
            job.future.set_exception(error if isinstance(error, SyncError) else SyncError(str(error)))
            return
        try:
            self._load(release)
            if self._working().cached_blocks:
                raise EngineError("keys and values of the old weights are still in the cache")
        except Exception as error:  # half of the old and half of the new, or no engine: only a new one helps
            logger.exception("loading weights failed")
            self._break(f"loading version {release.version} by {release.method} failed: {error}")
            job.future.set_exception(EngineError(self._broken))
            return
        self._version = release.version
        seconds = time.perf_counter() - began
        logger.info("version %d by %s in %.3f s", release.version, release.method, seconds)
        job.future.set_result(seconds)

    def _load(self, release: Release) -> None:
        folder = Path(release.folder)
        if release.method == "reload":
            self._working().reload(folder)
        elif release.method == "lora":
            if self._engine is None or not self._engine.is_base:
                self._renew(None)  # an adapter belongs on the base policy
            self._working().serve_adapter(folder)
        else:
            self._renew(str(folder))

    def _renew(self, folder: str | None) -> None:
        """Another engine, in this process."""
        if self._engine:
            self._engine.shutdown()
        self._engine = None
        self._engine, self._broken = Engine(self.settings, folder), ""

    def _working(self) -> Engine:
        if self._engine is None or self._broken:
            raise EngineError(self._broken or "there is no engine")
        return self._engine

    def _break(self, why: str) -> None:
        self._broken = why
        running, self._running = self._running, []
        self._fail(running, why)

    @staticmethod
    def _fail(jobs: Sequence[_Job], why: str) -> None:
        for job in jobs:
            _settle(job.future, EngineError(why))


def _settle(future: Future[Any], result: Any) -> None:
    """Answer, unless the caller has given up."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
