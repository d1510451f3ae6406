"""Fixtures that many tests share. A missing tool fails the test with the reason; it never skips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _given(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).exists():
        pytest.fail(f"{variable} must name {what}; scripts/test sets it", pytrace=False)
    return Path(value)


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """A real llama.cpp build: the folder with llama-server, ggml-rpc-server and llama-quantize."""
    return _given("TIGHTWAD_TEST_ENGINE", "the folder of the llama.cpp build")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1, a real GGUF of 98 MB."""
    return _given("TIGHTWAD_TEST_MODEL", "the demo model's GGUF")


@pytest.fixture(scope="session")
def f32_model() -> Path:
    """The demo model's weights as F32 (540 MB): a slow target with the same vocabulary."""
    return _given("TIGHTWAD_TEST_F32", "the demo model as F32")


@pytest.fixture(scope="session")
def window_model() -> Path:
    """Gemma 3 270M Q4_K_M (253 MB): attention that slides over 512 tokens, and a vocabulary of 262,144."""
    return _given("TIGHTWAD_TEST_WINDOW", "the GGUF of a model with sliding-window attention")
