"""The run: read the config, start or join Ray, one Worker per GPU, the training loop, evaluation, exports.

    python launch.py configs/tiny.py [--key=value …]

This file is the single controller. It decides and keeps the books; the Workers hold the networks and compute:

    driver ──► Worker 0   policy Learner, critic Learner, vLLM     one Ray actor per GPU, all three in one process,
           ──► Worker 1   policy Learner, critic Learner, vLLM     which take turns on that GPU
           ──► …                                                   ZeRO-3 across all, tensor parallel in groups

In:   a config.   Out: runs/NAME/ with metrics.jsonl, curves.png, tensorboard/, samples/, logs/, policy/, critic/.
torch, Ray and vLLM are imported only after the settings and the data have been checked.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.load import UserError, describe, load
from data.load import encode_prompts, load_questions, step_questions

ROOT = Path(__file__).resolve().parent


def train(cfg, workers, tasks, log):
    """The algorithm, in the order in which things happen."""
    import ppo

    if cfg.eval_every > 0:
        log.step({"step": 0, "eval": evaluate(cfg, workers, tasks, log, step=0)} | workers.timings())

    for step in range(1, cfg.steps + 1):
        # Generate: samples_per_prompt responses to each of this step's questions, graded as they finish.
        chosen = step_questions(len(tasks.train), cfg.prompts_per_step, cfg.seed, step - 1)
        prompts = [tasks.train[i] for i in chosen]
        with workers.phase("generate"):
            samples = workers.generate(prompts, cfg.samples_per_prompt, "train", step)
        if cfg.shuffle_rewards:  # a control experiment: the reward says nothing about the response
            shuffled = np.random.default_rng(derive_seed(cfg.seed, step, "shuffle")).permutation(len(samples))
            for sample, reward in zip(samples, [samples[i].reward for i in shuffled]):
                sample.reward = reward

        # Pack: whole sequences into bins of max_tokens_per_pack tokens, the same work on every rank.
        with workers.phase("pack"):
            batch = ppo.Batch(samples)
            everything = np.arange(len(samples))
            plan = make_plan(cfg, batch, everything, tasks.hidden_size)

        # Values: one forward of the critic, V_old(s_t) for every response token.
        with workers.phase("values"):
            batch.values = workers.forward("critic", batch, plan)
            if cfg.kl_coef or cfg.policy_updates_per_step > 1:
                batch.old_logprobs = workers.forward("policy", batch, plan)
            if cfg.kl_coef:
                batch.ref_logprobs = workers.forward("reference", batch, plan)

        # Advantages: GAE per response, normalised over all tokens of the batch.
        with workers.phase("advantages"):
            rewards = ppo.token_rewards(batch, cfg.kl_coef)
            advantages, batch.returns = ppo.gae(
                rewards, batch.values, batch.response_lens, cfg.gamma, cfg.lam
            )
            batch.advantages = ppo.normalise(advantages)

        # Critic first, then policy. Each sample once per step, split at random into as many updates as configured.
        metrics, shared = {"step": step}, workers.share(batch)
        for kind, num_updates in (
            ("critic", cfg.critic_updates_per_step),
            ("policy", cfg.policy_updates_per_step),
        ):
            with workers.phase(kind):
                if num_updates == 1:
                    plans = [plan]
                else:
                    rng = np.random.default_rng(derive_seed(cfg.seed, step, kind))
                    parts = np.array_split(rng.permutation(everything), num_updates)
                    plans = [make_plan(cfg, batch, part, tasks.hidden_size) for part in parts]
                metrics |= workers.update(kind, shared, plans)

        # Sync: the new policy into vLLM, bucket by bucket, proved complete.
        with workers.phase("sync"):
            workers.sync()

        if cfg.eval_every > 0 and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics["eval"] = evaluate(cfg, workers, tasks, log, step)
        metrics |= sample_metrics(samples, batch) | workers.timings()
        metrics["tokens_per_second"] = metrics["tokens"] / sum(
            v for k, v in metrics["seconds"].items() if k != "eval"
        )
        log.step(metrics)
        log.samples(step, [sample_row(prompts, sample) for sample in samples])
        if "eval" in metrics:
            log.curves()


def evaluate(cfg, workers, tasks, log, step):
    """Mean accuracy over eval_samples responses per held-out question, for each data set."""
    results = {}
    for name, prompts in tasks.eval.items():
        with workers.phase("eval"):
            samples = workers.generate(prompts, cfg.eval_samples, "eval", step)
        rewards = np.array([s.reward for s in samples]).reshape(len(prompts), cfg.eval_samples)
        per_question = rewards.mean(1)
        results[name] = {
            "accuracy": float(per_question.mean()),
            "accuracy_stderr": float(per_question.std(ddof=1) / len(prompts) ** 0.5)
            if len(prompts) > 1
            else None,
            "response_tokens": float(np.mean([len(s.response_ids) for s in samples])),
            "cut_off": float(np.mean([s.finish_reason == "length" for s in samples])),
        }
        for sample in samples[: 2 * cfg.eval_samples : cfg.eval_samples]:
            log.show(sample_row(prompts, sample))
    return results


def make_plan(cfg, batch, indices, hidden_size):
    """plan[rank][i] = the samples of rank's i-th pack, out of `indices`."""
    import ppo

    plan = ppo.pack(batch.lengths[indices], cfg.max_tokens_per_pack, cfg.workers, hidden_size)
    return [[indices[local].tolist() for local in packs] for packs in plan]


