#!/usr/bin/env bash
# Write scripts/ci/requirements-publish.txt: what the job `publish` of release.yml installs, with the hash of every wheel.
#
# Needs uv. The job runs on Linux with Python 3.12. Review the difference before you commit it.
set -euo pipefail
cd "$(dirname "$0")/../.."
{
  printf '# Written by scripts/ci/requirements-publish.sh: what the job `publish` of release.yml installs.\n'
  uv pip compile pyproject.toml - --extra pull --generate-hashes --no-annotate --no-header --quiet --only-binary :all: \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-emit-index-url <<<'setuptools'
} >scripts/ci/requirements-publish.txt
