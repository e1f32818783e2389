"""What verl's own reward managers and advantage code make of our reward and estimator, in verl's environment.

    build/verl/bin/python tests/verl_reward_program.py naive JOB.json
    build/verl/bin/python tests/verl_reward_program.py ray JOB.json

A job is {"tokenizer": folder, "judge": URL or null, "asks": [Ask], "advantages": folder}; an Ask {"order": path,
"path": the function's file, "control": what the judge is told first, "items": [{"row", "replies", "plays"}]}. A text
goes through verl's manager; what is no text, or has a world that "plays", to the desk, as an agent loop plays it.
Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils import hf_tokenizer

from lib.generate import scripted
from lib.verl import advantage
from lib.verl.local_ray import LOOPBACK, fix_ports, stay_here
from lib.verl.reward import Order, Unscored, open_desk


def config_of(job: dict[str, Any], ask: dict[str, Any]) -> Any:
    function = {"path": ask.get("path") or "pkg://lib.verl.reward", "name": "compute_score"}
    reward = {
        "custom_reward_function": function | {"reward_kwargs": {"order": ask["order"]}},
        "reward_manager": {"source": "register", "name": "naive"},
        "reward_model": {"enable": False},
        "num_workers": 1,
    }
    model = {"path": job["tokenizer"], "tokenizer_path": None}
    return OmegaConf.create({"reward": reward, "actor_rollout_ref": {"model": model}})


def batch_of(tokenizer: Any, items: list[dict[str, Any]]) -> DataProto:
    """Answers as verl's agent loop hands them over: right-padded responses, columns of the parquet beside them."""
    texts = [one["replies"][0] for one in items]
    answers = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, answers))
    padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in answers]
    masks = [[1] + [1] * len(ids) + [0] * (longest - len(ids)) for ids in answers]
    tensors = {
        "prompts": torch.full((len(items), 1), tokenizer.eos_token_id),
        "responses": torch.tensor(padded),
        "attention_mask": torch.tensor(masks),
    }
    columns = {
        "data_source": ["grpo-workbench/test"] * len(items),
        "reward_model": [{"style": "rule", "ground_truth": json.dumps(one["row"])} for one in items],
        "extra_info": [{"split": "train", "index": 0, "id": str(one["row"]["id"])} for one in items],
    }
    arrays = {name: np.fromiter(values, dtype=object, count=len(items)) for name, values in columns.items()}
    return DataProto(batch=TensorDict(tensors, batch_size=len(items)), non_tensor_batch=arrays)


def control(job: dict[str, Any], values: dict[str, Any] | None) -> None:
    if values is not None:
        body = json.dumps(values).encode()
        request = urllib.request.Request(f"{job['judge']}/control", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).read()


def row_scores(result: dict[str, Any], tokens: int) -> torch.Tensor:
    """A reward on its way through verl: the agent loop's output as what goes into the TransferQueue."""
    output = AgentLoopOutput(
        prompt_ids=[1],
        response_ids=[1] * tokens,
        response_mask=[1] * tokens,
        reward_score=result["reward_score"],
        metrics=AgentLoopMetrics(),
    )
    scores: torch.Tensor = output.as_dict()["rm_scores"]
    return scores


