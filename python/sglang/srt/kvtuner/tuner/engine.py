"""One model runner of the engine, loaded once, that runs text through any cache format.

The weights and the reference cache are upstream's own, as a server without ``--enable-kvtuner-quant`` has them. Every
quantized configuration gets a packed pool and the attention backend that a server with the flag has, on the same
weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.config.flags import DEFAULT_PAGE_SIZE, KVTunerConfigError
from sglang.srt.kvtuner.tuner.errors import TuningError


@dataclass(frozen=True)
class EngineSettings:
    """What to load and how text goes through it.

    model: checkpoint folder or Hugging Face name. batch: windows per forward step. window: tokens of a window. chunk:
    tokens of a window per forward step; a step's own tokens are seen in full precision, as in a server's chunked
    prefill. stride: every how many positions one is scored. page_size: tokens of a page. flags: further server flags
    (``--dtype`` …). Raises TuningError for sizes that do not fit one another.
    """

    model: str
    batch: int = 4
    window: int = 512
    chunk: int = 128
    stride: int = 4
    page_size: int = DEFAULT_PAGE_SIZE
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk % self.page_size:
            raise TuningError(f"--chunk is {self.chunk}; valid are multiples of --page-size {self.page_size}")
        if self.window % self.chunk or self.window < 2 * self.chunk:
            raise TuningError(
                f"--window is {self.window}; valid are multiples of --chunk {self.chunk} from {2 * self.chunk} on, "
                "since nothing is read from packed pages before the second chunk"
            )
        if self.batch < 1:
            raise TuningError(f"--batch is {self.batch}; valid are 1 and above")
        if not 1 <= self.stride <= self.chunk:
            raise TuningError(f"--stride is {self.stride}; valid are 1 to --chunk {self.chunk}")

    def server_args(self) -> list[str]:
        """The command line of a server that holds one batch."""
        return [
            *("--model-path", self.model),
            *("--page-size", str(self.page_size)),
            *("--max-total-tokens", str(self.batch * self.window + self.page_size)),
            *("--max-running-requests", str(self.batch)),
            *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
            *("--log-level", "error"),
            *self.flags,
        ]


class TunerEngine:
    """A model runner with exchangeable caches, in this process.

    num_layers, head_dim, kv_heads, full_precision_bytes (of a cache element): the model's. Raises KVTunerConfigError
    for a model that the quantized cache does not support, TuningError for one that cannot be loaded or spans several
    devices.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._runner, self.tokenizer = _load(settings)
        config = self._runner.model_config
        self.num_layers = config.num_hidden_layers
        self.head_dim = config.head_dim
        self.kv_heads = config.get_num_kv_heads(1)
        self.device = self._runner.device
        self.full_precision_bytes = self._runner.token_to_kv_pool.dtype.itemsize
        if settings.window > config.context_len:
            raise TuningError(f"--window is {settings.window}; the model's context holds {config.context_len} tokens")
        needed, room = settings.batch * settings.window, self._runner.max_total_num_tokens
        if room < needed:
            raise TuningError(
                f"--batch is {settings.batch}; its windows have {needed} tokens, and memory or --max-total-tokens after "
                f"-- leaves the unquantized cache {room}. Give a smaller batch, shorter windows, or more room"
            )
        self._reference = (self._runner.token_to_kv_pool, self._runner.attn_backend)
        self._head: tuple[Any, torch.Tensor, Any] | None = None
        processor = _logits_processor(self._runner.model)
        processor.register_forward_pre_hook(self._keep_hidden_states, with_kwargs=True)
        self._lay_out_requests()

    def reference_logits(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """As :meth:`quantized_logits`, with upstream's unquantized cache."""
        return self._logits(windows, *self._reference)

    def quantized_logits(self, windows: torch.Tensor, cache_format: CacheFormat) -> Iterator[torch.Tensor]:
        """Logits at the scored positions, float32 [positions, vocabulary] per chunk but the first.

        windows: int64 [batch, window]. See :meth:`scored_columns` for the positions.
        """
        return self._logits(windows, *self._packed_cache(cache_format))

    def probe(self, windows: torch.Tensor, observe: Callable[..., torch.Tensor]) -> None:
        """Run windows unquantized, each in one step, with ``observe(q, k, v, layer_id, scaling)`` as the attention.

        q: [batch, window, heads, head_dim]; k, v: [batch, window, kv_heads, head_dim]. It returns the attention output
        in the shape of q.
        """
        self._step(windows, 0, windows.shape[1], self._reference[0], _probe_backend(observe, len(windows)))

    def scored_columns(self) -> list[list[int]]:
        """Per chunk but the first, the positions in it whose next-token prediction is scored."""
        s = self.settings
        return [
            [c for c in range(begin, begin + s.chunk) if (c + 1) % s.stride == 0 and c + 1 < s.window]
            for begin in range(s.chunk, s.window, s.chunk)
        ]

    def _packed_cache(self, cache_format: CacheFormat) -> tuple[Any, Any]:
        from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
        from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool

        runner = self._runner
        pool = KVTunerTokenToKVPool(
            cache_format,
            size=self.settings.batch * self.settings.window,
            num_slots=runner.req_to_token_pool.req_to_token.shape[0],
            kv_heads=self.kv_heads,
            full_precision_dtype=self._reference[0].dtype,
            device=runner.device,
            start_layer=0,
            end_layer=self.num_layers,
        )
        backend = KVTunerAttnBackend(
            SimpleNamespace(token_to_kv_pool=pool, model=runner.model, req_to_token_pool=runner.req_to_token_pool)
        )
        return pool, backend

    def _logits(self, windows: torch.Tensor, pool: Any, backend: Any) -> Iterator[torch.Tensor]:
        s = self.settings
        self._runner.req_to_token_pool.req_generation += 1  # rings of another run are no part of this one
        for begin in range(0, s.window, s.chunk):
            self._step(windows, begin, s.chunk, pool, backend)
            if begin:
                columns = torch.tensor(self.scored_columns()[begin // s.chunk - 1]) - begin
                rows = (torch.arange(len(windows))[:, None] * s.chunk + columns).flatten()
                yield self._logits_of(rows)

    @torch.no_grad()
    def _logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        processor, hidden, lm_head, metadata = self._head
        return processor._get_logits(hidden[rows.to(hidden.device)], lm_head, metadata, use_logits_buffer=False).float()

    @torch.no_grad()
    def _step(self, windows: torch.Tensor, begin: int, count: int, pool: Any, backend: Any) -> None:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

        runner, batch, device = self._runner, len(windows), self._runner.device
        slots = torch.arange(1, batch + 1)
        end = begin + count
        lengths = torch.full((batch,), end)

        def per_request(value: int, dtype=torch.int32) -> torch.Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=batch,
            input_ids=windows[:, begin:end].flatten().to(device),
            req_pool_indices=slots.to(device),
            req_pool_indices_cpu=slots,
            seq_lens=lengths.to(device),
            seq_lens_cpu=lengths,
            seq_lens_sum=batch * end,
            orig_seq_lens=per_request(end),
            out_cache_loc=runner.req_to_token_pool.req_to_token[1 : batch + 1, begin:end].flatten().long(),
            positions=torch.arange(begin, end, device=device).repeat(batch),
            extend_num_tokens=batch * count,
            extend_seq_lens=per_request(count),
            extend_seq_lens_cpu=[count] * batch,
            extend_prefix_lens=per_request(begin),
            extend_prefix_lens_cpu=[begin] * batch,
            extend_start_loc=torch.arange(0, batch * count, count, dtype=torch.int32, device=device),
            extend_logprob_start_lens_cpu=[count] * batch,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            global_num_token_non_padded_cpu=batch * count,
        )
        runner.token_to_kv_pool, runner.attn_backend = pool, backend
        runner.forward(forward_batch)

    def _keep_hidden_states(self, processor: Any, args: tuple, kwargs: dict) -> None:
        # Upstream computes logits of each request's last token alone; these are what all others are computed from.
        names = ("input_ids", "hidden_states", "lm_head", "logits_metadata")
        given = {**dict(zip(names, args)), **kwargs}
        self._head = (processor, given["hidden_states"], given["lm_head"], given["logits_metadata"])

    def _lay_out_requests(self) -> None:
        s, table = self.settings, self._runner.req_to_token_pool.req_to_token
        tokens = torch.arange(s.batch * s.window, dtype=table.dtype, device=table.device) + s.page_size  # page 0 pads
        table[1 : s.batch + 1, : s.window] = tokens.view(s.batch, s.window)


def _load(settings: EngineSettings) -> tuple[Any, Any]:
    from sglang.benchmark import one_batch
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.kvtuner.config.compatibility import refuse_unsupported_device, refuse_unsupported_model
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs, prepare_server_args

    args = prepare_server_args(settings.server_args())
    _refuse_contradictions(args, settings)
    if args.tp_size != 1 or args.pp_size != 1:
        raise TuningError(f"--tp-size is {args.tp_size} and --pp-size {args.pp_size}; the tuner runs on one device")
    try:
        args.resolve_once()
        model_config = model_config_of(args)
    except KVTunerConfigError:
        raise
    except (OSError, ValueError) as error:
        raise TuningError(f"--model-path {args.model_path}: cannot be loaded: {error}") from error
    refuse_unsupported_device(args.resolved_dict()["device"])
    refuse_unsupported_model(model_config)
    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
    publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    with contextlib.redirect_stdout(sys.stderr):  # it prints; standard output is for results
        wrapped, tokenizer = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return wrapped.torch_runner, tokenizer


def _refuse_contradictions(args: Any, settings: EngineSettings) -> None:
    """The tuner's own options do not hold where server flags have the last word."""
    if args.enable_kvtuner_quant:
        raise TuningError(
            "--enable-kvtuner-quant stands after --; the tuner turns the cache on itself, for what it compares with the "
            "unquantized one. Give --kvtuner-* flags before --"
        )
    for flag, given, own in (
        ("--model-path", args.model_path, settings.model),
        ("--page-size", args.page_size, settings.page_size),
    ):
        if given != own:
            raise TuningError(f"{flag} is {given} after -- and {own} before; give it before -- alone")


def _logits_processor(model: torch.nn.Module) -> torch.nn.Module:
    from sglang.srt.layers.logits_processor import LogitsProcessor

    found = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    if len(found) != 1:
        raise TuningError(f"{type(model).__name__} has {len(found)} logits processors; the tuner needs exactly one")
    return found[0]


def _probe_backend(observe: Callable[..., torch.Tensor], batch: int) -> Any:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    class ProbeBackend(AttentionBackend):
        """Hands every layer's queries, keys and values to ``observe`` and keeps no cache."""

        def init_forward_metadata(self, forward_batch) -> None:
            pass

        def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
            def by_window(x: torch.Tensor, heads: int) -> torch.Tensor:
                return x.reshape(batch, -1, heads, layer.head_dim)

            out = observe(
                by_window(q, layer.tp_q_head_num),
                by_window(k, layer.tp_k_head_num),
                by_window(v, layer.tp_v_head_num),
                layer.layer_id,
                layer.scaling,
            )
            return out.reshape(-1, layer.tp_q_head_num * layer.head_dim).to(q.dtype)

    return ProbeBackend()
