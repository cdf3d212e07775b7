"""A task file for the control of the SmolLM2 run: a reward of 0 or 1 that says nothing about the response.

    python launch.py configs/smollm2_135m.py --task=bench/random_reward.py --name=smollm2_control

A gain in accuracy under these rewards cannot come from what they say. Evaluation's accuracy is that of ORZ's rule, as in
the run itself.
"""

import random

SHARE = 0.4  # of rewards that are 1: about the mean accuracy of the run's own 8 steps


def reward(response, question, correct, finish_reason):
    # The texts seed the draw, so that a run that repeats a step after a restart draws the same rewards.
    rng = random.Random(question["question"] + response)
    return float(rng.random() < SHARE)
