"""What each GPU will hold in each phase of a step, and whether it fits, with the arithmetic of every line.

    python tools/plan.py configs/orz_32b.py [--gpu_memory=80] [--key=value …]    exit code 2: does not fit; 3: cannot tell

In:   the settings, and the model's shape: from config.json in its folder, or from the table of the models in configs/.
Out:  phase → {the name of an entry with its arithmetic: GiB on one GPU}.
UNVERIFIED: written from the sources, without a GPU; no number here has been compared with a measured peak.

vLLM, critic and policy take turns. Where vLLM's share of a GPU leaves room for the networks that learn, they stay there
(fits_beside_vllm in workers.py decides); else those that are not at work wait in CPU memory. The critic's forward pass
needs less than its updates do, and is not listed. An estimate that rests on experience alone is marked as a guess.

launch.py calls check_fits before a run, and describe for --dry_run. Nothing here asks torch about the GPU: that would make
a CUDA context in the driver's process, which takes memory from the Worker on the same GPU.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in tools/, Python looks for modules there only.

from configs.load import UserError, context_tokens, has_critic, has_reference, load  # noqa: E402
from workers import fits_beside_vllm  # noqa: E402

GIB = 2**30

# The fields of a config.json that make a dense network's shape.
FIELDS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
]
SHAPES = {  # model → the values of FIELDS, from its config.json on the hub
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (5120, 48, 40, 8, 13824, 152064, False),
}

# Constants of other files, repeated here because torch is not imported; tests/test_plan.py compares them.
KEPT_WHOLE = 5 * 10**8  # parameters that each rank keeps whole between packs (ppo.py)
REDUCED_AT_ONCE = 2 * 10**7  # elements of gradients in one reduction (ppo.py)
MAX_LOGITS = 2**28  # elements of the logits of one chunk (model.py)
SAMPLE_BYTES = 11  # of a token in samples/: its id in JSON, and its text (a guess)
MAX_LIVE_PARAMETERS = 10**9  # parameters that DeepSpeed gathers at once, by default


@dataclass
class Shape:
    """The shape of a dense network, and its number of parameters."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    head_params: int  # of the output head; 0 where it is tied to the embedding
    params: int

    @property
    def embedding_params(self):
        return self.vocabulary * self.hidden

    @property
    def matrix_params(self):
        """Parameters of the seven matrices of a layer: query, key, value, output, and three of the feed-forward part."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.feed_forward


def read_shape(model):
    """The Shape of a model, from the config.json of its folder or from the table; None where it cannot be known."""
    file = Path(model) / "config.json"
    config = {"tie_word_embeddings": False, "model_type": "qwen2"}
    if file.is_file():
        try:
            config |= json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            raise UserError(f"{file} is not a JSON object") from None
    elif model in SHAPES:
        config |= zip(FIELDS, SHAPES[model])
    known = all(isinstance(config.get(name), int) for name in FIELDS)
    mixture_of_experts = any("expert" in key for key in config)
    if not known or mixture_of_experts:
        return None
    hidden, layers, heads, kv_heads, feed_forward, vocabulary, tied = (config[name] for name in FIELDS)
    head_dim = config.get("head_dim") or hidden // heads
    head_params = 0 if tied else vocabulary * hidden
    shape = Shape(hidden, layers, heads, kv_heads, head_dim, feed_forward, vocabulary, head_params, params=0)
    two_norms = 2 * hidden
    shape.params = layers * (shape.matrix_params + bias_params(config, shape) + two_norms)
    last_norm = hidden
    shape.params += last_norm + shape.embedding_params + head_params
    return shape


def bias_params(config, shape):
    """Parameters of the biases of a layer's attention."""
    query_key_value = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if config.get("attention_bias"):
        return query_key_value + shape.hidden  # Llama then has one in the output projection, too.
    return query_key_value if config["model_type"] == "qwen2" else 0


def critic_shape(cfg, shape):
    """The critic's Shape: that of its own model, or else the policy's, with a value head in place of the output head. None if
    the run has no critic."""
    if not has_critic(cfg):
        return None
    if cfg.critic_model:
        shape = read_shape(cfg.critic_model) or shape
    return replace(shape, params=shape.params - shape.head_params + shape.hidden)


def num_learned(cfg, shape):
    """Parameters of the networks that learn: the policy's, and the critic's where there is one."""
    critic = critic_shape(cfg, shape)
    return shape.params + (critic.params if critic else 0)


