"""The description of a corpus in `moenas check`: formats of its files, tokens, vocabulary."""

from __future__ import annotations

import os
from collections import Counter

from moenas.data import text_columns, token_files
from moenas.data.corpus import Corpus
from moenas.data.section import paths
from moenas.records import Plain

TEXT = "text"


def formats(section: Plain) -> dict[str, int]:
    """Return how many files of each format a section names; {} where it names none."""
    n_files = Counter[str]()
    for path in paths({**section, "tokenizer": None}):
        if section["kind"] == "tokens":
            n_files[token_files.inspect(path, section["dtype"]).format] += 1
        else:
            default = text_columns.JSON_LINES if section.get("text_column") else TEXT
            n_files[text_columns.text_format(path) or default] += 1
    return dict(n_files)


def report(section: Plain, corpus: Corpus) -> Plain:
    """Describe a corpus as a JSON object."""
    tokenizer = corpus.manifest.get("tokenizer")
    return {
        "name": corpus.name,
        "kind": section["kind"],
        "formats": formats(section),
        "text_column": section.get("text_column"),
        "dtype": corpus.train.dtype.name,
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "vocab_size": corpus.vocab_size,
        "split": corpus.manifest.get("split"),
        "tokenizer": tokenizer
        and {key: tokenizer[key] for key in ("path", "sha256", "vocab_size", "end_of_text")},
        "sha256": corpus.sha256,
    }


def line(corpus: Plain) -> str:
    """Lay out what `report` found in one line."""
    counted = corpus["formats"].items()
    files = ", ".join(f"{n} file{'s' if n > 1 else ''} of {name}" for name, n in counted)
    told = f"corpus: {files or corpus['name']}"
    if corpus["text_column"]:
        told += f", column '{corpus['text_column']}'"
    tokenizer = corpus["tokenizer"]
    if tokenizer:
        end = tokenizer["end_of_text"]
        told += f", with {os.path.basename(tokenizer['path'])}"
        told += f" and {end} after each document" if end and corpus["kind"] != "tokens" else ""
    elif corpus["kind"] == "tokens":
        told += f" ({corpus['dtype']})"
    else:
        told += ", as bytes"
    return (
        f"{told}; {corpus['train_tokens']:,} tokens to train on, {corpus['val_tokens']:,} to"
        f" validate on ({corpus['split']}), vocabulary {corpus['vocab_size']:,}"
    )
