"""ORZ-0.5B on a single GPU: the same recipe, eight times as long. Not run by us.

    python data/prepare.py orz                          once: the questions
    python launch.py configs/orz_0p5b_1gpu.py           1 GPU of 80 GB (ORZ: an A800 or H800)

128 prompts x 64 samples = 8,192 responses a step, all of them for one vLLM engine and one rank. A pack is as long as
one full sequence, 2,048 + 8,000 = 10,048 tokens, as in ORZ's script for one GPU.
ORZ released the script (playground/orz_0p5b_ppo_1gpu.py) and reported no scores for it; for 0.5B see orz_0p5b.py.
"""

model = "Qwen/Qwen2.5-0.5B"
train_data = ["data/orz/orz_math_57k.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
max_tokens_per_pack = 10048
# At 0.7, a few hundred MiB would decide whether the learners' states stay on the GPU beside vLLM.
gpu_memory_utilization = 0.65
