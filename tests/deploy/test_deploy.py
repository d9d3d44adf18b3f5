"""What is deployed: workflows, manifests, unit and images by their checkers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import click
import pytest
import yaml

from pipeline.errors import CorruptError, HostError, InputError, RefusedError
from pipeline.registry.publish import publish
from support import small_artifacts as small
from support.paths import ROOT
from support.release_workflow import TINY, tool

WORKFLOW = ROOT / ".github/workflows/release.yml"
SLOW = ROOT / ".github/workflows/slow.yml"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.server
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_by_actionlint(workflow):
    done = subprocess.run([tool("actionlint"), str(workflow)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.server
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_by_its_schema(workflow):
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.server
@pytest.mark.parametrize(
    ("schema", "pattern"),
    [("dependabot", "dependabot.yml"), ("github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
     ("github-issue-config", "ISSUE_TEMPLATE/config.yml")],
)  # fmt: skip
def test_github_files_by_their_schemas(schema, pattern):
    files = [str(path) for path in (ROOT / ".github").glob(pattern)]
    assert files
    command = [tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.server
def test_package_is_built_and_its_wheel_pulls(tmp_path):
    """The steps of ci.yml and package.yml, on a copy: sdist and wheel, their checks, the wheel in a new environment."""
    root = tmp_path / "checkout"
    for name in ("pipeline", "tandem_spec", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    environ = os.environ | {"PYTHON": sys.executable}
    for step in ("build", "check", "smoke"):
        command = ["bash", str(root / "scripts/ci/package.sh"), step]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.suffix for path in (root / "dist").iterdir()) == [".gz", ".whl"]
    (wheel,) = (root / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    data = {"pipeline/py.typed", "pipeline/validate/default_prompts.jsonl", "pipeline/backends/inductor/include/regex"}
    assert data | {"tandem_spec/py.typed"} <= set(names)


def test_slow_lanes_are_targets_of_the_makefile():
    """All of them; `test-quick` is a part of `test`, which each change runs (ci.yml)."""
    data = yaml.safe_load(SLOW.read_text())
    lanes = data["jobs"]["lane"]["strategy"]["matrix"]["lane"]
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert {*lanes, "test-quick"} == {target for target in targets if target.startswith("test-")}
    assert data["jobs"]["lane"]["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in re.findall(r"uses: (\S+)", SLOW.read_text()))


def test_workflow_pins_actions_and_asks_for_little():
    """Every action by commit; no permission at the top; code of pull requests runs without secrets or identity."""
    text = WORKFLOW.read_text()
    uses = re.findall(r"uses: (\S+)", text.split("name: release\n", 1)[1])
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in uses)
    data = yaml.safe_load(text)
    assert data["permissions"] == {}
    rights = {name: job["permissions"] for name, job in data["jobs"].items()}
    assert rights == {
        "changed": {"contents": "read"},
        "check": {"contents": "read"},
        "comment": {"pull-requests": "write"},
        "build": {"contents": "read"},
        "publish": {"contents": "read", "id-token": "write"},
    }
    assert "secrets." not in json.dumps(data["jobs"]["check"])
    runs = [step.get("run", "") for job in data["jobs"].values() for step in job["steps"]]
    assert not any("${{" in run for run in runs)  # expressions in a shell are how branch names become commands


def test_no_push_loses_its_release():
    """Only a pull request's runs replace each other; publishing waits by recipe, and builds the newest commit."""
    data = yaml.safe_load(WORKFLOW.read_text())
    assert data["concurrency"] == {
        "group": "release-${{ github.event_name == 'pull_request' && github.ref || github.run_id }}",
        "cancel-in-progress": True,
    }
    publish = data["jobs"]["publish"]
    assert publish["concurrency"] == {"group": "publish-${{ matrix.recipe }}", "cancel-in-progress": False}
    for job in (data["jobs"]["build"], publish):
        assert job["steps"][0]["with"]["ref"] == "${{ github.ref }}"


