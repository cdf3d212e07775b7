"""The memory plan: parameters as the real networks have them, GiB as worked out by hand, refusals that name a way out."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest

import ppo
from configs.load import ROOT, UserError, load
from data.models import network_without_memory
from tools import plan
from workers import fits_beside_vllm

PARAMETERS = {  # as the hub states them for each model's safetensors
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
}


def config(name, *arguments):
    return load([str(ROOT / "configs" / f"{name}.py"), *arguments])


def planned(cfg, gpu_memory=80.0):
    """{phase: {what: GiB}}, without the arithmetic."""
    phases = plan.plan(cfg, plan.read_shape(cfg.model), gpu_memory)
    return {
        phase: {what.split(" = ")[0]: held for what, held in items.items()} for phase, items in phases.items()
    }


@pytest.mark.parametrize("model", plan.SHAPES)
def test_parameters_are_the_real_ones(model):
    """Fails if a digit of the table is wrong, or if the formula forgets a bias or a tied head: every number of the
    plan would be off."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    assert plan.read_shape(model).params == PARAMETERS[model]
    with torch.device("meta"):
        network = Qwen2ForCausalLM(Qwen2Config(**dict(zip(plan.FIELDS, plan.SHAPES[model]))))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[model]  # tied once


def test_shape_of_a_folder(tmp_path):
    """Fails if a local model is looked up by its name, or if a mixture of experts is counted as if it were dense."""
    assert plan.read_shape(str(ROOT / "data/tiny")).params == 816_256  # with biases, as launch.py counts them
    folder = tmp_path / "Qwen2.5-0.5B"
    folder.mkdir()
    values = dict(zip(plan.FIELDS, (64, 2, 4, 2, 96, 1000)))
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama", "head_dim": 32}))
    # a layer: queries and output 2·64·4·32, keys and values 2·64·2·32, three matrices 64·96, two norms
    layer = 16_384 + 8_192 + 18_432 + 128
    assert plan.read_shape(str(folder)).params == 2 * layer + 64 + 2 * 64_000
    (folder / "config.json").write_text(
        json.dumps(values | {"model_type": "mixtral", "num_local_experts": 8})
    )
    assert plan.read_shape(str(folder)) is None and plan.read_shape("some/other") is None
    plan.check_fits(config("orz_7b", f"--model={folder}"), 1.0)  # a model that it cannot judge is not refused
    for broken in ("{", "3", "\xff"):
        (folder / "config.json").write_text(broken, encoding="latin-1")
        with pytest.raises(UserError, match="config.json is not a JSON object"):
            plan.read_shape(str(folder))


def test_7b_on_32_gpus_by_hand():
    """Fails if a factor is lost: 8 bytes of Adam instead of 12, a world size, GiB taken for GB."""
    phases = planned(config("orz_7b"))
    policy, generate = phases["policy"], phases["generate"]
    gib = 1.073741824e9
    assert policy["weights"] == pytest.approx(2 * 7.615616512 / 32 / 1.073741824)  # 0.443
    assert policy["fp32 weights and Adam's two averages"] == pytest.approx(2.660, abs=1e-3)
    assert policy["fp32 gradients"] == pytest.approx(0.887, abs=1e-3)
    assert policy["inputs of all layers"] == pytest.approx(2 * 16384 * 28 * 3584 / gib)  # 3.06
    # a layer: 16·3584 + 4·4·128 + 5·18944 = 154,112 numbers a token
    assert policy["activations of a layer"] == pytest.approx(2 * 16384 * 154112 / gib)  # 4.70
    assert policy["gradient of the head, in 16 bits and fp32"] == pytest.approx(3.045, abs=1e-3)
    # vLLM may fill 56 GiB; a token of cache is 2 (keys, values) · 28 layers · 4 heads · 128 · 2 bytes = 57,344
    assert generate["vLLM's weights"] == pytest.approx(14.185, abs=1e-3)
    table = generate["vLLM's table of sampled tokens"]
    # 0.58: int32 for each of 1,024 sequences and each word.
    assert table == pytest.approx(4 * 1024 * 152_064 / 2**30)
    assert phases["sync"]["vLLM's table of sampled tokens"] == table  # it returns to the GPU with the weights
    # 0.5 + 16,384 · 2 · (4·3584 + 3·18944) bytes + 1,024 · 12 · 152,064 bytes
    working = sum(held for what, held in generate.items() if what.endswith("(a guess)") and "vLLM's" in what)
    assert working == pytest.approx(0.5 + 2.172 + 1.740, abs=1e-3)
    cache = generate["KV cache: sequences, tokens, bytes"]
    assert 0 <= 56 - 14.185 - table - working - cache < 0.01
    assert cache * gib / 57344 / 10048 == pytest.approx(68.6, abs=0.1)
    critic = phases["critic"]["weights"] * 16 * gib  # the head's 152,064 x 3,584 became 3,584
    assert critic == pytest.approx(7_615_616_512 - 152_064 * 3584 + 3584)


