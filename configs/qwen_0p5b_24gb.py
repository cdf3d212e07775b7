"""One gaming card: Qwen2.5-0.5B learns countdown (examples/countdown.py) on one GPU of 24 GB. Not run by us.

    python launch.py configs/qwen_0p5b_24gb.py          an RTX 3090 or 4090, and 32 GB of CPU memory

32 prompts x 16 samples = 512 responses a step, of at most 1,024 tokens; 100 steps see 3,200 of the 20,000 questions.
tools/plan.py estimates 18.0 GiB on the GPU (the policy's update; vLLM may fill half of the card while it generates) and
16.6 GiB in CPU memory, where the learners' states wait. A checkpoint takes 11.9 GB of disk, and up to 4 exist at once.
The first start downloads the model from the hub (1 GB) and makes the questions.
"""

model = "Qwen/Qwen2.5-0.5B"
task = "examples/countdown.py"
steps = 100
prompts_per_step = 32
samples_per_prompt = 16
max_prompt_tokens = 256
max_response_tokens = 1024
max_num_seqs = 256
max_num_batched_tokens = 8192
max_tokens_per_pack = 4096
warmup_steps = 10
gpu_memory_utilization = 0.5
eval_samples = 4
