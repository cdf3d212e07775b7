"""ORZ-32B, second stage: 100 steps on the 13k hard questions, from the first stage's networks. Not run by us.

    python launch.py configs/orz_32b.py                 first: at its end runs/orz_32b/ holds policy/ and critic/
    python launch.py configs/orz_32b_anneal.py          128 GPUs of 80 GB (ORZ's README: 16 nodes of 8)

128 prompts x 64 samples = 8,192 responses a step: 256 for each of 128 GPUs / tensor parallel 4 = 32 vLLM engines, 682
or 683 in each of 12 critic updates. The policy's learning rate falls linearly from 1e-6 to 3e-7 over these 100 steps, the
critic's stays 5e-6 (appendix B). There is no second warm-up: this is our choice, since the paper does not say.
The lengths are those of the first stage: see orz_32b.py.
ORZ reported after this stage, avg@16 (table 4): AIME 2024 48.1, AIME 2025 36.0, MATH500 92.2, GPQA Diamond 55.5.
"""

model = "runs/orz_32b/policy"
critic_model = "runs/orz_32b/critic"
train_data = ["data/orz/orz_math_13k_hard.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
workers = 128
tensor_parallel = 4
max_response_tokens = 16384
max_tokens_per_pack = 18432
eval_max_response_tokens = 32768
steps = 100
lr_decay_steps = 100
warmup_steps = 0
