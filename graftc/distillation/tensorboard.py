"""A run's log as TensorBoard events, where the user asks for them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from graftc.diagnostics import Diagnostic, NotRunError
from graftc.distillation.run import Run

FOLDER = "tensorboard"


@contextmanager
def board_of(run: Run, wanted: bool) -> Generator[None]:
    """Every line that the run logs meanwhile, as scalars under `DIR/runs/ID/tensorboard`.

    `step` events give a curve a value, `bins` the errors of a site by bin. A run that is resumed goes on
    where its checkpoint stands: later events of before are hidden (`purge_step`). Raises NotRunError (G557)
    where tensorboard is not installed.
    """
    if not wanted:
        yield
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        text = "TensorBoard logs need tensorboard, which is not installed"
        raise NotRunError(
            Diagnostic("G557", text, help="pip install 'graftc[tensorboard]', or leave it out")
        ) from error
    writer: Any = None
    last = 0

    def write(event: Mapping[str, Any]) -> None:
        nonlocal writer, last
        if writer is None:  # not before the first line: only then is it known where the run goes on
            start = event.get("step")
            writer = SummaryWriter(str(run.path / FOLDER), purge_step=start)
        last = event.get("step", last)
        for name, value in curves_of(event).items():
            writer.add_scalar(name, value, last)

    run.listeners.append(write)
    try:
        yield
    finally:
        run.listeners.remove(write)
        if writer is not None:
            writer.close()


def curves_of(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, by the name of their curve.

    >>> curves_of({"event": "step", "step": 3, "loss": 0.5})
    {'loss': 0.5}
    """
    if event.get("event") == "bins":
        return {
            f"bins/{event['site']}/{i}": float(error) for i, error in enumerate(event["errors"])
        }
    if event.get("event") != "step":
        return {}
    values = event.get("values") or {
        k: v for k, v in event.items() if k not in ("event", "step", "generation")
    }
    return {str(k): float(v) for k, v in values.items() if isinstance(v, (int, float))}