def naive(job: dict[str, Any]) -> dict[str, Any]:
    """Every answer through NaiveRewardManager.run_single, all of an ask at once; and the estimator's cases."""
    tokenizer = hf_tokenizer(job["tokenizer"])

    async def played(ask: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
        desk = open_desk(ask["order"])
        score = (await desk.attempt(item["row"], scripted(*item["replies"]))).score
        told = desk.told(score, "train", str(item["row"]["id"]))
        return {"reward_score": told["score"], "reward_extra_info": told}

    async def ask_all(ask: dict[str, Any]) -> list[dict[str, Any]]:
        manager = load_reward_manager(config_of(job, ask), tokenizer)
        work = [
            played(ask, one)
            if one.get("plays") or not isinstance(one["replies"][0], str)
            else manager.run_single(batch_of(tokenizer, [one]))
            for one in ask["items"]
        ]
        return list(await asyncio.gather(*work))

    async def everything() -> list[list[dict[str, Any]]]:
        found = []
        for ask in job["asks"]:
            control(job, ask.get("control"))
            found.append(await ask_all(ask))
        return found

    found = asyncio.run(everything())
    for one in (one for answers in found for one in answers):
        last = row_scores(one, 3)[-1]
        one["left_out"] = bool(torch.signbit(last)) and float(last) == 0
        one["float32"] = float(last)
    return {"asks": found, "advantages": advantages(Path(job["advantages"])) if job.get("advantages") else {}}


def advantages(folder: Path) -> dict[str, Any]:
    """grpo_scored in verl's compute_advantage, beside verl's own grpo, on many random batches; and what it refuses."""
    advantage.register()
    counts = folder / "unscored.jsonl"
    order = Order(
        run=str(folder),
        task="decisions",
        params={},
        world_seconds=1,
        score_seconds=1,
        unscored_limit=0.25,
        counts=str(counts),
    )
    (folder / "reward.json").write_text(order.model_dump_json())

    def batch(rewards: list[float], uids: list[str], padding: int = 0) -> DataProto:
        tokens = [1 + at % 4 for at in range(len(rewards))]
        mask = torch.tensor([[int(place < length) for place in range(4)] for length in tokens])
        mask[len(rewards) - padding :] = 0
        scores = torch.zeros(mask.shape, dtype=torch.float32)
        scores[torch.arange(len(tokens)), torch.tensor(tokens) - 1] = torch.tensor(rewards)
        tensors = {"token_level_rewards": scores, "response_mask": mask}
        found = DataProto(batch=TensorDict(tensors, batch_size=len(rewards)))
        found.non_tensor_batch["uid"] = np.array(uids, dtype=object)
        return found

    def estimate(name: str, data: DataProto, norm: bool = True, **settings: Any) -> DataProto:
        config = OmegaConf.create(
            {"order": str(folder / "reward.json"), "norm_adv_by_std_in_grpo": norm, "use_kl_in_reward": False}
            | settings
        )
        return compute_advantage(data, adv_estimator=name, norm_adv_by_std_in_grpo=norm, config=config)

    def refusal(data: DataProto, **settings: Any) -> str:
        try:
            estimate(advantage.NAME, data, **settings)
        except Exception as error:  # whatever it is, it is looked at
            return f"{type(error).__name__}: {error}"
        return ""

    def unscored(*lines: dict[str, Any]) -> None:
        with counts.open("a") as file:
            for line in lines:
                known = {"time": time.time(), "split": "train", "row": "r", "reason": "judge: HTTP 503"}
                file.write(Unscored(**(known | line)).model_dump_json() + "\n")

    rng = np.random.default_rng(0)
    same, subset = [], []
    for number in range(200):
        sizes = rng.integers(1, 6, size=4)
        uids = [f"g{group}" for group, size in enumerate(sizes) for _ in range(size)]
        rewards = [float(one) for one in rng.choice([0.0, 0.0, 0.25, 1.0, -0.5, rng.random()], size=len(uids))]
        shuffled = rng.permutation(len(uids))
        uids = [uids[at] for at in shuffled]
        norm = bool(number % 2)
        ours, theirs = (estimate(name, batch(rewards, uids), norm) for name in (advantage.NAME, "grpo"))
        same.append(torch.equal(ours.batch["advantages"], theirs.batch["advantages"]))
        same.append(torch.equal(ours.batch["response_mask"], theirs.batch["response_mask"]))
        left_out = [bool(one) for one in rng.random(len(uids)) < 0.4]
        marked = [-0.0 if out else reward for out, reward in zip(left_out, rewards, strict=True)]
        ours = estimate(advantage.NAME, batch(marked, uids), norm)
        kept = [uid for uid, out in zip(uids, left_out, strict=True) if not out]
        wanted = torch.zeros(len(uids), 4)
        used = [
            at
            for at, uid in enumerate(uids)
            if not left_out[at] and (kept.count(uid) > 1 or uids.count(uid) == kept.count(uid))
        ]
        if used:
            whole = batch(rewards, uids)
            part = estimate("grpo", whole.select_idxs(np.array(used)), norm)
            wanted[used] = part.batch["advantages"]
        masked = batch(rewards, uids).batch["response_mask"] * ~torch.tensor(left_out).unsqueeze(-1)
        subset.append(torch.equal(ours.batch["advantages"], wanted))
        subset.append(torch.equal(ours.batch["response_mask"], masked))
    four = batch([1.0, -0.0, 0.0, 0.0], ["a"] * 4)
    found: dict[str, Any] = {"same": same, "subset": subset}
    unscored({"time": time.time() - 3600}, {"split": "eval"})
    found["at the limit"] = [refusal(four), unscored({}), refusal(four)][-1]
    unscored({}, {"reason": "the sandbox is gone"})
    found["over the limit"] = refusal(four)
    found["once more"] = refusal(four)
    unscored({})
    found["with padding"] = refusal(batch([1.0, -0.0, 0.0, 0.0], ["a", "a", "a", "pad"], padding=1))
    found["kl"] = refusal(four, use_kl_in_reward=True)
    found["no order"] = refusal(four, order=None)
    return found


def start_ray() -> None:
    """A Ray of our own, as the training has one."""
    import ray

    fix_ports()
    stay_here()
    own = {"address": "local", "num_cpus": 3, "include_dashboard": False, "_node_ip_address": LOOPBACK}
    ray.init(**own, runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}})


