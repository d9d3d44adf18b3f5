"""The manifests of Ray clusters: the pods by Kubernetes' schema, the command lines by `tandem` itself, EC2 by Ray's."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from support.paths import ROOT
from support.release_workflow import tool

FIELDS = {
    "spec": {"submissionMode", "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
             "rayClusterSpec"},
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip
"""Fields of KubeRay's `ray.io/v1`, by its CRD (ray.io_rayjobs.yaml), that the manifest uses; the CRD has over a MB."""


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    return [*yaml.safe_load_all((ROOT / "deploy/ray/build.yaml").read_text())]


@pytest.fixture(scope="module")
def job(manifests) -> dict:
    (found,) = [one for one in manifests if one["kind"] == "RayJob"]
    return found


def test_fields_are_those_of_kuberay(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) == FIELDS["spec"]
    assert set(cluster) == FIELDS["cluster"]
    assert set(cluster["headGroupSpec"]) == FIELDS["head"]
    assert [set(group) for group in cluster["workerGroupSpecs"]] == [FIELDS["workers"]]


@pytest.mark.server
def test_pods_by_the_schema_of_kubernetes(manifests, job, tmp_path):
    cluster = job["spec"]["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **template} for template in templates]
    others = [one for one in manifests if one["kind"] != "RayJob"]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all([*pods, *others]))
    command = [tool("kubernetes-validate"), "--strict", str(tmp_path / "pods.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_are_those_of_tandem(job):
    """Each command parses, with recipes that this repository has and that the image has a copy of."""
    from pipeline.cli.main import main

    commands = [shlex.split(one) for one in job["spec"]["entrypoint"].split("&&")]
    assert [words[:2] for words in commands] == [
        ["cd", "/cache"], ["tandem", "build"], ["tandem", "publish"], ["tandem", "publish"],
    ]  # fmt: skip
    for _, name, *arguments in commands[1:]:
        parsed = main.get_command(click.Context(main), name).make_context(name, arguments)
        if name == "build":
            assert parsed.params["executor"] == "ray"
            recipes = [Path(path) for path in parsed.params["recipes"]]
    assert all((ROOT / path.relative_to("/src")).is_file() for path in recipes)
    published = [words[2] for words in commands if words[1] == "publish"]
    assert published == [f"artifacts/{path.stem}" for path in recipes]


def test_all_pods_have_one_image_and_a_cache(job):
    """Images that differ have different toolchains, which a build rejects."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        environ = {one["name"]: one["value"] for one in container["env"]}
        assert environ["TANDEM_CACHE"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@pytest.mark.ray
def test_ec2_cluster_by_the_schema_of_ray():
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "deploy/ray/ec2.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["available_node_types"]["compilers"]["resources"]["neuronx-cc"] >= 1
