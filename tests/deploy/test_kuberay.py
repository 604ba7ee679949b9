"""deploy/kuberay, rendered by kubectl: the strict schemas, and rules of ours for what the schemas can't know."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from distributed_muzero.version import __version__
from tests.deploy.schemas import crd_schemas, errors, plain_schemas

ROOT = Path(__file__).parent.parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay_crds"
PART_OF = {"app.kubernetes.io/part-of": "distributed-muzero"}
# Labels that the operator puts onto the pods of every cluster.
OPERATORS_LABELS = {"ray.io/is-ray-node": {"yes"}, "ray.io/node-type": {"head", "worker"}}
UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30}
RAY_KINDS = ("RayCluster", "RayJob")

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl to render manifests")
every_overlay = pytest.mark.parametrize("overlay", ["base", "job", "minikube"])
needs_crds = [
    pytest.mark.shared,
    pytest.mark.skipif(not CRDS.is_dir(), reason=f"needs KubeRay's definitions in {CRDS}"),
]


@cache
def _rendered(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(KUBERAY / overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def manifests(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_rendered(overlay)))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests(overlay) if manifest["kind"] in kinds]


def cluster_spec(overlay: str) -> dict[str, Any]:
    [manifest] = of_kind(overlay, *RAY_KINDS)
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def groups(overlay: str) -> list[dict[str, Any]]:
    spec = cluster_spec(overlay)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_templates(overlay: str) -> list[dict[str, Any]]:
    templates = [group["template"] for group in groups(overlay)]
    submitters = [job["spec"]["submitterPodTemplate"] for job in of_kind(overlay, "RayJob")]
    return templates + submitters


def size(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)(\w*)", quantity)
    assert found is not None
    return int(found[1]) * UNITS[found[2]]


def change(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    *parents, last = path.split("/")
    place: Any = changed
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    return changed


@every_overlay
def test_plain_kinds_hold_known_fields_only(overlay):
    plain = [manifest for manifest in manifests(overlay) if manifest["kind"] not in RAY_KINDS]
    assert len(plain) >= 3
    for manifest in plain:
        assert errors(manifest, plain_schemas()) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("NetworkPolicy", "spec/igress", []),
        ("NetworkPolicy", "spec/ingress/0/form", []),
        ("NetworkPolicy", "spec/policyTypes", ["ingress"]),
        ("PersistentVolumeClaim", "spec/accessModes", ["ReadWriteSome"]),
        ("PersistentVolumeClaim", "spec/resources/storage", "1Gi"),
        ("PodMonitor", "spec/endpoints", []),
        ("PodMonitor", "metadata/lables", {}),
    ],
)
def test_a_slip_in_a_plain_kind_is_found(kind, path, value):
    document = of_kind("base", kind)[0]
    assert errors(change(document, path, value), plain_schemas())


class TestDefinitions:
    pytestmark = needs_crds

    @every_overlay
    def test_rays_kinds_pass_their_definitions(self, overlay):
        [manifest] = of_kind(overlay, *RAY_KINDS)
        assert errors(manifest, crd_schemas(CRDS)) == []

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("spec/workerGroupSpec", []),
            ("spec/authOptions/mode", "tokens"),
            ("spec/autoscalerOptions/idleTimeoutMinutes", 2),
            ("spec/workerGroupSpecs/0/replicas", "two"),
            ("spec/workerGroupSpecs/0/template/spec/containers/0/resource", {}),
            ("spec/headGroupSpec/template/spec/securityContext/runAsNonroot", True),
            ("spec/headGroupSpec/template/spec/volumes/1/emptyDir/size", "1Gi"),
        ],
    )
    def test_a_slip_in_a_cluster_is_found(self, path, value):
        [cluster] = of_kind("base", "RayCluster")
        assert errors(change(cluster, path, value), crd_schemas(CRDS))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("spec/backofLimit", 3),
            ("spec/rayClusterSpec/rayVersion", 2.6),
            ("spec/submitterPodTemplate/spec/containers/0/images", "x"),
        ],
    )
    def test_a_slip_in_a_job_is_found(self, path, value):
        [job] = of_kind("job", "RayJob")
        assert errors(change(job, path, value), crd_schemas(CRDS))


@every_overlay
def test_a_token_is_asked_for_and_ray_is_ours(overlay):
    spec = cluster_spec(overlay)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__


@every_overlay
def test_pods_run_as_a_user_on_a_read_only_root(overlay):
    contexts = []
    for template in pod_templates(overlay):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts += [container["securityContext"] for container in pod["containers"]]
    contexts.append(cluster_spec(overlay)["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@every_overlay
def test_only_the_heads_autoscaler_may_ask_kubernetes(overlay):
    _, *others = pod_templates(overlay)
    assert others
    assert all(template["spec"]["automountServiceAccountToken"] is False for template in others)


@every_overlay
def test_containers_have_limits_and_images_of_this_version(overlay):
    for template in pod_templates(overlay):
        for container in template["spec"]["containers"]:
            name, _, tag = container["image"].rpartition(":")
            assert name.split("/")[-1] in ("distributed-muzero-cpu", "distributed-muzero-gpu")
            assert tag == __version__
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()


@every_overlay
def test_volumes_that_are_mounted_exist_and_ray_can_write_where_it_must(overlay):
    claims = {claim["metadata"]["name"] for claim in of_kind(overlay, "PersistentVolumeClaim")}
    for template in pod_templates(overlay):
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in pod["volumes"]:
            assert "emptyDir" in volume or volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == volumes.keys()
            assert "/tmp" in mounts
    head_volumes = {volume["name"] for volume in pod_templates(overlay)[0]["spec"]["volumes"]}
    options = cluster_spec(overlay)["autoscalerOptions"]
    assert {mount["name"] for mount in options["volumeMounts"]} <= head_volumes


@every_overlay
def test_every_ray_node_sees_the_runs_folder_that_its_environment_names(overlay):
    for group in groups(overlay):
        [container] = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[variables["DISTRIBUTED_MUZERO_RUNS_DIR"]] == "runs"


@every_overlay
def test_the_object_store_fits_into_shared_memory(overlay):
    for group in groups(overlay):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        shared = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) < shared
        [container] = group["template"]["spec"]["containers"]
        assert shared < size(container["resources"]["limits"]["memory"])


@every_overlay
def test_actors_scale_from_none_and_stay_off_the_head(overlay):
    spec = cluster_spec(overlay)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    actors = spec["workerGroupSpecs"][0]
    assert (actors["groupName"], actors["minReplicas"], actors["replicas"]) == ("actors", 0, 0)
    assert actors["maxReplicas"] > 0


def test_the_learners_group_has_one_gpu_and_minikube_none():
    learner = cluster_spec("base")["workerGroupSpecs"][1]
    [container] = learner["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].startswith("registry.example.com/distributed-muzero-gpu:")
    assert learner["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia" not in _rendered("minikube")


@every_overlay
def test_policies_and_monitor_select_labels_and_ports_that_pods_have(overlay):
    for group in groups(overlay):
        assert PART_OF.items() <= group["template"]["metadata"]["labels"].items()
    ports = {
        port["name"]
        for group in groups(overlay)
        for container in group["template"]["spec"]["containers"]
        for port in container["ports"]
    }
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"].items() >= PART_OF.items()
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule.get("ports", [])} <= ports
    for monitor in of_kind(overlay, "PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    selectors = [
        manifest["spec"].get("podSelector") or manifest["spec"]["selector"]
        for manifest in of_kind(overlay, "NetworkPolicy", "PodMonitor")
    ]
    for selector in selectors:
        for label, value in selector["matchLabels"].items():
            assert value in OPERATORS_LABELS.get(label, {PART_OF.get(label)})


@every_overlay
def test_nobody_from_outside_reaches_a_ray_pod(overlay):
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    for spec in policies.values():
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        for rule in spec["ingress"]:
            assert rule["from"]
            # Without ports, all are open: for Ray's own pods only.
            if "ports" not in rule:
                assert rule["from"] == [{"podSelector": policies["muzero-ray"]["podSelector"]}]
    [monitoring] = [rule for rule in policies["muzero-ray"]["ingress"] if "ports" in rule]
    assert monitoring == {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "ports": [{"protocol": "TCP", "port": name} for name in ("metrics", "run-metrics")],
    }
    [dashboard] = policies["muzero-head"]["ingress"]
    assert dashboard["ports"] == [{"protocol": "TCP", "port": "dashboard"}]
    namespace, operator = dashboard["from"]
    assert namespace == {"podSelector": {}}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


@every_overlay
def test_a_ray_pod_reaches_its_own_kind_and_names_and_the_head_kubernetes_too(overlay):
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    ray = policies.pop("muzero-ray")
    assert ray["egress"] == [
        {"to": [{"podSelector": ray["podSelector"]}]},
        {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
    ]
    head = policies.pop("muzero-head")
    api = [443, 6443, 8443] if overlay == "minikube" else [443, 6443]
    assert head["egress"] == [{"ports": [{"protocol": "TCP", "port": port} for port in api]}]
    assert not policies


@every_overlay
def test_prometheus_asks_where_a_run_serves(overlay):
    [container] = cluster_spec(overlay)["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for job in of_kind(overlay, "RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        assert int(words[words.index("--metrics-port") + 1]) == ports["run-metrics"]
        assert "metrics.host=0.0.0.0" in words
    for monitor in of_kind(overlay, "PodMonitor"):
        endpoints = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
        assert endpoints == ["metrics", "run-metrics"]


def test_prometheus_keeps_the_same_of_rays_metrics_everywhere():
    [monitor] = of_kind("base", "PodMonitor")
    [kept] = monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    alone = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text(encoding="utf-8"))
    [also_kept] = alone["scrape_configs"][1]["metric_relabel_configs"]
    assert kept["regex"] == also_kept["regex"]
    assert kept["action"] == also_kept["action"] == "keep"


def test_the_job_brings_the_bases_cluster_and_leaves_none_standing():
    assert of_kind("job", "RayCluster") == []
    assert cluster_spec("job") == cluster_spec("base")


@pytest.mark.parametrize("overlay", ["job", "minikube"])
def test_a_job_that_is_tried_again_goes_on_with_its_run(overlay):
    [job] = of_kind(overlay, "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    # `exec`: a signal to the job reaches the program itself.
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["exec", "distributed-muzero", "train"]
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    options = dict(pairs)
    assert options["--resume"] == "auto"
    assert options["--name"]
    assert options["--runs-dir"] == "/runs"
    assert ("--set", "learner.device=cuda" if overlay == "job" else "learner.device=cpu") in pairs


@pytest.mark.parametrize("overlay", ["job", "minikube"])
def test_a_stopped_job_is_given_time_for_its_checkpoint(overlay):
    [job] = of_kind(overlay, "RayJob")
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 25
