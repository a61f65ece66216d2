"""The pod of an attempt: security, resources, volumes and environment."""

from __future__ import annotations

from typing import Any

from tunewright_api.merge_run import MergeRun
from tunewright_api.references import references
from tunewright_api.run_config import PVC_MOUNT_ROOT, RUN_ENVIRONMENT_VARIABLE, TrainRun
from tunewright_api.v1alpha1.adaptermerge import AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.v1alpha1.pod import Pod
from tunewright_operator import constants, naming
from tunewright_operator.kinds import FINETUNEJOB, Spec
from tunewright_operator.needs import Needs, needs_of
from tunewright_operator.settings import Settings

Manifest = dict[str, Any]
Run = TrainRun | MergeRun

# Enough to upload a report and the log; nothing is saved on a stop before checkpoints exist.
_GRACE_SECONDS = 60

_SCRATCH = {"work": constants.WORK_PATH, "cache": constants.CACHE_PATH, "tmp": "/tmp"}  # noqa: S108  an emptyDir of the pod's own
_SHARED_MEMORY = "shared-memory"


def pod_spec(spec: Spec, run: Run, settings: Settings) -> Manifest:
    """Return the pod spec of one attempt. It passes the `restricted` Pod Security standard."""
    pod, needs = spec.pod or Pod(), needs_of(spec, settings)
    claims = _claims(spec)
    manifest: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": constants.USER_ID,
            "runAsGroup": constants.USER_ID,
            "fsGroup": constants.USER_ID,
            # Changing the owner of every file of a large volume takes minutes; the root tells whether it is needed.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, run, needs, settings, claims)],
        "volumes": _volumes(needs, claims),
    }
    if isinstance(run, TrainRun) and run.nodes > 1:
        # With the host name that the Job controller gives each pod, this is the name that the Service has for it.
        manifest["subdomain"] = _service_name(run)
    given = pod.document()
    for field in (
        "imagePullSecrets", "serviceAccountName", "nodeSelector", "tolerations", "affinity", "priorityClassName",
        "runtimeClassName",
    ):  # fmt: skip
        if field in given:
            manifest[field] = given[field]
    return manifest


def _container(spec: Spec, run: Run, needs: Needs, settings: Settings, claims: dict[str, bool]) -> Manifest:
    pod = spec.pod or Pod()
    container: Manifest = {
        "name": constants.CONTAINER_NAME,
        "image": pod.image or settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "env": [*_environment(run, needs), *_hub_token(spec, run)],
        "ports": [{"name": constants.PROGRESS_PORT_NAME, "containerPort": constants.PROGRESS_PORT}],
        "resources": _resources(needs),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": constants.TERMINATION_LOG,
        # The report is JSON: the tail of the log in its place would only look like a broken one.
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(needs, claims),
    }
    secret = _storage_secret(spec, run)
    if secret is not None:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    return container


