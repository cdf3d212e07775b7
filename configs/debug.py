"""--debug=True: any config as a run of minutes on any machine. This is read after the config, before the command line.

    python launch.py configs/orz_32b.py --debug=True        one core, or one GPU

The demo's model and task, one Worker, three steps of 8 prompts x 8 samples. Settings that are not here stay the config's.
"""

model = "data/tiny"
critic_model = ""
train_data = ["data/tiny/train.jsonl"]
eval_data = ["data/tiny/eval.jsonl"]
prompt_template = "User: {question}\nAssistant: <think>"
steps = 3
workers = 1
tensor_parallel = 1
gpu_memory_utilization = 0.1
prompts_per_step = 8
samples_per_prompt = 8
max_prompt_tokens = 32
max_response_tokens = 96
max_tokens_per_pack = 4096
critic_updates_per_step = 2
eval_every = 3
eval_samples = 1
eval_max_response_tokens = 0
