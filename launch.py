"""The run: read the config, start or join Ray, one Worker per GPU, the training loop, evaluation, exports.

    python launch.py configs/tiny.py [--key=value …]

This file is the single controller. It decides and keeps the books; the Workers hold the networks and compute:

    driver ──► Worker 0   policy Learner, critic Learner, vLLM     one Ray actor per GPU, all three in one process,
           ──► Worker 1   policy Learner, critic Learner, vLLM     which take turns on that GPU
           ──► …                                                   ZeRO-3 across all, tensor parallel in groups

In:   a config.   Out: runs/NAME/ with metrics.jsonl, curves.png, tensorboard/, samples/, logs/, policy/, critic/.
torch, Ray and vLLM are imported only after the settings and the data have been checked.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
from rich.progress import Progress

from configs.load import ROOT, UserError, load
from data.load import load_questions, local_model, read_tasks, step_questions
from log import Log, installed, sample_line
from reward import Grader, extract_answer, response_stats


def train(cfg, workers, tasks, log):
    """The algorithm, in the order in which things happen, from the step that `workers` have reached."""
    import ppo

    if cfg.eval_every > 0 and workers.step == 0:
        log.step({"step": 0, "eval": evaluate(cfg, workers, tasks, log, step=0)} | workers.timings())

    for step in range(workers.step + 1, cfg.steps + 1):
        # Generate: samples_per_prompt responses to each of this step's questions, graded as they finish.
        chosen = step_questions(len(tasks.train), cfg.prompts_per_step, cfg.seed, step - 1)
        prompts = [tasks.train[i] for i in chosen]
        samples = workers.generate("generate", prompts, cfg.samples_per_prompt, step)

        # Pack: whole sequences into bins of max_tokens_per_pack tokens, the same work on every rank.
        batch = ppo.Batch(samples)
        (plan,) = split_plans(cfg, batch, 1, step, "pack", tasks.hidden_size)

        # Only for several policy updates or a penalty: what the policy and its base model think of the responses.
        if cfg.kl_coef or cfg.policy_updates_per_step > 1:
            batch.old_logprobs = workers.call("old_logprobs", "learn", "policy", "forward", batch, plan)[0]
        if cfg.kl_coef:
            batch.ref_logprobs = workers.call("ref_logprobs", "learn", "reference", "forward", batch, plan)[0]

        # None where there is one update, and the ratio 1.
        metrics = dict.fromkeys(["clipfrac_low", "clipfrac_high", "approx_kl"])
        if cfg.advantage == "group":
            batch.advantages = ppo.group_advantages(batch, cfg.samples_per_prompt)
        else:
            # Values: one forward of the critic, V_old(s_t) for every response token.
            batch.values = workers.call("values", "learn", "critic", "forward", batch, plan)[0]

            # Advantages: GAE per response, normalised over all tokens of the batch.
            rewards = ppo.token_rewards(batch, cfg.kl_coef)
            unscaled, batch.returns = ppo.gae(rewards, batch.values, batch.response_lens, cfg.gamma, cfg.lam)
            batch.advantages = ppo.normalise(unscaled)
            unexplained, variance = unscaled.var(), batch.returns.var()  # R − V is Â before normalising
            metrics["explained_var"] = float(1 - unexplained / variance) if variance > 0 else None

            # Critic: each sample once, split at random into critic_updates_per_step updates.
            plans = split_plans(cfg, batch, cfg.critic_updates_per_step, step, "critic", tasks.hidden_size)
            metrics |= workers.call("critic", "learn", "critic", "update", batch, plans)[0]

        # Policy: one update on everything, strictly on-policy; more updates take a part each.
        plans = split_plans(cfg, batch, cfg.policy_updates_per_step, step, "policy", tasks.hidden_size)
        metrics |= workers.call("policy", "learn", "policy", "update", batch, plans)[0]

        # Sync: the new policy into vLLM, bucket by bucket, proved complete.
        workers.call("sync", "sync")

        metrics |= {"reward": float(batch.rewards.mean()), "tokens": int(batch.lengths.sum())}
        metrics["tokens_per_second"] = metrics["tokens"] / sum(workers.seconds.values())
        if cfg.eval_every > 0 and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics["eval"] = evaluate(cfg, workers, tasks, log, step)
        log.step({"step": step} | response_metrics(samples) | metrics | workers.timings())
        log.lines(f"step_{step}", (sample.line for sample in samples))
        if "eval" in metrics:
            log.curves()
        workers.step = step
        if step == cfg.steps or (cfg.save_every > 0 and step % cfg.save_every == 0):
            workers.save()
        if workers.stop_signal:
            raise Stopped(workers.stop_signal)


# The columns of evaluate()'s table: the first three are means over a question's samples.
SCORES = ("accuracy", "response_tokens", "cut_off", "pass_at_k", "majority_at_k")


def evaluate(cfg, workers, tasks, log, step):
    """k = eval_samples responses to every held-out question; the means of each data set, and over all of them, of

    accuracy, avg@k; pass_at_k, 1 where any response is right; majority_at_k, 1 where the most frequent answer is.
    """
    results, k = {}, cfg.eval_samples
    for name, prompts in tasks.eval.items():
        samples = workers.generate("eval", prompts, k, step)
        rows = [[s.reward, len(s.response_ids), s.finish_reason == "length"] for s in samples]
        each = np.array(rows).reshape(-1, k, 3)  # [questions, k, 3]
        votes = [majority_reward(samples[i : i + k]) for i in range(0, len(samples), k)]
        scores = np.column_stack([each.mean(1), each[:, :, 0].max(1), votes])  # [questions, 5]
        results[name] = response_metrics(samples) | dict(zip(SCORES, scores.mean(0).tolist()))
        results[name]["accuracy_stderr"] = float(scores[:, 0].std() / max(1, len(prompts) - 1) ** 0.5)
        records = [p.question._asdict() | dict(zip(SCORES, row)) for p, row in zip(prompts, scores.tolist())]
        log.lines(f"eval_{name}_{step}", (sample.line for sample in samples))
        log.lines(f"eval_{name}_{step}_questions", records)
        for prompt, sample in zip(prompts[:2], samples[::k]):
            log.show(prompt.question, sample)
    if len(results) > 1:
        results["overall"] = {m: float(np.mean([result[m] for result in results.values()])) for m in SCORES}
    return results


def majority_reward(samples):
    """The reward of the most frequent answer, as it is spelled; no answer is no vote."""
    answers = [extract_answer(sample.text) for sample in samples]
    chosen = max(filter(None, answers), key=answers.count, default=None)
    return max((s.reward for s, answer in zip(samples, answers) if answer == chosen), default=0.0)


# Ways to a reward on which no answer was read: their shares are metrics
UNGRADED = ("cut_off", "no_answer", "refused", "timed_out", "backstop", "crashed")


def response_metrics(samples):
    """What responses were like; None for the length of those that do not exist."""
    rewards, lengths = np.array([[s.reward, len(s.response_ids)] for s in samples]).T
    metrics = {name: float(np.mean([s.stats[name] for s in samples])) for name in samples[0].stats}
    for part, which in (("", rewards >= 0), ("_right", rewards > 0), ("_wrong", rewards == 0)):
        metrics["response_tokens" + part] = float(lengths[which].mean()) if which.any() else None
    return metrics | {name: float(np.mean([s.graded == name for s in samples])) for name in UNGRADED}


def split_plans(cfg, batch, num_updates, step, purpose, hidden_size):
    """The samples split at random into num_updates parts, each packed: plans[update][rank][i] = indices of a pack.

    Samples of a question go together to share its prompt, up to an eighth of a pack: larger pieces fill packs unevenly.
    """
    import ppo

    plans, order = [], rng_for(cfg.seed, step, purpose).permutation(len(batch.lengths))
    for part in np.array_split(order, num_updates):
        bundles, sizes = ppo.bundle(batch, part, cfg.max_tokens_per_pack // 8)
        plan = ppo.pack(sizes, cfg.max_tokens_per_pack, cfg.workers, hidden_size)
        plans.append([[[i for b in local for i in bundles[b]] for local in packs] for packs in plan])
    return plans


def rng_for(*parts):
    """A generator for (seed, step, purpose, engine): nothing random has a state that a restart could lose."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in parts])


