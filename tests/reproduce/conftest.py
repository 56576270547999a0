"""The tests of the research code need what it needs."""

import pytest

pytest.importorskip("scipy", reason="e3rl reproduce needs scipy: pip install 'e3rl[reproduce]'")
