"""ORZ-7B: Qwen2.5-7B trained by the whole recipe. Not run by us.

    python data/prepare.py orz                          once, where every node can read it: the questions
    Ray on every node, with one token                   README, "Several machines"
    python launch.py configs/orz_7b.py                  32 GPUs of 80 GB (ORZ's README: 4 nodes of 8)

128 prompts x 64 samples = 8,192 responses a step: 256 for each of 32 vLLM engines, 682 or 683 in each of 12 critic
updates. 57k questions / 128 = about 445 steps an epoch.
ORZ's scripts say 8,000 response tokens, as here; for 7B its authors say 8,192 (its issues 50 and 65).
What it cost ORZ: 64 H800 for 5.5 days (its issue 1, February 2025).
ORZ reported, avg@16 (arXiv 2503.24290, table 4): AIME 2024 17.9, AIME 2025 15.6, MATH500 81.4, GPQA Diamond 36.6.
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