def _environment(run: Run, needs: Needs) -> list[Manifest]:
    cache = constants.CACHE_PATH
    values = {
        RUN_ENVIRONMENT_VARIABLE: run.to_json(),
        constants.ENV_TERMINATION_LOG: constants.TERMINATION_LOG,
        constants.ENV_WORK: constants.WORK_PATH,
        "HOME": cache,
        "HF_HOME": f"{cache}/huggingface",
        "MPLCONFIGDIR": f"{cache}/matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "XDG_CACHE_HOME": f"{cache}/xdg",
    }
    if needs.gpus == 0:
        # Images ask for all GPUs by this variable, and a container runtime gives them even without a request.
        values["NVIDIA_VISIBLE_DEVICES"] = "void"
    writer = {"name": constants.ENV_WRITER, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    given = [{"name": name, "value": value} for name, value in values.items()]
    if isinstance(run, MergeRun):
        return [*given, writer]
    return [*given, writer, *_rendezvous(run), *_tracking_secret(run)]


def _rendezvous(run: TrainRun) -> list[Manifest]:
    """Return what tells the pods of several nodes who they are and where they meet."""
    if run.nodes == 1:
        return []
    rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{constants.ANNOTATION_INDEX}']"}}
    first = f"{naming.job_name(FINETUNEJOB, run.name, run.attempt)}-0.{_service_name(run)}"
    return [
        {"name": constants.ENV_NODE_RANK, "valueFrom": rank},
        {"name": constants.ENV_MASTER_ADDRESS, "value": first},
        {"name": constants.ENV_MASTER_PORT, "value": str(constants.MASTER_PORT)},
    ]


def _service_name(run: TrainRun) -> str:
    return naming.service_name(naming.job_name(FINETUNEJOB, run.name, run.attempt))


def _tracking_secret(run: TrainRun) -> list[Manifest]:
    """Return the credentials of the tracking server by name: other keys of the Secret are no business of the pod."""
    if run.tracking is None or run.tracking.mlflow is None or run.tracking.mlflow.secret_name is None:
        return []
    secret = run.tracking.mlflow.secret_name
    return [
        # Optional: a server that asks for more than there is costs a line in the log, never the run.
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for key in constants.TRACKING_KEYS
    ]


def _resources(needs: Needs) -> Manifest:
    limits = {"memory": needs.memory, "ephemeral-storage": needs.ephemeral_storage}
    # No CPU limit: a throttled data loader starves the GPU.
    requests = {"cpu": needs.cpu, **limits}
    if needs.gpu_resource is not None and needs.gpus > 0:
        limits[needs.gpu_resource] = str(needs.gpus)
    return {"requests": requests, "limits": limits}


def _claims(spec: Spec) -> dict[str, bool]:
    """Return the PersistentVolumeClaims that the run names, and whether each one is only read."""
    claims = {claim: True for uri in _input_uris(spec) if (claim := _claim_of(uri)) is not None}
    output = _claim_of(spec.output.uri)
    if output is not None:
        claims[output] = False
    return dict(sorted(claims.items()))


def _input_uris(spec: Spec) -> list[str]:
    artifacts = [reference.uri for reference in references(spec) if reference.uri is not None]
    match spec:
        case FineTuneJobSpec():
            sources = [*spec.dataset.train, *(spec.dataset.validation or ())]
            assert spec.model.uri is not None, "names are resolved"
            return [spec.model.uri, *(source.uri for source in sources), *artifacts]
        case AdapterMergeSpec():
            return [*([spec.base.uri] if spec.base else ()), *artifacts]


def _claim_of(uri: str) -> str | None:
    return uri.removeprefix("pvc://").split("/", 1)[0] if uri.startswith("pvc://") else None


def _volumes(needs: Needs, claims: dict[str, bool]) -> list[Manifest]:
    volumes: list[Manifest] = [{"name": name, "emptyDir": {}} for name in _SCRATCH]
    if needs.shared_memory is not None:
        limit = {"medium": "Memory", "sizeLimit": needs.shared_memory}
        volumes.append({"name": _SHARED_MEMORY, "emptyDir": limit})
    # Read-only by the mount alone: some drivers cannot attach a volume read-only.
    persistent = [
        {"name": _volume_name(index), "persistentVolumeClaim": {"claimName": claim}}
        for index, claim in enumerate(claims)
    ]
    return [*volumes, *persistent]


def _mounts(needs: Needs, claims: dict[str, bool]) -> list[Manifest]:
    mounts: list[Manifest] = [{"name": name, "mountPath": path} for name, path in _SCRATCH.items()]
    if needs.shared_memory is not None:
        mounts.append({"name": _SHARED_MEMORY, "mountPath": "/dev/shm"})  # noqa: S108  an emptyDir of the pod's own
    persistent = [
        {"name": _volume_name(index), "mountPath": f"{PVC_MOUNT_ROOT}/{claim}", "readOnly": read_only}
        for index, (claim, read_only) in enumerate(claims.items())
    ]
    return [*mounts, *persistent]


def _volume_name(index: int) -> str:
    # A claim's name may have dots and 253 characters, a volume's may not.
    return f"claim-{index}"


def _storage_secret(spec: Spec, run: Run) -> str | None:
    """Return the Secret with S3 credentials: the spec's own, or the platform's where S3 is used at all."""
    if spec.storage is not None and spec.storage.secret_name is not None:
        return str(spec.storage.secret_name)
    return run.storage.secret_name if any(uri.startswith("s3://") for uri in _uris(spec)) else None


def _hub_token(spec: Spec, run: Run) -> list[Manifest]:
    """Return the variable with the Hub token: from the spec's own Secret, or the platform's where the Hub is used."""
    own = spec.hub is not None and spec.hub.secret_name is not None
    # A base that only the adapter's own papers name may lie on the hub.
    unnamed = isinstance(spec, AdapterMergeSpec) and spec.base is None
    used = unnamed or spec.output.hub is not None or any(uri.startswith("hf://") for uri in _uris(spec))
    if run.hub.secret_name is None or not (own or used):
        return []
    reference: Manifest = {"name": run.hub.secret_name, "key": constants.HUB_TOKEN_KEY}
    if not own:
        # The platform's default may be missing in a namespace that only uses public models.
        reference["optional"] = True
    return [{"name": constants.ENV_HUB_TOKEN, "valueFrom": {"secretKeyRef": reference}}]


def _uris(spec: Spec) -> list[str]:
    return [*_input_uris(spec), spec.output.uri]
