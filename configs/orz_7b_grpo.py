"""ORZ's GRPO arm, all else as ORZ-7B: the comparison that ORZ's paper makes (Figure 7). Not run by us.

    python data/prepare.py orz                          once, where every node can read it: the questions
    Ray on every node, with one token                   README, "Several machines"
    python launch.py configs/orz_7b_grpo.py             32 GPUs of 80 GB, as orz_7b.py

128 prompts x 64 samples = 8,192 responses a step: 256 for each of 32 vLLM engines. No critic: a response's advantage is
its reward minus the mean of the 64 responses to its question, at every token, and is then normalised over all tokens of
the batch. That is what ORZ's code computes: because of a bug (`std := np.std(…) > 0`) its standard deviation of a group is
always 1, and its advantages are normalised as PPO's are. Its authors agree that this is REINFORCE++ (its issue 75).
GRPO as its paper defines it is --advantage=grpo --loss_average=response.
ORZ reported no scores for it in a table; it found PPO the more stable of the two.
"""

model = "Qwen/Qwen2.5-7B"
train_data = ["data/orz/orz_math_57k.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
workers = 32
advantage = "reinforce"
