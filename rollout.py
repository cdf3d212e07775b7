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
        self.interrupted = False  # set from another thread where the run is to end
        gc.freeze()  # vLLM looks for garbage again and again as it starts: not through all that has been imported
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
                kv_cache_memory_bytes=None if self.on_gpu else 2**29,  # on a GPU, what that share leaves
                enable_prefix_caching=True,  # one prefill for all samples of a prompt, by whole blocks of tokens:
                block_size=None if self.on_gpu else 32,  # of 16 on a GPU, but of 128 on a CPU if not told
                enable_sleep_mode=self.on_gpu,
                enforce_eager=not self.on_gpu,  # CUDA graphs on a GPU
                logprobs_mode="processed_logprobs",  # of the distribution sampled from: after the temperature
                generation_config="vllm",  # a model folder's own sampling defaults would change the policy silently
            )
        self.engine = self.llm.llm_engine
        self.end_tokens = end_tokens(path)
        self.model = self.llm.apply_model(lambda model: model)[0]

    def generate(self, requests, seed, temperature, top_p, max_tokens):
        """Sample one response of at most max_tokens for each prompt of `requests` (lists of token ids), engine-wide.

        Yields a Response as each one ends, while others go on.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM samples by torch's generator on a CPU; on a GPU it draws a seed for each request from numpy's.
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.llm.reset_prefix_cache()  # of older weights; and of prompts that a resumed run has not seen
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
            state.logprobs_processor.tokenizer = None  # beside each log-prob nobody reads its token's text
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

        # In place until the next sync: reload_weights only warns about what was not written; we refuse.
        self.model.load_weights = load
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": counted()})
        if not self.on_gpu and self.model.config.tie_word_embeddings and hasattr(self.model, "lm_head"):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            # On CPU vLLM packs matrices for its kernels; a head tied to the embedding keeps the old ones after a reload.
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
    """The path; or a link to it, if vLLM would take brackets in it for a pattern of names and find no file."""
    if glob.escape(path) == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(path), f"{folder}/model")
        yield f"{folder}/model"


def checksum(tensor):
    """The sum of a tensor's bits, in words of 64, modulo 2^64; of parts that are merged, or padded with zeros, the sum of
    theirs (not of one that is transposed, as vLLM does with GPT-2's: refused). It is exact and reads each weight once, where
    sums in fp64 would first copy 16-bit weights into fp64."""
    # what does not begin at a whole word cannot be seen as words: a copy does
    flat = tensor.flatten() if tensor.storage_offset() % 8 == 0 else tensor.clone().flatten()
    return flat.view(torch.int64 if len(flat) % 8 == 0 else torch.uint8).sum()


def end_tokens(path):
    """All end tokens that a model folder names. With its sampling defaults switched off vLLM knows only one."""
    files = [Path(path) / name for name in ("config.json", "generation_config.json")]
    named = [json.loads(file.read_text()).get("eos_token_id") for file in files if file.exists()]
    tokens = (token for ids in named for token in np.atleast_1d(ids).tolist())
    return sorted({*tokens} - {None})
