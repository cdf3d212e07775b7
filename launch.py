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

import numpy as np

from configs.load import UserError, derived, describe, load
from data.load import load_questions, read_tasks, step_questions
from log import Log

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
            rewards = rng_for(cfg.seed, step, "shuffle").permutation([sample.reward for sample in samples])
            for sample, reward in zip(samples, rewards.tolist()):
                sample.reward = reward

        # Pack: whole sequences into bins of max_tokens_per_pack tokens, the same work on every rank.
        with workers.phase("pack"):
            batch = ppo.Batch(samples)
            (plan,) = split_plans(cfg, batch, 1, (step, "pack"), tasks.hidden_size)

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
            lengths = batch.response_lens
            advantages, batch.returns = ppo.gae(rewards, batch.values, lengths, cfg.gamma, cfg.lam)
            batch.advantages = ppo.normalise(advantages)

        # Critic: each sample once, split at random into critic_updates_per_step updates.
        with workers.phase("critic"):
            plans = split_plans(cfg, batch, cfg.critic_updates_per_step, (step, "critic"), tasks.hidden_size)
            metrics = workers.update("critic", batch, plans)

        # Policy: one update on everything, strictly on-policy.
        with workers.phase("policy"):
            num_updates = cfg.policy_updates_per_step
            plans = [plan]  # of everything; more updates take a part each
            if num_updates > 1:
                plans = split_plans(cfg, batch, num_updates, (step, "policy"), tasks.hidden_size)
            metrics |= workers.update("policy", batch, plans)

        # Sync: the new policy into vLLM, bucket by bucket, proved complete.
        with workers.phase("sync"):
            workers.call("sync")

        if cfg.eval_every > 0 and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics["eval"] = evaluate(cfg, workers, tasks, log, step)
        log.step({"step": step} | sample_metrics(samples, batch) | metrics | workers.timings())
        log.samples(f"step_{step}", prompts, samples)
        if "eval" in metrics:
            log.curves()
        if cfg.save_every > 0 and step % cfg.save_every == 0:
            workers.export(tasks.tokenizer)
        if workers.stop_signal:
            raise Stopped(workers.stop_signal)


def evaluate(cfg, workers, tasks, log, step):
    """Mean accuracy over eval_samples responses per held-out question, for each data set."""
    results = {}
    for name, prompts in tasks.eval.items():
        with workers.phase("eval"):
            samples = workers.generate(prompts, cfg.eval_samples, "eval", step)
        rewards = np.array([s.reward for s in samples]).reshape(len(prompts), cfg.eval_samples)
        accuracy = rewards.mean(1)  # per question
        results[name] = {
            "accuracy": float(accuracy.mean()),
            "accuracy_stderr": float(accuracy.std() / max(1, len(prompts) - 1) ** 0.5),
            "response_tokens": float(np.mean([len(s.response_ids) for s in samples])),
            "cut_off": float(np.mean([s.finish_reason == "length" for s in samples])),
        }
        log.samples(f"eval_{name}_{step}", prompts, samples)
        for sample in samples[: 2 * cfg.eval_samples : cfg.eval_samples]:
            log.show(prompts, sample)
    return results


def split_plans(cfg, batch, num_updates, purpose, hidden_size):
    """The samples split at random into num_updates parts, each packed: plans[update][rank][i] = indices of a pack."""
    import ppo

    order = rng_for(cfg.seed, *purpose).permutation(len(batch.lengths)) if num_updates > 1 else None
    plans = []
    for part in np.array_split(np.arange(len(batch.lengths)) if order is None else order, num_updates):
        plan = ppo.pack(batch.lengths[part], cfg.max_tokens_per_pack, cfg.workers, hidden_size)
        plans.append([[part[local].tolist() for local in packs] for packs in plan])
    return plans


def rng_for(*parts):
    """A generator for (seed, step, purpose, engine): nothing random has a state that a restart could lose."""
    return np.random.default_rng(
        [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    )


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
    } | dict.fromkeys(
        ["clipfrac_low", "clipfrac_high", "approx_kl"]
    )  # None where one update makes the ratio 1


# ---- The Workers -------------------------------------------------------------------------------------------------