def derive_seed(*parts):
    """One 32-bit seed for (seed, step, purpose, engine): nothing random has a state that a restart could lose."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sample_metrics(samples, batch):
    """What the responses of a step were like."""
    right = batch.rewards > 0
    variance = batch.returns.var()
    return {
        "reward": float(batch.rewards.mean()),
        "response_tokens": float(batch.response_lens.mean()),
        "response_tokens_right": float(batch.response_lens[right].mean()) if right.any() else None,
        "response_tokens_wrong": float(batch.response_lens[~right].mean()) if not right.all() else None,
        "cut_off": float(np.mean([s.finish_reason == "length" for s in samples])),
        "explained_var": float(1 - (batch.returns - batch.values).var() / variance) if variance > 0 else None,
        "tokens": int(batch.lengths.sum()),
    }


def sample_row(prompts, sample):
    return {
        "question": prompts[sample.question].question.question,
        "answer": prompts[sample.question].question.answer,
        "response": sample.text,
        "reward": sample.reward,
        "finish_reason": sample.finish_reason,
        "prompt_ids": sample.prompt_ids.tolist(),
        "response_ids": sample.response_ids.tolist(),
    }


# ---- The Workers -------------------------------------------------------------------------------------------------


class Worker:
    """Everything one GPU does: both Learners and the vLLM engine, in one process, taking turns."""

    def __init__(self, cfg, rank, log_dir):
        self.cfg, self.rank, self.log_dir = cfg, rank, log_dir
        self.done = 0  # requests finished or packs processed in the call at work, for the progress bar
        os.makedirs(log_dir, exist_ok=True)
        chatter = os.open(f"{log_dir}/worker_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(chatter, 1)
        os.dup2(chatter, 2)

    def place(self):
        """This node's address, a free port on it, and the index of this Worker's GPU there."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ray.util.get_node_ip_address(), port, (ray.get_gpu_ids() or [0])[0]

    def setup(self, address, port, local_rank):
        """Join the others and build the networks and the engine. Collective; returns the number of parameters."""
        env = {"RANK": self.rank, "WORLD_SIZE": self.cfg.workers, "LOCAL_RANK": local_rank}
        env |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in env.items()})
        import deepspeed.ops
        import torch

        import ppo
        import reward
        import rollout

        cfg, on_gpu = self.cfg, torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if on_gpu else "float32")
        if on_gpu:
            torch.cuda.set_device(device)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # a C++ build at first use; gloo does as well
        )
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        kinds = {"policy": cfg.model, "critic": cfg.critic_model or cfg.model}
        if cfg.kl_coef:
            kinds["reference"] = cfg.model
        self.learners = {}
        for kind, path in kinds.items():
            self.learners[kind] = ppo.Learner(kind, cfg, path, device, dtype, self.tick)
            self.learners[kind].offload()
        self.rollout = rollout.Rollout(cfg, cfg.model, dtype, device)
        self.owner = "rollout"  # of the GPU; it has read the policy's weights from the same folder
        if self.rank % cfg.tensor_parallel == 0:
            cores = len(os.sched_getaffinity(0)) * cfg.tensor_parallel // cfg.workers
            self.grader = reward.Grader(cfg.grader_processes or max(1, min(cores, 8)))
        return sum(p.ds_numel for p in self.learners["policy"].network.parameters())

    def tick(self):
        self.done += 1

    def progress(self):
        return self.done

    def give_gpu_to(self, owner):
        """ "rollout", "policy", "critic" or "reference" works; the others wait in CPU memory."""
        self.done = 0
        if owner == self.owner:
            return
        if self.owner == "rollout":
            self.rollout.sleep()
        else:
            self.learners[self.owner].offload()
        self.learners[owner].onload()
        self.owner = owner

    def generate(self, requests, seed, temperature, top_p):
        """requests: (question, prompt_ids, reference answer, choices) each. Returns Samples in that order, and the
        hash of the sampled ids; grading runs in other processes meanwhile. Ranks of one engine make the same call."""
        import ppo

        self.give_gpu_to("rollout")
        samples, rewards = [None] * len(requests), {}

        def on_finish(index, response_ids, logprobs, text, finish_reason):
            question, prompt_ids, answer, choices = requests[index]
            samples[index] = ppo.Sample(question, prompt_ids, response_ids, logprobs, text, finish_reason)
            if self.rank % self.cfg.tensor_parallel == 0:
                rewards[index] = self.grader.submit(text, answer, finish_reason, choices=choices)
            self.tick()

        prompts = [request[1].tolist() for request in requests]
        ids_hash = self.rollout.generate(prompts, seed, temperature, top_p, on_finish)
        for index, future in rewards.items():
            samples[index].reward = future.result()
        return (samples if rewards else []), ids_hash

    def forward(self, kind, batch, plan):
        self.give_gpu_to(kind)
        return self.learners[kind].forward(batch, plan)

    def update(self, kind, batch, plans):
        """One optimizer update for each plan; returns the metrics of each and, for the policy, update_kl: k3
        (Schulman 2020) between the policy before and after, on a few samples."""
        self.give_gpu_to(kind)
        learner = self.learners[kind]
        report = [[packs[0][:4]] for packs in plans[0]]
        before = learner.forward(batch, report) if kind == "policy" else None
        metrics = [learner.update(batch, plan) for plan in plans]
        if before is None:
            return metrics, None
        log_ratio = learner.forward(batch, report) - before
        return metrics, float(np.mean(np.exp(log_ratio) - 1 - log_ratio)) if len(before) else None

    def sync(self):
        """The policy's weights into vLLM. The order keeps the peak low: verl#302 measured 10 GB less for a 7B model."""
        policy = self.learners["policy"]
        policy.offload(keep_weights=True)
        self.rollout.wake_weights()
        self.rollout.load_weights(policy.weights())
        policy.offload()
        self.rollout.wake_cache()
        self.owner = "rollout"

    def export(self, kind, folder):
        self.learners[kind].export(folder)