def trained(cfg):
    """The networks that learn, and the folders they start from."""
    kinds = {"policy": cfg.model} | ({"critic": cfg.critic_model} if cfg.advantage == "gae" else {})
    return {} if cfg.eval_only else kinds


# ---- The Workers -------------------------------------------------------------------------------------------------


# Phases that leave the networks as they are
INTERRUPTIBLE = ("generate", "eval", "values", "old_logprobs", "ref_logprobs")


class Worker:
    """Everything one GPU does: both Learners and the vLLM engine, in one process, taking turns."""

    def __init__(self, cfg, rank):
        self.cfg, self.rank = cfg, rank

    def address(self):
        """This node's address and a free port on it."""
        import ray

        with socket.create_server(("", 0)) as free:
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def setup(self, address, port):
        """Join the others and build the networks and the engine. Collective; returns how many parameters learn."""
        import psutil
        import ray

        here, logs = ray.util.get_node_ip_address(), Path(self.cfg.out_dir, self.cfg.name, "logs")
        for folder in (logs, self.cfg.model, self.cfg.critic_model):
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"node {here} does not see {folder}")
        if lacking := sorted({*self.cfg.versions} - {*installed()}):
            raise ImportError(f"node {here} has not the driver's packages: {', '.join(lacking[:9])}")
        for stream in (1, 2):
            os.dup2(os.open(logs / f"worker_{self.rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
        mine, visible = str((ray.get_gpu_ids() or [0])[0]), os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = visible.split(",").index(mine) if visible else int(mine)  # torch counts those that it sees
        # gloo would listen where the host's name leads, which /etc/hosts often makes 127.0.1.1: no other node gets there
        cards = {a.address: card for card, has in psutil.net_if_addrs().items() for a in has}
        where = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": cards.get(here, "")}
        os.environ.update(where, RANK=str(self.rank), WORLD_SIZE=str(self.cfg.workers), LOCAL_RANK=str(gpu))
        import deepspeed.ops
        import torch

        import ppo
        import rollout

        cfg, on_gpu = self.cfg, torch.cuda.is_available()
        device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
        dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if on_gpu else "float32")
        if on_gpu:
            torch.cuda.set_device(device)
        # gloo does as well as this one, which would be compiled at its first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        kinds = trained(cfg) | ({"reference": cfg.model} if cfg.kl_coef else {})
        self.learners = {kind: ppo.Learner(kind, cfg, path, device, dtype) for kind, path in kinds.items()}
        learn = sum(p.ds_numel for kind in trained(cfg) for p in self.learners[kind].network.parameters())
        # These weights, at most 20 bytes each as in plan.py, stay on the GPU if they leave vLLM its share, and 4 GiB to spare.
        free, total = torch.cuda.mem_get_info() if on_gpu else (0, 1)
        ppo.Learner.stays = free - 20 * learn / cfg.workers - 2**32 > cfg.gpu_memory_utilization * total
        self.rollout = rollout.Rollout(cfg, cfg.model, dtype, device)
        self.owner = "rollout"  # of the GPU; it has read the policy's weights from the same folder
        self.grader = Grader(max(1, min(os.cpu_count() * cfg.tensor_parallel // cfg.workers, 8)))
        return learn

    def interrupt(self):
        # Ranks of one engine must end at the same step: one of several ranks generates to its end.
        self.rollout.interrupted = self.cfg.tensor_parallel == 1

    def give_gpu_to(self, owner):
        """One of "rollout", "policy", "critic", "reference" works; the others sleep, and wait in CPU memory where they must."""
        if owner != self.owner:
            self.rollout.sleep() if self.owner == "rollout" else self.learners[self.owner].offload()
            self.learners[owner].onload()
            self.owner = owner

    def generate(self, questions, num_samples, *sampling):
        """questions: (index, Prompt) each; sampling: seed, temperature, top_p. Returns num_samples Samples of each in that
        order, and the hash of the sampled ids; grading runs in other processes meanwhile. Ranks of one engine make the
        same call."""
        import ppo

        self.give_gpu_to("rollout")
        requests = [request for request in questions for _ in range(num_samples)]
        samples, rewards = [None] * len(requests), {}
        for index, *response in self.rollout.generate([p.ids.tolist() for _, p in requests], *sampling):
            number, prompt = requests[index]
            sample = samples[index] = ppo.Sample(number, prompt.ids, *response)
            sample.stats = response_stats(sample.text)
            if self.rank % self.cfg.tensor_parallel == 0:
                question, how = prompt.question, sample.finish_reason
                rewards[index] = self.grader.submit(sample.text, question.answer, how, question.choices)
        for index, future in rewards.items():
            correct, samples[index].graded = future.result()
            samples[index].reward = float(correct)
            samples[index].line = sample_line(samples[index], requests[index][1].question)
        ids_hash = zlib.crc32(b"".join(sample.response_ids.tobytes() for sample in samples if sample))
        return (samples if rewards else []), ids_hash

    def learn(self, kind, method, *args):
        """A method of one Learner, which gets the GPU where it computes; rank 0 speaks for all."""
        if method in ("forward", "update", "load"):
            self.give_gpu_to(kind)
        result = getattr(self.learners[kind], method)(*args)
        return result if self.rank == 0 else None

    def sync(self):
        """The policy's weights into vLLM. The order keeps the peak low: verl#302 measured 10 GB less for a 7B model."""
        policy = self.learners["policy"]
        policy.offload(keep_weights=True)
        self.rollout.wake("weights")
        self.rollout.load_weights(policy.weights())
        policy.offload()
        self.rollout.wake("kv_cache")
        self.owner = "rollout"


class Workers:
    """The driver's side of the Workers: make the same call on all, watch it, save what they have reached."""

    def __init__(self, cfg, log, on_gpu):
        import ray

        self.cfg, self.log, self.ray, self.on_gpu = cfg, log, ray, on_gpu
        self.step = 0  # the last that is finished
        self.seconds, self.longest, self.stop_signal = {}, {}, None  # seconds by phase
        for signum in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs its own
            signal.signal(signum, self.stop)

    def start(self, step=None):
        """Make the Workers, as they were at the newest checkpoint if there is one, or at that of `step`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        cfg, ray = self.cfg, self.ray
        # vLLM's; a killed engine leaves them, and the next one would fail; a living one has its own mapped
        for stale in Path("/dev/shm").glob("*cpushm*"):
            stale.unlink(missing_ok=True)
        # One bundle per engine: a tensor-parallel group sits on one node, and all are reserved together or not at all.
        what, tp = "GPU" if self.on_gpu else "CPU", cfg.tensor_parallel
        group = ray.util.placement_group([{what: tp}] * (cfg.workers // tp), strategy="PACK")
        if ray.cluster_resources().get(what, 0) < cfg.workers or not group.wait(60):
            have = int(ray.cluster_resources().get(what, 0))  # by now: a node may have left unnoticed
            raise UserError(f"workers={cfg.workers}: Ray has {have} {what}s; an engine takes {tp} of a node")
        actor = ray.remote(concurrency_groups={"watch": 1})(Worker)
        share = {"num_cpus": 1 - self.on_gpu, "num_gpus": int(self.on_gpu)}
        share["runtime_env"] = {"env_vars": worker_env(cfg, self.on_gpu)}
        self.handles = []
        for rank in range(cfg.workers):
            share["scheduling_strategy"] = InGroup(group, placement_group_bundle_index=rank // tp)
            self.handles.append(actor.options(**share).remote(cfg, rank))
        self.places = self.watch("address")
        self.num_parameters = self.call("setup", "setup", *self.places[0])[0]
        saved = checkpoints(cfg)
        self.step = max(saved, default=0) if step is None else step
        if self.step:
            for kind in reversed(trained(cfg)):  # the policy last, as in a step
                self.call("load", "learn", kind, "load", saved[self.step], self.step)
            self.call("sync", "sync")
        self.seconds = {}

    def timings(self):
        """Seconds by phase since the last call of this."""
        seconds, self.seconds = self.seconds, {}
        return {"seconds": {phase: round(value, 4) for phase, value in seconds.items()}}

    def watch(self, method):
        """method() on every Worker beside what it is doing; raises the death of one that has died."""
        # Again where one does not answer, until Ray is sure that its node has gone: its error then names the node.
        how = {"concurrency_group": "watch", "max_task_retries": -1}
        return self.ray.get([getattr(handle, method).options(**how).remote() for handle in self.handles])

    def call(self, phase, method, *args, per_rank=None):
        """method(*args) on every Worker; returns the results in rank order. Whatever one raises is raised here."""
        args = [arg if type(arg) is str else self.ray.put(arg) for arg in args]  # once, for all of them
        calls = zip(self.handles, per_rank or [args] * len(self.handles))
        refs = pending = [getattr(handle, method).remote(*arguments) for handle, arguments in calls]
        start, longest, results = time.monotonic(), self.longest.get(phase, 0.0), {}
        # Nobody knows yet how long the first of its kind takes: two hours.
        limit = self.cfg.phase_timeout or max(600.0, 10 * (longest or 720.0))
        with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task(phase, total=longest or None)  # of the longest so far
            while pending:
                done, pending = self.ray.wait(pending, num_returns=len(pending), timeout=1.0)
                try:
                    # The first to fail speaks; the others may wait for it in a collective.
                    results |= zip(done, self.ray.get(done))
                except (self.ray.exceptions.RayTaskError, self.ray.exceptions.ActorUnavailableError):
                    time.sleep(3)  # or did it fail because another one is dying?
                    self.watch("address")
                    raise
                bar.update(task, completed=time.monotonic() - start)
                # While the networks are those of the last step; an evaluation of new ones ends first.
                if self.stop_signal and phase in INTERRUPTIBLE and "sync" not in self.seconds:
                    self.watch("interrupt")
                    if not pending:
                        raise Stopped(self.stop_signal)
                if pending and time.monotonic() - start > limit:
                    late = (f"{r} at {self.places[r][0]}" for r, ref in enumerate(refs) if ref in pending)
                    raise TimeoutError(f"{phase}: over phase_timeout={limit:.0f} s on rank {', '.join(late)}")
        seconds = time.monotonic() - start
        self.longest[phase] = max(longest, seconds)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return [results[ref] for ref in refs]

    def generate(self, phase, prompts, num_samples, step):
        """num_samples responses to each of `prompts`, graded, in the order of the prompts."""
        cfg, tp, per_rank = self.cfg, self.cfg.tensor_parallel, []
        sampling = (cfg.eval_temperature, cfg.eval_top_p) if phase == "eval" else (cfg.temperature, cfg.top_p)
        # A fixed rule, never timing: longest prompt first, in snake order over the engines, so that runs repeat.
        order, snake = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)), 2 * cfg.workers // tp
        for engine in (rank // tp for rank in range(cfg.workers)):
            questions = [(i, prompts[i]) for i in order[engine::snake] + order[snake - 1 - engine :: snake]]
            # All ranks of an engine are seeded alike: else they sample different tokens, with no error at all.
            seed = int(rng_for(cfg.seed, step, phase, engine).integers(2**31))
            per_rank.append((questions, num_samples, seed, *sampling))
        results = self.call(phase, "generate", per_rank=per_rank)
        for rank, (_, ids_hash) in enumerate(results):
            if ids_hash != results[rank - rank % tp][1]:
                raise RuntimeError(f"rank {rank} sampled other tokens than the others of its vLLM engine")
        return sorted((sample for share, _ in results for sample in share), key=lambda s: s.question)

    def save(self):
        """checkpoints/step_N: written beside, then renamed, so that it is whole or not there at all."""
        folder, size = f"{self.log.dir}/checkpoints/step_{self.step}", 12 * self.num_parameters
        if self.step == 0 or os.path.exists(folder):
            return
        if (free := shutil.disk_usage(self.log.dir).free) < size:
            raise OSError(f"a checkpoint takes {size:,} bytes, but {self.log.dir} has {free:,} left")
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        os.makedirs(f"{folder}.tmp")
        for kind in trained(self.cfg):
            self.call("save", "learn", kind, "save", f"{folder}.tmp")
        shutil.copy(self.log.dir / "config.json", f"{folder}.tmp")
        os.sync()
        os.rename(f"{folder}.tmp", folder)
        saved = checkpoints(self.cfg)
        for step in {*sorted(saved)[: -self.cfg.keep_checkpoints]} - {self.log.best(saved)}:
            shutil.rmtree(saved[step])

    def export(self, tokenizer, suffix=""):
        """The networks as Hugging Face folders, policy/ and critic/: written beside, then renamed."""
        for kind in trained(self.cfg):
            folder = f"{self.log.dir}/{kind}{suffix}"
            self.call("export", "learn", kind, "export", f"{folder}.tmp")
            tokenizer.save_pretrained(f"{folder}.tmp")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(f"{folder}.tmp", folder)

    def stop(self, signum, _):
        """First signal: end at the next step boundary. Second: end at once."""
        if self.stop_signal:
            self.ray.shutdown()
            os._exit(128 + signum)
        # No restart: Workers may die of the same signal.
        self.stop_signal, self.cfg.max_restarts = signal.Signals(signum).name, 0


def checkpoints(cfg):
    """The whole checkpoints of a run, step → folder."""
    return {int(p.name[5:]): str(p) for p in Path(cfg.out_dir, cfg.name).glob("checkpoints/step_*[0-9]")}


class Stopped(Exception):
    """A signal asked the run to end; the networks are those of the last finished step."""


def worker_env(cfg, on_gpu):
    """Environment of a Worker's process, from its first instruction: what the libraries read when they are imported."""
    # vLLM's engine in this process; nothing reported to anyone; the driver has fetched what there is to fetch
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    if on_gpu:
        # Ray would show a Worker its own GPU only, while vLLM's peer checks ask about its neighbours.
        return env | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    # Threads not bound to cores, else two Workers would share the same ones.
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return env | {"OMP_NUM_THREADS": str(os.cpu_count() // cfg.workers or 1)}


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
        if ":" in address:  # where nobody listens Ray would wait for minutes, and then end this process
            socket.create_connection(address.rsplit(":", 1), timeout=10).close()
        context, how = ray.init(address, **quiet), "joined"
    except Exception as error:
        if address != "local" and not (address == "auto" and isinstance(error, ConnectionError)):
            reason = f"{str(error).splitlines()[0]}; RAY_ADDRESS=local starts one of its own"
            raise UserError(f"cannot join the Ray cluster at {address!r}: {reason}") from error
        os.environ.update(RAY_ADDRESS="local", RAY_AUTH_TOKEN=secrets.token_hex(32))
        context, how = ray.init("local", include_dashboard=False, **quiet), "started"
    print(f"{how} the Ray cluster at {context.address_info['gcs_address']}", flush=True)
    return ray.cluster_resources().get("GPU", 0) > 0


def run(cfg, argv):
    """Everything between good settings, which `argv` gave, and the exported networks. Returns the exit code."""
    data = {path: load_questions(path) for path in [*cfg.train_data, *cfg.eval_data]}
    cfg.model = local_model(cfg.model, "model")
    cfg.critic_model = local_model(cfg.critic_model, "critic_model") if cfg.critic_model else cfg.model
    log = Log(cfg)
    try:
        tasks = read_tasks(cfg, data, log)
        workers = Workers(cfg, log, on_gpu=start_ray())
        if workers.on_gpu and not cfg.eval_only:
            models = f"--model={cfg.model}", f"--critic_model={cfg.critic_model}"
            command = [sys.executable, ROOT / "plan.py", *argv, *models]
            if (judged := subprocess.run(command, capture_output=True, text=True)).returncode == 2:
                raise UserError(judged.stderr.strip().removeprefix("error: "))
        end, code = "done", 0
        try:
            workers.start()
            log.cut(workers.step)
            learn = f"{workers.num_parameters:,} parameters learn, from step {workers.step + 1}"
            log.say(f"{log.dir}: {cfg.model} on {cfg.workers} workers, {learn}")
            train(cfg, workers, tasks, log)
        except Stopped as stopped:
            end = f"stopped by {stopped} after step {workers.step}, to go on with the same command"
            code = 128 + signal.Signals[str(stopped)]
        workers.save()
        workers.export(tasks.tokenizer)
        log.say(f"{end}: {', '.join(sorted(os.listdir(log.dir)))} in {log.dir}; another --name starts anew")
        return code
    except UserError:
        log.discard()
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # what a Worker raised, without Ray's wrapping
        (log.dir / "error.txt").write_text("".join(traceback.format_exception(error)))
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:600]  # of a death Ray names the node
        log.say(f"error: {reason} (see {log.dir}/error.txt)")
        return os.EX_TEMPFAIL if isinstance(error, TimeoutError) or "Actor" in type(error).__name__ else 1
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def start_again(cfg):
    """After a death: this command anew in this process, from the newest checkpoint. Never twice from the same one."""
    failed_at, step = os.environ.get("FAILED_AT", "").split(), max(checkpoints(cfg), default=0)
    if str(step) not in failed_at and len(failed_at) < cfg.max_restarts:
        print(f"restart {len(failed_at) + 1} of {cfg.max_restarts}, from step {step}", flush=True)
        os.environ["FAILED_AT"] = " ".join([*failed_at, str(step)])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv):
    try:
        cfg = load(argv)
        if cfg.dry_run:
            return subprocess.call([sys.executable, ROOT / "plan.py", *argv])
        if (code := run(cfg, argv)) == os.EX_TEMPFAIL:
            start_again(cfg)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step; from then on Workers.stop takes it
        print("stopped before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
