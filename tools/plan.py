"""What each GPU will hold in each phase of a step, and whether it fits, with the arithmetic of every line.

    python tools/plan.py configs/orz_32b.py [--gpu_memory=80] [--key=value …]      exit code 2: does not fit; 3: cannot tell

In:   the settings, and the model's shape: config.json of a folder, or the table of the models of configs/.
Out:  phases → {what, with its arithmetic: GiB of one GPU}.
UNVERIFIED: written from the sources, without a GPU; no number here has been compared with a measured peak.

vLLM, critic and policy work by turns. Where vLLM's share of a GPU leaves room for the networks that learn (`stays`, as in
launch.py), they stay there; else who is not at work waits in CPU memory. What the critic's forward pass needs is less
than what its updates need, and is not listed.

Shapes: H hidden, L layers, A attention heads, K key-value heads, D size of a head, F feed-forward, V vocabulary.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Run as a script, Python looks for modules in tools/ only.

from configs.load import UserError, load  # noqa: E402

SHAPES = {  # H, L, A, K, F, V, whether the head is tied to the embedding; from config.json of each on the hub
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (5120, 48, 40, 8, 13824, 152064, False),
}
FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"

# What one GPU holds, in bytes: formulas of settings, shapes, and the few numbers that plan() adds. An estimate that
# rests on nothing but experience is marked as a guess. n is the network's parameters, params the policy's.
OTHER = {
    "CUDA, NCCL, sleeping vLLM, fragmentation (a guess)": "4 * 2**30",
    "the reference model, which stays there": "(kl_coef > 0) * size * params / workers",
    "its weights that are kept whole (KEPT_WHOLE)": "(kl_coef > 0) * (workers > 1) * size * min(params, 5 * 10**8)",
}
GENERATE = OTHER | {
    "vLLM's weights": "size * params / tensor_parallel",
    "vLLM's activations and CUDA graphs (a guess)": "2**29 + 8192 * size * (4 * H + 3 * F) + 1024 * 12 * V",
    "KV cache: sequences, tokens, bytes": "sequences * (max_prompt_tokens + max_response_tokens) * token_bytes",
    "beside vLLM's share: for what stays, or nobody": "max(0, (1 - gpu_memory_utilization) * gpu_memory - 4) * 2**30",
}
LEARNER = {
    "weights": "size * n / workers",
    "fp32 weights and Adam's two averages": "12 * n / workers",
    "fp32 gradients": "4 * n / workers",
    "weights gathered at once, and kept whole": "(workers > 1) * size * min(n, max(10**9, 5 * 10**8 + V * H))",
    "gradients reduced at once, and in fp32": "size * 2 * 10**7 + 4 * max(2 * 10**7, V * H)",
    "activations of a layer": "max(1, (1 - gradient_checkpointing) * L)"
    " * size * max_tokens_per_pack * (16 * H + 4 * K * D + 5 * F)",
    "inputs of all layers": "gradient_checkpointing * size * max_tokens_per_pack * L * H",
    "the other network, which stays": "stays * (size + 16) * (learn - n) / workers",
}
HEAD = {
    "logits, four copies in fp32 (MAX_LOGITS)": "4 * 4 * min(2**28, max_tokens_per_pack * V)",
    "gradient of the head, in 16 bits and fp32": "(2 + 4) * V * H",
}
SYNC = {
    "vLLM's weights": "size * params / tensor_parallel",
    "policy's weights": "size * params / workers",
    "all else that stays": "stays * ((size + 16) * learn - size * params) / workers",
    "gathered at once: 16 tensors": "size * (V * H + 1.5 * (2 * H * (A + K) * D + 3 * H * F))",
}


def read_shape(model):
    """The shape of a model and its number of parameters, from its folder or from the table; None where unknown."""
    names, file = [*FIELDS.split(), "tie_word_embeddings"], Path(model) / "config.json"
    config = {"tie_word_embeddings": False, "model_type": "qwen2"} | dict(zip(names, SHAPES.get(model, ())))
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config |= found if isinstance(found, dict) else {}
    numbers = all(isinstance(config.get(name), int) for name in names)
    if not numbers or any("expert" in key for key in config):
        return None
    H, L, A, K, F, V, tied = (config[name] for name in names)
    D = config.get("head_dim") or H // A
    bias = (A + 2 * K) * D if config["model_type"] == "qwen2" else 0  # of queries, keys and values
    bias = (A + 2 * K) * D + H if config.get("attention_bias") else bias  # and of the output
    layer = 2 * H * (A + K) * D + bias + 3 * H * F + 2 * H  # the last are two norms
    shape = {"H": H, "L": L, "A": A, "K": K, "D": D, "F": F, "V": V, "head": 0 if tied else V * H}
    return SimpleNamespace(**shape, params=L * layer + H + V * H + shape["head"])


def critic_shape(cfg, shape):
    """The critic's shape, of its own model or as the policy's, with a value head in the head's place; None for GRPO."""
    if cfg.advantage == "group":
        return None
    critic = (read_shape(cfg.critic_model) if cfg.critic_model else None) or shape
    return SimpleNamespace(**vars(critic) | {"params": critic.params - critic.head + critic.H})


