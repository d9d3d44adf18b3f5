#!/usr/bin/env bash
# Release of the Python package, for any CI. Each command is one step of .github/workflows/package.yml.
#
#   scripts/ci/package.sh tag TAG   fail unless TAG is `v` followed by pipeline.__version__
#   scripts/ci/package.sh build     write the sdist and the wheel into dist/
#   scripts/ci/package.sh check     check metadata and contents of the files in dist/
#   scripts/ci/package.sh smoke     install the wheel, without extras, into a new environment; publish, pull and verify an artifact
#
# `build` and `check` need scripts/ci/requirements-package.txt. PYTHON names the interpreter (default: python).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}

say() { printf '%s\n' "$*" >&2; }

version() { "$PYTHON" -c 'from pipeline import __version__; print(__version__)'; }

tag() {
  local tag=${1:?usage: package.sh tag TAG} version
  version=$(version)
  if [[ $tag != "v$version" ]]; then
    say "tag does not name the package's version: tag $tag, pipeline.__version__ $version"
    say "hint: set __version__ in pipeline/__init__.py, or push the tag v$version"
    return 3
  fi
}

build() {
  rm -rf build dist
  "$PYTHON" -m build --outdir dist .
}

check() {
  "$PYTHON" -m twine check --strict dist/*
  "$PYTHON" -m check_wheel_contents dist/*.whl
}

# The wheel alone must publish, pull and verify, which needs no torch. It runs outside the checkout, so that the installed
# package is imported. The artifact is a compile cache of the smallest layout that `tandem vllm-cache pack` accepts.
smoke() {
  local wheel version
  wheel=$(realpath dist/*.whl) version=$(version)
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$PYTHON" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet "$wheel"
  cd "$work"
  export TANDEM_CACHE="$work/tandem-cache" PATH="$work/venv/bin:$PATH"
  unset PYTHONPATH
  if python -c 'import torch' 2>/dev/null; then say "the base install brought torch" && return 3; fi
  tandem --version | grep --fixed-strings "$version"
  compile_cache "$work/filled"
  tandem vllm-cache pack "$work/filled" --name smoke --out "$work/artifact" --serve 'org/model' \
    --version-of vllm-neuron=0.0.0 --version-of neuronx-cc=0.0.0
  tandem publish "$work/artifact" --to "$work/registry" --alias latest --unvalidated
  tandem pull "$work/registry/smoke@latest" "$work/pulled"
  tandem verify "$work/pulled"
  diff --recursive --exclude pulled.json "$work/artifact" "$work/pulled"
}

compile_cache() {
  local key=0123456789abcdef0123456789abcdef
  local entry=$1/neuron/compile_cache/$key
  mkdir -p "$entry"
  printf 'graph' >"$entry/graph.hlo"
  printf 'NEFF' >"$entry/graph_$key.neff"
  printf '{"version": 0, "cache_key": "%s"}' "$key" >"$entry/.artifact_metadata_v0.json"
  printf 'neuronx-cc compile graph.hlo --framework XLA --target trn2 --output n --logfile l -O1' >"$entry/command.txt"
  printf 'completed:0.0\nneff_size:4\n' >"$entry/.compilation_complete"
}

command=${1:?see the head of this file}
shift
case $command in
  tag | build | check | smoke) "$command" "$@" ;;
  *) say "unknown step $command" && exit 2 ;;
esac
