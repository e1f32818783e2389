"""Which judge, and how it is asked: the settings, the model ids of configs/judges.yaml, and what is wrong with them.

python -c "from lib.judge.settings import JudgeSettings; print(JudgeSettings(model='gpt-6-luna').name)"
"""

from __future__ import annotations

import datetime
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lib.calls import MODEL_IDS, takes_temperature
from lib.cost import Prices, load_prices, priced_as, undated
from lib.judge.errors import JudgeRefused

WARN_DAYS = 90
"""Days before an id's end from which on it is warned of."""


class Provider(NamedTuple):
    title: str
    base_url: str
    key: str
    """Environment variable."""


PROVIDERS = {
    "openai": Provider("OpenAI", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    "gemini": Provider("Gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "compatible": Provider("the judge's endpoint", "", ""),
    "reward_model": Provider("the reward model", "", ""),
}


class JudgeSettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Which judge, and how it is asked: the fields `task.judge.*` of judged tasks."""

    provider: Literal["openai", "gemini", "compatible", "reward_model"] = "openai"
    model: str = ""
    """ "" = the provider's shipped id (configs/judges.yaml); for reward_model a folder or a Hub id."""
    base_url: str = ""
    """ "" = the provider's own; needed for compatible."""
    key: str = ""
    """The NAME of the environment variable that holds the key; "" = OPENAI_API_KEY, GEMINI_API_KEY, or no key."""
    temperature: float | Literal["auto", "none"] = "auto"
    """auto = 0, but none is sent to the ids that `no_temperature` in configs/judges.yaml matches."""
    reasoning_effort: str = ""
    """Sent when set: none, low, medium, high, as the model has it."""
    max_tokens: int = Field(default=4096, ge=1)
    """Of one reply, thinking included."""
    concurrency: int = Field(default=64, ge=1, le=1000)
    """Requests in flight at most."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one request."""
    attempts: int = Field(default=5, ge=1)
    """HTTP requests for one call at most."""
    budget_usd: float | None = Field(default=None, ge=0)
    """What all judges of one run may cost; None = no limit."""

    @field_validator("temperature")
    @classmethod
    def _possible_temperature(cls, temperature: float | str) -> float | str:
        if isinstance(temperature, float) and not 0 <= temperature <= 2:
            raise ValueError('give a number from 0 to 2, "auto" or "none"')
        return temperature

    @field_validator("base_url")
    @classmethod
    def _whole_url(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if base_url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.username):
            raise ValueError("give an address like http://127.0.0.1:8000/v1, without a name or password in it")
        return base_url.rstrip("/")

    @model_validator(mode="after")  # of the whole, so that what stands under `key` is never shown
    def _consistent(self) -> JudgeSettings:
        if self.key and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key):
            raise ValueError(
                "judge.key: give the NAME of the environment variable that holds the key (capitals, digits and _), "
                "MY_JUDGE_KEY say; a key itself never belongs in a config"
            )
        if self.provider in ("compatible", "reward_model") and not self.model:
            raise ValueError(f"judge.model is needed for the provider {self.provider!r}: it has no shipped id")
        if self.provider == "compatible" and not self.base_url:
            raise ValueError("judge.base_url is needed for the provider 'compatible': http://127.0.0.1:8000/v1, say")
        if self.provider == "reward_model" and (self.base_url or self.key):
            raise ValueError("a reward model runs in this process: leave judge.base_url and judge.key out")
        return self

    @property
    def model_id(self) -> str:
        """The id that is sent."""
        shipped = load_catalogue().shipped
        return self.model or (shipped.gemini if self.provider == "gemini" else shipped.openai)

    @property
    def endpoint(self) -> str:
        return self.base_url or PROVIDERS[self.provider].base_url

    @property
    def key_name(self) -> str:
        """The environment variable that has to be set; "" = none."""
        return self.key or PROVIDERS[self.provider].key

    @property
    def sent_temperature(self) -> float | None:
        """None = no temperature is sent."""
        if self.temperature == "none":
            return None
        if self.temperature == "auto":
            return 0.0 if takes_temperature(self.model_id) else None
        return self.temperature

    @property
    def name(self) -> str:
        """The judge's id in the ledger: all that decides its verdicts, and nothing else.

        Not covered: other weights under the same name, in a folder or behind an endpoint.
        """
        return _name_of(self)


@lru_cache
def _name_of(settings: JudgeSettings) -> str:
    parts = [settings.model_id, settings.endpoint]
    if settings.provider != "reward_model":
        sent = settings.sent_temperature
        parts.append("temperature default" if sent is None else f"temperature {sent:g}")
    if settings.reasoning_effort:
        parts.append(f"effort {settings.reasoning_effort}")
    return ", ".join(part for part in parts if part)


# the model ids --------------------------------------------------------------------------------------------------------


class Retirement(BaseModel, frozen=True, extra="forbid"):
    ends: datetime.date
    """The first day without it."""
    use: str
    """The id to use instead."""


class Shipped(BaseModel, frozen=True, extra="forbid"):
    openai: str
    gemini: str


class Catalogue(BaseModel, frozen=True, extra="forbid"):
    """configs/judges.yaml."""

    date: datetime.date
    shipped: Shipped
    no_temperature: tuple[str, ...]
    retirements: dict[str, Retirement]


@cache
def load_catalogue(path: Path = MODEL_IDS) -> Catalogue:
    """Read the file of model ids, once. Raises JudgeRefused where it is missing or cannot be used."""
    import yaml

    try:
        return Catalogue.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise JudgeRefused(f"{path} is missing: restore it with `git checkout configs/judges.yaml`") from None
    except ValidationError as error:
        places = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise JudgeRefused(f"{path} cannot be used:\n" + "\n".join(places)) from None
    except (ValueError, yaml.YAMLError) as error:
        raise JudgeRefused(f"{path} cannot be read: {error}") from None


# what can be told without asking --------------------------------------------------------------------------------------


def check_judge(settings: JudgeSettings, today: datetime.date | None = None) -> list[str]:
    """Warnings about a judge that is about to be used, without asking it anything.

    Raises JudgeRefused for a key that is not set, an id that its maker has retired and a budget without a price, and
    CostError for a price file that cannot be used.
    """
    warnings = retirement_warnings(settings, today)
    check_key(settings)
    check_budget(settings, load_prices())
    return warnings


def check_key(settings: JudgeSettings) -> None:
    """Raises JudgeRefused where the environment variable with the key is not set."""
    name = settings.key_name
    if name and not os.environ.get(name, "").strip():
        raise JudgeRefused(
            f"judge: no key for {PROVIDERS[settings.provider].title}: the environment variable {name} is not set. "
            f"Run `export {name}=...` first (on Modal it comes from .env or a secret), or name another variable with "
            f"task.judge.key"
        )


def check_budget(settings: JudgeSettings, prices: Prices) -> None:
    """Raises JudgeRefused for a spend limit that cannot be kept, since nobody knows what a call costs."""
    if settings.budget_usd is not None and priced_as(prices, settings.model_id) is None:
        raise JudgeRefused(
            f"judge: task.judge.budget_usd {settings.budget_usd:g} cannot be kept without a price: add "
            f"`{settings.model_id}: {{input: USD, output: USD}}` (per million tokens) under `tokens` in {prices.file}"
        )


def retirement_warnings(settings: JudgeSettings, today: datetime.date | None = None) -> list[str]:
    """What to say about an id that will be gone within WARN_DAYS. Raises JudgeRefused from its last day on.

    Only the maker's own endpoint ends an id by this calendar: others keep one for longer, or for ever.
    """
    today = today or datetime.date.today()
    known, model = load_catalogue().retirements, settings.model_id.removeprefix("models/")
    end = known.get(model) or known.get(undated(model))
    if settings.base_url or settings.provider not in ("openai", "gemini") or end is None:
        return []
    where = f"the {PROVIDERS[settings.provider].title} API on {end.ends.day} {end.ends:%B %Y}"
    advice = f"set task.judge.model to {end.use}"
    if not takes_temperature(end.use):
        advice += " (no temperature is sent to it)"
    days = (end.ends - today).days
    if days <= 0:
        raise JudgeRefused(f"judge: {settings.model_id} has left {where}: {advice}")
    if days > WARN_DAYS:
        return []
    return [f"judge: {settings.model_id} leaves {where}, in {days} days: {advice}, and expect other verdicts"]
