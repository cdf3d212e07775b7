"""The rollout: vLLM as a library inside the Worker's process: generate, sleep, wake, take new weights.

In:   prompts as token ids, and the policy's weights as an iterator of (Hugging Face name, tensor).
Out:  finished responses one by one: token ids as sampled, their log-probs, text, finish reason.

    asleep ── wake("weights") ── load_weights ── wake("kv_cache") ── generate … generate ── sleep ── (training) ── asleep

vLLM joins the torch.distributed world that the Worker has made (executor "external_launcher"): ranks 0…tp−1 are the
first engine, the next tp the second. Every rank of such a group holds a scheduler of its own and must make the same
calls with the same prompts and the same seed. Every vLLM call of this project is in this file.
"""

import contextlib
import gc
import glob
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.load import context_tokens


@dataclass
class Response:
    """One finished response."""

    index: int  # of its prompt in the request
    token_ids: np.ndarray  # int32, as sampled
    logprobs: np.ndarray  # fp32, one for each token
    text: str
    finish_reason: str  # "stop": it ended by itself; "length": it was cut off


class SyncError(Exception):
    """The engine does not hold the weights it was sent."""


class Rollout:
    def __init__(self, cfg, path, dtype, device):
        """An engine over cfg.tensor_parallel ranks, with the weights of the Hugging Face folder `path`."""
        from vllm import LLM

        self.cfg, self.on_gpu = cfg, device.type == "cuda"
        self.readable = self.on_gpu and cfg.tensor_parallel == 1
        self.interrupted = False  # set from another thread when the run is to end
        gc.freeze()  # vLLM collects garbage often while it starts; this excludes all objects that exist already.
        with plain_path(path) as folder:
            self.llm = LLM(
                folder,
                dtype=str(dtype).removeprefix("torch."),
                trust_remote_code=cfg.trust_remote_code,
                tensor_parallel_size=cfg.tensor_parallel,
                distributed_executor_backend="external_launcher",
                max_model_len=context_tokens(cfg),
                max_num_seqs=cfg.max_num_seqs,
                max_num_batched_tokens=cfg.max_num_batched_tokens,
                gpu_memory_utilization=cfg.gpu_memory_utilization,
                kv_cache_memory_bytes=None if self.on_gpu else 2**29,  # None: what that share leaves
                enable_prefix_caching=True,  # one prefill for all samples of a prompt, in whole blocks of tokens
                block_size=None if self.on_gpu else 32,  # vLLM's default is 16 on a GPU, but 128 on a CPU.
                enable_sleep_mode=self.on_gpu,
                enforce_eager=not self.on_gpu,  # CUDA graphs on a GPU
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after the temperature
                generation_config="vllm",  # else the folder's sampling defaults would silently change the policy
            )
        self.engine = self.llm.llm_engine
        self.end_tokens = end_tokens(path)
        self.model = self.llm.apply_model(lambda model: model)[0]

    def generate(self, requests, seed, temperature, top_p, max_tokens):
        """Sample one response of at most max_tokens for each prompt of `requests` (lists of token ids).

        All ranks of an engine call this together. Yields a Response as each one ends, while others go on.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM samples by torch's generator on a CPU; on a GPU it draws a seed for each request from numpy's.
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.llm.reset_prefix_cache()  # It holds states of older weights, and a resumed run would not have it.
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=-1,
            max_tokens=max_tokens,
            stop=list(self.cfg.stop),
            include_stop_str_in_output=True,
            stop_token_ids=self.end_tokens,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,  # arrays, not an object per token
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for index, prompt_ids in enumerate(requests):
            self.engine.add_request(str(index), {"prompt_token_ids": prompt_ids}, params)
        for state in self.engine.output_processor.request_states.values():
            state.logprobs_processor.tokenizer = None  # Nobody reads the token's text beside each log-prob.
        while self.engine.has_unfinished_requests() and not self.interrupted:
            for output in self.engine.step():
                finished = output.outputs[0]
                token_ids = np.array(finished.token_ids, np.int32)
                logprobs = np.array(finished.logprobs.logprobs[: len(token_ids)], np.float32)
                yield Response(
                    int(output.request_id), token_ids, logprobs, finished.text, finished.finish_reason
                )

    def load_weights(self, weights):
        """Replace all weights by `weights`, an iterator of (Hugging Face name, whole tensor).

        Raises SyncError unless every tensor was taken, every parameter written and, where they can be read back
        as they were sent (one GPU an engine; CPU kernels repack them), their checksums agree.
        """
        written, sent = set(), []

        def counted():
            for name, tensor in weights:
                sent.append(checksum(tensor) if self.readable else name)
                yield name, tensor

        def load(iterator):
            written.update(type(self.model).load_weights(self.model, iterator))
            return written

        # The wrapper stays until the next sync. reload_weights alone only warns about parameters that are not written.
        self.model.load_weights = load
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": counted()})
        if not self.on_gpu and self.model.config.tie_word_embeddings and hasattr(self.model, "lm_head"):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            # On CPU vLLM packs matrices for its kernels; a head tied to the embedding keeps its old copy after a reload.
            dispatch_cpu_unquantized_gemm(self.model.lm_head, False)
        missing = {name for name, _ in self.model.named_parameters()} - written
        if missing or not sent:
            raise SyncError(f"the weight sync sent {len(sent)} tensors and left unwritten: {sorted(missing)}")
        if self.readable:
            held = sum(checksum(parameter) for parameter in self.model.parameters())
            if held != sum(sent):
                raise SyncError(f"vLLM holds other weights than were sent: checksum {held} for {sum(sent)}")

    def sleep(self):
        if self.on_gpu:
            self.llm.sleep(level=2)  # weights and KV cache are dropped; the next sync brings new weights

    def wake(self, what):
        """Take back the GPU memory of "weights" or "kv_cache"."""
        if self.on_gpu:
            self.llm.wake_up(tags=[what])


@contextlib.contextmanager
def plain_path(path):
    """The path, or a link to it if it has brackets: vLLM would read them as a glob pattern and find no file."""
    if glob.escape(path) == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(path), f"{folder}/model")
        yield f"{folder}/model"


def checksum(tensor):
    """The sum of a tensor's bits read as 64-bit integers, modulo 2^64; as bytes if its length is no multiple of 8.

    Merging tensors or padding them with zeros keeps the sum. Transposing one, as vLLM does with GPT-2's, does not:
    load_weights then raises SyncError. The sum is exact and reads each weight once; a sum in fp64 would first copy 16-bit
    weights into fp64.
    """
    # A view as int64 needs a storage offset of whole 64-bit integers; a copy's offset is 0.
    flat = tensor.flatten() if tensor.storage_offset() % 8 == 0 else tensor.clone().flatten()
    return flat.view(torch.int64 if len(flat) % 8 == 0 else torch.uint8).sum()


def end_tokens(path):
    """All end tokens that a model folder names. With its sampling defaults switched off vLLM knows only one."""
    files = [Path(path) / name for name in ("config.json", "generation_config.json")]
    named = [json.loads(file.read_text()).get("eos_token_id") for file in files if file.exists()]
    tokens = (token for ids in named for token in np.atleast_1d(ids).tolist())
    return sorted({*tokens} - {None})
