"""The ablations' task: follow x → 21x + 7 (mod 100) for 10 to 18 steps, line by line. On one CPU core:

    OMP_NUM_THREADS=1 python launch.py configs/recurrence.py

With one thread a run repeats to the last bit on the same machine, and two runs fit side by side on two cores;
bench/ablate.py starts them. 16 prompts x 16 samples = 256 responses a step; data/make_recurrence.py made the task and
the base model (175,000 parameters). A worked answer has about 100 tokens, a checked one about 200; 256 are the limit.
"""

model = "data/recurrence"
train_data = ["data/recurrence/train.jsonl"]
eval_data = ["data/recurrence/eval.jsonl"]
prompt_template = "User: {question}\nAssistant: <think>"
steps = 24
prompts_per_step = 16
samples_per_prompt = 16
max_prompt_tokens = 16
max_response_tokens = 256
max_num_seqs = 256
max_num_batched_tokens = 4096
max_tokens_per_pack = 4096
policy_lr = 1.5e-4
critic_lr = 1e-3
warmup_steps = 2
gradient_checkpointing = False
gpu_memory_utilization = 0.1
eval_every = 8
eval_samples = 4
save_every = 4
keep_checkpoints = 1
