"""The Helm chart, rendered by the real helm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import gobuild
from tests.operator_permissions import EXPECTED
from tunewright_operator.settings import Settings

CHART = Path(__file__).parents[3] / "charts" / "tunewright"
# A cold build of the cluster's programs, helm among them, takes minutes.
pytestmark = pytest.mark.timeout(1800)

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


@pytest.fixture(scope="module")
def helm() -> str:
    """Path of the helm program."""
    return str(gobuild.build("control-plane")["helm"])


@pytest.fixture
def template(helm: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Function that renders the chart with values and returns how helm ended."""

    def run(values: Manifest | None = None) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        command = [helm, "template", "tw", str(CHART), "--namespace", "tunewright-system", "--values", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """Function that renders the chart with values and returns the manifests."""

    def run(values: Manifest | None = None) -> list[Manifest]:
        result = template(values)
        assert result.returncode == 0, result.stderr
        return [document for document in yaml.safe_load_all(result.stdout) if document]

    return run


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Return the manifests of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the one manifest of a kind."""
    (found,) = of_kind(manifests, kind)
    return found


def operator_container(manifests: list[Manifest]) -> Manifest:
    """Return the operator's container."""
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """Return the operator's environment."""
    return {entry["name"]: entry["value"] for entry in operator_container(manifests)["env"]}


def permissions(rules: list[Manifest]) -> Iterator[tuple[str, str, str]]:
    """Yield (API group, resource, verb) of RBAC rules."""
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    yield group, resource, verb


def test_the_chart_passes_lint(helm: str) -> None:
    """`helm lint --strict` has neither an error nor a warning."""
    result = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_default_release_is_complete(render: Render) -> None:
    """One operator, its identity, cluster-wide rights, roles for people, metrics, the CRDs; nothing optional."""
    kinds = sorted(manifest["kind"] for manifest in render())
    assert kinds == [
        "ClusterRole",
        "ClusterRole",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "CustomResourceDefinition",
        "Deployment",
        "Service",
        "ServiceAccount",
    ]


def test_the_cluster_role_grants_exactly_what_the_operator_does(render: Render) -> None:
    """No right more and none less than the set that the integration tests hold the operator to."""
    roles = {role["metadata"]["name"]: role for role in of_kind(render(), "ClusterRole")}
    assert set(permissions(roles["tw-tunewright"]["rules"])) == EXPECTED


def test_named_namespaces_get_roles_and_no_cluster_role(render: Render) -> None:
    """With watchNamespaces the same rights hold in those namespaces only."""
    manifests = render({"watchNamespaces": ["team-a", "team-b"], "rbac": {"aggregate": False}})
    assert not of_kind(manifests, "ClusterRole") + of_kind(manifests, "ClusterRoleBinding")
    roles = {role["metadata"]["namespace"]: role for role in of_kind(manifests, "Role")}
    assert set(roles) == {"team-a", "team-b"}
    assert all(set(permissions(role["rules"])) == EXPECTED for role in roles.values())
    for binding in of_kind(manifests, "RoleBinding"):
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "tw-tunewright", "namespace": "tunewright-system"}
        ]
    assert environment(manifests)["TUNEWRIGHT_WATCH_NAMESPACES"] == "team-a,team-b"


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["team-a"]}])
def test_nobody_gets_a_right_on_secrets(render: Render, values: Manifest) -> None:
    """No role of the chart names Secrets, or everything by a star."""
    manifests = render(values)
    granted = [
        permission
        for kind in ("Role", "ClusterRole")
        for role in of_kind(manifests, kind)
        for permission in permissions(role["rules"])
    ]
    assert granted
    assert not [p for p in granted if "secrets" in p[1] or "*" in p]


def test_people_see_and_edit_workloads_with_their_namespace_roles(render: Render) -> None:
    """Viewers read; editors write, but never the status."""
    roles = {role["metadata"]["name"]: role for role in of_kind(render(), "ClusterRole")}
    viewer, editor = roles["tw-tunewright-viewer"], roles["tw-tunewright-editor"]
    assert viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {verb for _, _, verb in permissions(viewer["rules"])} == {"get", "list", "watch"}
    assert {resource for _, resource, _ in permissions(editor["rules"])} == {"finetunejobs", "adaptermerges"}


