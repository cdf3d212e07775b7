"""ORZ-32B, first stage: Qwen2.5-32B on all 129k questions. Not run by us.

    python data/prepare.py orz                          once, where every node can read it: the questions
    Ray on every node, with one token                   README, "Several machines"
    python launch.py configs/orz_32b.py                 128 GPUs of 80 GB (ORZ's README: 16 nodes of 8)

128 prompts x 64 samples = 8,192 responses a step: 256 for each of 128 GPUs / tensor parallel 4 = 32 vLLM engines, 682
or 683 in each of 12 critic updates. 1,100 steps x 128 prompts = 140,800 = 1.1 epochs of 57k + 72k questions.
The paper's first stage has 1,100 steps (appendix B). That it used both files follows from ORZ's README, which says that the
13k hard questions were "mined from the above 129k data". AIME 2024 after this stage: about 41 (README).
Lengths: ORZ's authors answered in its issues 50 and 65 that 32B was trained at 16,384 response tokens, in packs of
2,048 + 16,384 = 18,432, and evaluated at 32,768. Its released script says 8,000, which cannot reach the 10,000 of Figure 2.
After the second stage ORZ reported, avg@16 (table 4): AIME 2024 48.1, AIME 2025 36.0, MATH500 92.2, GPQA Diamond 55.5.
"""

model = "Qwen/Qwen2.5-32B"
train_data = ["data/orz/orz_math_57k.json", "data/orz/orz_math_72k.json"]
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
steps = 1100
