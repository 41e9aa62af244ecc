"""The vLLM connector: KvNode beside vLLM's scheduler, and the two moments at which vLLM has to know of it.

vLLM loads this module by name (`kv_connector_module_path`), out of its tree, and makes two objects of
`TandemConnector`: one for the scheduler, one for the model worker. `engine/vllm_process.py` keeps all of vLLM in one
process, so both objects, the scheduler's block pool and the KV memory are there. `_Core` is what they share.

    vllm_process -- fetch, release, connect ---------------> KvNode <-- peers (KvPeer, one-sided reads)
        |                                                     ^ |
        '---- requests, their orders --> vLLM's scheduler ----' '-- pages -> KV blocks (start_load_kv)
                                                  offer, publish

**The owner's moment** is the end of a prefill leg. `request_finished_all_groups` puts the prompt's blocks under a
lease and returns True, which makes vLLM keep them. When the lease has ended, by release, expiry or cancel,
`take_ended` says so once, and the next step reports the request as sent, once, whereupon vLLM frees the blocks. vLLM
asserts, and so dies, on a report too many; a pin is therefore a dictionary entry that the report removes. An engine
with nothing to compute is woken for it (`on_lease_ended`).

**Before that**, a prompt of several chunks is readable while it is computed: after each step that computed a part of it
the blocks that are whole are published (`publish_computed`), and the stream becomes the lease when the prompt is done.
What counts is the step's own report. vLLM's scheduler counts tokens as computed when it schedules them, and with
asynchronous scheduling it is a step ahead of the device. So what a step computes goes with it to the worker half
(`TandemMetadata.computes`) and comes back with its output (`_Computed`), which vLLM hands to `update_connector_output`
when the step is over; on a GPU an event on the step's stream is waited for there, too.
vLLM may take the blocks back meanwhile, by preempting the request or by an abort: the stream is withdrawn in the same
`schedule`, before the step that could write into them, and the reports of steps still under way are of no interest.

**The reader's moment** is the step that admits a decode leg. Its blocks have been fetched and confirmed before vLLM
heard of the request, so the connector answers `get_num_new_matched_tokens` with a *synchronous* load, which vLLM runs
in the same step, before the forward pass: staging pages are copied into the blocks just allocated, and freed. vLLM's
other way, asynchronous loads with a waiting state of their own, is where its known crashes and leaks are (an abort
while waiting holds blocks until a report that may never come; a failed report kills the core). Nothing here uses it.

What the scheduler half must get right:
- Pages are claimed for a request before vLLM is given it, and given back on exactly one of two ways: after the copy, or
  by `request_finished`, which vLLM calls once for every request, also for one aborted before it was scheduled.
- `get_num_new_matched_tokens` may be asked many times and must change nothing. After the load it answers 0, so that a
  preempted request computes its prompt again.
- vLLM wants at least one token to compute: of a prompt that is all there, the last token is left out.
- Only whole blocks are copied. How a block's bytes are packed is the attention kernel's business (on the CPU it
  depends on the instruction set, hence `isa` in the fingerprint); equal fingerprints make the bytes mean the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus
from vllm.version import __version__ as VLLM_VERSION

from kv_transfer.api import NodeLimits, OfferRefused
from kv_transfer.layout import KvLayout
from kv_transfer.node import KvNode
from kv_transfer.registry import make_transports
from kv_transfer.segments import ArenaMap
from kv_transfer.transport import ARENA, STAGING, Region
from kv_transfer.vllm_params import (
    KEY,
    ConnectorSettings,
    DecodeOrder,
    Order,
    PrefillOrder,
    PrefillReport,
    report_params,
    settings_of,
)
from trust.tls import Tls

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- what both halves share


class _Core:
    """The engine's KV memory: its node, its staging pages, and the copy from those into KV blocks."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, Any], lease_rows: int
    ) -> None:
        settings = _settings(vllm_config)
        memory = _KvMemory.find(kv_cache_config, kv_caches)
        layout = _layout(vllm_config, settings, memory)
        self.block_tokens = memory.block_tokens
        self.block_pool: BlockPool | None = None
        staging_pages = _staging_pages(settings.staging_bytes, layout, vllm_config.model_config.max_model_len)
        self._blocks, self._staging = memory.views(layout, staging_pages)
        tls = Tls(settings.tls) if settings.tls.serves else None
        self.node = KvNode(
            name=settings.name,
            incarnation=settings.incarnation,
            layout=layout,
            model=settings.model,
            secret=settings.secret,
            transports=make_transports(settings.transports, host=settings.host, tls=tls),
            host=settings.host,
            tls=tls,
            verify=settings.kv_verify,
            limits=NodeLimits(
                rows=lease_rows, blocks_per_row=-(-vllm_config.model_config.max_model_len // memory.block_tokens)
            ),
        )
        self.node.open(
            arena=memory.region(ARENA, memory.base, memory.nbytes),
            arena_map=memory.arena_map,
            staging=memory.region(STAGING, self._staging.data_ptr(), staging_pages * layout.block_bytes),
            staging_pages=staging_pages,
            on_ended=settings.on_lease_ended,
        )

    def block_counts(self) -> tuple[int, int]:
        """Free and all KV blocks; one block of vLLM's pool is a placeholder and never used."""
        pool = self.block_pool
        return (pool.get_num_free_blocks(), pool.num_gpu_blocks - 1) if pool is not None else (0, 0)

    def copy(self, pages: Sequence[int], block_ids: Sequence[int]) -> None:
        """Staging pages into KV blocks, all segments; done when this returns."""
        device = self._blocks.device
        target = torch.tensor(block_ids, device=device)
        source = self._staging[pages[0] : pages[0] + len(pages)] if _is_run(pages) else self._staging[list(pages)]
        for segment in range(self._blocks.shape[0]):
            self._blocks[segment].index_copy_(0, target, source[:, segment])
        if device.type == "cuda":
            # The pages go to the next fetch as soon as this returns, and that does not wait for our stream.
            torch.cuda.current_stream().synchronize()

    def after_step(self) -> torch.cuda.Event | None:
        """Is over when all that the step under way has given the device is done; None where steps run on the CPU."""
        if self._blocks.device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event


#: Set by the worker half when it is given the KV memory, and found by the scheduler half, which vLLM makes later.
_core: _Core | None = None


def _get_core() -> _Core:
    if _core is None:
        raise RuntimeError(
            "the KV memory is not in this process; TandemConnector needs vLLM's model worker in the process of its "
            "scheduler (VLLM_ENABLE_V1_MULTIPROCESSING=0) and no tensor or pipeline parallelism"
        )
    return _core


@dataclass(frozen=True, slots=True, kw_only=True)
class _KvMemory:
    """vLLM's KV memory: one allocation, in which layer l of block b is a *page* of contiguous bytes at
    `offset + l * layer_stride + b * block_stride`."""

    storage: Any
    device: torch.device
    dtype: torch.dtype
    layers: int
    blocks: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    page_bytes: int
    offset: int
    layer_stride: int
    block_stride: int

    @classmethod
    def find(cls, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]) -> _KvMemory:
        """Raises NotImplementedError, naming the reason, for memory that can't be handed over block by block."""
        groups, tensors = kv_cache_config.kv_cache_groups, kv_cache_config.kv_cache_tensors
        if len(groups) != 1 or len(tensors) != 1:
            raise NotImplementedError(
                f"{len(groups)} KV cache groups in {len(tensors)} tensors; one of each can be handed over"
            )
        spec, place = groups[0].kv_cache_spec, tensors[0]
        if type(spec) is not FullAttentionSpec:
            raise NotImplementedError(f"a KV cache of {type(spec).__name__}; only full attention can be handed over")
        first = kv_caches[place.layers[0]]
        base = first.untyped_storage().data_ptr()
        for layer, name in enumerate(place.layers):
            found, told = kv_caches[name].data_ptr() - base, place.offset + layer * place.layer_stride
            if found != told:
                raise NotImplementedError(f"{name} lies at byte {found} of the KV memory, vLLM's own plan says {told}")
        return cls(
            storage=first.untyped_storage(),
            device=first.device,
            dtype=first.dtype,
            layers=len(place.layers),
            blocks=kv_cache_config.num_blocks,
            block_tokens=spec.block_size,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            page_bytes=spec.page_size_bytes,
            offset=place.offset,
            layer_stride=place.layer_stride,
            block_stride=place.block_stride,
        )

    @property
    def base(self) -> int:
        return int(self.storage.data_ptr())

    @property
    def nbytes(self) -> int:
        return int(self.storage.nbytes())

    @property
    def is_block_major(self) -> bool:
        """All layers of a block follow one another: it is one segment."""
        return self.layer_stride == self.page_bytes

    @property
    def segments(self) -> int:
        return 1 if self.is_block_major else self.layers

    @property
    def segment_bytes(self) -> int:
        return self.page_bytes * self.layers // self.segments

    @property
    def arena_map(self) -> ArenaMap:
        return ArenaMap(
            blocks=self.blocks,
            segment_stride=self.segment_bytes if self.is_block_major else self.layer_stride,
            block_stride=self.block_stride,
            offset=self.offset,
        )

    def region(self, name: str, address: int, nbytes: int) -> Region:
        return Region(name, address, nbytes, str(self.device))

    def views(self, layout: KvLayout, staging_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The KV blocks as [segment, block, word] and new staging memory as [page, segment, word].

        Words of 8 bytes: index copies of bytes take five times as long.
        """
        word = torch.int64.itemsize
        arena = torch.empty(0, dtype=torch.int64, device=self.device).set_(self.storage)
        words = self.segment_bytes // word
        strides = (self.arena_map.segment_stride // word, self.block_stride // word, 1)
        blocks = torch.as_strided(arena, (self.segments, self.blocks, words), strides, self.offset // word)
        staging = torch.zeros((staging_pages, self.segments, words), dtype=torch.int64, device=self.device)
        assert staging.nbytes == staging_pages * layout.block_bytes
        return blocks, staging


def _settings(vllm_config: VllmConfig) -> ConnectorSettings:
    return settings_of(vllm_config.kv_transfer_config.get_from_extra_config(KEY, ""))


def _is_run(numbers: Sequence[int]) -> bool:
    return all(after == before + 1 for before, after in zip(numbers, numbers[1:], strict=False))


def _staging_pages(staging_bytes: int, layout: KvLayout, max_model_len: int) -> int:
    """As many as fit, but one prompt of the longest length must: otherwise it could never be fetched."""
    fit, longest = staging_bytes // layout.block_bytes, -(-max_model_len // layout.block_tokens)
    if fit < longest:
        log.warning("staging of %d blocks is less than one prompt of %d tokens: taking %d", fit, max_model_len, longest)
    return max(fit, longest)


def _layout(vllm_config: VllmConfig, settings: ConnectorSettings, memory: _KvMemory) -> KvLayout:
    cache = vllm_config.cache_config
    return KvLayout(
        # The version, because how a kernel packs a page is not promised from one to the next.
        engine=f"vllm {VLLM_VERSION}",
        model=settings.model,
        revision=settings.revision,
        dtype=str(memory.dtype).removeprefix("torch."),
        block_tokens=memory.block_tokens,
        layers=memory.layers,
        kv_heads=memory.kv_heads,
        head_dim=memory.head_dim,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        order=cache.get_resolved_kv_cache_layout().name,
        isa=_packing(memory, cache.cache_dtype),
        segment_bytes=memory.segment_bytes,
        segments_per_block=memory.segments,
    )


def _packing(memory: _KvMemory, cache_dtype: str) -> str:
    """How the CPU attention kernel packs a page; empty where pages are not packed."""
    if memory.device.type != "cpu":
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(memory.dtype, memory.block_tokens, memory.head_dim, cache_dtype))


def _allow_amx() -> None:
    """Asks the kernel for AMX tiles. vLLM's attention uses them without asking; oneDNN asks, but only when a larger
    matmul comes along. A decode worker would die of SIGILL in its first step."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


# ------------------------------------------------------------------------------------------------ the scheduler half


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    staged_id: str
    pages: tuple[int, ...]
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class TandemMetadata(KVConnectorMetadata):
    """What one engine step must do, from the scheduler half to the worker half."""

    copies: list[_Copy] = field(default_factory=list)
    #: vLLM's ids of pinned requests whose lease has ended.
    sent: set[str] = field(default_factory=set)
    #: How many tokens of prompts that can be read meanwhile are computed when this step is done, by vLLM's request id.
    computes: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Computed(KVConnectorWorkerMetadata):
    """What one engine step has computed, from the worker half to the scheduler half."""

    tokens: Mapping[str, int]
    done: torch.cuda.Event | None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        raise NotImplementedError("there is one worker")


@dataclass(slots=True)
class _Prefill:
    order: PrefillOrder
    prompt_tokens: int
    arrived: float
    started: float | None = None
    #: The handle to what can be read while the rest is computed; empty before the first part, and if it can't.
    handle: bytes = b""
    #: How many tokens steps have reported, and how many have been told to be in place.
    computed: int = 0
    published: int = 0
    #: vLLM has taken its blocks back once. Steps that were under way may still report on them.
    preempted: bool = False

    @property
    def is_readable(self) -> bool:
        """While it is computed."""
        return self.order.overlap and not self.preempted


class _Scheduler:
    def __init__(self, core: _Core) -> None:
        self._core = core
        #: By vLLM's request id, from arrival to finish.
        self._prefills: dict[str, _Prefill] = {}
        #: By vLLM's request id, from arrival to the step that loads or to finish.
        self._loads: dict[str, DecodeOrder] = {}
        #: vLLM's ids of finished requests whose blocks it keeps for us, by transfer id. An entry goes when it is
        #: reported as sent, so that none is reported twice.
        self._pins: dict[str, str] = {}
        self._copies: list[_Copy] = []

    def expect(self, request: Request, order: Order) -> None:
        request_id = request.request_id
        match order:
            case PrefillOrder():
                self._prefills[request_id] = _Prefill(order, request.num_prompt_tokens, time.monotonic())
            case DecodeOrder():
                self._loads[request_id] = order

    def computes(self, output: SchedulerOutput) -> dict[str, int]:
        """Of this step, see TandemMetadata."""
        before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return {
            request_id: before[request_id] + tokens
            for request_id, tokens in output.num_scheduled_tokens.items()
            if (prefill := self._prefills.get(request_id)) and prefill.is_readable
        }

    def computed(self, report: _Computed) -> None:
        """A step is over."""
        if report.done is not None:
            report.done.synchronize()
        for request_id, tokens in report.tokens.items():
            if prefill := self._prefills.get(request_id):
                prefill.computed = tokens

    def publish(self, scheduler: Scheduler) -> list[tuple[str, bytes]]:
        """The handles that are new, by request."""
        found = []
        for request_id, prefill in self._prefills.items():
            if not prefill.is_readable or not prefill.published < prefill.computed < prefill.prompt_tokens:
                continue
            if prefill.published == 0 and self._stream(prefill):
                found.append((request_id, prefill.handle))
            prefill.published = prefill.computed
            if prefill.handle:
                block_ids = scheduler.kv_cache_manager.get_block_ids(request_id)[0]
                self._core.node.publish(prefill.order.transfer_id, block_ids, prefill.computed)
        return found

    def _stream(self, prefill: _Prefill) -> bool:
        order = prefill.order
        try:
            prefill.handle = self._core.node.stream(
                transfer_id=order.transfer_id,
                tenant=order.tenant,
                reader=order.reader,
                tokens=prefill.prompt_tokens,
                ttl_s=order.ttl_s,
            )
        except OfferRefused as refused:  # then it is offered as a whole, when it is done
            log.info("%s is not read while it is computed: %s", order.transfer_id, refused)
            return False
        return True

    def preempted(self, request_id: str) -> None:
        """vLLM has taken the blocks back; what was computed will be computed again, somewhere else."""
        prefill = self._prefills.get(request_id)
        if prefill is not None:
            prefill.preempted = True
            self._withdraw(prefill)

    def _withdraw(self, prefill: _Prefill) -> None:
        if prefill.handle:
            self._core.node.withdraw(prefill.order.transfer_id)
            prefill.handle = b""

    def forget(self, request_id: str) -> None:
        prefill = self._prefills.pop(request_id, None)
        if prefill is not None:
            self._withdraw(prefill)
        load = self._loads.pop(request_id, None)
        if load:
            self._core.node.consumed(load.staged_id)

    def loadable_tokens(self, request: Request, computed: int) -> int:
        load = self._loads.get(request.request_id)
        return max(0, _end(load, request) - computed) if load else 0

    def allocated(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        """The request is admitted in this step, with `external` tokens to come from us."""
        prefill = self._prefills.get(request.request_id)
        if prefill and prefill.started is None:
            prefill.started = time.monotonic()
        load = self._loads.pop(request.request_id, None)
        if load is None:
            return
        if not external:  # all of it was in vLLM's own prefix cache
            self._core.node.consumed(load.staged_id)
            return
        end, tokens = _end(load, request), self._core.block_tokens
        first, last = (end - external) // tokens, -(-end // tokens)
        self._copies.append(
            _Copy(staged_id=load.staged_id, pages=load.pages[first:last], block_ids=tuple(block_ids[first:last]))
        )

    def finished(self, request: Request, block_ids: Sequence[int]) -> tuple[bool, PrefillReport | None]:
        """Whether vLLM must keep the blocks, and what to tell of a prefill leg."""
        prefill = self._prefills.get(request.request_id)
        pinned, refusal = self._pin(request, prefill, block_ids) if prefill else (None, "")
        self.forget(request.request_id)
        if prefill is None:
            return False, None
        now = time.monotonic()
        started = prefill.started or now
        return pinned is not None, PrefillReport(
            queue_s=started - prefill.arrived, prefill_s=now - started, handle=pinned, refusal=refusal
        )

    def _pin(self, request: Request, prefill: _Prefill, block_ids: Sequence[int]) -> tuple[bytes | None, str]:
        order, tokens = prefill.order, prefill.prompt_tokens
        computed = request.status is RequestStatus.FINISHED_LENGTH_CAPPED or (
            request.status is RequestStatus.FINISHED_STOPPED and order.even_if_stopped
        )
        if not order.hand_off or not computed:
            return None, ""
        blocks = block_ids[: -(-tokens // self._core.block_tokens)]
        handle, prefill.handle = prefill.handle, b""
        if not handle or not self._core.node.publish(order.transfer_id, blocks, tokens):
            try:
                handle = self._core.node.offer(
                    transfer_id=order.transfer_id,
                    tenant=order.tenant,
                    reader=order.reader,
                    block_ids=blocks,
                    tokens=tokens,
                    ttl_s=order.ttl_s,
                )
            except OfferRefused as refused:
                return None, str(refused)
        self._pins[order.transfer_id] = request.request_id
        return handle, ""

    def take_step(self, output: SchedulerOutput) -> TandemMetadata:
        sent = {self._pins.pop(transfer_id) for transfer_id in self._core.node.take_ended()}
        copies, self._copies = self._copies, []
        return TandemMetadata(copies, sent, self.computes(output))


def _end(load: DecodeOrder, request: Request) -> int:
    """How many of the request's tokens need not be computed: vLLM wants at least one."""
    return min(load.tokens, request.num_tokens - 1)


# ------------------------------------------------------------------------------------------------ what vLLM calls


class TandemConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM makes one with role SCHEDULER and one with role WORKER, in one process."""

    _cache_hit_source = CacheHitSource.P2P

    #: Leases held at once.
    lease_rows = NodeLimits().rows

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        parallel = vllm_config.parallel_config
        if parallel.world_size != 1 or parallel.data_parallel_size != 1:
            raise NotImplementedError(
                "TandemConnector hands over the KV of one device; tensor, pipeline and data parallelism must be 1"
            )
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = _Scheduler(_get_core())

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str:
        """All layers of a block together where attention can live with it: one segment to move per block."""
        return "LBHNC" if vllm_config.device_config.device_type == "cpu" else "BLHNC"

    # -- what VllmEngine calls

    @property
    def node(self) -> KvNode:
        return _get_core().node

    def block_counts(self) -> tuple[int, int]:
        """Free and all KV blocks. From any thread."""
        return _get_core().block_counts()

    def expect(self, request: Request, order: Order) -> None:
        """Tells what to do with a request that vLLM's scheduler is given next. In the thread that steps."""
        self._scheduler.expect(request, order)

    def publish_computed(self, scheduler: Scheduler) -> list[tuple[str, bytes]]:
        """After a step: prompts become readable as far as steps that are over have computed them. The handles that are
        new, by request."""
        return self._scheduler.publish(scheduler)

    def forget(self, request_id: str) -> None:
        """The scheduler did not take it."""
        self._scheduler.forget(request_id)

    # -- worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        global _core
        _allow_amx()
        _core = _Core(self._vllm_config, self._kv_cache_config, kv_caches, self.lease_rows)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        core = _get_core()
        for copy in self._metadata().copies:
            core.copy(copy.pages, copy.block_ids)
            core.node.consumed(copy.staged_id)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._metadata().sent, None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        computes = self._metadata().computes
        return _Computed(computes, _get_core().after_step()) if computes else None

    def _metadata(self) -> TandemMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, TandemMetadata)
        return metadata

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    # -- scheduler half

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        _get_core().block_pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.loadable_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> TandemMetadata:
        for request_id in scheduler_output.preempted_req_ids or ():
            self._scheduler.preempted(request_id)
        return self._scheduler.take_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, _Computed):
            self._scheduler.computed(report)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        keep, report = self._scheduler.finished(request, block_ids[0] if block_ids else ())
        return keep, report_params(report) if report else None

    def shutdown(self) -> None:
        global _core
        if _core is not None:
            _core.node.close()
            _core = None
