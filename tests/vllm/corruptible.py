"""Connectors with a fault or a limit of their own. vLLM loads them by name into the engine process.

`CorruptibleConnector` can be told to break what it loads: the proof that the exactness tests can fail. `CORRUPT_FLAG`
names a file; while that exists, the first block of every load has its numbers' signs turned around between staging and
the copy into vLLM's blocks. The numbers stay finite: vLLM leaves what it finds in a block behind the last token, and a
NaN there would reach whoever gets the block next.

`HoldableConnector` can be told to compute no further: while the file that `HOLD_FLAG` names exists, all steps but the
first two wait.
"""

import os
import time
from pathlib import Path
from typing import Any

from kv_transfer import vllm_connector
from kv_transfer.vllm_connector import TandemConnector

CORRUPT_FLAG = "TANDEM_TEST_CORRUPT_FLAG"
HOLD_FLAG = "TANDEM_TEST_HOLD_FLAG"
_SIGNS_OF_TWO_FLOATS = 0x8000000080000000 - (1 << 64)


class CorruptibleConnector(TandemConnector):
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if Path(os.environ[CORRUPT_FLAG]).exists():
            for copy in self._metadata().copies:
                vllm_connector._get_core()._staging[copy.pages[0]].bitwise_xor_(_SIGNS_OF_TWO_FLOATS)
        super().start_load_kv(forward_context, **kwargs)


class HoldableConnector(TandemConnector):
    _steps_held = 0

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        flag = Path(os.environ[HOLD_FLAG])
        self._steps_held = self._steps_held + 1 if flag.exists() else 0
        while self._steps_held > 2 and flag.exists():
            time.sleep(0.005)
        super().start_load_kv(forward_context, **kwargs)


class FewLeasesConnector(HoldableConnector):
    lease_rows = 24
