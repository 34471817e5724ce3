"""From a config.json of a known family to the architecture that equals it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moenas.errors import LocatedError
from moenas.huggingface import (
    gemma_families,
    hybrid_families,
    latent_families,
    softmax_families,
    state_space_families,
    windowed_families,
)
from moenas.huggingface.config import Config, read_config
from moenas.huggingface.layer_groups import groups_of
from moenas.huggingface.softmax_families import Model
from moenas.model.architecture import Architecture

FAMILIES: dict[str, Callable[[Config], Model]] = (
    softmax_families.FAMILIES
    | windowed_families.FAMILIES
    | latent_families.FAMILIES
    | hybrid_families.FAMILIES
    | state_space_families.FAMILIES
    | gemma_families.FAMILIES
)
"""`model_type` -> the function that reads a configuration of this family."""

LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers")
"""Names of the number of layers in the families."""


def check_layers(config: Config) -> None:
    """Refuse a configuration without layers.

    Raises:
        SpaceError: naming the field with the number of layers.
    """
    for name in LAYER_COUNTS:
        node = config.fields.get(config.aliases.get(name, name))
        if node is not None and node.plain == 0:
            raise config.error(name, "a model has 1 layer or more; give a whole number above 0")


def model_of(config: Config) -> Model:
    """Return the fields of an architecture beside its blocks, and its blocks, one a layer.

    Raises:
        SpaceError: naming the field of the configuration that has no counterpart.
    """
    check_layers(config)
    try:
        whole, layers = FAMILIES[config.family](config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # such as a count of 0
        message = f"a field has a value that the family cannot have: {error}"
        raise config.error("model_type", message) from None
    config.check_all_read()
    try:
        Architecture.parse({**whole, "blocks": groups_of(layers)})
    except LocatedError as error:
        message = f"the sizes have no counterpart in a space file: {error.path}: {error.message}"
        raise config.error("model_type", message) from None
    return whole, layers


def read_model(path: Path) -> tuple[str, Model]:
    """Read a config.json, or the one of a folder: its family, and the model; see `model_of`."""
    config = read_config(path)
    return config.family, model_of(config)
