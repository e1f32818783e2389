"""The config: one tree, every default once, and checks that say what to change.

Owns names, defaults and impossible combinations. Must not know any implementation.

    python -c "from lib.config import load_config; print(load_config('configs/decisions.yaml').training.learning_rate)"
"""

from lib.config.evaluation import EndpointSection, EvaluationSection
from lib.config.export import ArtifactKind, ExportSection, HubSection
from lib.config.reading import (
    HOW_ASKED,
    ConfigError,
    UniqueKeys,
    check_key,
    known_keys,
    load_config,
    own_task,
    parse_config,
)
from lib.config.section import Section
from lib.config.training import LoraSection, ModelSection, SamplingSection, StarterSection, TrainingSection
from lib.config.tree import SCHEMA, Config, TaskSection
from lib.config.verl import VerlSection

__all__ = [
    "HOW_ASKED",
    "SCHEMA",
    "ArtifactKind",
    "Config",
    "ConfigError",
    "EndpointSection",
    "EvaluationSection",
    "ExportSection",
    "HubSection",
    "LoraSection",
    "ModelSection",
    "SamplingSection",
    "Section",
    "StarterSection",
    "TaskSection",
    "TrainingSection",
    "UniqueKeys",
    "VerlSection",
    "check_key",
    "known_keys",
    "load_config",
    "own_task",
    "parse_config",
]
