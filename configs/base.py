"""Every setting, once, with its meaning, unit, legal values and where ORZ's value comes from.

A config file holds only what differs from this; `--key=value` on the command line comes last.
"""

# ---- What is trained, on what ------------------------------------------------------------------------------
model = ""  # Hugging Face folder or hub name of the base model (ORZ: Qwen2.5 base models)
critic_model = ""  # the critic's backbone, or a saved critic; "" = start from `model`, as ORZ does
prompt_template = (  # text with {question}; ORZ's, byte for byte (MIT, github.com/Open-Reasoner-Zero)
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
    "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: You must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. "
    "And your final answer will be extracted automatically by the \\boxed{} tag.\n"
    "This is the problem:\n{question}\nAssistant: <think>"
)
train_data = []  # files of questions: ORZ's JSON lists, or JSONL {"question", "answer"}
eval_data = []  # held-out files, same formats or ORZ's evaluation lists; [] = no evaluation

# ---- The run -----------------------------------------------------------------------------------------------
out_dir = "runs"  # every run gets a folder in it
name = ""  # of that folder; "" = the config file's name
seed = 1  # everything random derives from it and the step number; >= 0
steps = 1000  # training steps; one step = one batch of questions
wandb = False  # also log to Weights & Biases, if it is installed
dry_run = False  # print the settings and the derived numbers, and stop

# ---- Machines ----------------------------------------------------------------------------------------------
workers = 1  # ranks, one per GPU (per CPU process without one)
tensor_parallel = 1  # ranks per vLLM engine; divides workers
dtype = "auto"  # "bfloat16", "float32", or "auto": bfloat16 on a GPU, float32 on CPU; master weights are fp32
gpu_memory_utilization = 0.7  # share of a GPU's memory that vLLM may fill while it is awake, 0 to 1
gradient_checkpointing = True  # compute activations again in the backward pass (ORZ: at every size)
grader_processes = 0  # per engine; 0 = one per core that falls to it, at most 8
phase_timeout = 0.0  # seconds a call to the Workers may take; 0 = 10 x the longest so far, at least 600

# ---- Sampling ----------------------------------------------------------------------------------------------
prompts_per_step = 128  # questions per step (ORZ, section 2.2)
samples_per_prompt = 64  # responses per question (ORZ)
max_prompt_tokens = 2048  # longer questions are dropped, counted and reported (ORZ)
max_response_tokens = 8000  # a response cut off here gets reward 0 (ORZ)
temperature = 1.0  # of sampling; the learner uses it too (ORZ)
top_p = 1.0  # nucleus; below 1 sampler and learner disagree by design: needs drift_limit=-1 (ORZ: 1)
stop = ["User:", "Human:", "Assistant:", "</answer>"]  # end a response and stay in it (ORZ)

# ---- PPO ---------------------------------------------------------------------------------------------------
max_tokens_per_pack = 16384  # sequences are laid end to end in packs of at most so many tokens
policy_lr = 1e-6  # AdamW, no weight decay (ORZ)
critic_lr = 5e-6  # (ORZ)
adam_betas = [0.9, 0.95]  # (ORZ)
warmup_steps = 50  # optimizer updates of each learner; update n uses n / warmup_steps of its rate (ORZ)
policy_updates_per_step = 1  # 1 = strictly on-policy (ORZ)
critic_updates_per_step = 12  # each on one twelfth of the samples (ORZ)
clip_eps = 0.2  # PPO's ε, for both sides of the ratio (ORZ)
value_clip = 0.2  # how far V may move from V_old before its loss stops helping it (ORZ)
gamma = 1.0  # discount, 0 to 1 (ORZ)
lam = 1.0  # GAE's λ, 0 to 1 (ORZ)
kl_coef = 0.0  # of a per-token penalty towards the base model; 0 = none, and no reference model (ORZ)
max_grad_norm = 1.0  # gradients are scaled down to this norm (ORZ)
drift_limit = (
    0.0  # mean |log-prob of vLLM - of the policy| that stops the run; 0 = 1e-3 fp32, 0.05 bf16; -1 = off
)
shuffle_rewards = False  # a control experiment: rewards permuted over the batch

# ---- Evaluation and saving ---------------------------------------------------------------------------------
eval_every = 10  # steps; also before the first and after the last; -1 = off
eval_samples = 16  # responses per held-out question: accuracy is their mean (ORZ: avg@16)
eval_temperature = 1.0  # (ORZ)
eval_top_p = 1.0  # (ORZ)
save_every = 50  # steps between exports of policy and critic as Hugging Face folders; -1 = only at the end
