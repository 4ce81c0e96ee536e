"""Tests run on one torch thread: at these sizes two are several times slower. Slow ones run with ``--slow`` only."""

import pytest
import torch

pytest_plugins = ["pytester"]

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that train detectors")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