def in_ray(job: dict[str, Any]) -> dict[str, Any]:
    """Every answer through verl's RewardLoopManager on Ray: the whole batch, one by one, and on through its queue."""
    import ray
    import transfer_queue as tq
    from verl.experimental.reward_loop import RewardLoopManager
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    advantage.register()
    tokenizer = hf_tokenizer(job["tokenizer"])
    ask = job["asks"][0]
    start_ray()
    tq.init()
    control(job, ask.get("control"))
    manager = RewardLoopManager(config_of(job, ask))
    batch = batch_of(tokenizer, ask["items"])
    together = manager.compute_rm_score(batch)
    worker = manager.reward_loop_worker_handles[0]
    single = ray.get([worker.compute_score.remote(batch[at : at + 1]) for at in range(len(batch))])
    keys = [f"u{number // 4}_{number % 4}_0" for number in range(len(batch))]
    fields = [
        {"rm_scores": row_scores(one, 2 + at % 3), "response_mask": torch.ones(2 + at % 3, dtype=torch.int64)}
        for at, one in enumerate(single)
    ]
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=[{}] * len(keys))
    stored = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["rm_scores", "response_mask"])
    data = DataProto(batch=stored.to_padded_tensor())
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    data.non_tensor_batch["uid"] = np.array([key.split("_")[0] for key in keys], dtype=object)
    algorithm = OmegaConf.create({"order": ask["order"], "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False})
    done = compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=advantage.NAME, num_repeat=4, config=algorithm
    )
    found = {
        "rm_scores": together.batch["rm_scores"].sum(dim=-1).tolist(),
        "left_out": torch.signbit(together.batch["rm_scores"]).any(dim=-1).tolist(),
        "extra": {key: together.non_tensor_batch[key].tolist() for key in together.meta_info["reward_extra_keys"]},
        "single": single,
        "advantages": done.batch["advantages"].tolist(),
        "mask": done.batch["response_mask"].tolist(),
        "nothing": step_of_nothing(ask["order"]),
    }
    ray.shutdown()
    return found


def step_of_nothing(order: str) -> dict[str, Any]:
    """A step of which every answer is left out, with one row of verl's padding, on its way to the optimizer."""
    import transfer_queue as tq
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from lib.verl.trainer import leave_one

    keys = ["pad_0_0", *(f"n{number // 2}_{number % 2}_0" for number in range(4))]
    names = ["response_mask", "loss_mask", "rm_scores"]
    fields = []
    for at in range(len(keys)):
        nothing = torch.zeros(1 + at % 3, dtype=torch.int64)
        scores = torch.zeros(1 + at % 3)
        scores[-1] = -0.0 if at else 0.0
        fields.append({"response_mask": nothing, "loss_mask": nothing, "rm_scores": scores})
    tags = [{"is_padding": not at} for at in range(len(keys))]
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
    leave_one(tq.KVBatchMeta(keys=keys, tags=tags, partition_id="train"))
    data = DataProto(batch=tq.kv_batch_get(keys=keys, partition_id="train", select_fields=names).to_padded_tensor())
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    data.non_tensor_batch["uid"] = np.array([key.split("_")[0] for key in keys], dtype=object)
    algorithm = OmegaConf.create({"order": order, "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False})
    done = compute_advantage_for_multi_trajectories(
        data, batch_keys=keys, adv_estimator=advantage.NAME, num_repeat=2, config=algorithm
    )
    return {name: done.batch[name].tolist() for name in ("response_mask", "loss_mask", "advantages")}


def main() -> None:
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):  # verl prints
        found = {"naive": naive, "ray": in_ray}[sys.argv[1]](job)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