def test_the_job_that_signs_builds_nothing_and_installs_pinned_wheels():
    """One job built, with unpinned packages, and held the identity and the registry's credentials."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    runs = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    signing = [name for name, job in jobs.items() if "id-token" in job["permissions"]]
    assert signing == ["publish"]
    assert "release.sh build" not in runs["publish"]
    assert "--require-hashes --only-binary :all: --no-deps -r scripts/ci/requirements-publish.txt" in runs["publish"]
    assert all("--no-deps" in line for line in runs["publish"].splitlines() if "pip install" in line)
    assert runs["publish"].index("release.sh check") < runs["publish"].index("release.sh publish")
    assert jobs["publish"]["environment"] == "release"
    secrets = {name: set(re.findall(r"secrets\.(\w+)", json.dumps(job))) for name, job in jobs.items()}
    assert secrets["build"] == {"CACHE_AWS_ACCESS_KEY_ID", "CACHE_AWS_SECRET_ACCESS_KEY"}
    assert not secrets["build"] & secrets["publish"]
    assert [name for name, found in secrets.items() if found] == ["build", "publish"]


def test_pull_requests_and_pushes_share_no_runner_and_no_cache():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    labels = {name: job["runs-on"] for name, job in jobs.items()}
    assert labels["check"] == "${{ vars.TANDEM_PR_RUNNER || 'ubuntu-latest' }}"
    assert labels["build"] == "${{ vars.TANDEM_RUNNER || 'ubuntu-latest' }}"
    assert labels["publish"] == "ubuntu-latest"
    assert "TANDEM_REMOTE_CACHE" not in json.dumps(jobs["check"])
    assert "actions/cache" not in WORKFLOW.read_text()


def test_requirements_of_the_signing_job_have_hashes():
    """Each is one version with hashes, among them what `tandem publish` to every kind of registry needs."""
    lines = (ROOT / "scripts/ci/requirements-publish.txt").read_text().replace("\\\n", " ").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+\s*", line) for line in pinned), (
        pinned
    )
    names = {line.partition("==")[0] for line in pinned}
    assert {
        "click",
        "pydantic",
        "setuptools",
        "obstore",
        "huggingface-hub",
        "urllib3",
        "model-signing",
        "pyopenssl",
    } <= names
    assert "torch" not in names


def test_an_artifact_of_another_recipe_run_or_verdict_is_not_signed(tmp_path, monkeypatch):
    """The job that signs did not build: what it was handed may be anything."""
    work = tmp_path / "work"
    root = small.make_validated(tmp_path / "artifacts/small", work).root
    (tmp_path / "recipes").mkdir()
    for name in ("recipe.yaml", "recipe.lock"):
        shutil.copy(root / name, tmp_path / f"recipes/small.{name.partition('.')[2]}")

    def checked(**environ: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "scripts/ci/check_artifact.py"), "small"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
        done = subprocess.run(command, cwd=tmp_path, env=clean | {"PYTHONPATH": str(ROOT)} | environ,
                              capture_output=True, text=True, check=False)  # fmt: skip
        return done.returncode, done.stderr

    assert checked() == (0, "")
    run = {
        "GITHUB_RUN_ID": "7",
        "GITHUB_REPOSITORY": "o/r",
        "GITHUB_WORKFLOW_REF": "o/r/.github/workflows/release.yml@m",
    }
    code, said = checked(**run)
    assert code == 4
    assert "builder: expected https://github.com/o/r/" in said
    assert "run: expected 7, found" in said
    recipe = tmp_path / "recipes/small.yaml"
    recipe.write_text(recipe.read_text().replace("max_new_tokens: 8", "max_new_tokens: 9"))
    assert "of another recipe" in checked()[1]
    shutil.copy(root / "recipe.yaml", recipe)
    lock = json.loads((tmp_path / "recipes/small.lock").read_text())
    lock["target"]["revision"] = "r2"
    (tmp_path / "recipes/small.lock").write_text(json.dumps(lock))
    assert "revision" in checked()[1]
    shutil.copy(root / "recipe.lock", tmp_path / "recipes/small.lock")
    shutil.rmtree(root)
    small.make_validated(root, work, passed=False)
    assert "validation gates did not pass" in checked()[1]


def test_policies_name_the_workflow_that_signs():
    """A certificate carries the file and the ref of the workflow that runs: this one, on the branch that it is for."""
    triggers = yaml.safe_load(WORKFLOW.read_text())[True]  # YAML reads `on` as a truth
    assert set(triggers) == {"push", "pull_request"}
    (branch,) = triggers["push"]["branches"]
    identity = f"identity: https://github.com/ORG/REPO/.github/workflows/{WORKFLOW.name}@refs/heads/{branch}\n"
    for policy in ("deploy/kubernetes/serve.yaml", "docs/how-to/sign.md"):
        assert identity in (ROOT / policy).read_text()


def test_recipes_of_other_backends_are_left_out(tmp_path):
    """One that cannot be read stays: its build tells why."""
    (tmp_path / "recipes").mkdir()
    recipes = {"here": TINY, "chip": TINY + "backend: {name: neuron, target: trn2}\n", "damaged": "nonsense: ["}
    for name, text in recipes.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(text)
    command = [sys.executable, str(ROOT / "scripts/ci/of_backend.py"), "inductor"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    names = json.dumps([*recipes])
    done = subprocess.run(command, cwd=tmp_path, env=environ, input=names, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["here", "damaged"]
    assert done.stderr == "chip: left out, it is not for inductor\n"


def test_settings_that_nobody_made_are_unset(tmp_path):
    """A workflow's unset variable is an empty text; as AWS_ENDPOINT_URL that ends the S3 client."""
    (tmp_path / "tandem").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "tandem").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AWS_ENDPOINT_URL": "", "AWS_REGION": "us-east-1"}
    command = ["bash", str(ROOT / "scripts/ci/release.sh"), "summary", "any"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "AWS_REGION=us-east-1\n" in done.stdout
    assert "AWS_ENDPOINT_URL" not in done.stdout


@pytest.mark.server
def test_kubernetes_manifests():
    command = [tool("kubernetes-validate"), "--strict", *map(str, (ROOT / "deploy/kubernetes").glob("*.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    """The manifests by their kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/kubernetes/serve.yaml").read_text())}


def test_kubernetes_arguments_are_options(manifests):
    """Both containers' command lines are ones that `tandem` takes; the server cannot write the volume."""
    from pipeline.cli.main import main

    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    for container, wanted in ((pod["initContainers"][0], "pull"), (pod["containers"][0], "serve")):
        command, *args = container["args"]
        assert command == wanted
        main.get_command(click.Context(main), command).make_context(command, args)
    mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    policy = manifests["ConfigMap"]["data"]["policy.yaml"]
    from pipeline.artifact.signing import Policy

    Policy.model_validate(yaml.safe_load(policy) | {}, strict=False)


def test_kubernetes_image_volume_is_what_the_server_opens():
    """No init container; the server's artifact is the mount of the image, and its policy knows artifacts by name."""
    from pipeline.cli.main import main

    text = (ROOT / "deploy/kubernetes/serve-image-volume.yaml").read_text()
    documents = {one["kind"]: one for one in yaml.safe_load_all(text)}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    assert "initContainers" not in pod
    (server,) = pod["containers"]
    command, *args = server["args"]
    main.get_command(click.Context(main), command).make_context(command, list(args))
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert (mounts["artifact"]["mountPath"], mounts["artifact"]["readOnly"]) == (args[0], True)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["artifact"]["image"]["reference"].endswith("-image")
    assert set(mounts) == set(volumes)
    rules = yaml.safe_load(documents["ConfigMap"]["data"]["policy.yaml"])["rules"]
    assert rules[0]["releases"] == "smollm2-135m-spec@*"


def test_kubernetes_service_reaches_a_ready_server(manifests):
    """Service, probe and server have one port; answers under way have their time before the pod is killed."""
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]["spec"]
    pod = deployment["template"]["spec"]
    server = pod["containers"][0]
    options = dict(zip(server["args"][2::2], server["args"][3::2], strict=True))
    assert {one["name"]: str(one["containerPort"]) for one in server["ports"]} == {"http": options["--port"]}
    assert server["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert [one["targetPort"] for one in service["ports"]] == ["http"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    waits = int(server["lifecycle"]["preStop"]["exec"]["command"][1]) + int(options["--shutdown-timeout"])
    assert pod["terminationGracePeriodSeconds"] > waits


@pytest.mark.server
def test_dockerfile():
    done = subprocess.run(
        [tool("hadolint"), str(ROOT / "deploy/Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.server
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_unit(tmp_path):
    text = (ROOT / "deploy/systemd/tandem-pull@.service").read_text()
    unit = tmp_path / "tandem-pull@.service"
    unit.write_text(text.replace("/opt/tandem/bin/tandem", "/bin/true"))  # what it starts is not installed here
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    user = re.search(r"sysusers.d/tandem.conf: +(u (\w+) .*?) {2,}", text)
    subprocess.run(["systemd-sysusers", "--dry-run", "--inline", user[1]], check=True)
    assert f"\nUser={user[2]}\n" in text


def test_systemd_unit_repeats_what_may_pass_and_nothing_else():
    """A first pull that failed ended the server's unit; what the policy rejects was pulled again and again."""
    text = (ROOT / "deploy/systemd/tandem-pull@.service").read_text()
    options = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    assert options["Type"] == "oneshot"
    assert float(re.search(r"--retry (\d+)", options["ExecStart"])[1]) >= 24 * 3600
    assert options["TimeoutStartSec"] == "infinity"
    assert "RestartMode" not in options, "systemd 252 does not have it"
    ends = {InputError.exit_code, RefusedError.exit_code, CorruptError.exit_code}
    assert set(map(int, options["RestartPreventExitStatus"].split())) == ends
    assert HostError.exit_code not in ends


def test_pod_has_probes_limits_and_its_secrets_apart():
    """The token of the registry's role and the key of the API are each in one container."""
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/serve.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    (pull,), (serve,) = pod["initContainers"], pod["containers"]
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(serve)
    assert all(volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume)
    mounts = {each["name"]: {mount["name"] for mount in each["volumeMounts"]} for each in (pull, serve)}
    assert "aws-token" in mounts["pull"]
    assert "aws-token" not in mounts["serve"]
    assert not {env["name"] for env in serve["env"]} & {"AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"}
    assert "annotations" not in by_kind["ServiceAccount"]["metadata"], "EKS would give the role to every container"
    key = next(env for env in serve["env"] if env["name"] == "VLLM_API_KEY")
    assert set(key["valueFrom"]) == {"secretKeyRef"}
    assert "--api-key" not in serve["args"]
    network = by_kind["NetworkPolicy"]["spec"]
    assert network["policyTypes"] == ["Ingress", "Egress"]
    assert network["podSelector"]["matchLabels"] == by_kind["Deployment"]["spec"]["selector"]["matchLabels"]


@pytest.mark.server
def test_pull_without_torch(tmp_path, url):
    """As in the pull image: an import of torch, numpy or transformers would end this."""
    made = small.make_validated(tmp_path / "made", tmp_path / "work").root
    publish(made, url, ["latest"])
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'transformers', 'safetensors', 'cyclonedx'): sys.modules[name] = None\n"
        "from pipeline.cli.main import main; main()"
    )
    out = tmp_path / "out"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TANDEM_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code, "pull", f"{url}/small@latest", str(out)], env=environ, check=True)
    assert small.digests(out) == small.digests(made)
