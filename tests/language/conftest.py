"""Hypothesis without deadlines (the first example builds the parser, 0.1 s); the fuzzer importable."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("language", deadline=None)
settings.load_profile("language")
