"""The run: settings, Ray, the training loop, evaluation, and the ways in which a run ends.

    python launch.py configs/tiny.py [--key=value …]

This file is the single controller: plain sequential Python that says what happens in which order and records it. The
networks are in the Workers, one process per GPU (workers.py), and each call of a method of `workers` runs on all of them.

    settings ─► questions ─► Ray, Workers ─► train: generate ─► values ─► advantages ─► critic ─► policy ─► sync ─┐
                                                       ▲                                                         │
                                                       └──────────────── evaluate, log, save ◄───────────────────┘

In:   a config.   Out: runs/NAME/ with metrics.jsonl, curves.png, report.html, tensorboard/, samples/, tokens/, logs/,
                       checkpoints/, policy/ and critic/.
torch, Ray and vLLM are imported only after the settings and the data have been checked.
"""

import contextlib
import os
import secrets
import socket
import sys
import traceback
from collections import Counter

import numpy as np

from configs.load import (
    ROOT,
    UserError,
    check_has_questions,
    has_critic,
    has_reference,
    load,
    updates_per_step,
    without_effect,
)
from data import prepare
from data.content import run_content
from data.load import (
    check_references,
    load_questions,
    read_tasks,
    report_overlap,
    step_questions,
    task_questions,
)
from data.models import local_model
from log import Log, outlive_terminal
from reward import REFLECTION, Grader, extract_answer, task_file
from token_record import record_evaluation, record_step
from tools import plan
from workers import (
    Cluster,
    PhaseTimeout,
    Stopped,
    StopRequest,
    WorkerGroup,
    newest_whole_checkpoint,
    rng_for,
)

# Ray listens on every address of this machine; a token keeps others out. Ray reads this variable when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# ---- The algorithm -----------------------------------------------------------------------------------------------


def train(cfg, workers, tasks, log):
    """The algorithm, in the order in which things happen, from the step that `workers` have reached."""
    import ppo
    from packing import Batch, plan_samples, plan_updates

    if cfg.eval_every > 0 and workers.step == 0:
        log.step({"step": 0, "eval": evaluate(cfg, workers, tasks, log, step=0)} | workers.take_seconds())
        log.report()

    for step in range(workers.step + 1, cfg.steps + 1):
        # Generate: samples_per_prompt responses to each of this step's prompts, graded as they finish.
        chosen = step_questions(len(tasks.train), cfg.prompts_per_step, cfg.seed, step - 1)
        prompts = [tasks.train[i] for i in chosen]
        samples = workers.generate(prompts, cfg.samples_per_prompt, step)

        # Pack: whole samples laid end to end, the same work on every rank.
        batch = Batch(samples)
        everything = range(len(samples))
        forward_plan = plan_samples(batch, everything, cfg, tasks.hidden_size)

        # Log-probs of the policy before its updates and of the reference model, where a setting needs them.
        if cfg.kl_coef or updates_per_step(cfg, "policy") > 1:
            batch.old_logprobs = workers.old_logprobs(batch, forward_plan)
        if has_reference(cfg):
            batch.ref_logprobs = workers.ref_logprobs(batch, forward_plan)

        # Values: one forward pass of the critic, V_old(s_t) for every response token.
        if has_critic(cfg):
            batch.values = workers.values(batch, forward_plan)

        # Advantages: GAE per response, normalised over all tokens of the batch.
        metrics = ppo.set_advantages(batch, cfg)

        # Critic: every sample once, split at random into critic_updates_per_step updates.
        if has_critic(cfg):
            rng, num_updates = rng_for(cfg.seed, step, "critic"), cfg.critic_updates_per_step
            plans = plan_updates(batch, everything, num_updates, rng, cfg, tasks.hidden_size)
            metrics |= workers.update("critic", batch, plans)

        # Record: some responses token by token, as the policy sees them before its update.
        if cfg.report_samples > 0:
            record_step(cfg, workers, tasks, log, step, prompts, samples, batch)

        # Policy: one update on all samples, strictly on-policy; with more updates each takes a part.
        metrics |= update_policy(cfg, workers, batch, step, tasks.hidden_size)

        # Sync: send the new policy to vLLM, bucket by bucket, and check that all of it has arrived.
        workers.sync()

        # Log, evaluate, save.
        metrics |= response_metrics(samples) | group_metrics(batch, cfg.samples_per_prompt)
        metrics["epoch"] = step * cfg.prompts_per_step / len(tasks.train)
        metrics["tokens"] = int(batch.lengths.sum())
        metrics["tokens_per_second"] = metrics["tokens"] / sum(workers.seconds.values())
        if cfg.eval_every > 0 and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics["eval"] = evaluate(cfg, workers, tasks, log, step)
        log.step({"step": step} | metrics | workers.take_seconds())
        if cfg.samples_every > 0 and step % cfg.samples_every == 0:
            log.lines(f"step_{step}", [sample.line for sample in samples])
        if "eval" in metrics:
            log.curves()
            log.report()
        workers.finish_step()
        if step == cfg.steps or (cfg.save_every > 0 and step % cfg.save_every == 0):
            workers.save()
        if workers.stop_request.signal:
            raise Stopped


