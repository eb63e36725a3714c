"""Rules between the settings of a study; its runs are checked one by one like any other."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from othink_ray.config.bounds import EXPERIMENTS
from othink_ray.config.problem import Problem, broken
from othink_ray.config.schema import Config


def study_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with that from which the list of runs is made."""
    study = config.study
    if config.mode != "study":
        return
    for name in study.experiments:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            remedy = f"{f'Did you mean {near[0]}? ' if near else ''}Options: {', '.join(EXPERIMENTS)}."
            yield Problem(subject=f"study.experiments = {name}", rule="there is no such experiment", remedy=remedy)
    for key, values in (("alpha", study.alphas), ("beta", study.betas)):
        if key in study.experiments and (not values or min(values) < 0):
            subject = f"study.{key}s = {list(values)}"
            rule = "must be numbers of 0 or more, at least one: a run is made for each"
            yield Problem(subject=subject, rule=rule, remedy=f"Set 'study.{key}s=[0,0.5,1]', for example.")
    for task_name, task in (("counting", study.counting), ("geometry", study.geometry)):
        if sum(one.startswith("algo.kl.beta_min=") for one in task.grpo) != 1:
            subject = f"study.{task_name}.grpo = [{', '.join(task.grpo)}]"
            rule = "must set algo.kl.beta_min once: the constant KL weight that GRPO-D is compared with"
            remedy = f'Set \'study.{task_name}.grpo=["algo=grpo","algo.kl.beta_min=0.04"]\'.'
            yield Problem(subject=subject, rule=rule, remedy=remedy)
    if study.counting.data == study.geometry.data:
        rule = "must not be that of study.counting: what one task does to the other needs two tasks"
        yield broken(config, "study.geometry.data", rule, "Set study.geometry.data=geometry.")