def weights_that_learn(cfg, shape):
    """The policy's and the critic's."""
    critic = critic_shape(cfg, shape)
    return shape.params + (critic.params if critic else 0)


def plan(cfg, shape, gpu_memory):
    """Phases → {what: GiB that one GPU holds of it}. It fits where no phase holds more than gpu_memory."""
    x = vars(cfg) | vars(shape) | {"gpu_memory": gpu_memory, "size": 4 if cfg.dtype == "float32" else 2}
    heads = max(1, shape.K // cfg.tensor_parallel)  # a key-value head is on one GPU of an engine at least
    x["token_bytes"] = 2 * shape.L * heads * shape.D * x["size"]
    sequence = (cfg.max_prompt_tokens + cfg.max_response_tokens) * x["token_bytes"]
    x["sequences"], x["n"] = 0.0, shape.params
    x["learn"] = weights_that_learn(cfg, shape)
    # 20 bytes a weight at most, 4 GiB to spare, and 1 GiB (a guess) that CUDA and NCCL have taken before vLLM starts
    room = (1 - cfg.gpu_memory_utilization) * gpu_memory * 2**30 - 5 * 2**30
    room -= (cfg.kl_coef > 0) * x["size"] * shape.params / cfg.workers
    x["stays"] = int(room > 20 * x["learn"] / cfg.workers)
    left = gpu_memory * 2**30 - sum(eval(formula, x) for formula in GENERATE.values())
    x["sequences"] = max(1.0, left // (sequence / 100) / 100)  # of full length, at once; one must fit
    phases = {"generate": (GENERATE, x)}
    if critic := critic_shape(cfg, shape):
        phases["critic"] = (OTHER | LEARNER, x | vars(critic) | {"n": critic.params, "params": shape.params})
    phases |= {"policy": (OTHER | LEARNER | HEAD, x), "sync": (OTHER | SYNC, x)}
    result = {}
    for phase, (formulas, x) in phases.items():
        items = {f"{what} = {filled(formula, x)}": eval(formula, x) for what, formula in formulas.items()}
        result[phase] = {what: held / 2**30 for what, held in items.items()}
    return result


def filled(formula, numbers):
    """The formula with every name's number in its place."""
    return re.sub(r"\b(?!min|max\b)[A-Za-z]\w*", lambda name: f"{numbers[name[0]]:,}", formula)


def overfull(cfg, shape, gpu_memory):
    """The phases that do not fit, as {phase: GiB it needs}."""
    needs = {phase: sum(items.values()) for phase, items in plan(cfg, shape, gpu_memory).items()}
    return {phase: need for phase, need in needs.items() if need > gpu_memory + 1e-6}


def check_fits(cfg, gpu_memory):
    """Raise UserError where a phase cannot fit, naming the first setting tried here that makes everything fit.

    A model of unknown shape passes: who cannot judge does not refuse.
    """
    shape = read_shape(cfg.model)
    if shape is None or not (failed := overfull(cfg, shape, gpu_memory)):
        return
    way_out = "no one setting is enough: more workers, more tensor_parallel, fewer tokens, or a smaller model"
    ways = {
        "gradient_checkpointing": [True],
        "max_tokens_per_pack": [cfg.max_prompt_tokens + cfg.max_response_tokens],
        "gpu_memory_utilization": [0.7],
        "tensor_parallel": [n for n in (2, 4, 8) if cfg.workers % n == shape.A % n == 0],
        "workers": [cfg.workers << doublings for doublings in range(1, 6)],
    }
    for key, value in ((key, value) for key, values in ways.items() for value in values):
        if not overfull(SimpleNamespace(**vars(cfg) | {key: value}), shape, gpu_memory):
            way_out = f"try --{key}={value}"
            break
    phase, need = next(iter(failed.items()))
    estimate = "an estimate, which --gpu_memory=1000 overrules"
    raise UserError(f"{phase}: needs {need:.1f} GiB of each GPU ({estimate}), has {gpu_memory:g}: {way_out}")


def memory_here():
    """GiB of this machine's first GPU; without one 80."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 80.0


def derived(cfg):
    """The numbers that follow from the settings."""
    responses, engines = cfg.prompts_per_step * cfg.samples_per_prompt, cfg.workers // cfg.tensor_parallel
    numbers = {
        "responses per step": f"{cfg.prompts_per_step} prompts x {cfg.samples_per_prompt} samples = {responses:,}",
        "response tokens per step": f"at most {responses * cfg.max_response_tokens:,}",
        "vLLM engines": f"{cfg.workers} workers / tensor parallel {cfg.tensor_parallel} = {engines}",
        "responses per policy update": f"{responses // cfg.policy_updates_per_step:,}",
    }
    if cfg.advantage == "gae":
        numbers["responses per critic update"] = f"{responses // cfg.critic_updates_per_step:,}"
    return numbers


def describe(cfg):
    """Every setting as it stands, and the numbers that follow."""
    settings = [f"{key} = {value!r}" for key, value in vars(cfg).items()]
    return "\n".join(settings + [""] + [f"{name}: {value}" for name, value in derived(cfg).items()])


def main(argv):
    try:
        cfg = load(argv)
        if cfg.dry_run:
            print(describe(cfg))
            return 0
        gpu_memory = cfg.gpu_memory or memory_here()
        if (shape := read_shape(cfg.model)) is None:
            print(
                f"model={cfg.model!r} is no folder of a dense model, nor in the table of tools/plan.py",
                file=sys.stderr,
            )
            return 3
        print("UNVERIFIED: estimates from the sources; no GPU was at hand to compare them with")
        print(f"{cfg.model}: {shape.params:,} parameters, {cfg.workers} GPUs of {gpu_memory:g} GiB")
        for phase, items in plan(cfg, shape, gpu_memory).items():
            print(f"\n{phase}: {sum(items.values()):.1f} of {gpu_memory:g} GiB")
            print("\n".join(f"{held:8.2f}  {what}" for what, held in items.items() if held))
        print("\n" + "\n".join(f"{name}: {value}" for name, value in derived(cfg).items()))
        responses = cfg.prompts_per_step * cfg.samples_per_prompt
        full = cfg.max_prompt_tokens + cfg.max_response_tokens
        packs = -(-responses // (cfg.max_tokens_per_pack // full))
        print(f"tokens per step: at most {responses:,} x {full:,} = {responses * full:,}")
        print(f"packs per step: at most {packs:,}, {-(-packs // cfg.workers):,} a GPU")
        weights = weights_that_learn(cfg, shape)
        waiting = 18 * weights / cfg.workers / 2**30
        print(f"CPU memory per GPU: up to {waiting:.1f} GiB, 18 bytes a weight; not checked here")
        at_once = cfg.keep_checkpoints + 2  # the best, and one being written
        print(f"disk: {12e-9 * weights:.1f} GB a checkpoint, of which up to {at_once} exist at once\n")
        check_fits(cfg, gpu_memory)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("fits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
