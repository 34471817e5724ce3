"""The files of deploy/ satisfy their linters and schemas, and name options and versions that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = "1.33.0"


def program(name: str) -> str:
    """The path of a linter of the test extra."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        pytest.skip(f"no {name}: `pip install 'moenas[test]'`")
    return str(path)


def assert_passes(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    assert_passes(program("hadolint"), "--no-color", DEPLOY / "Dockerfile")


def test_the_scripts_pass_shellcheck() -> None:
    assert_passes(program("shellcheck"), *sorted(DEPLOY.glob("*.sh")))


def test_the_compose_file_is_one_of_the_compose_specification() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    assert_passes(program("check-jsonschema"), *schema, DEPLOY / "compose.yaml")


def pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}


def ray_cluster() -> dict[str, Any]:
    (clusters,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "RayCluster"]
    return clusters


def test_the_manifests_are_those_of_kubernetes() -> None:
    """The operator's own kind has no schema there; the templates of its pods have one."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="no kubernetes-validate: `pip install 'moenas[test]'`"
    )
    spec = ray_cluster()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    plain = [manifest for manifest in MANIFESTS if manifest["kind"] != "RayCluster"]
    assert {manifest["kind"] for manifest in plain} == {"Deployment", "Service"}
    for manifest in [*plain, *(pod(group["template"]) for group in groups)]:
        validate.validate(manifest, KUBERNETES, strict=True)


def kubernetes_commands() -> str:
    """The shell commands of the section on Kubernetes."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    section = text.partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
    return "".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))


def test_the_pod_of_the_first_token_is_one_of_kubernetes() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="no kubernetes-validate: `pip install 'moenas[test]'`"
    )
    words = shlex.split(kubernetes_commands().partition("kubectl run ")[2])
    (overrides,) = (word for word in words if word.startswith("--overrides="))
    given = json.loads(overrides.removeprefix("--overrides="))
    validate.validate(pod(given), KUBERNETES, strict=True)
    (container,) = given["spec"]["containers"]
    assert words[0] == container["name"] == "moenas-token"
    assert words[1] == f"--image={container['image']}"
    program, *command = container["command"]
    assert program == "moenas"
    assert set(re.findall(r"--[a-z-]+", " ".join(command))) <= options("moenas", *command[:2])
    (server,) = (m["spec"]["template"] for m in MANIFESTS if m["kind"] == "Deployment")
    served = server["spec"]["containers"][0]["env"]
    assert all(entry in served for entry in container["env"]), "it asks the database of the server"


def test_the_pushed_image_takes_the_place_of_each_image() -> None:
    commands = kubernetes_commands()
    (pushed,) = re.findall(r"^docker push (\S+)$", commands, re.MULTILINE)
    assert f"docker build -f deploy/Dockerfile -t {pushed} ." in commands
    (script,) = re.findall(r'^sed -i "(.*)" deploy/kuberay\.yaml$', commands, re.MULTILINE)
    done = subprocess.run(
        ["sed", script, DEPLOY / "kuberay.yaml"], capture_output=True, text=True, check=True
    )
    images = re.findall(r"image: (.*)$", done.stdout, re.MULTILINE)
    assert images == [pushed] * 3


def test_a_wrong_manifest_is_refused() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="no kubernetes-validate: `pip install 'moenas[test]'`"
    )
    wrong = pod(ray_cluster()["spec"]["headGroupSpec"]["template"])
    wrong["spec"]["contaners"] = wrong["spec"]["containers"]
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, KUBERNETES, strict=True)


def test_ray_has_the_version_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray_cluster()["spec"]["rayVersion"] == pinned


def options(*command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z-]+", done.stdout))


def test_the_options_of_moenas_and_ray_exist() -> None:
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "kuberay.yaml").read_text()
    scripts = "".join(path.read_text() for path in sorted(DEPLOY.glob("*.sh")))
    used = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"(?m)^\s*#.*$", "", text + scripts)))
    of_slurm = {"--nodes", "--ntasks", "--cpus-per-task", "--exclude", "--ip-address", "--short"}
    known = options("moenas", "serve") | options("moenas", "run")
    known |= options("ray.scripts.scripts", "start") | options(
        "ray.scripts.scripts", "health-check"
    )
    assert used - of_slurm - known == set()


def test_every_service_has_the_token_and_the_same_root() -> None:
    services = {k: v for k, v in COMPOSE["services"].items() if v["image"] == "moenas"}
    assert set(services) == {"ray-head", "ray-worker", "serve"}
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["MOENAS_RUNS"] == "file:///shared/runs"
        assert "shared:/shared" in service["volumes"]
    pods = [
        manifest["spec"]["template"] for manifest in MANIFESTS if manifest["kind"] == "Deployment"
    ]
    spec = ray_cluster()["spec"]
    pods += [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    for template in pods:
        (container,) = template["spec"]["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert values["RAY_AUTH_MODE"] == "token"
        assert values["MOENAS_RUNS"] == "s3://moenas/runs"
        assert values["AWS_ACCESS_KEY_ID"] is None  # from the secret
