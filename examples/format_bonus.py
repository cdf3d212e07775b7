"""A reward with a bonus for form: 1 if ORZ's rule finds a response right, and 0.2 more for thoughts before the answer.

    python launch.py configs/tiny.py --task=examples/format_bonus.py

The evaluation's accuracy still counts right answers alone.
"""

BONUS = 0.2


def has_form(response):
    """Whether a response is `thoughts </think> <answer> … </answer>`. The prompt ends with <think>."""
    thoughts, _, rest = response.partition("</think>")
    rest = rest.strip()
    return bool(thoughts.strip()) and rest.startswith("<answer>") and rest.endswith("</answer>")


def reward(response, question, correct, finish_reason):
    ended_by_itself = finish_reason == "stop"
    return float(correct) + BONUS * (ended_by_itself and has_form(response))
