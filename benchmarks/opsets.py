"""Which opsets and IR versions a release of ONNX Runtime loads: the rows `ort-…` of graftc/deploy/runtimes.py.

    pip install --no-deps --target /tmp/ort onnxruntime==1.20.1
    PYTHONPATH=/tmp/ort python benchmarks/opsets.py

Run on 2026-11-21: 1.20.1 loads opsets to 21 and IR 10; 1.21.1 and 1.22.1 to 22 and IR 10; 1.23.2 to 23 and IR 11.
"""

from __future__ import annotations

import onnxruntime
from onnx import TensorProto, helper


def loads(opset: int, ir: int) -> bool:
    """Whether a file of one Add is taken."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "add", ports[:1], ports[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # the runtime's own error classes are not public
        return False
    return True


def main() -> None:
    taken = [(o, i) for o in range(18, 28) for i in range(9, 15) if loads(o, i)]
    print(
        f"onnxruntime {onnxruntime.__version__}: opsets to {max(o for o, _ in taken)}, IR to {max(i for _, i in taken)}"
    )


if __name__ == "__main__":
    main()
