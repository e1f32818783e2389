"""vLLM as a server process: its command line, its environment, and what its failures mean wherever it runs.

Owns the server's flags, the variables that vLLM is started with, and which of its parsers fits a model's tool calls.
Read with vLLM 0.31. Must not know runs, tasks or who asks.

    python -c "from lib.engine import tool_parser; from lib.config.training import VllmSection as V; \
               print(tool_parser(V(), 'Salesforce/xLAM-2-3b-fc-r', ''))"
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lib import WorkbenchError, models
from lib.config import Config
from lib.config.training import VllmSection
from lib.front import Front
from lib.hosts import LOOPBACK, Server, answers

logger = logging.getLogger(__name__)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.31 can be told of the largest rank."""

UNREAD = ("rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of an adapter that vLLM 0.31 passes over without a word."""

ANYWHERE = "0.0.0.0"
"""Every interface of this machine, the loopback one among them."""

LEAST_CACHE = 256 * 2**20
"""Bytes of KV cache where there is no GPU, if twice the longest conversation needs no more: vLLM's own choice there is
a share of all memory, and it is written to at the start."""

ADVICE: tuple[tuple[str, str], ...] = (
    (r"invalid tool call parser: .*chose from \{ ?([^}]*?) ?\}", r"sampling.vllm.tool_parser: one of \1"),
    (
        r"max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=([0-9]+)",
        r"sampling.vllm.max_length: at most \1, which is as long as the model allows",
    ),
    (
        r"larger than the available KV cache memory.*estimated maximum model length is (\d+)",
        r"sampling.vllm.max_length: at most \1; or raise sampling.vllm.memory_share (without a GPU: "
        r"VLLM_CPU_KVCACHE_SPACE, in GiB)",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache",
        "raise sampling.vllm.memory_share (without a GPU: VLLM_CPU_KVCACHE_SPACE, in GiB), or lower "
        "sampling.vllm.max_length, or name a smaller model",
    ),
    (
        r"less than desired \w+ memory utilization|less than requested memory for kv",
        "lower sampling.vllm.memory_share, or end what else holds the memory (nvidia-smi or top shows it)",
    ),
    (
        r"out of memory|OutOfMemoryError|can't allocate memory|Failed core proc\(s\): \{[^}]*: -9",
        "lower sampling.vllm.memory_share and sampling.vllm.max_length, keep sampling.vllm.enforce_eager: true, or "
        "name a smaller model",
    ),
    (
        r"Model architectures .* not supported|does not recognize this architecture",
        "another model.name: the vLLM and Transformers that are installed do not know this one's architecture",
    ),
    (
        r"Unsupported CPU attention configuration: head_dim=(\d+)",
        r"--engine transformers: vLLM has no attention for heads of \1 on a CPU",
    ),
    (r"No common block size", "sampling.vllm.block_size: leave it out, and vLLM chooses"),
    (
        r"gated repo|401 Client Error|403 Client Error",
        "the model is gated: accept its terms on its page of huggingface.co, and set HF_TOKEN",
    ),
    (
        r"not a valid model identifier|Repository Not Found|cached snapshot folder|presence of a 'config\.json'",
        "model.name: neither a model's folder here nor an id that the Hub knows; check spelling and connection",
    ),
    (
        r"Failed to infer device type|libcuda\.so|no CUDA-capable device",
        "the CUDA build of vLLM is installed and no GPU is there: ACCELERATOR=cpu make setup",
    ),
    (r"No space left on device", "free some disk space, and run the same command again"),
    (
        r"engine core exited unexpectedly|EngineDeadError|was ended by SIGKILL",
        "nothing, where somebody ended the engine's process; where the kernel did, for want of memory (`dmesg` says "
        "so), lower sampling.vllm.memory_share and sampling.vllm.max_length",
    ),
)
"""(what vLLM 0.31 says, what to change), the most telling first."""

PARSERS: tuple[tuple[str, str], ...] = (
    (r"<\|channel\|>", "openai"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<arg_key>", "glm45"),
    (r"<function=", "qwen3_xml"),
    (r"<tool_call>(?:\\n|\s)*\{\\?\"name", "hermes"),
    (r"<\|python_tag\|>|\"parameters\": ?dictionary", "llama3_json"),
)
"""(what stands in a chat template, vLLM's parser of the calls that it asks for), the most telling first."""


class EngineError(WorkbenchError, RuntimeError):
    """vLLM cannot be started here; the message says what to change."""


class Served(NamedTuple):
    """What a server serves, by the ids under which it is asked."""

    source: str
    """A folder or Hub id."""
    name: str
    adapter: Path | None = None
    adapter_name: str = ""
    is_base: bool = False
    """Whether nothing of it was trained."""

    @property
    def asked(self) -> str:
        """The id to evaluate."""
        return self.adapter_name or self.name


class Address(NamedTuple):
    """Where a server listens, and how long it may take until it does."""

    host: str = LOOPBACK
    port: int = 0
    """0 = a free one."""
    deadline: float = 900.0
    """Seconds."""


def program(config: Config, served: Served, logs: Path, front: Mapping[str, str], at: Address) -> Server:
    """vLLM's OpenAI-compatible server, for lib/hosts.py to start. `front`: its guard's settings. Raises EngineError."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed here (it is built for Linux): `make setup` brings it there")
    tokenizer = models.load_tokenizer(served.source, config.model)  # refuses here what would fail after a minute
    command = [*vllm_arguments(config, served, at.host), *call_arguments(config, served, str(tokenizer.chat_template))]
    started = server_program("vLLM", served, lambda port: [*command, "--port", str(port)], logs, at)
    template = started.log.with_suffix(".jinja")  # the date in it is the config's: it would render today's
    template.write_text(str(tokenizer.chat_template), encoding="utf-8")
    command += ["--chat-template", str(template)]
    environment = {**vllm_environment(), "VLLM_SYSTEM_START_DATE": config.model.date.isoformat(), **front}
    # Its own key would be looked at beside the guard's.
    return replace(started, environment={**environment, "VLLM_API_KEY": ""}, advice=ADVICE)


def server_program(
    name: str, served: Served, command: Callable[[int], Sequence[str]], logs: Path, at: Address
) -> Server:
    """A server process of whatever engine, for lib/hosts.py to start; `command` is its command line for a port."""
    asked: list[int] = []

    def with_port(port: int) -> Sequence[str]:
        asked[:] = [port]
        return command(port)

    return Server(
        name=name,
        command=with_port,
        log=logs / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', served.name)}-{os.getpid()}.log",
        port=at.port,
        port_setting="--port",
        ready=lambda: answers(f"http://{LOOPBACK if at.host == ANYWHERE else at.host}:{asked[0]}/health"),
        deadline=at.deadline,
        deadline_setting="--wait",
    )


def vllm_arguments(config: Config, served: Served, host: str = LOOPBACK) -> list[str]:
    """vLLM's command line without a port. It samples as it is asked to: no defaults of the model's own."""
    vllm, model = config.sampling.vllm, config.model
    # The module behind `vllm serve`: that script does not start where the distribution is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--host", host]
    command += ["--model", served.source, "--served-model-name", served.name, "--generation-config", "vllm"]
    command += ["--middleware", f"{Front.__module__}.{Front.__name__}"]
    command += ["--dtype", str(models.torch_dtype(model)).removeprefix("torch."), "--disable-uvicorn-access-log"]
    command += ["--revision", model.revision] if model.revision and served.source == model.name else []
    command += ["--trust-remote-code"] * model.trust_remote_code
    command += ["--enforce-eager"] * vllm.enforce_eager
    command += ["--max-model-len", str(vllm.max_length)] if vllm.max_length else []
    command += ["--block-size", str(vllm.block_size)] if vllm.block_size else []
    command += memory_arguments(config, served.source)
    if served.adapter:
        rank = check_adapter(config, served.source, served.adapter)
        allowed = next((one for one in LORA_RANKS if one >= rank), LORA_RANKS[-1])
        command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(allowed)]
        command += ["--lora-modules", f"{served.adapter_name}={served.adapter}"]
    return command


def check_adapter(config: Config, source: str, adapter: Path) -> int:
    """Refuse an adapter that vLLM would apply otherwise than PEFT does, or not at all; its rank.

    Read and tried with vLLM 0.31: lora/peft_helper.py knows one rank and one alpha; lora/model_manager.py takes LoRA
    of stacked experts for gpt-oss alone, both of their tensors, and without a GPU no LoRA of any mixture of experts.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    other = "Serve the merged model (export merged, then --artifact merged), or take --engine transformers"
    ignored = [key for key in UNREAD if settings.get(key)]
    if ignored:
        raise EngineError(
            f"the adapter sets {' and '.join(ignored)}, which vLLM does not read: it would answer as another policy. "
            f"{other}"
        )
    shape = models.load_shape(source, config.model)
    if not models.counts_of(shape).experts:
        return int(settings["r"])
    if models.device().type != "cuda":
        raise EngineError(
            f"{Path(source).name} is a mixture of experts, and vLLM serves an adapter on one with a GPU only. {other}"
        )
    experts = {name.rsplit(".", 1)[-1] for name in settings.get("target_parameters") or () if "experts" in name}
    if experts and (shape.model_type != "gpt_oss" or experts != {"gate_up_proj", "down_proj"}):
        raise EngineError(
            f"the adapter changes stacked experts ({', '.join(sorted(experts))} of {shape.model_type}), which vLLM "
            f"takes of gpt_oss alone, gate_up_proj and down_proj together. {other}"
        )
    return int(settings["r"])


def memory_arguments(config: Config, source: str) -> list[str]:
    """The memory for weights and KV cache on a GPU; for the cache alone where there is none."""
    share = config.sampling.vllm.memory_share
    if models.device().type == "cuda":
        return ["--gpu-memory-utilization", str(share)]
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return []
    free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    most = int(share * int(free[1]) * 1024) if free else sys.maxsize
    return ["--kv-cache-memory-bytes", str(min(most, max(LEAST_CACHE, 2 * _longest_cache(config, source))))]


def _longest_cache(config: Config, source: str) -> int:
    """Bytes of the KV cache of one conversation as long as it may be (float32 at most)."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(source, trust_remote_code=config.model.trust_remote_code).get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    length = config.sampling.vllm.max_length or shape.max_position_embeddings
    return int(2 * shape.num_hidden_layers * heads * size * 4 * length)


def vllm_environment() -> dict[str, str]:
    """What vLLM reads from its environment, where the user has not set it."""
    wanted = {
        "VLLM_HOST_IP": LOOPBACK,  # it would ask the network for this machine's address, and listen there
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would tie every engine of this machine to the same cores
        "NO_COLOR": "1",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def call_arguments(config: Config, served: Served, template: str) -> list[str]:
    """vLLM's flags for answers with tool calls; none, and a warning, where no parser is known for the model."""
    parser = tool_parser(config.sampling.vllm, served.source, template)
    if parser:
        return ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if config.sampling.vllm.tool_calls:
        logger.warning(
            "vLLM: no parser of tool calls is known for %s: it refuses requests with tools (HTTP 400) until "
            "sampling.vllm.tool_parser is set",
            served.name,
        )
    return []


def tool_parser(vllm: VllmSection, source: str, template: str) -> str:
    """vLLM's name for the parser of a model's tool calls; "" = none is known, or none is wanted."""
    if not vllm.tool_calls:
        return ""
    if vllm.tool_parser:
        return vllm.tool_parser
    if "xlam" in Path(source).name.lower():  # a JSON list, whatever the template is called
        return "xlam"
    return next((name for pattern, name in PARSERS if re.search(pattern, template)), "")
