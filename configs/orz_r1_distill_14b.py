"""ORZ-R1-Distill-Qwen-14B: the recipe on a model that reasons already, with the 13k hard questions. Not run by us.

    python data/prepare.py orz                          once, where every node can read it: the questions
    Ray on every node, with one token                   README, "Several machines"
    python launch.py configs/orz_r1_distill_14b.py      64 GPUs of 80 GB (our choice: ORZ does not say how many)

128 prompts x 64 samples = 8,192 responses a step: 256 for each of 64 GPUs / tensor parallel 2 = 32 vLLM engines, 682 or
683 in each of 12 critic updates. 300 steps x 128 prompts = 38,400 = 3 epochs of 13k questions.
The paper (appendix B): the 13k mined prompts, everything else as in the other runs, scores of step 300. The prompt, too, is
ORZ's: it opens <think>, which this model is used to; prompt_template="chat" would be the model's own.
No source gives the lengths of this run: 8,000 is that of ORZ's scripts. This model was made to think for longer, and hard
questions take more than 8,000 tokens at first. In training many responses are then cut off (reward 0), so that it learns
shorter ones; evaluation at 8,000 stays below the scores reported. To train and measure it as ORZ-32B:
--max_response_tokens=16384 --max_tokens_per_pack=18432 --eval_max_response_tokens=32768.
ORZ reported, avg@16 (table 3): AIME 2024 75.2, AIME 2025 60.0, MATH500 95.6, GPQA Diamond 60.4.
"""

model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
train_data = ["data/orz/orz_math_13k_hard.json"]
eval_data = [
    "data/orz/aime2024.json",
    "data/orz/aime2025.jsonl",
    "data/orz/math500.json",
    "data/orz/gpqa_diamond.json",
]
workers = 64
tensor_parallel = 2
steps = 300
