"""For `make gpu-tests`, which runs tests/ops too: failures are told as they happen, a lost device costs one process.

pytest tells of failures when all is done, and a run that is cut short never is. After an illegal access every CUDA call
of its process fails, and pytest-xdist would hand that process more and more tests, because it is so fast with them.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("RAGGED_EXIT_TEST_DEVICE") != "cuda":
        return
    if not torch.cuda.is_available():
        pytest.exit("this machine has no CUDA device", returncode=2)
    config.pluginmanager.register(AsTheyHappen(config))


class AsTheyHappen:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)  # a worker's report is on its way by then
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:  # workers have none
            terminal.ensure_newline()
            terminal.write_line(f"{report.longreprtext}\n({report.when} of {report.nodeid})")
        if device_is_lost():
            if hasattr(self.config, "workerinput"):
                os._exit(1)  # pytest-xdist starts another worker for what is left
            pytest.exit("the device is lost to this process", returncode=1)


def device_is_lost() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
