"""The demo: a 0.8M-parameter model learns that thinking longer pays, on two CPU cores or any GPU.

    python launch.py configs/tiny.py --workers=2        two CPU cores
    python launch.py configs/tiny.py                    one core, or one GPU

64 prompts x 16 samples = 1,024 responses a step; data/make_tiny.py made the task and the base model. The learning
rates are 500 (policy) and 200 (critic) times ORZ's: the model is ten thousand times smaller, and has 20 steps.
"""

model = "data/tiny"
train_data = ["data/tiny/train.jsonl"]
eval_data = ["data/tiny/eval.jsonl"]
prompt_template = "User: {question}\nAssistant: <think>"
steps = 20
prompts_per_step = 64
samples_per_prompt = 16
max_prompt_tokens = 32
max_response_tokens = 96
max_num_seqs = 256  # This and the next are what vLLM chooses on a CPU.
max_num_batched_tokens = 4096
max_tokens_per_pack = 4096
policy_lr = 5e-4
critic_lr = 1e-3
warmup_steps = 2
critic_updates_per_step = 4
gradient_checkpointing = False
gpu_memory_utilization = 0.1
eval_every = 10
eval_samples = 8
save_every = -1
