"""Every setting, once: its meaning, its unit, where ORZ's value comes from, and in [brackets] what is legal.

A config file holds only what differs from this; `--key=value` on the command line comes last. The brackets hold
plain Python with x for the value; configs/load.py evaluates them, so what is written here is what is enforced.
Rules that bind two settings to each other are code there (check_sizes and its neighbours). `python launch.py --help`
prints this file, and marks the settings that may differ when a run goes on.
"""

from pathlib import Path

_orz_prompt = (Path(__file__).parent / "orz_prompt.txt").read_text()  # byte for byte (MIT)

# ---- What is trained, on what ------------------------------------------------------------------------------
model = ""  # Hugging Face folder or hub name of the base model (ORZ: Qwen2.5 base models) [x != ""]
critic_model = ""  # the critic's backbone, or a saved critic; "" = start from `model`, as ORZ does
trust_remote_code = False  # run the Python code that comes with a model; else such a model is refused
prompt_template = _orz_prompt  # the text around {question}, or "chat" for the model's chat template [x == "chat" or x.count("{question}") == 1]
train_data = []  # ORZ's JSON lists, or JSONL {"question", "answer"}; a file that is named twice counts twice
eval_data = []  # held-out files, no two of the same name; with none there is no evaluation
task = ""  # a Python file with a judge, a reward or questions of your own (docs/own_task.md); "" = ORZ's rule, 0 or 1
task_memory_gb = 8.0  # GiB of address space for each process that runs the task file [x > 0]

# ---- The run -----------------------------------------------------------------------------------------------
out_dir = "runs"  # every run gets a folder in it [x != ""]
name = ""  # name of that folder; "" = the config file's name ["/" not in x and x not in (".", "..")]
seed = 1  # everything random derives from it and the step number [0 <= x < 2**32]
steps = 1000  # training steps, each on one batch of questions; 0 only with eval_only [x >= 0]
debug = False  # shrink the run to minutes on any machine: configs/debug.py is read after the config
dry_run = False  # print the settings and the derived numbers, and stop
eval_only = False  # evaluate `model` and train nothing: configs/eval_only.py is read after the config

# ---- Machines ----------------------------------------------------------------------------------------------
tensor_parallel = 1  # ranks per vLLM engine [x > 0]
workers = 1  # ranks, one per GPU (or CPU process): a multiple of tensor_parallel [x > 0]
dtype = "auto"  # bfloat16 on a GPU, float32 on a CPU; master weights are fp32 [x in ("auto", "bfloat16", "float32")]
gpu_memory = 0.0  # GiB of each GPU, for the check that a run fits; 0 = what the GPU reports, or 80 [x >= 0]
gpu_memory_utilization = 0.7  # share of a GPU's memory that vLLM may fill while it is awake; if the learners' states fit into the rest they stay on the GPU, else they wait in CPU memory [0 < x <= 1]
gradient_checkpointing = True  # compute activations again in the backward pass (ORZ: at every size)
phase_timeout = 0.0  # seconds after which a call to the Workers counts as hung; 0 = 10 x the longest so far, at least 600, and 7,200 for the first [x >= 0]

# ---- Sampling ----------------------------------------------------------------------------------------------
prompts_per_step = 128  # questions per step (ORZ, section 2.2) [x > 0]
samples_per_prompt = 64  # responses per question (ORZ) [x > 0]
max_prompt_tokens = 2048  # (ORZ); longer questions are dropped, counted and reported [x > 0]
max_response_tokens = 8000  # a response cut off here gets reward 0 (ORZ) [x > 0]
temperature = 1.0  # of sampling; the learner uses it too (ORZ) [0.01 <= x <= 100]
top_p = 1.0  # nucleus; below 1 vLLM and policy differ by design: needs drift_limit=-1 (ORZ: 1) [0 < x <= 1]
max_num_seqs = 1024  # responses that an engine samples at a time (vLLM on an H100; A100: 256) [x > 0]
max_num_batched_tokens = 16384  # tokens in an engine's forward pass (vLLM on an H100; A100: 8192) [x > 0]
stop = ["User:", "Human:", "Assistant:", "</answer>"]  # texts that end a response, kept in it (ORZ) [all(x)]