def test_the_operator_pod_passes_the_restricted_pod_security_standard(render: Render) -> None:
    """Every control of the `restricted` profile that applies to a pod without host access."""
    pod = only(render(), "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])


def test_two_operators_never_run_at_once(render: Render) -> None:
    """One replica, and the old pod is gone before a new one starts."""
    spec = only(render(), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_every_setting_of_the_operator_can_be_reached(render: Render) -> None:
    """Each field of Settings has its variable, save the port, which probes and Service fix."""
    settings = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    numbers = dict.fromkeys(settings, 7)
    values = {
        "settings": numbers,
        "watchNamespaces": ["a"],
        "storage": {"endpoint": "http://s3:8333", "secretName": "s3"},
        "hub": {"endpoint": "https://hub.example.com", "secretName": "hf-token"},
    }
    expected = {f"TUNEWRIGHT_{name.upper()}" for name in Settings.model_fields} - {"TUNEWRIGHT_PORT"}
    assert set(environment(render(values))) == expected


def test_the_operator_understands_what_the_chart_sets(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings read from the rendered environment have the chart's values."""
    values = {
        "logLevel": "debug",
        "trainer": {"image": {"repository": "example.com/trainer", "tag": "v1"}, "resources": {"memory": "3Gi"}},
        "merge": {"resources": {"memory": "5Gi"}},
        "storage": {"endpoint": "http://10.0.0.1:8333", "pathStyle": True, "secretName": "s3", "region": "eu-west-1"},
        "hub": {"endpoint": "https://hub.example.com/", "secretName": "hf-token"},
        "settings": {"configErrorGraceSeconds": 2.5, "concurrency": 3},
    }
    for name, value in environment(render(values)).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.log_level == "debug"
    assert settings.trainer_image == "example.com/trainer:v1"
    assert (settings.default_memory, settings.default_cpu) == ("3Gi", "2")
    assert (settings.default_merge_memory, settings.default_merge_cpu) == ("5Gi", "2")
    assert (settings.config_error_grace_seconds, settings.concurrency) == (2.5, 3)
    assert settings.storage.endpoint == "http://10.0.0.1:8333"
    assert (settings.storage.path_style, settings.storage.region) == (True, "eu-west-1")
    assert settings.storage_secret_name == "s3"
    assert (settings.hub.endpoint, settings.hub.secret_name) == ("https://hub.example.com", "hf-token")


def test_the_chart_s_defaults_are_the_operator_s(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing the chart unchanged gives the defaults that the operator documents."""
    bare = Settings()
    for name, value in environment(render()).items():
        monkeypatch.setenv(name, value)
    assert Settings() == bare


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "tunewright/operator:0.1.0"),
        ({"repository": "example.com/op", "tag": "v2"}, "example.com/op:v2"),
        ({"tag": "v2", "digest": "sha256:" + "a" * 64}, "tunewright/operator@sha256:" + "a" * 64),
    ],
)
def test_the_image_is_named_by_tag_or_digest(render: Render, image: Manifest, reference: str) -> None:
    """The tag defaults to the chart's appVersion; a digest wins over it."""
    assert operator_container(render({"image": image}))["image"] == reference


def test_the_crd_survives_the_release_unless_told_otherwise(render: Render) -> None:
    """Uninstalling must not delete every workload; `crds.keep: false` and `crds.enabled: false` are choices."""
    kept, left = render(), render({"crds": {"keep": False}})
    for crd in of_kind(kept, "CustomResourceDefinition"):
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not [crd for crd in of_kind(left, "CustomResourceDefinition") if "annotations" in crd["metadata"]]
    assert not of_kind(render({"crds": {"enabled": False}}), "CustomResourceDefinition")


def test_the_crds_in_the_chart_are_the_generated_ones(render: Render) -> None:
    """Templates and plain files define the same schemas."""
    plain = [yaml.safe_load(path.read_text()) for path in (CHART.parents[1] / "crds").glob("*.yaml")]
    rendered = {crd["metadata"]["name"]: crd["spec"] for crd in of_kind(render(), "CustomResourceDefinition")}
    assert rendered == {crd["metadata"]["name"]: crd["spec"] for crd in plain}


def test_metrics_can_be_scraped(render: Render) -> None:
    """Service and ServiceMonitor select the operator's pod and its port."""
    manifests = render({"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}})
    service, monitor = only(manifests, "Service"), only(manifests, "ServiceMonitor")
    pod_labels = only(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod_labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["name"] == monitor["spec"]["endpoints"][0]["port"]
    ports = {port["name"] for port in operator_container(manifests)["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports


def test_the_network_policy_lets_through_what_the_operator_needs(render: Render) -> None:
    """DNS, the API server and the progress port of training pods; probes and metrics inward."""
    policy = only(render({"networkPolicy": {"enabled": True, "apiServerPorts": [8443]}}), "NetworkPolicy")["spec"]
    outward = [port["port"] for rule in policy["egress"] for port in rule["ports"]]
    assert outward == [53, 53, 8443, 8080]
    assert policy["ingress"] == [{"ports": [{"port": "http"}]}]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"bogus": 1}, "'bogus' not allowed"),
        ({"trainer": {"image": {"repositry": "x"}}}, "'repositry' not allowed"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"logLevel": "verbose"}, "/logLevel"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Team"]}, "/watchNamespaces/0"),
        ({"storage": {"endpoint": "s3.example.com"}}, "/storage/endpoint"),
        ({"trainer": {"resources": {"memory": "lots"}}}, "/trainer/resources/memory"),
        ({"merge": {"resources": {"gpus": 1}}}, "'gpus' not allowed"),
        ({"settings": {"concurrency": 0}}, "/settings/concurrency"),
        ({"image": {"digest": "abc"}}, "/image/digest"),
        ({"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}}, "needs metrics.service"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name is needed"),
    ],
)
def test_wrong_values_are_refused(
    template: Callable[..., subprocess.CompletedProcess[str]], values: Manifest, complaint: str
) -> None:
    """A misspelt or impossible value stops the installation and is named."""
    result = template(values)
    assert result.returncode != 0
    assert complaint in result.stderr
