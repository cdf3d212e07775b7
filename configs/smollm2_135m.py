"""SmolLM2-135M-Instruct learns arithmetic word problems on two CPU cores.

    python data/prepare.py smollm2 && python launch.py configs/smollm2_135m.py

16 prompts x 4 samples = 64 responses a step, in 9 GB of memory. float32: bf16 products are five times slower on a CPU
without AVX-512. It took 12 minutes on 2 shared cores of an AMD EPYC: held-out numbers 9 -> 76% right, held-out wordings
2 -> 60% (docs/smollm2.md).
"""

model = "models/smollm2_135m"
critic_model = "models/smollm2_135m_critic"  # 6 of its 30 layers: a whole one costs as much as the policy
train_data = ["data/word_problems/train.jsonl"]
eval_data = ["data/word_problems/eval.jsonl", "data/word_problems/eval_wordings.jsonl"]
prompt_template = (  # <|im_start|> comes before this. Without the examples the model hardly ever boxes an answer.
    "user\n"
    "Tom had 9 pens and lost 4. How many are left? 9 - 4 = 5 <answer>\\boxed{5}</answer>\n"
    "Tom has 3 bags of 4 pens. How many pens? 3 * 4 = 12 <answer>\\boxed{12}</answer>\n"
    "{question}"
)
steps = 8
prompts_per_step = 16
samples_per_prompt = 4
max_prompt_tokens = 128
max_response_tokens = 28
max_num_seqs = 256  # This and the next are what vLLM chooses on a CPU.
max_num_batched_tokens = 4096
max_tokens_per_pack = 2048
policy_lr = 3e-5
critic_lr = 1e-4
warmup_steps = 3
critic_updates_per_step = 2
gradient_checkpointing = False
gpu_memory_utilization = 0.2
eval_every = 8
eval_samples = 1
save_every = 8
