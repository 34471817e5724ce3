"""The format `transformers`: config.json and weights as a family of Hugging Face has them.

transformers and other programs of this format load such a folder. moenas does not import it.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from moenas.errors import InputError
from moenas.export.card import readme, trial_data
from moenas.export.published_weights import published_weights
from moenas.export.trained_trial import TrainedTrial
from moenas.huggingface.family_matching import family_config, layers_of_architecture
from moenas.records import Plain
from moenas.store.weights import FILE


def write(trial: TrainedTrial, folder: Path) -> None:
    """Write config.json, model.safetensors, moenas.json and README.md into an empty folder.

    The configuration is read back: its architecture must give equal logits. A byte corpus and a
    study with a tokenizer have a tokenizer, too.

    Raises:
        InputError: if no family has the architecture; it names the nearest and what differs.
    """
    try:
        config = family_config(trial.architecture, trial.record.setting("train", "context"))
    except InputError as error:
        raise InputError(
            f"{trial.name}: {error}. `--format folder` exports every architecture"
        ) from None
    layers = layers_of_architecture(trial.architecture)
    state = trial.model().state_dict()
    named = published_weights(config["model_type"], layers.whole, layers.blocks, state)
    data = trial_data(trial)
    files = {"config.json": config, "moenas.json": data}
    tokenizer = _tokenizer(trial)
    files |= tokenizer
    if config.get("output_hidden_states"):  # of a pass: `generate` returns tokens alone
        files["generation_config.json"] = {"output_hidden_states": False}
    for name, content in files.items():
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    (folder / FILE).write_bytes(safetensors.torch.save(named, {"format": "pt"}))
    family, sample = config["model_type"], _TEXT_SAMPLE if tokenizer else _ID_SAMPLE
    about = _BYTES if trial.is_bytes else _STORED_TOKENIZER if tokenizer else _NO_TOKENIZER
    card = readme(
        data,
        trial.architecture,
        intro=_INTRO.format(family=family),
        use=f"{_LOAD}\n{sample}\n\n{about}\n{_LENGTH}",
        files=_FILES + (_TOKENIZER_FILES if tokenizer else ""),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer(trial: TrainedTrial) -> dict[str, Plain]:
    """Return the files of the tokenizer of a trial; none for arrays without one."""
    context = trial.record.setting("train", "context")
    if trial.is_bytes:
        return byte_tokenizer(context)
    if trial.tokenizer is None:
        return {}
    return {
        "tokenizer.json": json.loads(trial.tokenizer),
        "tokenizer_config.json": _tokenizer_settings(context),
    }


def _tokenizer_settings(context: int) -> Plain:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


def byte_tokenizer(context: int) -> dict[str, Plain]:
    """Return the files of a tokenizer of Hugging Face whose token i is the byte i.

    It is a byte-level BPE without merges (GPT-2's code): each byte stands as one character.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: Plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": _tokenizer_settings(context)}


def byte_letters() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE.

    Printable characters of Latin-1 stand for themselves, other bytes for those from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_INTRO = """\
A language model with its trained weights, in the layout of the family `{family}` of Hugging Face.
It needs transformers 5 or newer with PyTorch. It also loads in what reads this layout."""
_LOAD = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer   # run Python in this folder

    model = AutoModelForCausalLM.from_pretrained(".")"""
_TEXT_SAMPLE = """\
    tokenizer = AutoTokenizer.from_pretrained(".")
    tokens = tokenizer("def ", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(tokens, max_new_tokens=100, do_sample=False)[0]))"""
_ID_SAMPLE = """\
    tokens = torch.tensor([[0]])   # import torch
    print(model.generate(tokens, max_new_tokens=100, do_sample=False)[0])"""
_BYTES = "The model was trained on bytes: token i is the byte i, and no token ends a text."
_NO_TOKENIZER = """\
The study was given token arrays without a tokenizer, so there is none here: copy yours into this
folder. No token ends a text in config.json; set `eos_token_id` to the token of your tokenizer."""
_STORED_TOKENIZER = """\
`tokenizer.json` is the tokenizer of the study. No token ends a text in config.json; set
`eos_token_id` to the token of the tokenizer."""
_LENGTH = """\
`max_position_embeddings` is the length that the model was trained at."""
_FILES = """\
- `config.json`: the configuration of the family.
- `model.safetensors`: the weights in float32, under the names of the family.
- `moenas.json`: the architecture as a space file has it, every number above, recipe, data."""
_TOKENIZER_FILES = """
- `tokenizer.json`, `tokenizer_config.json`: the tokenizer of the corpus."""
