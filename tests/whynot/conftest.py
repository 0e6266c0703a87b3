from __future__ import annotations

import pytest

from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from tests.whynot.models import odd


@pytest.fixture(scope="session")
def models(digits: Analysis, dit: Analysis, pixart: Analysis) -> dict[str, Analysis]:
    """The models that the batteries name, captured once."""
    return {"digits": digits, "dit": dit, "pixart": pixart, "odd": analyse(capture(odd()))}
