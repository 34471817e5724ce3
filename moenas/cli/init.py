"""The start of `moenas init`: a shipped space, or the architecture of a published model."""

from __future__ import annotations

from pathlib import Path

from moenas import resources
from moenas.errors import InputError, NotFoundError

COUNTED = ["active_params", "total_params", "flops_per_token"]
TRAINED = ["val_loss", "active_params"]


def start_text(start: str | None, sizes: list[str]) -> str:
    """Return the text of a new space file.

    `start` is the name of a space, or the path of a config.json of Hugging Face or of a folder
    with one. `sizes` come from `--shrink`.

    Raises:
        InputError: if the model cannot be read, or has no counterpart in a space file.
    """
    if start is None:
        if sizes:
            raise InputError("--shrink: give --from, the model that is made smaller")
        return resources.read_text(resources.shipped("spaces") / "_template.yaml")
    path = Path(start).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return _model_text(path, sizes)
    source = _space(start)
    return _smaller_space_text(source, sizes) if sizes else resources.read_text(source)


def _space(start: str) -> Path:
    """Return the file of a space by its name; an identifier of the Hub suggests the nearest."""
    try:
        return resources.find("spaces", ".yaml", start)
    except NotFoundError:
        owner, slash, name = start.partition("/")
        words = name.split("-")
        for n in range(len(words), 0, -1):
            near = (
                resources.names_with("spaces", ".yaml", "-".join(words[:n]))
                if owner and slash
                else []
            )
            if near:
                names = " or ".join(map(repr, near))
                raise NotFoundError(
                    f"{start}: no such file. moenas downloads no model; give the path of its"
                    f" config.json, or a name of the zoo: {names}"
                ) from None
        raise


def _model_text(path: Path, sizes: list[str]) -> str:
    from moenas.huggingface.config import FILE
    from moenas.huggingface.families import read_model

    if path.is_dir() and not (path / FILE).is_file():
        raise NotFoundError(f"{path}: the folder has no {FILE}")
    family, (whole, layers) = read_model(path)
    shown = path if path.name not in ("", "..") else path.resolve().name  # of `.`, `..` and `a/..`
    return _text(f"{shown} ({family})", whole, layers, sizes)


def _smaller_space_text(source: Path, sizes: list[str]) -> str:
    from moenas.huggingface.layer_groups import layers_of
    from moenas.space.architecture_file import read_architecture

    plain = read_architecture(str(source)).architecture.plain()
    layers = layers_of(plain.pop("blocks"))
    return _text(source.stem, plain, layers, sizes)


def _text(
    origin: str, whole: dict[str, object], layers: list[dict[str, object]], words: list[str]
) -> str:
    """Return the space file of a model, in the sizes that `--shrink` names."""
    from moenas.errors import LocatedError
    from moenas.huggingface.layer_groups import groups_of
    from moenas.huggingface.shrink import read_sizes, shrink
    from moenas.huggingface.space_text import space_text
    from moenas.model.architecture import Architecture

    sizes = read_sizes(words)
    if sizes:
        whole, layers = shrink(whole, layers, sizes)
    try:
        model = Architecture.parse({**whole, "blocks": groups_of(layers)})
    except LocatedError as error:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(f"--shrink {given}: {error.path}: {error.message}") from None
    cost = model.cost(1)
    made = f"The model of {' '.join(origin.split())}"
    made += f", made smaller: {', '.join(f'{n}={x}' for n, x in sizes.items())}." if sizes else "."
    counts = f"{cost.params:,} parameters, of which {cost.active_params:,} act on a token."
    return space_text(whole, layers, [made, counts], TRAINED if sizes else COUNTED)
