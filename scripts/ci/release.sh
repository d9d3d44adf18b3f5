#!/usr/bin/env bash
# Compile on merge, for any CI: changed recipes, a locked build with its gates, a signed release, an alias.
#
#   scripts/ci/release.sh changed BASE [HEAD]   names of the recipes that the commits from BASE to HEAD change, as a JSON list
#   scripts/ci/release.sh build RECIPE          build from the lock, and run the gates; fails if a gate fails
#   scripts/ci/release.sh summary RECIPE        artifact and results of the gates, in Markdown; also after a failed build
#   scripts/ci/release.sh check RECIPE          check what was built, maybe elsewhere: files, recipe, lock, gates, run
#   scripts/ci/release.sh publish RECIPE        sign, publish, then move the alias
#   scripts/ci/release.sh promote NAME@VERSION  copy a release from the registry FROM to TO if POLICY accepts it; move the alias
#
# From the environment: REGISTRY (a folder, s3://bucket/prefix, hf://org, oci://host/path), ALIAS (none: no alias is moved),
# SIGNING_KEY (a private key's file) or an identity of the CI job for a keyless signature, TANDEM_REMOTE_CACHE and
# TANDEM_PUSH_CACHE=1. With BACKEND, `changed` names only the recipes that this backend builds. `promote` reads FROM, TO,
# POLICY and ALIAS. OCI_USERNAME and OCI_PASSWORD log in to the OCI registries of a step (none: as Docker is logged in).
set -euo pipefail
cd "$(dirname "$0")/../.."

# CI passes unset variables as empty strings, which AWS tools read as values.
for name in "${!AWS_@}" "${!HF_@}" "${!TANDEM_@}"; do
  if [[ -z ${!name} ]]; then unset "$name"; fi
done

say() { printf '%s\n' "$*" >&2; }

changed() { files "$@" | tandem recipe changed - | of_backend; }

files() {
  local base=$1 head=${2:-HEAD}
  # A first push has no earlier commit: every recipe counts as changed.
  if [[ $base =~ ^0+$ ]] || ! git cat-file -e "$base^{commit}" 2>/dev/null; then
    git ls-files -- recipes
  else
    git diff --name-only --no-renames "$base" "$head" -- recipes
  fi
}

of_backend() { if [[ -n ${BACKEND:-} ]]; then python scripts/ci/of_backend.py "$BACKEND"; else cat; fi; }

build() { tandem build "$1" --locked; }

summary() { tandem inspect "$1" --markdown || printf '## %s\n\nNo artifact: the log says why.\n' "$1"; }

check() {
  tandem verify "$1"
  python scripts/ci/check_artifact.py "$1"
}

login() {
  local url host client=docker
  if [[ -z ${OCI_PASSWORD:-} ]]; then return; fi
  command -v docker >/dev/null || client=podman
  for url in "$@"; do
    if [[ $url != oci://* ]]; then continue; fi
    host=${url#oci://}
    "$client" login --username "${OCI_USERNAME:?set OCI_USERNAME}" --password-stdin "${host%%/*}" <<<"$OCI_PASSWORD" >&2
  done
}

publish() {
  local sign=() alias=()
  if [[ -n ${SIGNING_KEY:-} ]]; then
    sign=(--sign "$SIGNING_KEY")
  elif [[ -n ${ACTIONS_ID_TOKEN_REQUEST_URL:-}${SIGSTORE_ID_TOKEN:-} ]]; then
    sign=(--keyless)
  else
    say "nothing to sign with: set SIGNING_KEY, or give this job an identity (id-token: write)"
    return 3
  fi
  if [[ -n ${ALIAS:-} ]]; then alias=(--alias "$ALIAS"); fi
  login "${REGISTRY:?set REGISTRY}"
  tandem publish "$1" --to "$REGISTRY" "${sign[@]}" "${alias[@]}"
}

promote() {
  local alias=()
  if [[ -n ${ALIAS:-} ]]; then alias=(--alias "$ALIAS"); fi
  login "${FROM:?set FROM}" "${TO:?set TO}"
  tandem copy "$FROM/$1" "$TO" --policy "${POLICY:?set POLICY}" "${alias[@]}"
}

command=${1:?see the head of this file}
shift
case $command in
  changed | build | summary | check | publish | promote) "$command" "$@" ;;
  *) say "unknown step $command" && exit 2 ;;
esac
