from __future__ import annotations

import fake_server
import pytest


@pytest.fixture
def server():
    with fake_server.running() as running:
        yield running
