"""Reward inspection before anything is trained: known answers, the base policy's answers, cheats, and the gate.

Owns the checks of notebook 2; each file one subject, all of them under one name. Must not know training.

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/decisions.yaml
"""

from lib.preflight.answers import grouped_rewards, known_answers, sample_base, score_answers, score_one
from lib.preflight.gate import Check, gate, keeps_prefix, verdict
from lib.preflight.groups import SIZES, UsefulGroups, useful_groups
from lib.preflight.judging import JudgeBill, judge_bill
from lib.preflight.suite import Attacked, AttackTable, attack_table

__all__ = [
    "SIZES",
    "AttackTable",
    "Attacked",
    "Check",
    "JudgeBill",
    "UsefulGroups",
    "attack_table",
    "gate",
    "grouped_rewards",
    "judge_bill",
    "keeps_prefix",
    "known_answers",
    "sample_base",
    "score_answers",
    "score_one",
    "useful_groups",
    "verdict",
]