def update_policy(cfg, workers, batch, step, hidden_size):
    """The policy's updates of one step, on the samples that no setting leaves out. Returns metrics."""
    import ppo
    from packing import plan_samples, plan_updates

    kept = ppo.policy_samples(batch, cfg)
    # With one policy update a step the ratio is always 1, and these three metrics do not exist.
    metrics = {"clipfrac_low": None, "clipfrac_high": None, "approx_kl": None}
    metrics["policy_samples"] = len(kept) / len(batch.lengths)
    if step > cfg.critic_warmup_steps and len(kept) >= cfg.policy_updates_per_step:
        rng = rng_for(cfg.seed, step, "policy")
        plans = plan_updates(batch, kept, cfg.policy_updates_per_step, rng, cfg, hidden_size)
        few_samples = rng.permutation(len(batch.lengths))[: 2 * cfg.workers].tolist()
        kl_plan = plan_samples(batch, few_samples, cfg, hidden_size)
        metrics |= workers.update("policy", batch, plans, kl_plan)
    if cfg.update_ref_every and has_reference(cfg) and step % cfg.update_ref_every == 0:
        workers.update_reference()
    return metrics


def mean(values):
    """The mean, or None if there are no values."""
    values = list(values)
    return float(np.mean(values)) if values else None


# Outcomes where no answer was compared with the reference, or where a task file failed; their shares are metrics.
UNGRADED = ("cut_off", "no_answer", "refused", "timed_out", "backstop", "crashed", "task_error")


def response_metrics(samples):
    """Rewards, lengths and other statistics of the responses. A length is None where there is no such response."""
    right = [len(sample.response_ids) for sample in samples if sample.correct]
    wrong = [len(sample.response_ids) for sample in samples if not sample.correct]
    rewards = [sample.reward for sample in samples]
    metrics = {
        "reward": mean(rewards),
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "accuracy": mean(sample.correct for sample in samples),
    }
    all_lengths = {
        "response_tokens": right + wrong,
        "response_tokens_right": right,
        "response_tokens_wrong": wrong,
    }
    for name, lengths in all_lengths.items():
        metrics[name] = mean(lengths)
        metrics[f"{name}_std"] = float(np.std(lengths)) if lengths else None
    metrics |= reflection_metrics(samples)
    for name in samples[0].stats:
        metrics[name] = mean(sample.stats[name] for sample in samples)
    for outcome in UNGRADED:
        metrics[outcome] = mean(sample.graded == outcome for sample in samples)
    return metrics


def reflection_metrics(samples):
    """Mean count of reflection patterns, and mean length of the right responses with any (ORZ's paper, Figure 4)."""
    counts, lengths = [], []
    for sample in samples:
        count = sum(sample.stats.get(word, 0.0) for word in REFLECTION)
        counts.append(count)
        if sample.correct and count > 0:
            lengths.append(len(sample.response_ids))
    return {"reflection": mean(counts), "response_tokens_right_reflecting": mean(lengths)}


def group_metrics(batch, group_size):
    """The share of questions with at least one right response, and of those whose responses all have the same reward."""
    correct = batch.correct.reshape(-1, group_size)  # [prompts, G]
    rewards = batch.rewards.reshape(-1, group_size)
    is_equal = rewards.min(axis=1) == rewards.max(axis=1)  # [prompts]
    return {"pass_at_n": mean(correct.any(axis=1)), "equal_groups": mean(is_equal)}


