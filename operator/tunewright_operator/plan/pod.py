"""The training pod: security, resources, volumes and environment."""

from __future__ import annotations

from typing import Any

from tunewright_api.references import references
from tunewright_api.run_config import PVC_MOUNT_ROOT, RUN_ENVIRONMENT_VARIABLE, TrainRun
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec, Resources
from tunewright_api.v1alpha1.pod import Pod
from tunewright_operator import constants, naming
from tunewright_operator.settings import Settings

Manifest = dict[str, Any]

# Enough to upload a report and the log; nothing is saved on a stop before checkpoints exist.
_GRACE_SECONDS = 60

_SCRATCH = {"work": constants.WORK_PATH, "cache": constants.CACHE_PATH, "tmp": "/tmp"}  # noqa: S108  an emptyDir of the pod's own


def pod_spec(spec: FineTuneJobSpec, run: TrainRun, settings: Settings) -> Manifest:
    """Return the pod spec of one attempt. It passes the `restricted` Pod Security standard."""
    pod = spec.pod or Pod()
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
        "containers": [_container(spec, run, settings, claims)],
        "volumes": _volumes(spec, settings, claims),
    }
    if run.nodes > 1:
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


def _container(spec: FineTuneJobSpec, run: TrainRun, settings: Settings, claims: dict[str, bool]) -> Manifest:
    pod = spec.pod or Pod()
    container: Manifest = {
        "name": constants.CONTAINER_NAME,
        "image": pod.image or settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "env": [*_environment(run), *_hub_token(spec, run)],
        "ports": [{"name": constants.PROGRESS_PORT_NAME, "containerPort": constants.PROGRESS_PORT}],
        "resources": _resources(spec, settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": constants.TERMINATION_LOG,
        # The report is JSON: the tail of the log in its place would only look like a broken one.
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(claims),
    }
    secret = _storage_secret(spec, run)
    if secret is not None:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    return container


def _environment(run: TrainRun) -> list[Manifest]:
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
    if run.gpus == 0:
        # Images ask for all GPUs by this variable, and a container runtime gives them even without a request.
        values["NVIDIA_VISIBLE_DEVICES"] = "void"
    writer = {"name": constants.ENV_WRITER, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    given = [{"name": name, "value": value} for name, value in values.items()]
    return [*given, writer, *_rendezvous(run), *_tracking_secret(run)]


def _rendezvous(run: TrainRun) -> list[Manifest]:
    """Return what tells the pods of several nodes who they are and where they meet."""
    if run.nodes == 1:
        return []
    rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{constants.ANNOTATION_INDEX}']"}}
    first = f"{naming.job_name(run.name, run.attempt)}-0.{_service_name(run)}"
    return [
        {"name": constants.ENV_NODE_RANK, "valueFrom": rank},
        {"name": constants.ENV_MASTER_ADDRESS, "value": first},
        {"name": constants.ENV_MASTER_PORT, "value": str(constants.MASTER_PORT)},
    ]


def _service_name(run: TrainRun) -> str:
    return naming.service_name(naming.job_name(run.name, run.attempt))


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


def _resources(spec: FineTuneJobSpec, settings: Settings) -> Manifest:
    given = spec.resources or Resources()
    memory = given.memory or settings.default_memory
    disk = given.ephemeral_storage or settings.default_ephemeral_storage
    # No CPU limit: a throttled data loader starves the GPU.
    requests = {"cpu": given.cpu or settings.default_cpu, "memory": memory, "ephemeral-storage": disk}
    limits = {"memory": memory, "ephemeral-storage": disk}
    if given.gpus > 0:
        limits[given.gpu_resource] = str(given.gpus)
    return {"requests": requests, "limits": limits}


def _claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """Return the PersistentVolumeClaims that the run names, and whether each one is only read."""
    claims = {claim: True for uri in _input_uris(spec) if (claim := _claim_of(uri)) is not None}
    output = _claim_of(spec.output.uri)
    if output is not None:
        claims[output] = False
    return dict(sorted(claims.items()))


def _input_uris(spec: FineTuneJobSpec) -> list[str]:
    sources = [*spec.dataset.train, *(spec.dataset.validation or ())]
    artifacts = [reference.uri for reference in references(spec) if reference.uri is not None]
    return [spec.model.uri, *(source.uri for source in sources), *artifacts]


def _claim_of(uri: str) -> str | None:
    return uri.removeprefix("pvc://").split("/", 1)[0] if uri.startswith("pvc://") else None


def _volumes(spec: FineTuneJobSpec, settings: Settings, claims: dict[str, bool]) -> list[Manifest]:
    shared = (spec.resources or Resources()).shared_memory or settings.default_shared_memory
    scratch = [{"name": name, "emptyDir": {}} for name in _SCRATCH]
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared}}
    # Read-only by the mount alone: some drivers cannot attach a volume read-only.
    persistent = [
        {"name": _volume_name(index), "persistentVolumeClaim": {"claimName": claim}}
        for index, claim in enumerate(claims)
    ]
    return [*scratch, memory, *persistent]


def _mounts(claims: dict[str, bool]) -> list[Manifest]:
    scratch = [{"name": name, "mountPath": path} for name, path in _SCRATCH.items()]
    memory = {"name": "shared-memory", "mountPath": "/dev/shm"}  # noqa: S108  an emptyDir of the pod's own
    persistent = [
        {"name": _volume_name(index), "mountPath": f"{PVC_MOUNT_ROOT}/{claim}", "readOnly": read_only}
        for index, (claim, read_only) in enumerate(claims.items())
    ]
    return [*scratch, memory, *persistent]


def _volume_name(index: int) -> str:
    # A claim's name may have dots and 253 characters, a volume's may not.
    return f"claim-{index}"


def _storage_secret(spec: FineTuneJobSpec, run: TrainRun) -> str | None:
    """Return the Secret with S3 credentials: the spec's own, or the platform's where S3 is used at all."""
    if spec.storage is not None and spec.storage.secret_name is not None:
        return str(spec.storage.secret_name)
    return run.storage.secret_name if any(uri.startswith("s3://") for uri in _uris(spec)) else None


def _hub_token(spec: FineTuneJobSpec, run: TrainRun) -> list[Manifest]:
    """Return the variable with the Hub token: from the spec's own Secret, or the platform's where the Hub is used."""
    own = spec.hub is not None and spec.hub.secret_name is not None
    used = spec.output.hub is not None or any(uri.startswith("hf://") for uri in _uris(spec))
    if run.hub.secret_name is None or not (own or used):
        return []
    reference: Manifest = {"name": run.hub.secret_name, "key": constants.HUB_TOKEN_KEY}
    if not own:
        # The platform's default may be missing in a namespace that only uses public models.
        reference["optional"] = True
    return [{"name": constants.ENV_HUB_TOKEN, "valueFrom": {"secretKeyRef": reference}}]


def _uris(spec: FineTuneJobSpec) -> list[str]:
    return [*_input_uris(spec), spec.output.uri]
