"""The judge: a model behind an OpenAI-compatible endpoint that is asked for verdicts as JSON.

Owns the settings of judges and configs/judges.yaml (`settings`), single HTTP requests (`http`), and concurrency,
retries, pauses, dollars and the spend limit (`asking`). A call that fails raises JudgeError: it is never a verdict.
Must not know tasks, rewards, rollouts or criteria.

    python -c "from lib.judge import *; print(JudgeSettings().name, check_judge(JudgeSettings(provider='gemini')))"
"""

from lib.judge.asking import Judge, Totals, open_judge
from lib.judge.errors import JudgeError, JudgeRefused, Reply, UselessReply
from lib.judge.settings import JudgeSettings, check_judge, load_catalogue

__all__ = [
    "Judge",
    "JudgeError",
    "JudgeRefused",
    "JudgeSettings",
    "Reply",
    "Totals",
    "UselessReply",
    "check_judge",
    "load_catalogue",
    "open_judge",
]
