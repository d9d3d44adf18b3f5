"""The page of the environment variables: environment.md. tests/test_reference.py compares the table with the code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One variable: what reads it, what it does, and what holds when it is not set."""

    name: str
    reader: str
    meaning: str
    default: str = ""


INTRO = """\
# Environment variables

<!-- Written by docs/make_reference.py from the table in docs/make_environment.py: change it there. -->

Every variable that Tandem, its release scripts and its Makefile read. An option on the command line takes precedence
over its variable. Libraries that Tandem uses read more variables of their own.
"""

TANDEM = (
    Variable("TANDEM_CACHE", "all commands that use the cache", "root of the local cache: compiled graphs, weight shards, pulled blobs, downloaded sources, text of `tandem distill`; `~` is the home folder", "`artifacts/cache` in the current folder; on a node of a Ray cluster `~/.cache/tandem`"),
    Variable("TANDEM_REMOTE_CACHE", "`tandem build --remote-cache`; `tandem cache push`, `pull`", "shared cache of compiled graphs: a folder or `s3://bucket/prefix`", "no shared cache"),
    Variable("TANDEM_PUSH_CACHE", "`tandem build --push-cache`", "`1`: write compiled graphs to the shared cache", "read the shared cache only"),
    Variable("TANDEM_POLICY", "commands with `--policy`; vLLM with Tandem's plugin", "policy file: which signatures an artifact needs", "no signature needed"),
    Variable("TANDEM_REQUIRE_SIGNATURE", "vLLM with Tandem's plugin", "key file or identity that must have signed the artifact; `tandem serve --require-signature` sets it", "no signature needed"),
    Variable("TANDEM_ISSUER", "vLLM with Tandem's plugin", "issuer of that identity; `tandem serve --issuer` sets it", "GitHub Actions"),
    Variable("TANDEM_VERIFIED_MANIFEST", "vLLM with Tandem's plugin", "SHA-256 of the manifest that the server's first process verified, for its other processes", "set by the server"),
    Variable("TANDEM_RANK_TIMEOUT_S", "backend `inductor` with several ranks", "time limit of one run of a graph on all ranks, in seconds", "`600`"),
    Variable("TANDEM_TIMESTAMPS", "every command", "`0`: no times before the lines on stderr", "times in UTC without a terminal"),
    Variable("TANDEM_KEY_PASSWORD", "`tandem publish --sign`, `tandem sign --key`", "password of the private key", "the key has no password"),
    Variable("TANDEM_ARTIFACT", "vLLM with Tandem's plugin", "folder of the artifact to serve; `tandem serve` sets it", "a folder that `vllm serve` names"),
    Variable("TANDEM_COMPILE_TIMEOUT_S", "backend `neuron`", "time limit of one run of neuronx-cc, in seconds", "`14400`"),
    Variable("NO_COLOR", "every command", "no colour and no bold text on a terminal, with any value but the empty one", "colour on a terminal"),
    Variable("TERM", "every command", "`dumb`: no bars and no colour, as without a terminal", "set by the terminal"),
    Variable("PYTHONUTF8", "the command `tandem`", "Python's UTF-8 mode; `tandem` sets it for itself and its processes where the locale is not UTF-8", "the locale"),
    Variable("SHELL", "`tandem completion`", "shell whose script is printed or installed, if none is named", "set by the login"),
    Variable("_TANDEM_COMPLETE", "the command `tandem`", "set by the script of `tandem completion`: the shell that asks", "no completion"),
    Variable("OMP_WAIT_POLICY", "libgomp", "`active` or `passive`: how threads of a graph wait for each other", "short waits: `GOMP_SPINCOUNT` [below](#set-by-tandem)"),
)  # fmt: skip
BUILD = (
    Variable("CXX", "backend `inductor`", "C++ compiler (GCC, Clang or Intel's), with a launcher before it and flags behind it: `ccache g++ -pipe`; flags are part of a graph's cache key, launchers are not; another compiler makes a build stale", "`g++`"),
    Variable("TMPDIR", "backend `inductor`; all temporary files", "folder for compiled files; skipped if its path is long or has spaces or other special characters, or if it is missing, not writable or mounted `noexec`", "`TEMP`, `TMP`, `/tmp`, `/var/tmp`, the user's cache: the first that is usable"),
    Variable("TEMP", "backend `inductor`; all temporary files", "as `TMPDIR`", "the next folder of that list"),
    Variable("TMP", "backend `inductor`; all temporary files", "as `TMPDIR`", "the next folder of that list"),
    Variable("XDG_CACHE_HOME", "backend `inductor`", "the user's cache, the last folder of that list", "`~/.cache`"),
    Variable("RAY_ADDRESS", "`tandem build --executor ray`", "address of the Ray cluster: `HOST:6379`, or `ray://HOST:10001`", "the cluster that runs on this machine"),
    Variable("HTTP_PROXY", "`s3://`, `hf://`, `oci://`", "proxy; `HTTPS_PROXY`, `ALL_PROXY` and names in lower case likewise; checked before a request", "no proxy"),
    Variable("HTTPS_PROXY", "`s3://`, `hf://`, `oci://`", "proxy of encrypted connections", "no proxy"),
    Variable("ALL_PROXY", "`s3://`, `hf://`", "proxy of all connections", "no proxy"),
    Variable("SOURCE_DATE_EPOCH", "`tandem build`", "time of creation that the manifest records, in seconds since 1970, for reproducible artifacts", "now"),
    Variable("PIP_INDEX_URL", "pip, when Tandem fetches a `package://` source", "package index", "pip's configuration"),
    Variable("PIP_EXTRA_INDEX_URL", "pip, when the Makefile installs Tandem", "additional package index, for CPU builds of PyTorch", "pip's configuration"),
)  # fmt: skip
HUB = (
    Variable("HF_TOKEN", "`hf://` sources and registries", "access token", "the token that `hf auth login` stored"),
    Variable("HF_ENDPOINT", "`hf://` sources and registries", "URL of the Hub", "`https://huggingface.co`"),
    Variable("TANDEM_STREAM", "`hf://` sources", "`1`: leave weights on the Hub, and read them by ranges while shards are written", "download them to `HF_HUB_CACHE`"),
    Variable("HF_HUB_CACHE", "`hf://` sources (library `huggingface_hub`)", "folder of downloaded models", "`~/.cache/huggingface/hub`"),
    Variable("HF_HUB_DISABLE_XET", "`hf://` registries (library `huggingface_hub`)", "`1`: transfer with LFS, for Hubs without Xet", "Xet"),
)  # fmt: skip
OCI = (
    Variable("DOCKER_CONFIG", "`oci://` registries", "folder of `config.json`, in which `docker login` keeps credentials and the names of credential helpers", "`~/.docker`"),
    Variable("REGISTRY_AUTH_FILE", "`oci://` registries", "file of credentials of Podman and Skopeo", "`$XDG_RUNTIME_DIR/containers/auth.json`"),
    Variable("XDG_RUNTIME_DIR", "`oci://` registries", "folder of `containers/auth.json`, in which `podman login` keeps credentials", "no such file"),
    Variable("TANDEM_OCI_PLAIN_HTTP", "`oci://` registries", "registries without TLS: hosts with their ports, between commas", "`localhost` and 127.0.0.0/8 only"),
    Variable("SSL_CERT_FILE", "`oci://` registries (Python)", "certificates of authorities, for a registry with one of its own", "those of the system"),
)  # fmt: skip
S3 = (
    Variable("AWS_ENDPOINT_URL_S3", "`s3://` sources, registries and caches", "URL of the S3 server; `http://` allows unencrypted connections", "`AWS_ENDPOINT_URL`"),
    Variable("AWS_ENDPOINT_URL", "`s3://` registries and caches", "URL of the S3 server", "Amazon S3"),
    Variable("AWS_REGION", "`s3://` registries and caches (library `obstore`)", "region of the bucket", "`us-east-1`"),
    Variable("AWS_ACCESS_KEY_ID", "`s3://` registries and caches", "access key; takes precedence over profiles", "the next source of credentials"),
    Variable("AWS_SECRET_ACCESS_KEY", "`s3://` registries and caches (library `obstore`)", "secret of the access key"),
    Variable("AWS_SESSION_TOKEN", "`s3://` registries and caches (library `obstore`)", "session token of temporary credentials"),
    Variable("AWS_WEB_IDENTITY_TOKEN_FILE", "`s3://` registries and caches", "token file of a web identity, as Kubernetes mounts it; takes precedence over profiles", "the next source of credentials"),
    Variable("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "`s3://` registries and caches", "credentials of an ECS task; takes precedence over profiles", "the next source of credentials"),
    Variable("AWS_CONTAINER_CREDENTIALS_FULL_URI", "`s3://` registries and caches", "credentials of an EKS pod; takes precedence over profiles", "the next source of credentials"),
    Variable("AWS_PROFILE", "`s3://` registries and caches", "profile in the files below", "`default`, if a file exists; else the role of the machine"),
    Variable("AWS_SHARED_CREDENTIALS_FILE", "`s3://` registries and caches", "file of credentials", "`~/.aws/credentials`"),
    Variable("AWS_CONFIG_FILE", "`s3://` registries and caches", "file of profiles", "`~/.aws/config`"),
    Variable("AWS_SKIP_SIGNATURE", "`s3://` registries and caches", "`true`: anonymous requests, for public buckets", "signed requests"),
)  # fmt: skip
SIGNING = (
    Variable("SIGSTORE_ID_TOKEN", "`tandem publish --keyless`, `tandem sign` without `--key`", "identity token of the CI job", "the identity that the CI system offers"),
    Variable("ACTIONS_ID_TOKEN_REQUEST_URL", "`scripts/ci/release.sh`; keyless signing on GitHub", "source of the job's identity; GitHub sets it with `id-token: write`"),
)  # fmt: skip
RECORDED = (
    Variable("GITHUB_ACTOR", "registry commands that move an alias", "name in the alias's history", "`USER`"),
    Variable("USER", "registry commands that move an alias", "name in the alias's history", "the account's name"),
    Variable("GITHUB_WORKFLOW_REF", "`tandem build`", "builder in provenance.json", "a local build"),
    Variable("GITHUB_SERVER_URL", "`tandem build`", "server in provenance.json", "`https://github.com`"),
    Variable("GITHUB_REPOSITORY", "`tandem build`", "repository in provenance.json"),
    Variable("GITHUB_RUN_ID", "`tandem build`", "run in provenance.json", "no run is recorded"),
    Variable("GITHUB_RUN_ATTEMPT", "`tandem build`", "attempt in provenance.json", "`1`"),
)  # fmt: skip
NEURON = (
    Variable("NEURON_LOGICAL_NC_CONFIG", "commands that compare an artifact with the host; backend `neuron`", "physical cores per logical core; a build rejects a value other than the recipe's `backend.lnc`", "the chip's default"),
    Variable("NEURON_PLATFORM_TARGET_OVERRIDE", "backend `neuron`", "chip; a build rejects a value other than the recipe's `backend.target`", "the recipe's chip"),
    Variable("NEURON_CC_FLAGS", "backend `neuron`", "a build rejects it: flags belong into the recipe's `backend.flags`"),
    Variable("NEURON_*", "backend `neuron`", "other variables of the SDK that change compiled code: part of a graph's cache key"),
    Variable("XLA_*", "backend `neuron`", "variables of PyTorch/XLA that change compiled code: part of a graph's cache key"),
    Variable("VLLM_CACHE_ROOT", "`tandem vllm-cache install`, `check`", "vLLM's cache root", "`~/.cache/vllm`"),
)  # fmt: skip
SET = (
    Variable("OMP_NUM_THREADS", "compile workers", "the worker's share of the cores"),
    Variable("GOMP_SPINCOUNT", "every process", "`1000`, unless it or `OMP_WAIT_POLICY` is set: threads that wait for others sleep soon, so that a graph is not many times slower where other processes use the cores ([results](../results.md#shared-cores))"),
    Variable("TORCHINDUCTOR_CACHE_DIR", "compile workers", "a temporary folder"),
    Variable("TRITON_CACHE_DIR", "compile workers", "a temporary folder"),
    Variable("GLOO_SOCKET_IFNAME", "ranks of an artifact", "`lo`, unless it is set"),
    Variable("BASE_COMPILE_WORK_DIR", "NxD Inference", "a temporary folder"),
    Variable("NEURON_COMPILED_ARTIFACTS", "the command that `tandem vllm-args` prints", "the artifact's folder"),
    Variable("VLLM_NEURON_FRAMEWORK", "the command that `tandem vllm-args` prints", "`neuronx-distributed-inference`"),
    Variable("VLLM_NEURON_DISABLE_WARMUP_COMPILE", "the command that `tandem vllm-cache install` prints", "`1`: a graph that is not in the cache is an error"),
    Variable("VLLM_NEURON_DISABLE_GRAPH_CAPTURE_BACKEND", "the command that `tandem vllm-cache install` prints", "`1`: graphs are not captured"),
    Variable("NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND", "the command that `tandem vllm-cache install` prints", "`1`: the same, by its name in newer versions"),
)  # fmt: skip
REJECTED = (
    Variable("VLLM_NEURON_BACKEND", "`tandem vllm-cache pack --env`", "the plugin's compilation route, which must be that of the packed graphs"),
    Variable("VLLM_NEURON_DISABLE_COMPILE_CACHE", "`tandem vllm-cache pack --env`", "contradicts a packed cache"),
    Variable("NEURON_LIBTORCH_DISABLE_COMPILE_CACHE", "`tandem vllm-cache pack --env`", "contradicts a packed cache"),
)  # fmt: skip
RELEASE = (
    Variable("REGISTRY", "`scripts/ci/release.sh publish`", "registry to publish to", "**required**"),
    Variable("ALIAS", "`scripts/ci/release.sh publish` and `promote`", "alias to set to the release", "no alias is set"),
    Variable("FROM", "`scripts/ci/release.sh promote`", "registry to copy from", "**required**"),
    Variable("TO", "`scripts/ci/release.sh promote`", "registry to copy to", "**required**"),
    Variable("POLICY", "`scripts/ci/release.sh promote`", "policy file that must accept the release", "**required**"),
    Variable("OCI_USERNAME", "`scripts/ci/release.sh publish` and `promote`", "user of the OCI registries of the step", "as Docker or Podman is logged in"),
    Variable("OCI_PASSWORD", "`scripts/ci/release.sh publish` and `promote`", "its password or token", "as Docker or Podman is logged in"),
    Variable("SIGNING_KEY", "`scripts/ci/release.sh publish`", "file of a private key", "keyless, with the CI job's identity"),
    Variable("BACKEND", "`scripts/ci/release.sh changed`", "list only recipes of this backend", "all recipes"),
    Variable("PYTHON", "`scripts/ci/package.sh`; the Makefile", "Python interpreter", "`python`; `python3` in the Makefile"),
    Variable("TANDEM_REGISTRY", "variable of `release.yml`", "registry; without it, the workflow publishes nothing", "no publication"),
    Variable("TANDEM_ALIAS", "variable of `release.yml`", "alias to set to the release", "no alias is set"),
    Variable("TANDEM_RUNNER", "variable of `release.yml`", "label of the runner that builds pushes", "`ubuntu-latest`"),
    Variable("TANDEM_PR_RUNNER", "variable of `release.yml`", "label of the runner that builds pull requests: another machine", "`ubuntu-latest`"),
    Variable("CACHE_AWS_ACCESS_KEY_ID", "secret of `release.yml`", "access key of the shared cache alone, for the job that builds", "no shared cache"),
    Variable("CACHE_AWS_SECRET_ACCESS_KEY", "secret of `release.yml`", "its secret key", "no shared cache"),
    Variable("TANDEM_PROMOTE_FROM", "variable of `promote.yml`, in the environment of a stage", "registry of the stage before", "**required**"),
    Variable("TANDEM_PROMOTE_TO", "variable of `promote.yml`, in the environment of a stage", "registry of this stage", "**required**"),
    Variable("TANDEM_PROMOTE_ALIAS", "variable of `promote.yml`, in the environment of a stage", "alias to set to the release", "no alias is set"),
    Variable("TANDEM_PROMOTE_POLICY", "variable of `promote.yml`", "policy file in the repository", "`policy.yaml`"),
    Variable("TANDEM_PYPI_PROJECT", "variable of `package.yml`", "name of the project on PyPI; without it, the workflow publishes nothing", "no publication"),
)  # fmt: skip
DEVELOPMENT = (
    Variable("VENV", "Makefile", "virtual environment", "`.venv`"),
    Variable("RECIPE", "`make build`, `make test-soak`", "recipe to build", "`smollm2-135m-spec`"),
    Variable("MINUTES", "`make test-soak`", "length of the load", "`15`"),
    Variable("SEED", "`make test-soak`, `make test-chaos`", "seed of the disturbances", "`1`"),
    Variable("EXTRAS", "Makefile", "extras that the virtual environment gets, separated by spaces; tests add `dev`", "`build`; `build-neuron` where torch-neuronx is installed"),
    Variable("XLA_VENV", "`make test-xla`", "virtual environment", "`.venv-xla`"),
    Variable("XLA_PYTHON", "`make test-xla`", "Python interpreter", "`PYTHON`"),
    Variable("DRAFTS_VENV", "`make test-drafts`", "virtual environment", "`.venv-drafts`"),
    Variable("TRANSFORMERS_4_VENV", "`make test-transformers-4`", "virtual environment", "`.venv-transformers-4`"),
    Variable("CLIENTS_VENV", "`make test-vllm`", "virtual environment of lm-eval, guidellm and LangChain", "`.venv-clients`"),
    Variable("VLLM_VENV", "`make test-vllm`", "virtual environment", "`.venv-vllm`"),
    Variable("DOCS_VENV", "`make docs`", "virtual environment", "`.venv-docs`"),
    Variable("TANDEM_NXD_SOURCE", "`make test-xla`", "folder `src` of neuronx-distributed, to test with it", "a stand-in"),
)  # fmt: skip

SECTIONS: dict[str, tuple[Variable, ...]] = {
    "Tandem": TANDEM,
    "Build": BUILD,
    "Hugging Face Hub": HUB,
    "S3": S3,
    "OCI": OCI,
    "Signing": SIGNING,
    "Provenance and history": RECORDED,
    "Neuron": NEURON,
    "CI scripts and workflows": RELEASE,
    "Development": DEVELOPMENT,
}
SET_BY_TANDEM = """\
## Set by Tandem

Tandem sets these for its own processes, or in a command that it prints.

| variable | for | value |
|---|---|---|"""
REJECTED_BY_TANDEM = """
## Rejected

| variable | where | reason |
|---|---|---|"""


def environment_page() -> str:
    """Return environment.md: a table for each subject."""
    lines = [INTRO]
    for title, variables in SECTIONS.items():
        lines += [f"## {title}\n", "| variable | read by | meaning | when not set |", "|---|---|---|---|"]
        lines += [f"| `{item.name}` | {item.reader} | {item.meaning} | {item.default} |" for item in variables]
        lines.append("")
    lines += [SET_BY_TANDEM, *(_short(item) for item in SET), REJECTED_BY_TANDEM, *(_short(item) for item in REJECTED)]
    return "\n".join(lines) + "\n"


def _short(item: Variable) -> str:
    return f"| `{item.name}` | {item.reader} | {item.meaning} |"
