"""One GPU (Worker: the learners and vLLM take turns on it) and all of them (WorkerGroup), driven from launch.py.

    driver ──► Worker 0   policy Learner, critic Learner, vLLM     one Ray actor per GPU, all three in one process
           ──► Worker 1   policy Learner, critic Learner, vLLM     ZeRO-3 across all Workers
           ──► …                                                   tensor-parallel vLLM engines in groups of neighbours

One step on each GPU, from left to right; only one of the three computes at a time:

    phase             generate     values   critic   policy   sync                 generate of the next step
    policy Learner    waits        waits    waits    works    gives its weights    waits
    critic Learner    waits        works    works    waits    waits                waits
    vLLM              works        asleep   asleep   asleep   wakes, takes them    works

A Learner that waits does so in CPU memory, or on the GPU where fits_beside_vllm finds room for that. vLLM asleep holds
neither weights nor KV cache. This file imports torch, Ray and vLLM only inside functions.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from configs.load import ROOT, UserError, eval_response_tokens, has_critic, has_reference
from data.models import safetensors_header
from log import installed, sample_line
from reward import Grader, response_stats, task_file
from tools import gpu_machine

START_SECONDS = 300  # until every Worker must have answered; the slowest disks need a minute


def fits_beside_vllm(cfg, num_learned, free, total):
    """Returns whether the learners' states can stay on the GPU while vLLM is awake; else they wait in CPU memory.

    num_learned: parameters of all networks that learn; each Worker holds 1 / cfg.workers of their states.
    free, total: bytes of one GPU, before vLLM starts: a reference model is loaded, no learner's state is on the GPU yet.
    The Worker asks with what its GPU reports, tools/plan.py with estimates; therefore this imports neither Ray nor torch.
    """
    # A parameter takes 4 bytes in each of fp32 weights, gradients and Adam's two averages, and up to 4 more in the weights
    # of the forward pass.
    states = 20 * num_learned / cfg.workers
    headroom = 4 * 2**30  # for buffers that come and go, and fragmentation
    return free - states - headroom > cfg.gpu_memory_utilization * total


def rng_for(*parts):
    """A random generator for (seed, step, purpose, engine). It has no state that a restart could lose."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in parts])


def learned_networks(cfg):
    """The networks that learn, and the folder each starts from."""
    if cfg.eval_only:
        return {}
    networks = {"policy": cfg.model}
    if has_critic(cfg):
        networks["critic"] = cfg.critic_model
    return networks


def saved_networks(cfg):
    """The networks of a checkpoint: those that learn, and a reference model that follows the policy."""
    follows = has_reference(cfg) and cfg.update_ref_every > 0
    return [*learned_networks(cfg), *(["reference"] if follows else [])]


# The project's modules that a Worker or its grading processes import, directly or through each other.
MODULES = """workers ppo rollout model reward equality own_task packing log configs.load data.load data.models
    tools.gpu_machine""".split()


def own_code():
    """The project's modules as this process finds them: name → (file, a hash of its content)."""
    code = {}
    for name in MODULES:
        file = importlib.util.find_spec(name).origin
        code[name] = (file, hashlib.sha256(Path(file).read_bytes()).hexdigest())
    return code


class Stopped(Exception):
    """A signal asked the run to end, and the networks are those of the last finished step."""


class PhaseTimeout(Exception):
    """A phase took longer than its limit; some Worker hangs."""


class StopRequest:
    """Whether a signal has asked the run to end. The first one is noted, a second one ends the process at once.

    SIGHUP comes when the terminal closes. A signal that was ignored when the run started stays ignored: nohup does that
    with SIGHUP, and a shell with SIGINT for what runs in its background.
    """

    def __init__(self):
        self.signal = None  # a signal.Signals
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.heeded = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]

    def shield_children(self):
        """Call this before Ray starts processes. They inherit that SIGHUP is ignored, and outlive the terminal: the
        Workers hold the networks, which are still to be saved."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def listen(self):
        """Call this after ray.init, which installs handlers of its own."""
        for signum in self.heeded:
            signal.signal(signum, self.note)

    def note(self, signum, _):
        if self.signal:
            import ray

            ray.shutdown()
            os._exit(128 + signum)
        self.signal = signal.Signals(signum)


@dataclass
class Cluster:
    """The Ray cluster that the driver has joined or started."""

    has_gpus: bool
    session_dir: str  # Ray's folder on this machine, with its logs


# ---- One GPU -----------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What one vLLM engine is asked to sample."""

    prompts: list  # (prompt_index, Prompt)
    num_samples: int  # responses to each
    seed: int
    temperature: float
    top_p: float
    max_tokens: int  # of a response
    with_reward: bool = False  # whether the reward of a task file is asked for: in training only


