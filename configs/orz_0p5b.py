"""ORZ-0.5B: Qwen2.5-0.5B trained by the whole recipe on one machine. Not run by us.

    python data/prepare.py orz                          once: the questions
    python launch.py configs/orz_0p5b.py                8 GPUs of 80 GB (ORZ: one node of 8 A800 or H800)

128 prompts x 64 samples = 8,192 responses a step: 1,024 for each of 8 vLLM engines, 682 or 683 in each of 12 critic
updates, all in the one policy update. 57k questions / 128 = about 445 steps an epoch.
ORZ reported, avg@16 (arXiv 2503.24290, table 4): AIME 2024 1.0, AIME 2025 0.2, MATH500 31.0, GPQA Diamond 12.1.
"""

model = "Qwen/Qwen2.5-0.5B"
train_data = ["data/orz/orz_math_57k.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
workers = 8