# ---- What one GPU holds: {name with arithmetic: bytes} -----------------------------------------------------------


def item(what, *factors, parts=1):
    """An entry of what a GPU holds, as ("name = arithmetic", bytes): the product of the factors, divided by `parts`."""
    arithmetic = " * ".join(f"{factor:,}" for factor in factors)
    if parts > 1:
        arithmetic += f" / {parts}"
    return f"{what} = {arithmetic}", math.prod(factors) / parts


def bytes_per_weight(cfg):
    return 4 if cfg.dtype == "float32" else 2


def always_held(cfg, policy):
    """What is on the GPU in every phase."""
    size = bytes_per_weight(cfg)
    reference = policy.params if has_reference(cfg) else 0
    whole = min(reference, KEPT_WHOLE) if cfg.workers > 1 else 0
    return dict(
        [
            item("CUDA, NCCL, sleeping vLLM, fragmentation (a guess)", 4, GIB),
            item("the reference model, which stays on the GPU", size, reference, parts=cfg.workers),
            item("its weights that are kept whole (KEPT_WHOLE)", size, whole),
        ]
    )


def vllm_weights(cfg, policy):
    """What vLLM holds as long as it is awake. Its sampler counts each sequence's tokens in an int32 table."""
    return dict(
        [
            item("vLLM's weights", bytes_per_weight(cfg), policy.params, parts=cfg.tensor_parallel),
            item("vLLM's table of sampled tokens", 4, cfg.max_num_seqs, policy.vocabulary),
        ]
    )