class Worker:
    """Everything one GPU does: both Learners and the vLLM engine, in one process, taking turns."""

    def __init__(self, cfg, rank, log_dir):
        self.cfg, self.rank = cfg, rank
        self.done = 0  # requests finished or packs processed in the call at work, for the progress bar
        os.makedirs(log_dir, exist_ok=True)
        chatter = open(f"{log_dir}/worker_{rank}.log", "ab")
        for stream in (1, 2):
            os.dup2(chatter.fileno(), stream)

    def address(self):
        """This node's address and a free port on it."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def setup(self, address, port):
        """Join the others and build the networks and the engine. Collective; returns the number of parameters."""
        import ray

        local_rank = int((ray.get_gpu_ids() or [0])[0])
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
        # gloo does as well as this one, which would be compiled at its first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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

    def interrupt(self):
        self.rollout.interrupted = True

    def give_gpu_to(self, owner):
        """One of "rollout", "policy", "critic", "reference" works; the others wait in CPU memory."""
        self.done = 0
        if owner != self.owner:
            self.rollout.sleep() if self.owner == "rollout" else self.learners[self.owner].offload()
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
        """One optimizer update for each plan; returns their metrics and, of this rank, drift_max and update_kl:
        k3 (Schulman 2020) between the policy before and after, on a few samples."""
        self.give_gpu_to(kind)
        learner = self.learners[kind]
        if kind == "critic":
            return [learner.update(batch, plan) for plan in plans], {}
        report = [[packs[0][:4]] for packs in plans[0]]
        before = learner.forward(batch, report)
        learner.drift_max = 0.0
        updates = [learner.update(batch, plan) for plan in plans]
        log_ratio = learner.forward(batch, report) - before
        update_kl = np.mean(np.exp(log_ratio) - 1 - log_ratio) if len(before) else 0.0
        return updates, {"update_kl": float(update_kl), "drift_max": learner.drift_max}

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

    def __init__(self, cfg, log, on_gpu):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        self.cfg, self.log, self.ray = cfg, log, ray
        self.seconds, self.longest, self.stop_signal = {}, {}, None
        # One bundle per engine: a tensor-parallel group sits on one node, and all are reserved together or not at all.
        what, tp = "GPU" if on_gpu else "CPU", cfg.tensor_parallel
        have = int(ray.cluster_resources().get(what, 0))
        group = ray.util.placement_group([{what: tp}] * (cfg.workers // tp), strategy="PACK")
        if have < cfg.workers or not group.wait(60):
            place = f", {tp} on one node for each engine" if tp > 1 else ""
            raise UserError(
                f"workers={cfg.workers} needs as many free {what}s{place}; the Ray cluster has {have}"
            )
        actor = ray.remote(concurrency_groups={"watch": 1})(Worker)
        share = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        share["runtime_env"] = {"env_vars": worker_env(cfg, on_gpu)}
        self.handles = []
        for rank in range(cfg.workers):
            share["scheduling_strategy"] = InGroup(group, placement_group_bundle_index=rank // tp)
            self.handles.append(actor.options(**share).remote(cfg, rank, str(log.dir / "logs")))
        address = ray.get(self.handles[0].address.remote())
        self.num_parameters = self.call("setup", *address)[0]

    @contextlib.contextmanager
    def phase(self, name):
        """Time one phase of the step."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def timings(self):
        """Seconds by phase since the last call of this."""
        seconds, self.seconds = self.seconds, {}
        return {"seconds": {name: round(value, 4) for name, value in seconds.items()}}

    def call(self, method, *args, per_rank=None, total=0):
        """method(*args) on every Worker; returns the results in rank order. Whatever one raises is raised here."""
        calls = zip(self.handles, per_rank or [args] * len(self.handles))
        refs = pending = [getattr(handle, method).remote(*arguments) for handle, arguments in calls]
        start, longest = time.monotonic(), self.longest.get(method, 0.0)
        limit = self.cfg.phase_timeout or max(600.0, 10 * longest)
        with self.log.progress(method, total) as show:
            while pending:
                done, pending = self.ray.wait(pending, num_returns=len(pending), timeout=1.0)
                self.ray.get(done)  # the first to fail speaks; the others may wait for it in a collective
                if pending and show:
                    watch = [handle.progress.options(concurrency_group="watch") for handle in self.handles]
                    show(sum(self.ray.get([progress.remote() for progress in watch])))
                if self.stop_signal and method in ("generate", "forward"):
                    for handle in self.handles:
                        handle.interrupt.options(concurrency_group="watch").remote()
                    raise Stopped(self.stop_signal)  # the networks are still those of the last step
                if pending and time.monotonic() - start > limit:
                    late = [rank for rank, ref in enumerate(refs) if ref in pending]
                    raise TimeoutError(
                        f"{method}: over phase_timeout={limit:.0f} s on ranks {late}; see logs/"
                    )
        self.longest[method] = max(longest, time.monotonic() - start)
        return self.ray.get(refs)

    def generate(self, prompts, num_samples, purpose, step):
        """num_samples responses to each of `prompts`, graded, in the order of the prompts."""
        cfg, tp = self.cfg, self.cfg.tensor_parallel
        # A fixed rule, never timing: longest prompt first, in snake order over the engines, so that runs repeat.
        num_engines = cfg.workers // tp
        snake = [*range(num_engines), *reversed(range(num_engines))]
        shares = [[] for _ in range(num_engines)]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        for place, i in enumerate(order):
            request = (i, prompts[i].ids, prompts[i].question.answer, prompts[i].question.choices)
            shares[snake[place % len(snake)]] += [request] * num_samples
        is_eval = purpose == "eval"
        sampling = (cfg.eval_temperature, cfg.eval_top_p) if is_eval else (cfg.temperature, cfg.top_p)
        per_rank = []
        for engine in (rank // tp for rank in range(cfg.workers)):
            # All ranks of an engine are seeded alike: else they sample different tokens, with no error at all.
            seed = int(rng_for(cfg.seed, step, purpose, engine).integers(2**31))
            per_rank.append((shares[engine], seed, *sampling))
        results = self.call("generate", per_rank=per_rank, total=tp * len(prompts) * num_samples)
        for rank, (_, ids_hash) in enumerate(results):
            if ids_hash != results[rank - rank % tp][1]:
                raise RuntimeError(
                    f"rank {rank} sampled other tokens than the rest of its tensor-parallel group"
                )
        samples = [sample for share, _ in results for sample in share]
        return sorted(samples, key=lambda sample: sample.question)

    def forward(self, kind, batch, plan):
        """V(s_t) or log π(a_t|s_t) for every response token of the batch, fp32 [N] in the batch's order."""
        results = self.call("forward", kind, self.ray.put(batch), plan, total=sum(map(len, plan)))
        flat = np.empty(len(batch.logprobs), np.float32)
        for packs, result in zip(plan, results):
            start = 0
            for i in (i for pack in packs for i in pack):
                flat[batch.response(i)] = result[start : start + batch.response_lens[i]]
                start += batch.response_lens[i]
        return flat

    def update(self, kind, batch, plans):
        """The updates of one Learner; returns each metric's mean over all its elements, None where it has none."""
        total = sum(len(packs) for plan in plans for packs in plan)
        results = self.call("update", kind, self.ray.put(batch), plans, total=total)
        updates, extra = results[0]  # sums over all ranks, the same on each
        metrics = {}
        for name in updates[0]:
            amount, count = np.sum([update[name] for update in updates if name in update], axis=0)
            metrics[name] = float(amount / count) if count else None
        maxima = {name: max(extras[name] for _, extras in results) for name in extra}
        return metrics | maxima

    def export(self, tokenizer):
        """The networks as Hugging Face folders, policy/ and critic/: written beside, then renamed."""
        for kind in ("policy", "critic"):
            folder = self.log.dir / kind
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


class Stopped(Exception):
    """A signal asked the run to end; the networks are those of the last finished step."""


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


def start_ray():
    """Join the cluster that RAY_ADDRESS names or that runs on this machine, else start one; True where it has GPUs."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray listens on every address: nobody without the token
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            raise ConnectionError
        context, how = ray.init(address, **quiet), "joined"
    except Exception as error:
        if address != "local" and not (address == "auto" and isinstance(error, ConnectionError)):
            reason = str(error).splitlines()[0]
            way_out = "RAY_ADDRESS=local starts one of its own"
            raise UserError(f"cannot join the Ray cluster at {address!r}: {reason}; {way_out}") from error
        os.environ.update(RAY_ADDRESS="local", RAY_AUTH_TOKEN=secrets.token_hex(32))
        context, how = ray.init("local", include_dashboard=False, **quiet), "started"
    print(f"{how} the Ray cluster at {context.address_info['gcs_address']}", flush=True)
    return ray.cluster_resources().get("GPU", 0) > 0


def local_model(name, setting):
    """The folder of a model: itself, or a hub name's, fetched to this machine's cache."""
    if not os.path.isdir(name) and name.count("/") == 1 and name[0] not in "./":
        from huggingface_hub import snapshot_download

        try:
            name = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{setting}={name!r} is no folder, and the hub did not give it: {reason}"
            ) from error
    files = os.listdir(name) if os.path.isdir(name) else []
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{setting}={name!r} must be a folder with config.json and *.safetensors, or a hub name"
        )
    return name


def run(cfg):
    """Everything between good settings and the exported networks. Returns the exit code."""
    data = {path: load_questions(path) for path in [*cfg.train_data, *cfg.eval_data]}
    cfg.model = local_model(cfg.model, "model")
    cfg.critic_model = local_model(cfg.critic_model, "critic_model") if cfg.critic_model else cfg.model
    log = Log(cfg)
    try:
        tasks = read_tasks(cfg, data, log)
        on_gpu = start_ray()
        workers = Workers(cfg, log, on_gpu)
        for signum in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs its own
            signal.signal(signum, workers.stop)
        size = f"{workers.num_parameters:,} parameters"
        log.say(
            f"{cfg.model}: {size}, {cfg.workers} workers on {'GPU' if on_gpu else 'CPU'}, run folder {log.dir}"
        )
        log.say("\n".join(f"{name}: {value}" for name, value in derived(cfg).items()))
        try:
            train(cfg, workers, tasks, log)
        finally:
            if sys.exc_info()[0] in (None, Stopped):
                workers.export(tasks.tokenizer)
        log.say(f"done: networks in {log.dir}/policy and critic, curves in {log.dir}/curves.png")
        return 0
    except Stopped as stopped:
        log.say(
            f"stopped by {stopped}: the networks of the last finished step are in {log.dir}/policy and critic"
        )
        return 128 + signal.Signals[str(stopped)]
    except UserError:
        shutil.rmtree(log.dir)  # made by this run, which has not begun
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # what a Worker raised, without Ray's wrapping
        (log.dir / "error.txt").write_text("".join(traceback.format_exception(error)))
        log.say(
            f"error: {type(cause).__name__}: {str(cause).splitlines()[0]} (all of it: {log.dir}/error.txt)"
        )
        return 1
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step; from then on Workers.stop takes it
        print("stopped before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
