"""A task file for the control of the SmolLM2 run: a reward of 0 or 1 that says nothing about the response.

    python launch.py configs/smollm2_135m.py --task=bench/random_reward.py --name=smollm2_control

What learns with these rewards was not taught by them. Evaluation's accuracy is that of ORZ's rule, as in the run itself.
"""

import random

SHARE = 0.4  # of rewards that are 1: about the mean accuracy of the run's own 8 steps


def reward(response, question, correct, finish_reason):
    # Drawn from the texts, so that a run that makes a step again draws the same.
    rng = random.Random(question["question"] + response)
    return float(rng.random() < SHARE)
