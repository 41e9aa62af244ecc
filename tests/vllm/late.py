"""vLLM scheduling asynchronously, on the CPU: the way it does on GPUs, which its CPU platform does not offer.

vLLM loads `LateConnector` by name into the engine process. Making the worker half is early enough to turn asynchronous
scheduling on: the model runner exists by then, and computes synchronously; scheduler and step loop do not. What is
given to the executor is then not computed before its result is asked for, in order: every step is over only after the
next one was scheduled, as on a device that is busy.
"""

import pickle
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tests.vllm.corruptible import HoldableConnector


class LateConnector(HoldableConnector):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.WORKER:
            vllm_config.scheduler_config.async_scheduling = True
            UniProcExecutor.collective_rpc = _collective_rpc

    def publish_computed(self, scheduler: Any) -> list[tuple[str, bytes]]:
        assert isinstance(scheduler, AsyncScheduler), "the test is not what it says"
        return super().publish_computed(scheduler)


class _Late(Future[Any]):
    """Computed when it is asked for, behind what was given to the executor before."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        super().__init__()
        self._compute = compute
        _under_way.append(self)

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            first = _under_way.popleft()
            try:
                first.set_result(first._compute())
            except Exception as error:
                first.set_exception(error)
        return super().result(timeout)


_under_way: deque[_Late] = deque()
_at_once = UniProcExecutor.collective_rpc


def _collective_rpc(
    self: UniProcExecutor, method: Any, timeout: Any = None, args: Any = (), non_block: bool = False, **kwargs: Any
) -> Any:
    if not non_block:
        return _at_once(self, method, timeout, args, **kwargs)
    # The scheduler goes on changing what it has handed over.
    kept = pickle.loads(pickle.dumps(args))
    return _Late(lambda: _at_once(self, method, timeout, kept, **kwargs))