def test_32b_on_128_gpus_by_hand():
    """Fails if tensor parallel divides what it does not, or if the KV cache is not divided by it."""
    phases = planned(config("orz_32b"))
    assert phases["generate"]["vLLM's weights"] == pytest.approx(2 * 32.763876352 / 4 / 1.073741824)  # 15.26
    assert phases["policy"]["weights"] == pytest.approx(0.477, abs=1e-3)
    assert phases["policy"]["inputs of all layers"] == 11.25  # 2 · 18,432 · 64 · 5,120 = 11.25 · 2^30
    assert phases["sync"]["policy's weights"] == phases["policy"]["weights"]
    cfg = config("orz_32b")
    (line,) = [what for what in plan.plan(cfg, plan.read_shape(cfg.model), 80.0)["generate"] if "KV" in what]
    # 2,048 + 32,768 tokens, in evaluation; 64 layers · 2 of 8 heads · 128 · 2 · 2 bytes.
    assert line.endswith(" * 34,816 * 65,536")
    for items in phases.values():
        assert sum(items.values()) <= 80


def test_what_stays_on_the_gpu():
    """Fails if a network that stays on the GPU is not counted while another one works, or if one that waits in CPU
    memory is."""
    other = "the other network, which stays on the GPU"
    beside = [
        "policy's other states, which stay on the GPU",
        "the critic, which stays on the GPU",
    ]  # in "sync"
    critic, policy = 7_615_616_512 - 152_064 * 3584 + 3584, 7_615_616_512
    stays, waits = planned(config("orz_7b")), planned(config("orz_7b", "--gpu_memory_utilization=0.9"))
    assert stays["policy"][other] == pytest.approx(18 * critic / 32 / 2**30)
    assert stays["critic"][other] == pytest.approx(18 * policy / 32 / 2**30)
    assert stays["sync"][beside[0]] == pytest.approx(16 * policy / 32 / 2**30)
    assert stays["sync"][beside[1]] == pytest.approx(18 * critic / 32 / 2**30)
    assert waits["policy"][other] == waits["critic"][other] == 0
    assert waits["sync"][beside[0]] == waits["sync"][beside[1]] == 0
    # 20 bytes for each of 14.7e9 weights are 273.5 GiB. Of 80 GiB, vLLM's 56, CUDA's 1 and 4 of headroom leave 19 a GPU.
    cfg = [config("orz_7b", f"--workers={n}") for n in (14, 15)]
    assert [planned(c)["policy"][other] > 0 for c in cfg] == [False, True]


def test_the_worker_and_the_plan_have_one_rule():
    """Fails if the plan counts states that the Worker offloads to CPU memory, or does not count states that it
    keeps."""
    cfg = config("orz_7b", "--workers=10", "--gpu_memory_utilization=0.5")
    # Of 80 GiB 79 are free. Without vLLM's 40 and 4 of headroom, 35 remain on each of 10 workers, at 20 bytes a weight.
    most = 35 * 2**30 * 10 / 20
    assert fits_beside_vllm(cfg, most - 1, free=79 * 2**30, total=80 * 2**30)
    assert not fits_beside_vllm(cfg, most, free=79 * 2**30, total=80 * 2**30)
    assert not fits_beside_vllm(cfg, 0, free=0, total=1)  # without a GPU
    # The plan calls the same rule with 1 GiB taken by CUDA, and with the 1.42 GiB of a reference model where there is one.
    for arguments, taken in ([], 1), (["--kl_coef=0.1"], 1 + 2 * 7.615616512 / 10 / 1.073741824):
        cfg = config("orz_7b", "--workers=10", *arguments)
        policy = plan.read_shape(cfg.model)
        answers = set()
        for utilization in (0.56, 0.57, 0.58, 0.59, 0.6, 0.61):
            cfg.gpu_memory_utilization = utilization
            room = 80 - taken - 4 - 80 * utilization
            answers.add(plan.learners_stay(cfg, policy, 80.0))
            assert plan.learners_stay(cfg, policy, 80.0) == (room > 20 * 1.4686239232 / 1.073741824)
        assert answers == {True, False}


