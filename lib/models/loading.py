"""From a config to a tokenizer, a model and an adapter.

Owns what is loaded, from where, and what is refused (pickled weights, an adapter of another base). Must not know tasks.

    python -c "from lib.models.loading import load_model; help(load_model)"
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib import harmony
from lib.config import Config, ModelSection
from lib.models.errors import ModelError, explained
from lib.models.machine import attention_of, describe_device, device, torch_dtype
from lib.models.quantized import Purpose, in_dtype, kept_as, loading_arguments, quant_method, say_size
from lib.models.shape import load_shape, parameter_count, revision_of
from lib.places import locate
from lib.runfolder import recorded_base_hash, weights_hash
from lib.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STARTER = "starter"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "README.md")
"""A model's own files."""


def resolve_model(config: Config, rows: Sequence[Row]) -> str:
    """The Hugging Face id or folder of the base policy; makes (or finds) the starter policy where that is asked for."""
    if config.model.name != STARTER:
        local = locate(config.model.name)
        return str(local) if local.is_dir() else config.model.name
    from lib.starter import starter_path

    seed = config.training.seed if config.starter.seed is None else config.starter.seed
    cache = locate(config.paths.cache) / "starter"
    return str(starter_path(rows, cache, kind=config.starter.kind, steps=config.starter.steps, seed=seed))


def load_tokenizer(source: str, settings: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, padded on the left; refuses one without a chat template.

    Its template shows model.date wherever it would show today's, and model.reasoning_effort: whoever renders with this
    tokenizer, or with a copy that is saved of it, gives the policy the same prompt.
    """
    from transformers import AutoTokenizer

    with explained(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=revision_of(source, settings),
            trust_remote_code=settings.trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{source} has no chat template: use the instruct version of this model, or add a template to it"
        )
    try:
        tokenizer.chat_template = harmony.frozen(tokenizer.chat_template, settings.date, settings.reasoning_effort)
    except harmony.EffortError as error:
        raise ModelError(f"{source}: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: str, settings: ModelSection, train_all: bool = False, purpose: Purpose = "answer"
) -> PreTrainedModel:
    """The causal language model of a folder or Hub id, on this machine's device, in evaluation mode.

    `train_all`: all weights are to be trained, so `dtype: auto` keeps them in float32: the small updates of a usual
    learning rate vanish in bfloat16 weights (an adapter's weights are float32 in any case). `purpose` decides, with
    model.quantization, how quantized weights are held. Only safetensors are read. Raises ModelError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # headless logs are plain lines
    shape = load_shape(source, settings)
    refuse_pickles(source, settings)
    kept = kept_as(source, shape, settings, purpose)
    dtype, attention = torch_dtype(settings, train_all), attention_of(settings, shape)
    if kept == "dequantized":
        say_size(_short(source), shape, dtype)
    logger.info(
        "model: loading %s (%s, %s attention) on %s",
        _short(source),
        str(dtype).removeprefix("torch.") if kept in ("none", "dequantized") else kept,
        attention,
        describe_device(),
    )
    with explained(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision_of(source, settings),
            trust_remote_code=settings.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            **loading_arguments(kept, dtype),
        )
    if kept == "dequantized":
        in_dtype(model, dtype)
    logger.info("model: %.2f million parameters", parameter_count(model) / 1e6)
    if kept == "4bit" and purpose == "train":
        from peft import prepare_model_for_kbit_training

        # Norms and embeddings in float32; checkpointing is TRL's matter.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if kept != "none":
        return model.eval()  # type: ignore[no-any-return] # it is where it belongs already
    return model.to(device()).eval()  # type: ignore[arg-type, no-any-return]


def check_held(source: str, settings: ModelSection, purpose: Purpose) -> None:
    """Raises ModelError where load_model could not hold the weights as model.quantization asks; loads nothing."""
    kept_as(source, load_shape(source, settings), settings, purpose)


def load_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with a LoRA adapter on top; refuses one that was made for another base, or is pickled."""
    from peft import PeftConfig, PeftModel

    with explained(adapter):
        settings = PeftConfig.from_pretrained(adapter)
    base, name = settings.base_model_name_or_path, str(model.name_or_path)
    if not same_base(str(base or ""), name, adapter):
        raise ModelError(f"adapter {adapter} was trained on {base}, not on {name}: set model.name to its base")
    bare = getattr(settings, "target_parameters", None)
    if bare and quant_method(model.config) == "mxfp4":
        raise ModelError(
            f"adapter {adapter} changes experts or routers ({', '.join(bare)}), and weights kept in MXFP4 cannot "
            f"carry that: set model.quantization to auto, or export it (notebook 5) and evaluate the export"
        )
    _refuse_pickled_files(adapter, _files_of(adapter, None), "adapter_model.safetensors")
    with explained(adapter):
        return PeftModel.from_pretrained(model, adapter).eval()  # type: ignore[return-value]


def same_base(recorded: str, source: str, adapter: str | Path) -> bool:
    """Whether an adapter that names the base `recorded` belongs on `source`: a folder or Hub id.

    A folder may have moved. Where the run that the adapter lies in says what its base's weights hash to, they decide;
    else a folder's own name does. Hub ids have to be equal. An adapter that names no base fits any.
    """
    if not recorded or recorded == source:
        return True
    is_folder = Path(source).is_dir()
    known = recorded_base_hash(Path(adapter), recorded) if is_folder else ""
    if known:
        return weights_hash(source) == known
    return Path(recorded).name == Path(source).name and (Path(recorded).is_absolute() or is_folder)


def download(source: str, settings: ModelSection) -> Path:
    """The folder of a Hub model's own files, from the cache where they are there. Raises ModelError.

    Its folders (original/, say) are other formats of the same weights.
    """
    from huggingface_hub import snapshot_download

    refuse_pickles(source, settings)
    wanted, revision = list(_WANTED), revision_of(source, settings)
    with explained(source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


def refuse_pickles(source: str, settings: ModelSection) -> None:
    """Raises ModelError for a checkpoint without safetensors: pickled weights can run code when they are read."""
    _refuse_pickled_files(source, _files_of(source, revision_of(source, settings)), ".safetensors")


def _refuse_pickled_files(source: str, files: Sequence[str], wanted: str) -> None:
    pickled = [file for file in files if file.endswith(_PICKLES) and "training_args" not in file]
    if pickled and not any(file.endswith(wanted) for file in files):
        with explained(source):
            raise OSError(f"pickled weights only: {', '.join(pickled)}")


def _files_of(source: str, revision: str | None) -> list[str]:
    """Names of a checkpoint's files; [] where the Hub cannot be asked (its copy here, if any, is then used)."""
    if Path(source).is_dir():
        return [path.name for path in Path(source).iterdir()]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return [file for file in HfApi().list_repo_files(source, revision=revision) if "/" not in file]
    except (OSError, OfflineModeIsEnabled, ValueError):  # what is wrong is said by whoever loads it
        return []


def _short(source: str) -> str:
    return Path(source).name if Path(source).is_dir() else source
