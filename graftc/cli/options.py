"""The options that several commands take."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        help="MODEL: file.py:function, package.module:function, diffusers:CLASS@FOLDER, or model.pt2",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE|FOLDER",
        help="the model's weights: safetensors, a folder of shards, or a state dict of torch.save",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "-d", "--data", help="DATA: file.py:function, a folder of safetensors shards, or hf:NAME"
    ),
]
MaybeData = Annotated[
    str | None,
    typer.Option(
        "-d", "--data", help="DATA: file.py:function, a folder of safetensors shards, or hf:NAME"
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "-t", "--task", help="TASK: a shipped name, or file.py:Task; default: the model's own"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override a `set` parameter of the file: name=value"),
]
AllowOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-python",
        metavar="FILE.py",
        help="run this Python file, which a rule names (operators, patterns)",
    ),
]
FormatOption = Annotated[str, typer.Option("--format", help="text or json")]
SamplesOption = Annotated[
    int, typer.Option("--samples", help="samples of DATA that measured selectors are measured on")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="where measures are kept; default: ~/.cache/graftc/measures"
    ),
]
GraphOption = Annotated[
    Path | None,
    typer.Option("--graph", metavar="OUT.svg", help="draw the chains of blocks, before and after"),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="where the student is to run: cpu or cuda")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="what it is to run in: fp32, fp16 or bf16")
]
ToOption = Annotated[
    str, typer.Option("--to", help="what it is to run on: torch, onnx or tensorrt")
]
BuildArgument = Annotated[Path, typer.Argument(help="a build directory made by `graftc compile`")]
MaybeSeed = Annotated[
    int | None, typer.Option("--seed", help="seed of every random choice; default 0")
]
BankOption = Annotated[
    Path | None,
    typer.Option("--bank", metavar="BANK", help="a directory of trained sites, used and added to"),
]
SeedOption = Annotated[int, typer.Option(help="seed of every random choice")]


def overrides(given: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in given or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set takes name=value, found {item!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def check_format(value: str) -> str:
    if value not in ("text", "json"):
        raise typer.BadParameter(f"--format is text or json, found {value!r}")
    return value


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def typed() -> str:
    """What was typed, for the build's record; the program by name, wherever it lies."""
    return shlex.join(["graftc", *sys.argv[1:]])
