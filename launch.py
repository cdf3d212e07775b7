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
import signal
import socket
import subprocess
import sys
import traceback

import numpy as np

from configs.load import ROOT, UserError, load
from data.load import load_questions, local_model, read_tasks, step_questions
from log import Log
from reward import extract_answer
from workers import Stopped, Workers, checkpoints, rng_for


def train(cfg, workers, tasks, log):
    """The algorithm, in the order in which things happen, from the step that `workers` have reached."""
    import packing
    import ppo

    if cfg.eval_every > 0 and workers.step == 0:
        log.step({"step": 0, "eval": evaluate(cfg, workers, tasks, log, step=0)} | workers.timings())

    for step in range(workers.step + 1, cfg.steps + 1):
        # Generate: samples_per_prompt responses to each of this step's questions, graded as they finish.
        chosen = step_questions(len(tasks.train), cfg.prompts_per_step, cfg.seed, step - 1)
        prompts = [tasks.train[i] for i in chosen]
        samples = workers.generate("generate", prompts, cfg.samples_per_prompt, step)

        # Pack: whole sequences into bins of max_tokens_per_pack tokens, the same work on every rank.
        batch = packing.Batch(samples)
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
    import packing

    plans, order = [], rng_for(cfg.seed, step, purpose).permutation(len(batch.lengths))
    for part in np.array_split(order, num_updates):
        bundles, sizes = packing.bundle(batch, part, cfg.max_tokens_per_pack // 8)
        plan = packing.pack(sizes, cfg.max_tokens_per_pack, cfg.workers, hidden_size)
        plans.append([[[i for b in local for i in bundles[b]] for local in packs] for packs in plan])
    return plans


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
            command = [sys.executable, ROOT / "tools/plan.py", *argv, *models]
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
            return subprocess.call([sys.executable, ROOT / "tools/plan.py", *argv])
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
