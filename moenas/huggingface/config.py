"""A config.json of Hugging Face: typed fields with the defaults of its family."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from moenas.errors import SourceLocation, SpaceError, suggestion
from moenas.records import Plain
from moenas.resources import Node, parse_yaml, read_text

DEFAULTS = Path(__file__).with_name("defaults.json")
"""model_type -> "defaults": field -> value in transformers; "aliases": other name -> field."""
FILE = "config.json"
WRAPPERS = ("text_config", "llm_config")
"""Fields under which the configuration of a model of text and images holds its text model."""

_WITHOUT_EFFECT = """
    _name_or_path architectures attn_implementation auto_map bos_token_id
    chunk_size_feed_forward dtype embd_pdrop emb_pdrop eod_token_id eos_token_id ep_size
    for_llm_class head_dim_per_rank hidden_dropout id2label initializer_factor
    initializer_range is_encoder_decoder label2id mamba_chunk_size mamba_ssm_cache_dtype
    max_position_embeddings max_sequence_length max_seq_len model_max_length
    mtp_layers_block_type mtp_loss_scaling_factor num_logits_to_keep num_mtp_layers
    num_nextn_predict_layers output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type quantization_config rescale_prenorm_residual
    resid_pdrop residual_in_fp32 return_dict router_aux_loss_coef router_jitter_noise
    input_jitter_noise router_dtype sep_token_id seq_aux time_step_floor time_step_max
    time_step_min torch_dtype transformers_version transformers.js_config unk_token_id
    use_associative_scan use_cache use_mamba_kernels use_mambapy use_flash_attn
    attention_dropout attn_pdrop dropout aux_loss_alpha max_window_layers
    moe_shared_expert_overlap chunk_size block_size conv_use_xavier_init
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""Fields that change no logit of a model without dropout: training, tokens, kernels, storage."""
NULL_IS_USUAL = ("num_key_value_heads", "head_dim")
"""Whole numbers whose null follows from other fields."""
T = TypeVar("T")


@cache
def families() -> dict[str, dict[str, Plain]]:
    """Return the defaults and aliases of every family by its `model_type`."""
    by_family: dict[str, dict[str, Plain]] = json.loads(DEFAULTS.read_text())
    return by_family


class Config:
    """The fields of one configuration; it remembers which of them were read.

    A field that the file leaves out has the default of the family in transformers.
    """

    def __init__(self, fields: dict[str, Node], family: str, source: str, prefix: str = "") -> None:
        table = families().get(family, {"defaults": {}, "aliases": {}})
        self.family = family
        self.source = source
        self.prefix = prefix
        self.defaults = table["defaults"]
        self.aliases = table["aliases"]
        self.fields: dict[str, Node] = {}
        self.written: dict[str, str] = {}
        self.read: set[str] = set()
        for name, node in fields.items():
            known = self.aliases.get(name, name)
            other = self.written.setdefault(known, name)
            if other != name and self.fields[known].plain != node.plain:
                raise self.error(
                    known, f"the field is {name}, too, which has another value; delete one of them"
                )
            self.fields[known] = node

    def error(self, name: str, message: str) -> SpaceError:
        """Build the error for a field, at its place in the file if it is there."""
        name = self.aliases.get(name, name)
        node = self.fields.get(name)
        place = SourceLocation(self.source) if node is None else (node.key_mark or node.mark)
        path = self.prefix + self.written.get(name, name)
        return SpaceError(message, location=place, path=path)

    def put(self, name: str, value: Any, source: str) -> None:
        """Set a field that another one, `source`, stands for; errors point there."""
        self.fields[name] = Node.wrap(value, self.fields[source].mark)
        self.written[name] = source

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field as plain data: that of the file, of the family, or `default`."""
        name = self.aliases.get(name, name)
        self.read.add(name)
        if name in self.fields:
            return self.fields[name].plain
        value = self.defaults.get(name)
        return default if value is None else value

    def is_null(self, name: str) -> bool:
        """Return whether the file has null for a field for which the family has a value."""
        name = self.aliases.get(name, name)
        is_written = name in self.fields and self.fields[name].value is None
        return is_written and self.defaults.get(name) is not None

    def _typed(
        self, name: str, default: Any, is_right: Callable[[Any], bool], what: str
    ) -> Any | None:
        value = self.get(name, default)
        value = default if value is None else value
        if value is not None and not is_right(value):
            raise self.error(name, f"{value!r} is not {what}")
        return value

    def whole_or_none(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number of at least 0, or None where it is null."""
        return self._typed(
            name, default, lambda x: type(x) is int and x >= 0, "a whole number of at least 0"
        )

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number of at least 0; a missing one is an error, as null mostly is."""
        if self.is_null(name) and name not in NULL_IS_USUAL:
            raise self.error(name, "null is not a whole number; give one, or delete the field")
        value = self.whole_or_none(name, default)
        if value is None:
            raise self.error(name, "the field is missing; give a whole number")
        return value

    def whole_unless_left_out(self, name: str, derived: int) -> int:
        """Return a whole number of the file; a missing one follows from other fields: `derived`."""
        self.read.add(name)
        return self.whole(name) if name in self.fields else derived

    def number(self, name: str, default: float = 0.0) -> float:
        """Return a number; a missing one, or null where the family has none, is the default."""
        if self.is_null(name) and not default:
            raise self.error(name, "null is not a number; give one, or delete the field")
        value = self._typed(name, default, lambda x: type(x) in (int, float), "a number")
        return float(default if value is None else value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false; null in the file is false, as transformers has it."""
        if self.aliases.get(name, name) in self.fields and self.get(name) is None:
            return False
        return bool(self._typed(name, default, lambda x: type(x) is bool, "true or false"))

    def kinds(self, name: str, n_layers: int, known: dict[str, T]) -> list[T] | None:
        """Return what each layer is by a list of words, or None where there is no list."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n_layers:
            raise self.error(name, f"give a list of one word for each of the {n_layers} layers")
        for word in value:
            if word not in known:
                raise self.no_counterpart(name, word, known)
        return [known[word] for word in value]

    def no_counterpart(self, name: str, value: object, known: Any = ()) -> SpaceError:
        """Build the error for a value that a space file cannot express."""
        names = ", ".join(map(str, known))
        has = f"; moenas reads: {names}" if names else "; moenas has no such part"
        return self.error(name, f"{_short(value)} has no counterpart in a space file{has}")

    def expect(self, name: str, *values: Any) -> None:
        """Refuse a field with another value than these; a missing field has the first."""
        value = self.get(name, values[0])
        if value not in values:
            raise self.no_counterpart(name, value, values)

    def section(self, name: str) -> Config:
        """Return the fields of a field, such as `rope_parameters`, as a configuration."""
        self.read.add(name)
        node, default = self.fields.get(name), self.defaults.get(name) or {}
        if node is not None and node.value is not None and not isinstance(node.value, dict):
            raise self.error(name, f"{_short(node.plain)} is not an object of fields")
        fields = node.value if node is not None and isinstance(node.value, dict) else {}
        inner = Config(fields, "", self.source, f"{self.prefix}{name}.")
        inner.defaults = default
        return inner

    def check_all_read(self) -> None:
        """Refuse a field that was not read and differs from the default of the family.

        Raises:
            SpaceError: naming the field and its value.
        """
        for name, node in self.fields.items():
            if name in self.read or name in WITHOUT_EFFECT:
                continue
            value = node.plain
            empty = value is None or value is False or value in ([], {})
            if value == self.defaults.get(name) or (empty and not self.defaults.get(name)):
                continue
            raise self.error(
                name,
                f"{_short(value)} has no counterpart in a space file; delete the field if it has"
                " no effect on the logits",
            )


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(path: Path) -> Config:
    """Read a config.json, or the one of a folder.

    The text model inside the configuration of a model of text and images is taken.

    Raises:
        SpaceError: with line and column of what is wrong.
        InputError: if the file cannot be read.
    """
    path = path / FILE if path.is_dir() else path
    source = str(path)
    text = read_text(path)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = SourceLocation(source, error.lineno, error.colno)
        raise SpaceError(f"not valid JSON: {error.msg}", location=place) from None
    except RecursionError:
        raise SpaceError("nested too deep", location=SourceLocation(source)) from None
    # JSON allows tabs between values, which YAML does not; a string of JSON holds none.
    root = parse_yaml(text.replace("\t", " "), source)
    return config_of(root, source)


def config_of(root: Node, source: str, prefix: str = "") -> Config:
    """Return the configuration of a node; see `read_config`."""
    if not isinstance(root.value, dict):
        raise SpaceError("a configuration is an object of fields", location=root.mark)
    if "model_type" not in root.value:
        raise SpaceError(
            "the field is missing; moenas reads config.json of a Hugging Face model",
            location=root.mark,
            path=f"{prefix}model_type",
        )
    family = root.value["model_type"].plain
    if not isinstance(family, str) or family not in families():
        for name in WRAPPERS:
            if name in root.value:
                return config_of(root.value[name], source, f"{prefix}{name}.")
        raise root.value["model_type"].error(
            f"{prefix}model_type",
            f"{family!r} is not a family that moenas reads."
            f"{suggestion(str(family), families())} It reads: {', '.join(families())}",
        )
    fields = {name: node for name, node in root.value.items() if name != "model_type"}
    return Config(fields, str(family), source, prefix)
