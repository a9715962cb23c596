"""Schedules: the factor of the learning rate and the stage, as functions of the epoch."""

import math

from bonn_qat.scheme import Stage
from bonn_qat.training.recipe import Recipe


def lr_factor(recipe: Recipe, epoch: float) -> float:
    """The factor of the learning rate ``epoch`` epochs (may be a fraction) after the start.

    >>> lr_factor(Recipe(schedule="cosine", epochs=10), 5.0)
    0.5
    """
    done = epoch / recipe.epochs
    if recipe.schedule == "step":
        passed = sum(epoch >= milestone for milestone in recipe.milestones)
        if recipe.factors:
            return (1.0, *recipe.factors)[passed]
        return recipe.gamma**passed
    if recipe.schedule == "one_cycle" and done < recipe.warmup:
        return max(done / recipe.warmup, 1e-2)
    if recipe.schedule == "one_cycle":
        return 0.5 + 0.5 * math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup))
    return 0.5 + 0.5 * math.cos(math.pi * done) if recipe.schedule == "cosine" else 1.0


def stage_of(stages: tuple[Stage, ...], epoch: int, epochs: int) -> int:
    """Index of the stage that ``epoch`` (from 1) of ``epochs`` belongs to, by the stages' shares."""
    ends, total = [], 0.0
    for stage in stages:
        total += stage.share
        ends.append(round(total * epochs))
    return next((index for index, end in enumerate(ends) if epoch <= end), len(stages) - 1)