def test_the_learners_of_the_smallest_size_stay_by_gibs():
    """Fails if a few hundred MiB of the driver's decide whether 19 GiB of states stay on the GPU."""
    cfg = config("orz_0p5b_1gpu")
    policy = plan.read_shape(cfg.model)
    assert all(plan.learners_stay(cfg, policy, gpu_memory) for gpu_memory in (72.0, 79.1, 80.0, 94.0))


@pytest.mark.parametrize(
    "extra", [[], ["--kl_coef=0.1"], ["--gradient_checkpointing=False"], ["--dtype=float32"]], ids=str
)
@pytest.mark.parametrize("name", ["orz_0p5b_1gpu", "orz_32b"])
def test_every_line_states_its_arithmetic(name, extra):
    """Fails if the arithmetic that is printed gives another number than the one beside it."""
    cfg = config(name, *extra)
    for held in plan.plan(cfg, plan.read_shape(cfg.model), 79.1).values():
        for line, gib in held.items():
            what, arithmetic = line.split(" = ")
            assert what and eval(arithmetic.replace(",", "")) / 2**30 == pytest.approx(gib)


def test_a_grpo_policy_has_no_neighbour():
    """Fails if a critic is counted where there is none."""
    phases = planned(config("orz_7b_grpo"))
    assert phases["policy"]["the other network, which stays on the GPU"] == 0
    assert phases["sync"]["policy's other states, which stay on the GPU"] == pytest.approx(
        16 * 7_615_616_512 / 32 / 2**30
    )
    assert phases["sync"]["the critic, which stays on the GPU"] == 0


def test_critic_head_and_reference():
    """Fails if a reference model, which never leaves the GPU, is not counted, or is counted where there is none."""
    assert ppo.KEPT_WHOLE == plan.KEPT_WHOLE == 5 * 10**8
    name = "the reference model, which stays on the GPU"
    whole = "its weights that are kept whole (KEPT_WHOLE)"
    without, with_kl = planned(config("orz_7b")), planned(config("orz_7b", "--kl_coef=0.1"))
    for phase in without:
        assert without[phase][name] == without[phase][whole] == 0
        assert with_kl[phase][whole] == pytest.approx(2 * 0.5 / 1.073741824)
        assert with_kl[phase][name] == pytest.approx(2 * 7.615616512 / 32 / 1.073741824)
    # The reference model is outside vLLM's share, so the KV cache is as large as without it.
    cache = "KV cache: sequences, tokens, bytes"
    assert with_kl["generate"][cache] == without["generate"][cache]


ORZ = sorted(path.stem for path in (ROOT / "configs").glob("orz_*.py"))


@pytest.mark.parametrize("name", ORZ)
def test_every_size_fits_its_hardware(name):
    """Fails if a config names hardware on which it cannot run."""
    trained_first = {"orz_32b_anneal": ["--model=Qwen/Qwen2.5-32B", "--critic_model="]}
    cfg = config(name, *trained_first.get(name, []))
    assert plan.read_shape(cfg.model) is not None
    plan.check_fits(cfg, 80.0)
    plan.check_fits(cfg, 79.1)  # what torch reports of an H100's 80 GB


REFUSED = {  # config, arguments, GiB → phase, way out
    ("orz_32b", "--workers=8", 80): ("critic", "--workers=16"),
    ("orz_32b", "--tensor_parallel=1", 80): ("generate", "--tensor_parallel=2"),
    ("orz_7b", "--gradient_checkpointing=False", 80): ("critic", "--gradient_checkpointing=True"),
    ("orz_7b", "--gpu_memory_utilization=0.1", 80): ("generate", "--gpu_memory_utilization=0.7"),
    ("orz_7b", "--max_tokens_per_pack=200000", 80): ("critic", "--max_tokens_per_pack=10048"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1])
def test_refusal_names_a_setting_that_helps(case):
    """Fails if the user is told to change a setting, changes it, and is refused again."""
    name, argument, gpu_memory = case
    phase, way_out = REFUSED[case]
    with pytest.raises(UserError) as error:
        plan.check_fits(config(name, argument), gpu_memory)
    message = str(error.value)
    assert message.startswith(f"{phase}: needs ") and message.endswith(f"has {gpu_memory}: try {way_out}"), (
        message
    )
    assert "\n" not in message
    plan.check_fits(config(name, argument, way_out), gpu_memory)


def test_no_single_setting():
    """Fails if a GPU that is far too small gets a suggestion that does not help."""
    with pytest.raises(UserError, match="no single setting is enough"):
        plan.check_fits(config("orz_32b", "--workers=1", "--tensor_parallel=1"), 80.0)