class Worker:
    """Everything one GPU does. Ray makes one of these in a process of its own, and runs one method of it at a time."""

    def __init__(self, cfg, rank):
        self.cfg, self.rank = cfg, rank
        self.is_first_of_engine = rank % cfg.tensor_parallel == 0

    # -- Start

    def address(self):
        """This node's address and a free port on it."""
        import ray

        with socket.create_server(("", 0)) as server:
            return ray.util.get_node_ip_address(), server.getsockname()[1]

    def code(self):
        """The code that this Worker runs, as own_code returns it."""
        return own_code()

    def gpu_memory(self):
        """GiB of this Worker's GPU. Raises RuntimeError, naming the node, where torch does not see it."""
        import ray
        import torch

        gpu_machine.check_worker(ray.util.get_node_ip_address())
        return torch.cuda.get_device_properties(self.gpu_index()).total_memory / 2**30

    def gpu_index(self):
        """The number under which torch knows the GPU that Ray gave to this Worker."""
        import ray

        gpu_ids = ray.get_gpu_ids()
        if not gpu_ids:
            return 0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",").index(str(gpu_ids[0])) if visible else int(gpu_ids[0])

    def setup(self, address, port):
        """Join the other Workers, whose rank 0 is at this address, and build the networks and the engine.

        Returns how many parameters learn. All Workers call this together.
        """
        self.check_node()
        self.send_output_to(f"{self.cfg.out_dir}/{self.cfg.name}/logs/worker_{self.rank}.log")
        device = self.join_world(address, port)
        import torch

        import ppo
        import rollout

        cfg = self.cfg
        if cfg.dtype == "auto":
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        else:
            dtype = getattr(torch, cfg.dtype)
        networks = learned_networks(cfg)
        if has_reference(cfg):
            networks["reference"] = cfg.model
        self.learners = {}
        num_learned = 0
        for kind, path in networks.items():
            learner = self.learners[kind] = ppo.Learner(kind, cfg, path, device, dtype)
            if learner.is_trained:
                num_learned += sum(parameter.ds_numel for parameter in learner.network.parameters())
        self.learners_stay_on_gpu = False
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.learners_stay_on_gpu = fits_beside_vllm(cfg, num_learned, free, total)
        try:
            self.rollout = rollout.Rollout(cfg, cfg.model, dtype, device)
        except Exception as error:
            # Some of vLLM's exceptions cannot be pickled: the driver would see only the error of pickling.
            raise RuntimeError(f"vLLM does not start: {error}") from None
        self.gpu_owner = "rollout"  # vLLM has read the policy's weights from the same folder.
        graders = os.cpu_count() * cfg.tensor_parallel // cfg.workers
        self.grader = Grader(max(1, min(graders, 8)), task_file(cfg))
        return num_learned

    def check_node(self):
        """Raise unless this node sees the run's folder and the models, and has the driver's packages."""
        import ray

        node = ray.util.get_node_ip_address()
        for folder in (f"{self.cfg.out_dir}/{self.cfg.name}/logs", self.cfg.model, self.cfg.critic_model):
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"node {node} does not see {folder}")
        missing = sorted(set(self.cfg.versions) - set(installed()))
        if missing:
            raise ImportError(f"node {node} lacks the driver's packages: {', '.join(missing[:9])}")
        if ray.get_gpu_ids():
            gpu_machine.check_worker(node)

    def send_output_to(self, path):
        """Append all that this process prints to a file, also what its libraries print from C and C++."""
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)

    def join_world(self, address, port):
        """Make the torch.distributed world of all Workers. Returns this Worker's device."""
        import psutil
        import ray

        # gloo would listen on the address of the host's name, which /etc/hosts often makes 127.0.1.1, where no other node
        # reaches it. Name the network interface that has this node's address instead.
        node = ray.util.get_node_ip_address()
        interfaces = psutil.net_if_addrs().items()
        own = [name for name, addresses in interfaces if node in [a.address for a in addresses]]
        gpu_index = self.gpu_index()
        os.environ |= {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": own[0] if own else "",
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.cfg.workers),
            "LOCAL_RANK": str(gpu_index),
        }
        import deepspeed.ops
        import torch

        # DeepSpeed would compile this extension at its first use; gloo can do its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not torch.cuda.is_available():
            torch.distributed.init_process_group("gloo")
            return torch.device("cpu")
        torch.cuda.set_device(gpu_index)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
        return torch.device("cuda", gpu_index)

    # -- Beside other work, in a thread of its own

    def interrupt(self):
        """End generation early. With tensor parallel it goes on to its end: an engine's ranks must end at the same step."""
        self.rollout.interrupted = self.cfg.tensor_parallel == 1

    # -- Phases

    def generate(self, request):
        """Sample, and grade in other processes meanwhile. Returns (Samples in the order of the prompts, a hash of all
        sampled ids); only the first rank of an engine grades and returns Samples. All ranks of an engine call this together
        with equal requests. Training and evaluation both sample here; request.with_reward is set in training only.
        """
        from packing import Sample

        if self.gpu_owner != "rollout":
            raise RuntimeError("vLLM is asleep: it can generate only after a sync")
        prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)]
        prompt_ids = [prompt.ids.tolist() for _, prompt in prompts]
        samples = {}  # place in `prompts` → its Sample; an interrupted engine leaves places out
        verdicts = {}  # place in `prompts` → a Future of its Verdict
        sampling = (request.seed, request.temperature, request.top_p, request.max_tokens)
        for response in self.rollout.generate(prompt_ids, *sampling):
            prompt_index, prompt = prompts[response.index]
            samples[response.index] = Sample(
                prompt_index=prompt_index,
                prompt_ids=prompt.ids,
                response_ids=response.token_ids,
                logprobs=response.logprobs,
                text=response.text,
                finish_reason=response.finish_reason,
                stats=response_stats(response.text),
            )
            if self.is_first_of_engine:
                question = prompt.question.as_dict()
                verdicts[response.index] = self.grader.judge(
                    response.text, question, response.finish_reason, request.with_reward
                )
        ids_hash = 0
        for place in sorted(samples):
            ids_hash = zlib.crc32(samples[place].response_ids.tobytes(), ids_hash)
        if not self.is_first_of_engine:
            return [], ids_hash
        for place, sample in samples.items():
            verdict = verdicts[place].result()
            sample.correct, sample.reward = verdict.correct, verdict.reward
            sample.graded, sample.error = verdict.outcome, verdict.error
            sample.line = sample_line(sample, prompts[place][1].question)
        return [samples[place] for place in sorted(samples)], ids_hash

    def forward(self, kind, batch, plan):
        """Values or log-probs of all response tokens, fp32 [N]; rank 0 returns them."""
        self.give_gpu_to(kind)
        results = self.learners[kind].forward(batch, plan)
        return results if self.rank == 0 else None

    def logprobs_and_entropies(self, batch, plan):
        """The policy's log-probs and entropies at all response tokens, fp32 [2, N]; rank 0 returns them."""
        self.give_gpu_to("policy")
        results = self.learners["policy"].token_outputs(batch, plan)
        return results if self.rank == 0 else None

    def update(self, kind, batch, plans, step, kl_plan):
        """The updates of one step; rank 0 returns their metrics."""
        self.give_gpu_to(kind)
        metrics = self.learners[kind].update(batch, plans, step, kl_plan)
        return metrics if self.rank == 0 else None

    def update_reference(self):
        """Give the reference model the policy's weights."""
        self.give_gpu_to("policy")
        self.learners["reference"].copy_weights(self.learners["policy"])

    def sync(self):
        """Send the policy's weights to vLLM. This order keeps peak memory low (verl#302: 10 GB less for a 7B model)."""
        policy = self.learners["policy"]
        self.put_away(policy, keep_weights=True)
        self.rollout.wake("weights")
        self.rollout.load_weights(policy.weights())
        self.put_away(policy)
        self.rollout.wake("kv_cache")
        self.gpu_owner = "rollout"

    def save(self, kind, folder):
        self.learners[kind].save(folder)

    def load(self, kind, folder):
        self.give_gpu_to(kind)
        self.learners[kind].load(folder)

    def export(self, kind, folder):
        self.learners[kind].export(folder)

    # -- Turns

    def give_gpu_to(self, kind):
        """Let one Learner compute next; the GPU's owner so far frees the memory that it can. Only sync wakes vLLM."""
        if kind == self.gpu_owner:
            return
        if self.gpu_owner == "rollout":
            self.rollout.sleep()
        else:
            self.put_away(self.learners[self.gpu_owner])
        self.learners[kind].onload()
        self.gpu_owner = kind

    def put_away(self, learner, keep_weights=False):
        """Free GPU memory that a Learner does not need while it waits; keep_weights leaves its 16-bit weights there."""
        if self.learners_stay_on_gpu:
            learner.free_gathered()
        else:
            learner.offload(keep_weights)


