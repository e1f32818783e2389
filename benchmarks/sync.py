"""Seconds from "the actor has new weights" to "the worker generates with them", by method, the proof included.

One process holds the actor's model (random weights of a Qwen2) and a rollout worker's engine (the real vLLM), with the
same settings for all methods, and every repeat does each of them once, after a step of training:

    publish (merge, write, hash) -> check, load, empty the cache; the actor's canaries meanwhile -> the worker's
    canaries -> compare -> the first new token

re-creation = the same folder as reload's, loaded by making the engine anew in this warm process; volume and checkpoint
publish in their own way (on the disk before they count). in turn = reload where the worker loads only after the actor's
canaries. fresh process = a worker started anew on the folder, from its start to its first token. Adapter rows: LoRA of
rank 16 on all linear layers; an engine that serves adapters. `--folder /dev/shm` hands the weights over in memory; a
file that was just written is read from the kernel's memory in any case.

`others` = cores that other processes used meanwhile; above 0.3 the times say little, ratios are of medians in one run.

    PYTHONPATH=. .venv/bin/python benchmarks/sync.py --out sync.json           # about 10 minutes on 2 quiet cores
    PYTHONPATH=. .venv/bin/python benchmarks/sync.py --sizes 50M --repeats 3
    PYTHONPATH=. .venv/bin/python benchmarks/sync.py --clean 1000              # false alarms of the proof, tiny model
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from machine import Others, shown

from lib.roles import Canary, Method, Release, Sampling
from lib.rollout_worker import EngineSettings, RemoteWorker, RolloutWorker, command, environment
from lib.rpc import Child, start
from lib.sync import canary_of, compare, make_canaries, publish

SIZES = {"tiny": (64, 128, 2, 2), "50M": (512, 2048, 12, 8), "200M": (1024, 4096, 12, 16)}
"""Hidden, feed-forward, layers, heads."""

BAR, AIM = 6.0, 20.0
RUN = "bench"
PROMPTS = [[(7 * number + 3 * place) % 300 + 10 for place in range(50)] for number in range(1, 7)]


class Way(NamedTuple):
    """How weights get to the worker: how they are published, and how they are loaded."""

    name: str
    publish: Method
    load: Method
    meanwhile: bool = True
    """Whether the actor answers its canaries while the worker loads."""


RELOAD, RECREATION = Way("reload", "reload", "reload"), Way("re-creation", "reload", "volume")
LORA, IN_TURN = Way("lora", "lora", "lora"), Way("in turn", "reload", "reload", meanwhile=False)
WAYS = [RELOAD, IN_TURN, RECREATION, Way("volume", "volume", "volume"), Way("checkpoint", "checkpoint", "checkpoint")]


class Bench:
    """An actor's model and a worker in this process, and the weights on their way."""

    def __init__(self, size: str, folder: Path, adapter: bool) -> None:
        self.folder = folder
        self.model = make_model(size, folder / "base", adapter)
        self.settings = EngineSettings(
            run=RUN, model=str(folder / "base"), max_length=512, lora_rank=16 if adapter else None
        )
        self.worker = RolloutWorker(self.settings)
        self.canaries = make_canaries(PROMPTS, self.worker.facts()["block_size"], 512)
        self.before = canary_of(self.model, 0, self.canaries)
        self.version = 0
        self.worst = 0.0

    async def sync(self, way: Way) -> dict[str, float]:
        """Seconds of each part, after a step of training. Ends the benchmark where the proof fails."""
        train(self.model)
        self.version += 1
        marks = [time.perf_counter()]
        release = self._publish(way)
        marks.append(time.perf_counter())
        said = asyncio.create_task(asyncio.to_thread(canary_of, self.model, self.version, self.canaries))
        if not way.meanwhile:
            await said
        await self.worker.update_weights(release._asdict())
        now = await said
        marks.append(time.perf_counter())
        proof = compare(now, await self.worker.canary(self.canaries), before=self.before)
        marks.append(time.perf_counter())
        await self.worker.generate([PROMPTS[0][:8]], Sampling(1)._asdict())
        marks.append(time.perf_counter())
        if not proof.holds:
            sys.exit(f"{way.name}: the proof failed: {proof}")
        self.before, self.worst = now, max(self.worst, proof.worst)
        parts = [after - before for before, after in itertools.pairwise(marks)]
        names = ("publish", "load and canaries", "proof", "first token")
        return dict(zip(names, parts, strict=True)) | {"all": marks[-1] - marks[0]}

    def _publish(self, way: Way) -> Release:
        release = publish(
            self.model, self.folder / "weights", version=self.version, step=self.version, method=way.publish, run=RUN
        )
        return release._replace(method=way.load)

    async def fresh_process(self, threads: int) -> float:
        """A worker started on the newest weights, from its start to its first token."""
        folder = max((self.folder / "weights").glob("v-*"), key=lambda path: int(path.name[2:]))
        settings = self.settings.model_copy(update={"model": str(folder)})
        began = time.perf_counter()
        values = environment() | {"OMP_NUM_THREADS": str(threads)}
        child = Child(name="fresh", command=command(settings), environment=values, log=self.folder / "fresh.log")
        client = await start(child)
        worker = RemoteWorker(client)
        await worker.generate(PROMPTS[:1], Sampling(1))
        seconds = time.perf_counter() - began
        await worker.close()
        return seconds


