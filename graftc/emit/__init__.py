"""What leaves graftc: the standalone package, the build directory, ONNX, and what checks them.

`source` prints a Program as one Python file that needs torch alone; `write_package` puts it on disk
with its weights and a description of its inputs; `write_build` puts student and teacher into one
build directory, and `Build` reads it back; `export_onnx` and `verify` make an ONNX file and say what
was checked. Nothing is pickled: weights are safetensors, descriptions YAML, code is source.
"""

from graftc.emit.build import Build, RunInfo, weights_of, write_build
from graftc.emit.files import state_hash
from graftc.emit.package import load_package, write_package
from graftc.emit.source import source

__all__ = [
    "Build",
    "RunInfo",
    "load_package",
    "source",
    "state_hash",
    "weights_of",
    "write_build",
    "write_package",
]
