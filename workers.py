"""One GPU (Worker: the learners and vLLM take turns on it) and all of them (WorkerGroup), driven from launch.py."""


def fits_beside_vllm(cfg, num_learned, free, total):
    """Returns whether the learners' states can stay on the GPU while vLLM is awake; else they wait in CPU memory.

    num_learned: parameters of all networks that learn; each Worker holds 1 / cfg.workers of their states.
    free, total: bytes of one GPU, before vLLM starts: a reference model is loaded, no learner's state is on the GPU yet.
    The Worker asks with what its GPU reports, tools/plan.py with estimates; therefore this imports neither Ray nor torch.
    """
    # A parameter takes 4 bytes in each of fp32 weights, gradients and Adam's two averages, and up to 4 to compute with.
    states = 20 * num_learned / cfg.workers
    headroom = 4 * 2**30  # for buffers that come and go, and fragmentation
    return free - states - headroom > cfg.gpu_memory_utilization * total
