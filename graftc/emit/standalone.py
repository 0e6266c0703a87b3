"""The parts of `model.py` that are the same for every model: they are text, and need torch alone."""

from __future__ import annotations

CHECK = '''
# What this model was captured with. A number is fixed; a name may vary from call to call.
{inputs}
{absent}
{constants}


def check_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name. Raises ValueError for a call that the captured model cannot answer."""
    if len(args) > len(INPUTS):
        raise TypeError(f"takes {{len(INPUTS)}} inputs ({{', '.join(INPUTS)}}), got {{len(args)}}")
    given = dict(zip(INPUTS, args)) | kwargs
    for name in ABSENT:
        if given.pop(name, None) is not None:
            raise ValueError(f"this model was captured without `{{name}}`; it cannot take one")
    for name, value in CONSTANTS.items():
        if given.pop(name, value) != value:
            raise ValueError(f"this model was captured with `{{name}}={{value!r}}`; it is fixed")
    for name, shape in INPUTS.items():
        if not isinstance(given.get(name), Tensor):
            continue
        found = given[name].shape
        wrong = len(found) != len(shape) or any(
            isinstance(size, int) and found[i] != size for i, size in enumerate(shape)
        )
        if wrong:
            captured = ", ".join(str(size) for size in shape)
            dynamic = ", ".join(sorted({{s for s in shape if isinstance(s, str)}})) or "nothing"
            raise ValueError(
                f"`{{name}}` is {{tuple(found)}}; this model was captured at ({{captured}}): "
                f"{{dynamic}} may vary, the rest is fixed"
            )
    return given
'''

CALL = """
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(**check_inputs(args, kwargs))
"""

LOAD = '''
def load_weights(model: nn.Module, path: str | Path, *, part: bool = False) -> nn.Module:
    """Give `model` the tensors of a safetensors file, and their dtype; what is shared stays so.

    The file holds a shared tensor once, under its first name. Raises KeyError for a name that is
    missing or unknown; with `part`, buffers outside of the state dict may be missing.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = set(file.keys())
    fresh: dict[int, Tensor] = {{}}
    missing: list[str] = []
    state = model.state_dict(keep_vars=True)
    extra = {{n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}}
    for name, old in {{**state, **extra}}.items():
        if name in stored:
            stored.remove(name)
            with safe_open(path, "pt") as file:  # opened for each: its pages go with it
                new = file.get_tensor(name).clone()  # aligned memory: kernels round by alignment
            if new.shape != old.shape:
                raise ValueError(f"{{name}} is {{tuple(new.shape)}}, wanted {{tuple(old.shape)}}")
            if id(old) not in fresh:
                learned = isinstance(old, nn.Parameter)
                fresh[id(old)] = nn.Parameter(new, old.requires_grad) if learned else new
        elif id(old) not in fresh and not (part and name in extra):
            missing.append(name)
        if id(old) in fresh:
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            held = holder._parameters if leaf in holder._parameters else holder._buffers
            held[leaf] = fresh[id(old)]
    if missing or stored:
        raise KeyError(f"{{path}}: missing {{missing[:5]}}, unknown {{sorted(stored)[:5]}}")
    return model


def load(directory: str | Path | None = None) -> {root}:
    """The model with the weights in `directory` (this file's own), in {mode} mode."""
    folder = Path(directory) if directory is not None else Path(__file__).parent
    with torch.device("meta"):
        model = {root}()
    load_weights(model, folder / "model.safetensors")
    return model.{mode}()
'''
