"""Rewards. Rules only: a right answer and a kept format count the same (R1 Sec 2.2.2)."""

from benthic.tasks.task import Grade


def rule_reward(grade: Grade) -> float:
    """Reward_rule = Reward_acc + Reward_format, each 0 or 1."""
    return float(grade.correct) + float(grade.well_formed)