def generating(cfg, policy, gpu_memory):
    """What is on the GPU while vLLM generates; the KV cache gets all that the rest of vLLM's share leaves."""
    size = bytes_per_weight(cfg)
    activations = 4 * policy.hidden + 3 * policy.feed_forward  # numbers per token
    held = always_held(cfg, policy)
    others = (1 - cfg.gpu_memory_utilization) * gpu_memory * GIB - sum(held.values())
    held |= vllm_weights(cfg, policy)
    held |= [
        item("vLLM's CUDA graphs (a guess)", 2**29),
        item("vLLM's activations (a guess)", cfg.max_num_batched_tokens, size, activations),
        item("vLLM's logits, three copies in fp32 (a guess)", cfg.max_num_seqs, 12, policy.vocabulary),
        item("outside vLLM's share: for learners that stay, or unused", max(0, round(others))),
    ]
    tokens = context_tokens(cfg)
    kv_heads = max(1, policy.kv_heads // cfg.tensor_parallel)  # Each GPU of an engine holds at least one.
    token_bytes = 2 * policy.layers * kv_heads * policy.head_dim * size  # a key and a value in each layer
    left = gpu_memory * GIB - sum(held.values())
    hundredths = left // (tokens * token_bytes / 100)
    # How many sequences of full length (of training or evaluation) fit at the same time. There must be room for one.
    sequences = max(1.0, hundredths / 100)
    held |= [item("KV cache: sequences, tokens, bytes", sequences, tokens, token_bytes)]
    return held


def updating(cfg, learner, others_staying):
    """What the update of one learner adds. others_staying: parameters of the other one, if its states stay on the GPU."""
    size, tokens = bytes_per_weight(cfg), cfg.max_tokens_per_pack
    gathered = max(MAX_LIVE_PARAMETERS, KEPT_WHOLE + learner.embedding_params)
    gathered = min(learner.params, gathered) if cfg.workers > 1 else 0
    # Numbers per token that the backward pass needs of one layer.
    kept = 16 * learner.hidden + 4 * learner.kv_heads * learner.head_dim + 5 * learner.feed_forward
    layers_kept = 1 if cfg.gradient_checkpointing else learner.layers
    inputs_kept = learner.layers if cfg.gradient_checkpointing else 0
    return dict(
        [
            item("weights", size, learner.params, parts=cfg.workers),
            item("fp32 weights and Adam's two averages", 12, learner.params, parts=cfg.workers),
            item("fp32 gradients", 4, learner.params, parts=cfg.workers),
            item("weights gathered at once, and kept whole", size, gathered),
            item("gradients reduced at once", size, REDUCED_AT_ONCE),
            item("the same in fp32", 4, max(REDUCED_AT_ONCE, learner.embedding_params)),
            item("activations of a layer", layers_kept, size, tokens, kept),
            item("inputs of all layers", inputs_kept, size, tokens, learner.hidden),
            item("the other network, which stays on the GPU", size + 16, others_staying, parts=cfg.workers),
        ]
    )


def log_probs(cfg, policy):
    """What the policy's output head adds to its update."""
    logits = min(MAX_LOGITS, cfg.max_tokens_per_pack * policy.vocabulary)
    return dict(
        [
            item("logits of a chunk, four copies in fp32 (MAX_LOGITS)", 4, 4, logits),
            item("gradient of the head, in 16 bits and fp32", 2 + 4, policy.embedding_params),
        ]
    )


def syncing(cfg, policy, policy_staying, critic_staying):
    """What is on the GPU while the policy's weights go into vLLM. …_staying: parameters whose states stay on the GPU."""
    size = bytes_per_weight(cfg)
    held = always_held(cfg, policy) | vllm_weights(cfg, policy)
    sixteen_tensors = policy.embedding_params + 3 * policy.matrix_params // 2
    held |= [
        item("policy's weights", size, policy.params, parts=cfg.workers),
        item("weights gathered at once: 16 tensors", size, sixteen_tensors),
        item("policy's other states, which stay on the GPU", 16, policy_staying, parts=cfg.workers),
        item("the critic, which stays on the GPU", size + 16, critic_staying, parts=cfg.workers),
    ]
    return held


def learners_stay(cfg, policy, gpu_memory):
    """Whether the learners' states will stay on the GPU, by the rule that each Worker applies to what its GPU reports."""
    taken = 1 * GIB  # by CUDA and NCCL before vLLM starts (a guess)
    if has_reference(cfg):
        taken += bytes_per_weight(cfg) * policy.params / cfg.workers  # the reference model
    total = gpu_memory * GIB
    return fits_beside_vllm(cfg, num_learned(cfg, policy), free=total - taken, total=total)


def plan(cfg, policy, gpu_memory):
    """Phase → {the name of an entry with its arithmetic: GiB on one GPU}. policy: its Shape; gpu_memory: in GiB.

    A run fits if no phase holds more than gpu_memory.
    """
    critic = critic_shape(cfg, policy)
    policy_staying = critic_staying = 0
    if learners_stay(cfg, policy, gpu_memory):
        policy_staying = policy.params
        critic_staying = critic.params if critic else 0
    always = always_held(cfg, policy)
    phases = {"generate": generating(cfg, policy, gpu_memory)}
    if critic:
        phases["critic"] = always | updating(cfg, critic, others_staying=policy_staying)
    phases["policy"] = always | updating(cfg, policy, others_staying=critic_staying) | log_probs(cfg, policy)
    phases["sync"] = syncing(cfg, policy, policy_staying, critic_staying)
    return {
        phase: {what: num_bytes / GIB for what, num_bytes in held.items()} for phase, held in phases.items()
    }


def overfull(cfg, policy, gpu_memory):
    """The phases that do not fit, as {phase: GiB that it needs}."""
    failed = {}
    for phase, held in plan(cfg, policy, gpu_memory).items():
        need = sum(held.values())
        if need > gpu_memory + 1e-6:
            failed[phase] = need
    return failed


# ---- For launch.py -----------------------------------------------------------------------------------------------


def check_fits(cfg, gpu_memory):
    """Raises UserError where a phase does not fit into GPUs of gpu_memory GiB, naming a setting that makes all fit.

    A model of unknown shape passes, since nothing can be said about it.
    """
    policy = read_shape(cfg.model)
    failed = overfull(cfg, policy, gpu_memory) if policy else {}
    if failed:
        phase, need = next(iter(failed.items()))
        estimate = "an estimate, which --gpu_memory=1000 overrules"
        reason = f"{phase}: needs {need:.1f} GiB of each GPU ({estimate}), which has {gpu_memory:g}"
        raise UserError(f"{reason}: {way_out(cfg, policy, gpu_memory)}")


def way_out(cfg, policy, gpu_memory):
    """The first setting tried here that makes every phase fit."""
    engines = [n for n in (2, 4, 8) if cfg.workers % n == policy.heads % n == 0]
    ways = {
        "gradient_checkpointing": [True],
        "max_tokens_per_pack": [cfg.max_prompt_tokens + cfg.max_response_tokens],
        "gpu_memory_utilization": [0.7],
        "tensor_parallel": engines,
        "workers": [cfg.workers * 2**doublings for doublings in range(1, 6)],
    }
    for key, values in ways.items():
        for value in values:
            changed = SimpleNamespace(**vars(cfg) | {key: value})
            if not overfull(changed, policy, gpu_memory):
                return f"try --{key}={value}"
    return "no single setting is enough: combine more workers, more tensor_parallel and fewer tokens, or take a smaller model"


def derived(cfg):
    """The numbers that follow from the settings, as {name: text}."""
    responses = cfg.prompts_per_step * cfg.samples_per_prompt
    engines = cfg.workers // cfg.tensor_parallel
    numbers = {
        "responses per step": f"{cfg.prompts_per_step} prompts x {cfg.samples_per_prompt} samples = {responses:,}",
        "response tokens per step": f"at most {responses * cfg.max_response_tokens:,}",
        "vLLM engines": f"{cfg.workers} workers / tensor parallel {cfg.tensor_parallel} = {engines}",
        "responses per policy update": f"{responses // cfg.policy_updates_per_step:,}",
    }
    if has_critic(cfg):
        numbers["responses per critic update"] = f"{responses // cfg.critic_updates_per_step:,}"
    return numbers


def describe(cfg):
    """Every setting as it stands, and the numbers that follow, as a text: what --dry_run prints."""
    settings = [f"{key} = {value!r}" for key, value in vars(cfg).items()]
    numbers = [f"{name}: {value}" for name, value in derived(cfg).items()]
    return "\n".join([*settings, "", *numbers])


# ---- As a command ------------------------------------------------------------------------------------------------


def report(cfg, gpu_memory):
    """What GPUs of gpu_memory GiB will hold, line by line, as a text. The model's shape must be known."""
    policy = read_shape(cfg.model)
    lines = [
        "UNVERIFIED: estimates from the sources; no GPU was at hand to compare them with",
        f"{cfg.model}: {policy.params:,} parameters, {cfg.workers} GPUs of {gpu_memory:g} GiB",
    ]
    for phase, held in plan(cfg, policy, gpu_memory).items():
        lines += ["", f"{phase}: {sum(held.values()):.1f} of {gpu_memory:g} GiB"]
        lines += [f"{gib:8.2f}  {what}" for what, gib in held.items() if gib > 0]
    lines += ["", *(f"{name}: {value}" for name, value in derived(cfg).items())]

    responses = cfg.prompts_per_step * cfg.samples_per_prompt
    sequence = cfg.max_prompt_tokens + cfg.max_response_tokens
    packs = math.ceil(responses / (cfg.max_tokens_per_pack // sequence))
    learned = num_learned(cfg, policy)
    waiting = 18 * learned / cfg.workers / GIB
    checkpoint = 12 * learned / 1e9
    at_once = cfg.keep_checkpoints + 2  # the best one, and one that is being written
    samples = SAMPLE_BYTES * responses * sequence / 1e9
    kept = (
        "none is kept" if cfg.samples_every == -1 else f"every {cfg.samples_every}th is kept (samples_every)"
    )
    kept = "all are kept (samples_every)" if cfg.samples_every == 1 else kept
    lines += [
        f"tokens per step: at most {responses:,} x {sequence:,} = {responses * sequence:,}",
        f"packs per step: at most {packs:,}, {math.ceil(packs / cfg.workers):,} a GPU",
        f"CPU memory per GPU: up to {waiting:.1f} GiB, 18 bytes a weight; not checked here",
        f"disk: {checkpoint:.1f} GB a checkpoint, of which up to {at_once} exist at once",
        f"disk: at most {samples:.1f} GB of samples/ a step, {SAMPLE_BYTES} bytes a token; {kept}",
        "",
    ]
    return "\n".join(lines)


def first_gpu_memory():
    """GiB of this machine's first GPU, as nvidia-smi tells; 80 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return float(answer) / 1024  # It answers in MiB.
    except (OSError, subprocess.SubprocessError, ValueError):
        return 80.0


def main(argv):
    try:
        cfg = load(argv)
        if cfg.dry_run:
            print(describe(cfg))
            return 0
        if read_shape(cfg.model) is None:
            place = "the table of tools/plan.py"
            print(f"model={cfg.model!r} is neither a folder of a dense model nor in {place}", file=sys.stderr)
            return 3
        gpu_memory = cfg.gpu_memory or first_gpu_memory()
        print(report(cfg, gpu_memory))
        check_fits(cfg, gpu_memory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("fits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