def test_constants_are_those_of_the_code():
    """Fails if model.py's chunk size or a bucket of the Learner changes and the plan keeps the old one."""
    import model

    assert model.MAX_LOGITS == plan.MAX_LOGITS == 2**28
    assert ppo.REDUCED_AT_ONCE == plan.REDUCED_AT_ONCE == 2 * 10**7


def test_constant_is_that_of_deepspeed():
    """Fails if DeepSpeed's default changes and the plan keeps the old one."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == plan.MAX_LIVE_PARAMETERS == 10**9


NVIDIA_SMI = {"81559": 81559 / 1024, "[N/A]": 80.0, "": 80.0, "exit 9": 80.0}  # its answer in MiB → GiB


@pytest.mark.parametrize("answer", NVIDIA_SMI)
def test_memory_of_the_first_gpu(answer, tmp_path, monkeypatch):
    """Fails if the plan is made for 80 GiB where the GPUs have another size, or ends in a traceback where the driver
    is broken."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{answer if answer.startswith('exit') else f'echo {answer!r}'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan.first_gpu_memory() == pytest.approx(NVIDIA_SMI[answer])
    script.unlink()
    assert plan.first_gpu_memory() == 80.0


def run(*argv):
    command = [sys.executable, str(ROOT / "tools/plan.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_as_a_command():
    """Fails if a sum is not that of the lines below it, or if the estimates are not marked as unverified."""
    done = run(str(ROOT / "configs/orz_32b.py"), "--gpu_memory=94")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "fits", done.stderr
    assert done.stdout.startswith("UNVERIFIED")
    phases = [part.splitlines() for part in done.stdout.split("\n\n")[1:5]]
    assert [head.partition(":")[0] for head, *_ in phases] == ["generate", "critic", "policy", "sync"]
    for head, *lines in phases:
        total = float(re.match(r"\w+: ([\d.]+) of 94 GiB", head)[1])
        assert sum(float(line.split()[0]) for line in lines) == pytest.approx(total, abs=0.1)
    assert "8,192 x 18,432 = 150,994,944" in done.stdout and "at most 8,192, 64 a GPU" in done.stdout


@pytest.mark.parametrize(
    "argv, words",
    [
        (["configs/orz_32b.py", "--workers=8", "--gpu_memory=80"], "try --workers=16"),
        (["configs/orz_7b.py", "--gpu_memory=lots"], "lots"),
        (["configs/orz_7b.py", "--gpu_memory=nan"], "a number"),
        (["configs/orz_7b.py", "--gpu_memory=-1"], "gpu_memory >= 0"),
        (["configs/orz_7b.py", "--worker=8"], "did you mean workers"),
        ([], "config file"),
    ],
    ids=str,
)
def test_errors_are_one_line(argv, words):
    """Fails if a bad argument ends in a traceback."""
    done = run(*[str(ROOT / a) if a.startswith("configs") else a for a in argv])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_a_model_of_unknown_shape():
    """Fails if a model that the plan cannot judge is refused: with exit code 2 launch.py would not start it."""
    done = run(str(ROOT / "configs/orz_7b.py"), "--model=no/such")
    assert done.returncode == 3 and "'no/such'" in done.stderr and "Traceback" not in done.stderr


ON_GPUS = """
import sys, launch
launch.QUIET["num_gpus"] = 1  # this machine's Ray, as if it had a GPU
sys.exit(launch.main(sys.argv[1:]))
"""


def write_empty_weights(folder):
    """A model.safetensors with all tensors of config.json in bf16. All are zero, and a sparse file takes no disk space."""
    header, end = {}, 0
    for name, parameter in network_without_memory("policy", folder).named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.soak
def test_launch_refuses_what_does_not_fit(tmp_path):
    """Fails if a run that tools/plan.py would refuse loads weights for an hour until memory runs out, or if its folder
    stays."""
    of_32b = dict(zip(plan.FIELDS, plan.SHAPES["Qwen/Qwen2.5-32B"]))
    config = json.loads((ROOT / "data/tiny/config.json").read_text()) | of_32b
    (folder := tmp_path / "model").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data/tiny" / file, folder)
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 128}))
    write_empty_weights(folder)
    arguments = ["configs/tiny.py", f"--model={folder}", f"--out_dir={tmp_path}/runs", "--dtype=bfloat16"]
    arguments.append("--gpu_memory=80")
    # Ray refuses to offer a GPU if this variable hides them all. No process gets as far as using the GPU.
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ON_GPUS, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"error: generate: needs [\d.]+ GiB of each GPU .*has 80: .*", done.stderr.strip())
    assert not (tmp_path / "runs").exists()