def evaluate(cfg, workers, tasks, log, step):
    """Sample eval_samples responses to every held-out question. Returns {data set: metrics}, and the mean of several
    data sets as "overall"."""
    results = {}
    for name, prompts in tasks.eval.items():
        samples = workers.evaluate(prompts, cfg.eval_samples, step)
        scores, records = [], []
        for i, prompt in enumerate(prompts):
            group = samples[i * cfg.eval_samples : (i + 1) * cfg.eval_samples]
            scores.append(question_scores(group))
            records.append(prompt.question._asdict() | scores[-1])
            if i < 2:
                log.show(prompt.question, group[0])
        log.lines(f"eval_{name}_{step}", [sample.line for sample in samples])
        log.lines(f"eval_{name}_{step}_questions", records)
        if cfg.report_samples > 0:
            record_evaluation(cfg, tasks, log, name, step, samples)
        means = {key: mean(score[key] for score in scores) for key in scores[0]}
        deviation = np.std([score["accuracy"] for score in scores])
        means["accuracy_stderr"] = float(deviation / max(1, len(prompts) - 1) ** 0.5)
        results[name] = response_metrics(samples) | means
    if len(results) > 1:
        results["overall"] = {key: mean(result[key] for result in results.values()) for key in scores[0]}
    return results


def question_scores(group):
    """The scores of one held-out question, from its k responses. accuracy is avg@k."""
    return {
        "accuracy": mean(sample.correct for sample in group),
        "response_tokens": mean(len(sample.response_ids) for sample in group),
        "cut_off": mean(sample.finish_reason == "length" for sample in group),
        "pass_at_k": float(any(sample.correct for sample in group)),
        "majority_at_k": float(majority_is_correct(group)),
    }


def majority_is_correct(group):
    """Whether the most frequent answer is right; answers are counted as strings. Responses without one do not vote."""
    answers = [extract_answer(sample.text) for sample in group]
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return False
    winner = max(votes, key=votes.get)  # the first of several equally frequent answers
    return any(sample.correct for sample, answer in zip(group, answers) if answer == winner)


# ---- The run -----------------------------------------------------------------------------------------------------


QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def start_ray(log):
    """Join the Ray cluster that RAY_ADDRESS names or that runs on this machine, else start one. Returns a Cluster."""
    import ray

    for path in (sys.executable, str(ROOT)):
        if " " in path:
            raise UserError(
                f"Ray cannot start processes where a path has a space: move the project from {path!r}"
            )
    address = os.environ.get("RAY_ADDRESS", "auto")
    # Ray puts the current folder first on a Worker's path, and a reward.py there would be imported in place of ours.
    with contextlib.chdir(ROOT):
        context = None if address == "local" else join_cluster(address)
        how = "joined"
        if context is None:
            how, context = "started", start_cluster()
    log.say(f"{how} the Ray cluster at {context.address_info['gcs_address']}")
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return Cluster(has_gpus, context.address_info["session_dir"])


def join_cluster(address):
    """Join a running Ray cluster. Returns Ray's context, or None if the address is "auto" and no cluster runs on this
    machine. Raises UserError where joining fails."""
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address} is Ray's client port: run this on a node of the cluster, with RAY_ADDRESS=auto"
        )
    try:
        if ":" in address:  # Where nobody listens Ray would wait for minutes and then end this process.
            socket.create_connection(address.rsplit(":", 1), timeout=10).close()
        return ray.init(address, **QUIET)
    except Exception as error:
        if address == "auto" and isinstance(error, ConnectionError):
            return None
        reason = str(error).splitlines()[0]
        if "token" in reason.lower():  # Ray has other words for a missing token than for a wrong one.
            reason = "its token is not this run's: start the cluster with RAY_AUTH_MODE=token RAY_AUTH_TOKEN=… and set the"
            reason += " same two variables here, or set RAY_AUTH_MODE=disabled in both places"
        raise UserError(
            f"cannot join the Ray cluster at {address!r}: {reason}; RAY_ADDRESS=local starts a new one"
        ) from error


def start_cluster():
    """Start a Ray cluster of this run's own, with a token of its own."""
    import ray

    os.environ["RAY_ADDRESS"] = "local"  # After a restart the run starts a cluster of its own again.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return ray.init("local", include_dashboard=False, **QUIET)