# ---- All of them -------------------------------------------------------------------------------------------------


class WorkerGroup:
    """The driver's side of the Workers. Each method makes the same call on all of them and waits for the results."""

    def __init__(self, cfg, log, cluster, stop_request):
        import ray

        self.cfg, self.log, self.cluster, self.stop_request = cfg, log, cluster, stop_request
        self.ray = ray
        self.step = 0  # the last finished one
        self.networks_step = 0  # the last step whose updates the learners have finished; None during updates
        self.seconds = {}  # of each phase since the last take_seconds()
        self.longest_seconds = {}  # the longest that each phase has taken
        self.task_failed = False  # whether the task file has failed on a response, which is printed once

    # -- Start

    def place(self):
        """Start the Workers' processes. Raises UserError where the cluster has too few GPUs (or, without GPUs, CPUs)."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remove_leftover_segments()
        cfg, resource = self.cfg, "GPU" if self.cluster.has_gpus else "CPU"
        # One bundle per engine: a tensor-parallel group sits on one node, and all bundles are reserved together.
        bundles = [{resource: cfg.tensor_parallel}] * (cfg.workers // cfg.tensor_parallel)
        group = self.ray.util.placement_group(bundles, strategy="PACK")
        available = self.ray.cluster_resources().get(resource, 0)
        if available < cfg.workers or not group.wait(60):
            available = int(self.ray.cluster_resources().get(resource, 0))  # a node may have left meanwhile
            needed = f"each vLLM engine takes {cfg.tensor_parallel} of one node"
            raise UserError(f"workers={cfg.workers}: Ray has {available} {resource}s; {needed}")
        actor = self.ray.remote(concurrency_groups={"watch": 1})(Worker)
        self.handles = []
        for rank in range(cfg.workers):
            options = {
                "num_gpus": 1 if self.cluster.has_gpus else 0,
                "num_cpus": 0 if self.cluster.has_gpus else 1,
                "runtime_env": {"env_vars": worker_environment(cfg, self.cluster.has_gpus)},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank // cfg.tensor_parallel
                ),
            }
            self.handles.append(actor.options(**options).remote(cfg, rank))
        self.addresses = self.first_answers()
        self.check_code()

    def first_answers(self):
        """(node, free port) of each Worker. Raises where they do not start, with the last line of Ray's own log."""
        refs = [handle.address.remote() for handle in self.handles]
        try:
            return self.ray.get(refs, timeout=START_SECONDS)
        except self.ray.exceptions.GetTimeoutError:
            reason = f"no answer from all {len(refs)} Workers within {START_SECONDS} s"
            raise RuntimeError(
                f"{reason}; Ray's log says: {last_line_of_logs(self.cluster.session_dir)}"
            ) from None
        except self.ray.exceptions.RayActorError as error:
            if "never ran" not in str(error):
                raise
            way_out = "start it with RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…, or set RAY_AUTH_MODE=disabled here"
            raise UserError(f"the Ray cluster was started without this run's token: {way_out}") from error

    def check_code(self):
        """Raises UserError unless all Workers run this process's code: another reward.py would give other rewards."""
        own = own_code()
        for (node, _), code in zip(self.addresses, self.watch("code")):
            for name, (file, content) in code.items():
                if content != own[name][1]:
                    reason = f"the Worker on {node} would run {file}, which differs from {own[name][0]} here"
                    raise UserError(f"{reason}: give all nodes the same code")

    def gpu_memory(self):
        """GiB of the first Worker's GPU."""
        return self.ray.get(self.handles[0].gpu_memory.remote())

    def start(self, step=None):
        """Build the networks, as they were after `step`, or by default at the newest whole checkpoint."""
        self.num_parameters = self.call("setup", "setup", *self.addresses[0])[0]
        self.step = newest_whole_checkpoint(self.cfg, self.log) if step is None else step
        if self.step:
            folder = checkpoints(self.cfg)[self.step]
            for kind in reversed(saved_networks(self.cfg)):  # the policy last, as in a step: sync comes next
                self.call("load", "load", kind, folder)
            self.sync()
        self.networks_step = self.step  # sync() has set it to the next step.
        self.seconds = {}

    # -- Phases of a step, in their order

    def generate(self, prompts, num_samples, step):
        """num_samples graded Samples for each of `prompts`, in the order of the prompts, to be trained on."""
        cfg = self.cfg
        sampling = (cfg.temperature, cfg.top_p, cfg.max_response_tokens)
        return self.sample("generate", prompts, num_samples, step, *sampling)

    def evaluate(self, prompts, num_samples, step):
        """The same as generate, with the settings of evaluation."""
        cfg = self.cfg
        sampling = (cfg.eval_temperature, cfg.eval_top_p, eval_response_tokens(cfg))
        return self.sample("eval", prompts, num_samples, step, *sampling)

    def sample(self, phase, prompts, num_samples, step, temperature, top_p, max_tokens):
        requests = []
        for engine, hand in enumerate(deal_prompts(prompts, self.cfg.workers // self.cfg.tensor_parallel)):
            # All ranks of an engine are seeded alike: else they would sample different tokens, with no error at all.
            seed = int(rng_for(self.cfg.seed, step, phase, engine).integers(2**31))
            with_reward = phase == "generate"
            requests.append(Request(hand, num_samples, seed, temperature, top_p, max_tokens, with_reward))
        refs = []
        for rank, handle in enumerate(self.handles):
            refs.append(handle.generate.remote(requests[rank // self.cfg.tensor_parallel]))
        samples = []
        hash_of_engine = {}
        for rank, (samples_of_rank, ids_hash) in enumerate(self.wait(phase, refs, interruptible=True)):
            if hash_of_engine.setdefault(rank // self.cfg.tensor_parallel, ids_hash) != ids_hash:
                raise RuntimeError(f"rank {rank} sampled other tokens than the others of its vLLM engine")
            samples += samples_of_rank
        self.say_first_task_error(samples)
        return sorted(samples, key=lambda sample: sample.prompt_index)

    def say_first_task_error(self, samples):
        """Name the first failure of the task file; the metric task_error counts them all."""
        errors = [sample.error for sample in samples if sample.error]
        if errors and not self.task_failed:
            self.task_failed = True
            self.log.say(f"task_error (the response gets reward 0): {errors[0]}", bold=True)

    def old_logprobs(self, batch, plan):
        """log π_old(a_t|s_t), fp32 [N]: of the policy before this step's updates."""
        return self.call("old_logprobs", "forward", "policy", batch, plan, interruptible=True)[0]

    def ref_logprobs(self, batch, plan):
        """log π_ref(a_t|s_t), fp32 [N]: of the reference model."""
        return self.call("ref_logprobs", "forward", "reference", batch, plan, interruptible=True)[0]

    def values(self, batch, plan):
        """V(s_t), fp32 [N]: of the critic before this step's updates."""
        return self.call("values", "forward", "critic", batch, plan, interruptible=True)[0]

    def logprobs_and_entropies(self, batch, plan):
        """log π(a_t|s_t) and the entropy of π(·|s_t), fp32 [2, N]: of the policy before its updates, for the report."""
        return self.call("report", "logprobs_and_entropies", batch, plan, interruptible=True)[0]

    def update(self, kind, batch, plans, kl_plan=None):
        """One optimizer update of the "policy" or "critic" for each of the plans; returns metrics, see Learner.update."""
        self.networks_step = None
        return self.call(kind, "update", kind, batch, plans, self.step + 1, kl_plan)[0]

    def update_reference(self):
        """Make the reference model equal to the policy."""
        self.call("update_reference", "update_reference")

    def sync(self):
        """Send the policy's weights to all vLLM engines and check that they arrive. This ends the updates of a step."""
        self.call("sync", "sync")
        self.networks_step = self.step + 1

    def finish_step(self):
        """Call this when the step is logged and evaluated: from here on a run may stop, and go on with the next step."""
        self.step = self.networks_step

    # -- Out

    def save(self):
        """Write checkpoints/step_N atomically: into a folder beside it, which is then renamed."""
        folder = f"{self.log.dir}/checkpoints/step_{self.networks_step}"
        is_saved = os.path.exists(folder) and checkpoint_fault(folder, self.cfg) is None
        if self.networks_step == 0 or is_saved:
            return
        size = 12 * self.num_parameters  # fp32 weights and AdamW's two averages
        free = shutil.disk_usage(self.log.dir).free
        if free < size:
            raise OSError(f"a checkpoint takes {size:,} bytes, but {self.log.dir} has {free:,} left")
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        os.makedirs(f"{folder}.tmp")
        for kind in saved_networks(self.cfg):
            self.call("save", "save", kind, f"{folder}.tmp")
        shutil.copy(self.log.dir / "config.json", f"{folder}.tmp")
        os.sync()
        shutil.rmtree(folder, ignore_errors=True)  # a damaged checkpoint of this step
        os.rename(f"{folder}.tmp", folder)
        saved = checkpoints(self.cfg)
        kept = sorted(saved)[-self.cfg.keep_checkpoints :] + [self.log.best(saved)]
        for step in set(saved).difference(kept):
            shutil.rmtree(saved[step])

    def export(self, tokenizer, suffix=""):
        """Write the networks as Hugging Face folders policy/ and critic/, atomically."""
        for kind in learned_networks(self.cfg):
            folder = f"{self.log.dir}/{kind}{suffix}"
            self.call("export", "export", kind, f"{folder}.tmp")
            tokenizer.save_pretrained(f"{folder}.tmp")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(f"{folder}.tmp", folder)

    def take_seconds(self):
        """{"seconds": {phase: seconds since the last call of this}}."""
        seconds = {phase: round(value, 4) for phase, value in self.seconds.items()}
        self.seconds = {}
        return {"seconds": seconds}

    # -- How a call is made

    def call(self, phase, method, *args, interruptible=False):
        """Call a method on every Worker; returns the results in rank order. What one raises is raised here."""
        shared = [self.ray.put(arg) for arg in args]  # once in Ray's object store, for all Workers
        refs = [getattr(handle, method).remote(*shared) for handle in self.handles]
        return self.wait(phase, refs, interruptible)

    def wait(self, phase, refs, interruptible=False):
        """Wait for one result of every Worker, with a progress bar on a terminal.

        Raises what a Worker raised, Ray's error where one died, PhaseTimeout where one takes too long, and Stopped where
        a signal asked the run to end, the phase is interruptible and the learners are those of a finished step.
        """
        start = time.monotonic()
        longest = self.longest_seconds.get(phase)
        # The first phase of its kind has no earlier time to compare with: it gets two hours.
        limit = self.cfg.phase_timeout or max(600.0, 10 * (longest or 720.0))
        results, pending = {}, refs
        with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task(phase, total=longest)
            while pending:
                done, pending = self.ray.wait(pending, num_returns=len(pending), timeout=1.0)
                results |= zip(done, self.results_of(done))
                seconds = time.monotonic() - start
                bar.update(task, completed=seconds)
                if self.stop_request.signal and interruptible and self.networks_step == self.step:
                    self.watch("interrupt")
                    if not pending:
                        raise Stopped
                if pending and seconds > limit:
                    late = [
                        f"{rank} at {self.addresses[rank][0]}"
                        for rank, ref in enumerate(refs)
                        if ref in pending
                    ]
                    raise PhaseTimeout(f"{phase}: over phase_timeout={limit:.0f} s on rank {', '.join(late)}")
        self.longest_seconds[phase] = max(longest or 0.0, seconds)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return [results[ref] for ref in refs]

    def results_of(self, done):
        """The results of these calls. Raises the first failure: the other Workers may be waiting for the failed one."""
        try:
            return self.ray.get(done)
        except (self.ray.exceptions.RayTaskError, self.ray.exceptions.ActorUnavailableError):
            # Perhaps it failed because another Worker is dying: that death is the cause, and a reason to restart.
            time.sleep(3)
            self.watch("address")
            raise

    def watch(self, method):
        """Call a method of every Worker beside what it is doing. Raises Ray's error where a Worker has died."""
        # A Worker that does not answer is asked again until Ray is sure that its node has gone; the error then names it.
        options = {"concurrency_group": "watch", "max_task_retries": -1}
        return self.ray.get([getattr(handle, method).options(**options).remote() for handle in self.handles])


def deal_prompts(prompts, num_engines):
    """Deal prompts to the engines, longest first, in snake order (0 1 2, 2 1 0, …): by a fixed rule and never by timing,
    because the same requests in another order give other tokens, and a resumed run must repeat itself.

    Returns a list of (prompt_index, Prompt) for each engine.
    """
    from packing import snake

    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    hands = [[] for _ in range(num_engines)]
    for place, prompt_index in enumerate(longest_first):
        hands[snake(place, num_engines)].append((prompt_index, prompts[prompt_index]))
    return hands


def worker_environment(cfg, on_gpu):
    """Environment variables of a Worker's process, from its start: libraries read them when they are imported."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's engine runs in the Worker's own process.
        "VLLM_NO_USAGE_STATS": "1",  # vLLM sends no usage statistics.
        "HF_HUB_OFFLINE": "1",  # The driver has downloaded all that is needed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        # torch would start up to 32 compiling processes in each Worker when it is imported.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # With tensor parallel vLLM would compile FlashInfer's all-reduce where it finds nvcc, which takes minutes.
        "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    }
    if on_gpu:
        # Ray would show a Worker only its own GPU, but vLLM's peer checks ask about its neighbours.
        environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # Threads are not bound to cores: else two Workers would be bound to the same ones.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        threads = max(1, os.cpu_count() // cfg.workers)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return environment


def last_line_of_logs(session_dir):
    """The last non-empty line of one of Ray's logs on this machine that tell why processes do not start."""
    for pattern in ("raylet.err", "worker-*.err", "gcs_server.err", "raylet.out"):
        for file in sorted(Path(session_dir, "logs").glob(pattern)):
            lines = file.read_text(errors="replace").split("\n")
            lines = [line for line in lines if line.strip()]
            if lines:
                return f"{lines[-1].strip()[:300]} ({file})"
    return f"nothing ({session_dir}/logs)"


# ---- Checkpoints -------------------------------------------------------------------------------------------------


def checkpoints(cfg):
    """The checkpoints of a run: step → folder."""
    folders = Path(cfg.out_dir, cfg.name, "checkpoints").glob("step_*[0-9]")
    return {int(folder.name.removeprefix("step_")): str(folder) for folder in folders}


def newest_whole_checkpoint(cfg, log):
    """The step of the newest checkpoint without a fault, or 0. Newer, damaged ones are reported and left alone."""
    saved = checkpoints(cfg)
    for step in sorted(saved, reverse=True):
        fault = checkpoint_fault(saved[step], cfg)
        if fault is None:
            return step
        log.say(f"the checkpoint of step {step} is damaged and not used: {fault}")
    return 0


def checkpoint_fault(folder, cfg):
    """What is wrong with the files of a checkpoint; None where they are whole."""
    for kind in saved_networks(cfg):
        for rank in range(cfg.workers):
            file = f"{folder}/{kind}_{rank}.safetensors"
            try:
                safetensors_header(file)
            except (OSError, ValueError) as error:
                return f"{file} {getattr(error, 'strerror', None) or error}"
    return None


def remove_leftover_segments():
    """Remove the shared memory of vLLM engines that were killed, because the next engine would fail to create its own.
    A segment that a living process has mapped is in use and stays."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped.update(re.findall(r"/dev/shm/\S*cpushm\S*", maps.read_text()))
        except OSError:
            continue  # The process has ended, or is another user's.
    for segment in Path("/dev/shm").glob("*cpushm*"):
        if str(segment) not in mapped:
            segment.unlink(missing_ok=True)