def make_model(size: str, folder: Path, adapter: bool) -> Any:
    """A random policy whose answers differ from token to token; with an adapter, only that is trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    hidden, forward, layers, heads = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": forward, "num_hidden_layers": layers, "vocab_size": 320}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 1024}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=0,
                                              tie_word_embeddings=True)).eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(2.0)
    model.save_pretrained(folder)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    return model


def train(model: Any, size: float = 1e-3) -> None:
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=size)


async def measure(size: str, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    """All ways on one size: the medians of their parts."""
    result: dict[str, Any] = {"size": size, "repeats": repeats}
    bench = Bench(size, folder / "full", adapter=False)
    result["parameters"] = sum(weight.numel() for weight in bench.model.parameters())
    result |= await rounds(dict.fromkeys(WAYS, bench), repeats)
    others = Others()
    result["fresh process"] = statistics.median([await bench.fresh_process(threads) for _ in range(min(repeats, 3))])
    result["fresh process others"] = others.cores()
    bench.worker.close()
    # Two engines: on merged weights an adapter would need a new one.
    adapters = {way: Bench(size, folder / way.name, adapter=True) for way in (LORA, RELOAD)}
    result["adapter"] = await rounds(adapters, repeats)
    for one in adapters.values():
        one.worker.close()
    return result


async def rounds(benches: dict[Way, Bench], repeats: int) -> dict[str, Any]:
    ways = list(benches)
    seen: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for way in ways:  # pages, plans and versions that later rounds find there
        for _ in range(3 if way.load in ("reload", "lora") else 1):
            await benches[way].sync(way)
    others = Others()
    for number in range(repeats):
        for way in ways if number % 2 else ways[::-1]:
            seen[way.name].append(await benches[way].sync(way))
    worst = max(bench.worst for bench in benches.values())
    found: dict[str, Any] = {"others": others.cores(), "worst": worst, "ways": {}}
    for name, runs in seen.items():
        found["ways"][name] = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        found["ways"][name]["spread"] = [min(run["all"] for run in runs), max(run["all"] for run in runs)]
    return found


def report(result: dict[str, Any]) -> bool:
    print(f"{result['size']}: {result['parameters'] / 1e6:.1f} million parameters, medians of {result['repeats']}, "
          f"others {shown(result['others'])}, worst |difference| {result['worst']:.1e}")  # fmt: skip
    table(result["ways"])
    ways = result["ways"]
    ratio = ways["re-creation"]["all"] / ways["reload"]["all"]
    print(f"  fresh process to its first token {result['fresh process']:.2f} s (no sync, no proof)")
    print(f"  re-creation / reload {ratio:.1f}   bar {BAR:g}, aim {AIM:g}; in turn / reload "
          f"{ways['in turn']['all'] / ways['reload']['all']:.2f}")  # fmt: skip
    adapter = result["adapter"]
    print(f"  with an adapter (others {shown(adapter['others'])}, worst {adapter['worst']:.1e})")
    table(adapter["ways"])
    share = adapter["ways"]["lora"]["all"] / adapter["ways"]["reload"]["all"]
    print(f"  lora / reload {share:.2f}   bar 1")
    result["ratio"], result["lora share"] = ratio, share
    return bool(ratio >= BAR and share <= 1)


def table(ways: dict[str, dict[str, Any]]) -> None:
    names = [name for name in next(iter(ways.values())) if name != "spread"]
    print(f"  {'':12}" + "".join(f"{name:>18}" for name in names) + "   lowest to highest")
    for way, parts in ways.items():
        low, high = parts["spread"]
        print(f"  {way:12}" + "".join(f"{parts[name]:18.3f}" for name in names) + f"   {low:.3f} to {high:.3f}")


async def clean(count: int, folder: Path) -> bool:
    """False alarms of the proof over clean syncs of a tiny model, in steps from large to hardly any."""
    bench = Bench("tiny", folder, adapter=False)
    alarms, worst = 0, 0.0
    started, others = time.perf_counter(), Others()
    for number in range(count):
        train(bench.model, 10.0 ** -(2 + number % 5))
        bench.version += 1
        release = bench._publish(RELOAD)
        now: Canary = canary_of(bench.model, bench.version, bench.canaries)
        await bench.worker.update_weights(release._asdict())
        proof = compare(now, await bench.worker.canary(bench.canaries), before=bench.before)
        alarms, worst, bench.before = alarms + (not proof.holds), max(worst, proof.worst), now
        if not proof.holds:
            print(f"  alarm at sync {number}: {proof}")
    seconds = time.perf_counter() - started
    print(f"{count} clean syncs of the tiny model in {seconds:.0f} s: {alarms} false alarms, worst |difference| "
          f"{worst:.1e} (others {shown(others.cores())})")  # fmt: skip
    bench.worker.close()
    return alarms == 0


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["50M", "200M"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clean", type=int, default=0, help="only count false alarms, over so many clean syncs")
    parser.add_argument("--folder", help="where models and weights go; default: a temporary folder")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        if options.clean:
            return 0 if await clean(options.clean, Path(temporary)) else 1
        results, passed = [], []
        for size in options.sizes:
            results.append(await measure(size, options.repeats, threads, Path(temporary) / size))
            passed.append(report(results[-1]))
        if options.out:
            Path(options.out).write_text(json.dumps({"threads": threads, "sizes": results}, indent=1))
    print(f"verdict: {'PASS' if all(passed) else 'FAIL'} ({threads} threads)")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    missing = {name: value for name, value in environment().items() if os.environ.get(name) != value}
    if missing:  # as a worker's own process has it: some of it counts only from a process's start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)
    sys.exit(asyncio.run(main()))
