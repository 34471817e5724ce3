#!/usr/bin/env bash
# Collect what a GPU machine without a network lacks: bash benchmarks/gpu/prepare.sh [FOLDER]
#
# With --check instead of a FOLDER it only looks whether every dependency has a source.
# FOLDER (.gpu, which git ignores) gets wheels for Python 3.12 on x86-64 and a Ray that is cut down to
# what a cluster of one machine needs, together less than 60 MiB. The machine is expected to have what
# AT_HAND lists; every other dependency of pyproject.toml must be in WHEELS, or this stops.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
to=${1:-$root/.gpu}
python=${PYTHON:-python3}

# Dependencies that images with torch have, as fsspec, which torch needs; so are those of typer and Ray.
AT_HAND="torch fsspec numpy pandas scipy pyyaml safetensors typer rich"
# The others, and what they need. greenlet is for SQLAlchemy; colorlog, mako, alembic, sqlalchemy for
# Optuna; bottle for its dashboard; termcolor, yacs, iopath for fvcore; cffi, pycparser and
# platformdirs for moocore; the last four for Ray.
WHEELS="optuna optuna-dashboard sqlalchemy alembic moocore plotly
    colorlog mako greenlet bottle yacs termcolor cffi pycparser platformdirs
    jsonschema jsonschema-specifications referencing rpds-py"
# Those that are published as source alone; they hold no compiled code.
SOURCES="fvcore iopath"
LIMIT_KIB=$((60 * 1024))

# name==version as constraints.txt pins it, or the name alone
pinned() {
    for name in "$@"; do
        grep -i -m1 -E "^${name//-/[-_]}==" "$root/constraints.txt" || echo "$name"
    done
}

platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
for alias in manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${alias}_x86_64")
done

# download FOLDER NAME...
download() {
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d "$1" "${@:2}"
}

# Every dependency that pyproject.toml lists must come from somewhere.
listed=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\).*/\1/p' "$root/pyproject.toml")
for name in $listed; do
    case " $(echo $AT_HAND $WHEELS $SOURCES ray) " in
    *" $name "*) ;;
    *)
        echo "$0: pyproject.toml needs '$name': add it to AT_HAND or to WHEELS" >&2
        exit 1
        ;;
    esac
done

if [ "$to" = --check ]; then
    exit 0
fi

rm -rf "$to"
mkdir -p "$to/wheels"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "wheels"
# shellcheck disable=SC2046,SC2086 # lists of words
download "$to/wheels" $(pinned $WHEELS)
# shellcheck disable=SC2046,SC2086
"$python" -m pip wheel -q --no-deps -w "$to/wheels" $(pinned $SOURCES)

echo "ray, cut down"
# shellcheck disable=SC2046
download "$work" $(pinned ray)
mkdir "$work/ray"
"$python" -m zipfile -e "$work"/ray-*.whl "$work/ray"
for part in jars rllib llm serve data train tune cpp dashboard/client; do
    rm -rf "$work/ray/ray/$part"
done
# A zip file does not say what may be run.
find "$work/ray/ray" -type f \( -name raylet -o -name gcs_server -o -name '*.so' \) -exec chmod +x {} +
tar -C "$work/ray" -cJf "$to/ray.tar.xz" .

du -sh "$to"
size=$(du -sk "$to" | cut -f1)
if [ "$size" -gt "$LIMIT_KIB" ]; then
    echo "$0: $to has $size KiB, more than $LIMIT_KIB" >&2
    exit 1
fi
