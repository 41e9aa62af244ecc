"""Python imports this at its start where the folder is on PYTHONPATH: so faults get into workers and into the engine
process of vLLM without a line for them in the program."""

import os
import sys

_CARRIERS = ("worker", "engine.vllm_process")
folder = os.environ.get("FAULTS_FOLDER")
if folder and any(carrier in argument for argument in sys.orig_argv for carrier in _CARRIERS):
    from tests.faults.inject import install

    install(folder)