# ---- PPO ---------------------------------------------------------------------------------------------------
max_tokens_per_pack = 16384  # a pack is whole sequences laid end to end, and the longest one must fit [x > 0]
policy_lr = 1e-6  # AdamW, no weight decay (ORZ) [0 <= x < 1]
critic_lr = 5e-6  # (ORZ) [0 <= x < 1]
policy_lr_final = 3e-7  # policy_lr after lr_decay_steps updates (ORZ-32B's second stage) [0 <= x < 1]
lr_decay_steps = 0  # policy updates of linear decay to policy_lr_final; 0 = constant (ORZ) [x >= 0]
adam_betas = [0.9, 0.95]  # decay of Adam's two averages (ORZ) [len(x) == 2 and 0 <= min(x) <= max(x) < 1]
warmup_steps = 50  # updates of each learner; number n uses n / warmup_steps of its rate (ORZ) [x >= 0]
# advantage: "gae" needs a critic (ORZ). The others do not; they compare the G responses to a question: "dr_grpo" is reward
# − mean, "grpo" divides that by the standard deviation, "rloo" takes the mean of the other G − 1, "reinforce" is dr_grpo
# normalised over all tokens of the batch (ORZ's GRPO arm).
advantage = "gae"  # see above [x in ("gae", "grpo", "dr_grpo", "rloo", "reinforce")]
normalise_advantages = True  # normalise those of gae over all tokens of the batch (ORZ)
gamma = 1.0  # discount per token (ORZ) [0 <= x <= 1]
lam = 1.0  # GAE's λ for the advantages (ORZ) [0 <= x <= 1]
critic_lam = 1.0  # λ of the returns that the critic learns (ORZ has one λ for both) [0 <= x <= 1]
policy_updates_per_step = 1  # 1 = strictly on-policy (ORZ) [x > 0]
critic_updates_per_step = 12  # (ORZ's paper) on a twelfth of the responses each [x > 0]
epochs_per_step = 1  # passes of both networks over the batch, each with all these updates (ORZ) [x > 0]
critic_warmup_steps = 0  # the first steps, in which only the critic learns; 0 = none (ORZ) [x >= 0]
clip_eps = 0.2  # PPO's ε, how far the ratio may leave 1 (ORZ) [0 < x < 1]
clip_eps_high = 0.0  # ε for ratios above 1; 0 = clip_eps (ORZ; DAPO: 0.28) [x >= 0]
value_clip = 0.2  # in units of the reward: how far V may move from V_old towards its target before the gradient is 0 (ORZ) [x > 0]
# loss_average: the policy's loss is a mean over all tokens, or over the responses of the mean over each one's tokens
# (GRPO), or over the responses of the sum over each one's tokens, divided by max_response_tokens (Dr. GRPO).
loss_average = "token"  # see above [x in ("token", "response", "constant")]
kl_coef = 0.0  # coefficient of a KL penalty to the reference model in the rewards; 0 = none (ORZ) [x >= 0]
kl_loss_coef = 0.0  # coefficient of KL in the policy's loss; both 0 = no reference model (ORZ) [x >= 0]
kl_estimator = "k3"  # estimator of the loss's KL (ORZ); k1's gradient has mean 0 [x in ("k1", "k2", "k3")]
update_ref_every = 0  # steps after which the reference takes the policy's weights; 0 = never [x >= 0]
# vLLM's log-probs differ a little from the policy's. The next three weight a token's loss by ρ = π / π_vLLM, or leave it out.
importance_cap = 0.0  # weight min(ρ, this) for each token; 0 = weight 1 (ORZ; TIS: 2) [x == 0 or x >= 1]
importance_token_band = [0.0, 0.0]  # weight 0 where ρ is outside; 0,0 = off (IcePop: 0.5,5) [len(x) == 2]
importance_response_band = [0.0, 0.0]  # the same for the geometric mean of a response [len(x) == 2]
drop_equal_groups = False  # train the policy without questions whose responses all have the same reward
drop_cut_off = False  # train the policy without responses that were cut off
max_grad_norm = 1.0  # gradients are scaled down to this norm (ORZ) [x > 0]
on_nonfinite = "stop"  # or "skip": go on without an update that is not finite [x in ("stop", "skip")]
drift_limit = 0.0  # mean |Δ log-prob| between vLLM and the policy above which the run stops; 0 = by dtype: 0.001 in fp32, 0.2 in bf16; -1 = off [x == -1 or x >= 0]

# ---- Evaluation and saving ---------------------------------------------------------------------------------
eval_every = 10  # steps; also before the first and after the last; -1 = off [x == -1 or x > 0]
eval_samples = 16  # responses per held-out question: accuracy is their mean (ORZ's tables: avg@16) [x > 0]
eval_temperature = 1.0  # (ORZ) [0 < x <= 100]
eval_top_p = 1.0  # (ORZ) [0 < x <= 1]
eval_max_response_tokens = 0  # a response is cut off here; 0 = as in training (ORZ-32B: 32768) [x >= 0]
save_every = 50  # steps between checkpoints; -1 = only at the end [x == -1 or x > 0]
max_restarts = 100  # restarts from the newest checkpoint after the death of a machine or process [x >= 0]
samples_every = 1  # steps between the files of samples/ that are kept, hundreds of MB each at ORZ's size; -1 = none [x == -1 or x > 0]
report_samples = 32  # responses a step, and questions of each evaluation, that are recorded token by token in tokens/ for report.html; 0 = none [x >= 0]
wandb = False  # send all metrics to Weights & Biases as well; needs the package wandb
keep_checkpoints = 2  # newest checkpoints to keep; the best one in evaluation is kept besides [x > 0]
