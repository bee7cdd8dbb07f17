#!/bin/sh
# Writes every lock file anew, each with hashes. Called by hand when a version is to be bumped (see README.md);
# it must not be called by a build: a build installs what the locks say.
# Usage: images/lock.sh [uv pip compile options], for example: images/lock.sh --upgrade-package transformers
set -eu
cd "$(dirname "$0")/.."
lock() { uv pip compile --quiet --generate-hashes --no-header --python-version 3.11 "$@"; }

# The trainer's stack is the one with the narrowest ranges, so it decides; what operator and developers share with it follows.
lock --universal operator/pyproject.toml --extra prepare --extra trainer -o images/trainer/requirements.lock "$@"
lock --universal operator/pyproject.toml --extra operator --extra prepare --extra dev \
  -c images/trainer/requirements.lock -o operator/dev.lock "$@"
lock --universal operator/pyproject.toml --extra operator -c operator/dev.lock -o images/operator/requirements.lock "$@"
# vLLM pins its own torch and runs on Linux only: its lock stands alone.
lock --python-platform x86_64-manylinux_2_35 images/inference/requirements.in -o images/inference/requirements.lock "$@"
