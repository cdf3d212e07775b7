"""ORZ-1.5B: Qwen2.5-1.5B trained by the whole recipe. Not run by us.

    python data/prepare.py orz                          once, where every node can read it: the questions
    Ray on every node, with one token                   README, "Several machines"
    python launch.py configs/orz_1p5b.py                16 GPUs of 80 GB (ORZ: 2 nodes of 8)

128 prompts x 64 samples = 8,192 responses a step: 512 for each of 16 vLLM engines, 682 or 683 in each of 12 critic
updates. 57k questions / 128 = about 445 steps an epoch.
ORZ reported, avg@16 (arXiv 2503.24290, table 4): AIME 2024 3.5, AIME 2025 1.0, MATH500 58.0, GPQA Diamond 16.8.
"""

model = "Qwen/Qwen2.5-1.5B"
train_data = ["data/orz/orz_math_57k.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
workers = 16