def run(cfg, argv):
    """Load the data, make the run's folder, and run with restarts. `argv` are the arguments that gave the settings.
    Returns the exit code."""
    # A task file that cannot be loaded, and data that cannot be read, end the run before it has begun.
    grader = Grader(2, task_file(cfg, cfg.task))
    has_own_questions = "questions" in grader.task_functions
    if has_own_questions:
        cfg.train_data = cfg.eval_data = []
    else:
        data = load_data(cfg)
    cfg.model = local_model(cfg.model, "model")
    cfg.critic_model = local_model(cfg.critic_model, "critic_model") if cfg.critic_model else cfg.model
    cfg.content = run_content(cfg)
    log = Log(cfg)
    try:
        if cfg.wandb:
            log.check_wandb()
        if has_own_questions:
            folder = log.dir / "questions"
            cfg.train_data = [] if cfg.eval_only else task_questions(grader, "train", folder)
            cfg.eval_data = task_questions(grader, "eval", folder)
            data = load_data(cfg)
        if "is_correct" not in grader.task_functions:
            check_references(data, grader, log.say)
        del grader  # Its processes end, with all that the task file has loaded.
        report_overlap(cfg, data, log.say)
        tasks = read_tasks(cfg, data, log)
        return run_with_restarts(cfg, argv, tasks, log)
    except UserError:
        log.discard()
        raise
    except Exception as error:
        report(error, log)
        return 1


def load_data(cfg):
    """Load the questions of all files: path → Questions. Those of ORZ's files that are missing are downloaded first."""
    check_has_questions(cfg)
    cfg.train_data = [prepare.fetched(path) for path in cfg.train_data]
    cfg.eval_data = [prepare.fetched(path) for path in cfg.eval_data]
    return {path: load_questions(path) for path in [*cfg.train_data, *cfg.eval_data]}


def run_with_restarts(cfg, argv, tasks, log):
    """Run, and run again from the newest checkpoint after the death of a Worker or a time limit. Returns the exit code."""
    stop_request = StopRequest()
    failed_steps = []  # the step of the newest checkpoint at each death
    while True:
        try:
            return run_once(cfg, argv, tasks, log, stop_request)
        except deaths() as error:
            report(error, log)
            step = newest_whole_checkpoint(cfg, log)
            # The signal that asks this process to end may have killed the Workers, too.
            if stop_request.signal or not may_restart(failed_steps, step, cfg.max_restarts):
                return os.EX_TEMPFAIL
            failed_steps.append(step)
            log.say(f"restart {len(failed_steps)} of {cfg.max_restarts}, from step {step}")


def deaths():
    """The exceptions that say that a Worker died or hangs. Ray itself kills a Worker where its node runs out of memory."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    return RayActorError, OutOfMemoryError, PhaseTimeout


def may_restart(failed_steps, step, max_restarts):
    """Whether the run may restart: never twice from the same step, because a death that the data causes would recur."""
    return step not in failed_steps and len(failed_steps) < max_restarts


def run_once(cfg, argv, tasks, log, stop_request):
    """Start Ray and the Workers, train, save and export. Returns the exit code."""
    import ray

    try:
        stop_request.shield_children()
        cluster = start_ray(log)
        stop_request.listen()
        workers = WorkerGroup(cfg, log, cluster, stop_request)
        workers.place()
        if cluster.has_gpus and not cfg.eval_only:
            plan.check_fits(cfg, cfg.gpu_memory or workers.gpu_memory())
        workers.start()
        log.start(workers.step, workers.num_parameters, tasks)
        for line in without_effect(cfg):
            log.say(line)
        ending, code = "done", 0
        try:
            train(cfg, workers, tasks, log)
        except Stopped:
            ending = f"stopped by {stop_request.signal.name}"
            code = 128 + stop_request.signal
        except deaths():
            raise
        except Exception:
            save_what_is_whole(workers, log)
            raise
        workers.save()
        workers.export(tasks.tokenizer)
        log.end(ending, workers.step, argv)
        return code
    finally:
        ray.shutdown()


def save_what_is_whole(workers, log):
    """After an exception: save a checkpoint of the last step whose updates are complete, if the learners' weights are
    still those of that step."""
    if workers.networks_step is None:
        log.say("the networks are not saved: the updates of a step were not finished", bold=True)
        return
    try:
        workers.save()
        log.say(f"the networks of step {workers.networks_step} are saved", bold=True)
    except Exception as error:
        log.say(f"the networks cannot be saved: {error}", bold=True)


def report(error, log):
    """One line about an exception that ended the run; its traceback goes into error.txt."""
    with log.best_effort("error.txt"):
        (log.dir / "error.txt").write_text("".join(traceback.format_exception(error)))
    cause = getattr(error, "cause", None) or error  # what a Worker raised, without Ray's wrapping
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:600]  # Ray names a dead Worker's node.
    log.say(f"error: {reason} (see {log.dir}/error.txt)")


def main(argv):
    outlive_terminal()
    try:
        cfg = load(argv)
        if cfg.dry_run:
            print(plan.describe(cfg))
            return 0
        return run(cfg, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before StopRequest.listen(), which handles SIGINT from then on
        print("stopped before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