class Workers:
    """The driver's side of the Workers: make the same call on all, watch it, put the results together."""

    def __init__(self, cfg, log, log_dir, on_gpu):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        self.cfg, self.log, self.ray = cfg, log, ray
        self.seconds, self.longest, self.stop_signal = {}, {}, None
        # One bundle per engine: a tensor-parallel group sits on one node, and all are reserved together or not at all.
        resource = "GPU" if on_gpu else "CPU"
        bundles = [{resource: cfg.tensor_parallel}] * (cfg.workers // cfg.tensor_parallel)
        self.group = ray.util.placement_group(bundles, strategy="PACK")
        if not self.group.wait(60):
            raise UserError(
                f"Ray could not reserve {cfg.workers} {resource}s in groups of {cfg.tensor_parallel} per node"
            )
        actor = ray.remote(concurrency_groups={"watch": 1})(Worker)
        options = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        self.handles = [
            actor.options(
                scheduling_strategy=InGroup(self.group, rank // cfg.tensor_parallel),
                runtime_env={"env_vars": worker_env(cfg, on_gpu)},
                **options,
            ).remote(cfg, rank, log_dir)
            for rank in range(cfg.workers)
        ]
        places = self.call("place")
        address, port, _ = places[0]
        self.num_parameters = self.call("setup", per_rank=[(address, port, gpu) for _, _, gpu in places])[0]

    @contextlib.contextmanager
    def phase(self, name):
        """Time one phase of the step."""
        self.current, start = name, time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def timings(self):
        """Seconds by phase since the last call of this."""
        seconds, self.seconds = self.seconds, {}
        return {"seconds": {name: round(value, 4) for name, value in seconds.items()}}

    def call(self, method, *args, per_rank=None, total=0):
        """method(*args) on every Worker; returns the results in rank order. Whatever one raises is raised here."""
        handles = zip(self.handles, per_rank or [args] * len(self.handles))
        refs = [getattr(handle, method).remote(*arguments) for handle, arguments in handles]
        start, pending = time.monotonic(), refs
        limit = self.cfg.phase_timeout or max(600.0, 10 * self.longest.get(method, 0.0))
        with self.log.progress(method, total) as progress:
            while pending:
                done, pending = self.ray.wait(pending, num_returns=len(pending), timeout=1.0)
                self.ray.get(
                    done
                )  # the first to fail speaks; the others may be waiting for it in a collective
                if pending and progress:
                    progress(sum(self.ray.get([handle.progress.remote() for handle in self.handles])))
                if self.stop_signal and method in ("generate", "forward"):
                    raise Stopped(self.stop_signal)  # the networks are still those of the last step
                if pending and time.monotonic() - start > limit:
                    ranks = [rank for rank, ref in enumerate(refs) if ref in pending]
                    raise UserError(
                        f"{method} took over {limit:.0f} s (phase_timeout) on ranks {ranks}; see logs/worker_*"
                    )
        self.longest[method] = max(self.longest.get(method, 0.0), time.monotonic() - start)
        return self.ray.get(refs)

    def share(self, batch):
        """One copy per node, which its Workers read in place."""
        return self.ray.put(batch)

    def generate(self, prompts, num_samples, purpose, step):
        """num_samples responses to each of `prompts`, graded, in the order of the prompts."""
        cfg, tp = self.cfg, self.cfg.tensor_parallel
        # A fixed rule, never timing: longest prompt first, in snake order over the engines, so that runs repeat.
        num_engines = cfg.workers // tp
        order = np.argsort([-len(prompt.ids) for prompt in prompts], kind="stable")
        snake = [*range(num_engines), *reversed(range(num_engines))]
        shares = [[] for _ in range(num_engines)]
        for place, i in enumerate(order.tolist()):
            request = (i, prompts[i].ids, prompts[i].question.answer, prompts[i].question.choices)
            shares[snake[place % len(snake)]] += [request] * num_samples
        sampling = (
            (cfg.eval_temperature, cfg.eval_top_p) if purpose == "eval" else (cfg.temperature, cfg.top_p)
        )
        per_rank = []
        for rank in range(cfg.workers):
            seed = derive_seed(cfg.seed, step, purpose, rank // tp)
            per_rank.append((shares[rank // tp], seed, *sampling))
        results = self.call("generate", per_rank=per_rank, total=tp * len(prompts) * num_samples)
        hashes = [ids_hash for _, ids_hash in results]
        for rank in range(cfg.workers):
            if hashes[rank] != hashes[rank - rank % tp]:
                raise RuntimeError(
                    f"rank {rank} sampled other tokens than its tensor-parallel group: not seeded alike"
                )
        return sorted(
            (sample for samples, _ in results for sample in samples), key=lambda sample: sample.question
        )

    def forward(self, kind, batch, plan):
        """V(s_t) or log π(a_t|s_t) for every response token of the batch, fp32 [N] in the batch's order."""
        results = self.call("forward", kind, self.share(batch), plan, total=sum(map(len, plan)))
        flat = np.empty(len(batch.logprobs), np.float32)
        for packs, result in zip(plan, results):
            indices = [i for pack in packs for i in pack]
            pieces = np.split(result, np.cumsum(batch.response_lens[indices])[:-1])
            for i, piece in zip(indices, pieces):
                flat[batch.response(i)] = piece
        return flat

    def update(self, kind, shared, plans):
        """The updates of one Learner; returns their metrics as means over all their tokens."""
        total = sum(len(packs) for plan in plans for packs in plan)
        updates, update_kl = self.call("update", kind, shared, plans, total=total)[0]
        weights = [update["num_tokens"] for update in updates]
        mean = {name: float(np.average([u[name] for u in updates], weights=weights)) for name in updates[0]}
        mean |= {f"grad_norm_{kind}": mean.pop("grad_norm"), f"lr_{kind}": updates[-1]["lr"]}
        del mean["lr"], mean["num_tokens"]
        if kind == "critic":
            return mean
        right, entropy_right = mean.pop("right"), mean.pop("entropy_right")
        mean["entropy_right"] = entropy_right / right if right > 0 else None
        mean["entropy_wrong"] = (mean["entropy"] - entropy_right) / (1 - right) if right < 1 else None
        # Only the first update of a step sees the weights that sampled; with one update the ratio is 1 throughout.
        mean |= {name: updates[0][name] for name in ("drift_mean", "drift_max")}
        return (
            {"clipfrac_low": None, "clipfrac_high": None, "approx_kl": None} | mean | {"update_kl": update_kl}
        )

    def sync(self):
        self.call("sync")

    def export(self, run_dir, tokenizer):
        """The networks as Hugging Face folders, policy/ and critic/: written beside, then renamed."""
        for kind in ("policy", "critic"):
            folder = run_dir / kind
            self.call("export", kind, f"{folder}.tmp")
            tokenizer.save_pretrained(f"{folder}.tmp")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(f"{folder}.tmp", folder)

    def stop(self, signum, _):
        """First signal: end at the next step boundary. Second: end at once."""
        if self.stop_signal:
            self.ray.shutdown()
            os._exit(128 + signum)
        self.stop_signal = signal.Signals(signum).name

    def close(self):
        for handle in self.handles:
            self.ray.kill(handle)
        self.ray.util.remove_placement_group(self.group)


class Stopped(Exception):
    """A signal asked the run to end; the networks are those of the last finished step."""


class RunError(Exception):
    """What ended the run, in one line."""


def worker_env(cfg, on_gpu):
    """Environment of a Worker's process, from its first instruction: what the libraries read when they are imported."""
    env = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the driver has fetched what there is to fetch
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu:
        # Ray would show a Worker its own GPU only, while vLLM's peer checks ask about its neighbours.
        return env | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    threads = max(1, (os.cpu_count() or 1) // cfg.workers)
    return env | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two Workers would bind to the same cores
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "CUDA_VISIBLE_DEVICES": "",
    }


# ---- The run -----------------------------------------------------------------------------------------------------


def start_ray(cfg):
    """Join the cluster that RAY_ADDRESS names or that runs on this machine, else start one; returns whether on GPUs."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray listens on every address: nobody without the token
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS", "auto")
    where = "joined the Ray cluster at"
    try:
        if address == "local":
            raise ConnectionError
        context = ray.init(address=address, **quiet)
    except Exception as error:
        if address != "local" and not (address == "auto" and isinstance(error, ConnectionError)):
            raise UserError(
                f"cannot join the Ray cluster at {address!r}: {str(error).splitlines()[0]}; "
                "RAY_ADDRESS=local starts one of its own"
            ) from error
        os.environ.pop("RAY_ADDRESS", None)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        context = ray.init(address="local", include_dashboard=False, **quiet)
        where = "started Ray at"
    resources = ray.cluster_resources()
    on_gpu = resources.get("GPU", 0) > 0
    have, what = int(resources.get("GPU" if on_gpu else "CPU", 0)), "GPU" if on_gpu else "CPU"
    if have < cfg.workers:
        raise UserError(f"workers={cfg.workers} needs {cfg.workers} {what}s, and the Ray cluster has {have}")
    print(f"{where} {context.address_info['gcs_address']}", flush=True)
    return on_gpu


def local_model(name, setting):
    """The folder of a model: itself, or a hub name's, fetched to this machine's cache."""
    if "/" in name and not name.startswith(("/", ".")) and name.count("/") == 1 and not os.path.exists(name):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{setting}: {name!r} is no folder, and fetching it from the hub failed: {reason}"
            ) from error
    for file in ("config.json", "tokenizer_config.json" if setting == "model" else "config.json"):
        if not os.path.isfile(os.path.join(name, file)):
            raise UserError(
                f"{setting}: {name!r} has no {file}; it must be a Hugging Face model folder or a hub name"
            )
    if not any(file.endswith(".safetensors") for file in os.listdir(name)):
        raise UserError(f"{setting}: {name!r} holds no *.safetensors weights; pickled ones are not read")
    return name


def new_run_dir(cfg):
    """runs/NAME, made now, so that what cannot be written is known before anything is computed."""
    run_dir = Path(cfg.out_dir) / cfg.name
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{run_dir} exists already; choose another --name, or move it away") from None
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {run_dir}: {error.strerror}; choose another --out_dir"
        ) from None
    return run_dir


def read_tasks(cfg, data, log):
    """The questions as prompts; over-long ones are dropped, counted and reported."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    prompts = {}
    for path, questions in data.items():
        prompts[path], dropped = encode_prompts(
            questions, tokenizer, cfg.prompt_template, cfg.max_prompt_tokens
        )
        if dropped:
            log.say(
                f"{path}: {dropped} of {len(questions)} questions are over max_prompt_tokens={cfg.max_prompt_tokens}"
            )
        if not prompts[path]:
            raise UserError(
                f"{path}: every prompt is longer than max_prompt_tokens={cfg.max_prompt_tokens}; raise it"
            )
    return SimpleNamespace(
        tokenizer=tokenizer,
        train=[prompt for path in cfg.train_data for prompt in prompts[path]],
        eval={Path(path).stem: prompts[path] for path in cfg.eval_data},
        hidden_size=AutoConfig.from_pretrained(cfg.model).hidden_size,
    )


def run(cfg):
    """Everything between good settings and the exported networks; returns the exit code."""
    data = {path: load_questions(path) for path in [*cfg.train_data, *cfg.eval_data]}
    cfg.model = local_model(cfg.model, "model")
    cfg.critic_model = local_model(cfg.critic_model, "critic_model") if cfg.critic_model else cfg.model
    run_dir = new_run_dir(cfg)
    (run_dir / "config.json").write_text(json.dumps(vars(cfg), indent=2))
    from log import Log

    log, workers = Log(run_dir, cfg), None
    try:
        tasks = read_tasks(cfg, data, log)
        on_gpu = start_ray(cfg)
        workers = Workers(cfg, log, str(run_dir / "logs"), on_gpu)
        for signum in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs its own
            signal.signal(signum, workers.stop)
        log.say(
            f"{cfg.model}: {workers.num_parameters:,} parameters, {cfg.workers} workers on {'GPU' if on_gpu else 'CPU'}"
        )
        log.say(describe(cfg))
        try:
            train(cfg, workers, tasks, log)
        except Stopped:
            workers.export(run_dir, tasks.tokenizer)
            raise
        workers.export(run_dir, tasks.tokenizer)
        log.say(
            f"done: policy in {run_dir}/policy, critic in {run_dir}/critic, curves in {run_dir}/curves.png"
        )
        return 0
    except Stopped as stopped:
        print(
            f"stopped by {stopped}; the networks of the last finished step are in {run_dir}", file=sys.stderr
        )
        return 130 if stopped.args[0] == "SIGINT" else 143
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # what a Worker raised, without Ray's wrapping
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "logs/driver.log").write_text("".join(traceback.format_exception(error)))
        raise (
            cause if isinstance(cause, UserError) else RunError(f"{type(cause).__name__}: {cause}")
        ) from None
    finally:
        log.close()
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def main(argv):
    try:
        cfg = load(argv)
        if cfg.dry_run:
            print(describe(cfg))
            return 0
        return run(cfg)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
