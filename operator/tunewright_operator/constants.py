"""Every string that Kubernetes sees, with what it is for."""

from __future__ import annotations

from typing import Final

from tunewright_api import GROUP

OPERATOR_NAME: Final = "tunewright-operator"
"""Reporter of events, value of `app.kubernetes.io/managed-by`, user agent and field manager."""

LABEL_FINETUNEJOB: Final = f"{GROUP}/finetunejob"
"""On Jobs and pods of a FineTuneJob: its name."""

LABEL_ADAPTERMERGE: Final = f"{GROUP}/adaptermerge"
"""On Jobs and pods of an AdapterMerge: its name."""

LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
"""On Jobs and pods: number of the attempt, from 1. The operator watches by it, on the server's side: it is on those of
either kind."""

LABEL_STAGE: Final = f"{GROUP}/stage"
"""On Jobs and pods: what the Job does."""

STAGE_TRAIN: Final = "train"
"""The stage that trains; part of Job names."""

STAGE_MERGE: Final = "merge"
"""The stage that merges; part of Job names."""

LABEL_UID: Final = f"{GROUP}/uid"
"""On the pods of several nodes: UID of the FineTuneJob. The Service selects by it, so that pods of an earlier
FineTuneJob of the same name, which are still ending, are not found under the new ones' names."""

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
"""On Jobs, Services and pods: the customary label for the tool that made them."""

CONTAINER_NAME: Final = "trainer"
"""The one container of a training or merging pod."""

PROGRESS_PORT: Final = 8080
"""Where the supervisor in the pod serves /progress, /metrics and /healthz."""

PROGRESS_PORT_NAME: Final = "http"
"""Name of that port, for PodMonitors."""

ANNOTATION_INDEX: Final = "batch.kubernetes.io/job-completion-index"
"""On the pods of an Indexed Job, by Kubernetes: the node rank."""

ENV_NODE_RANK: Final = "PET_NODE_RANK"
"""Which of the nodes a pod is; torchrun's own name, as the two below."""

ENV_MASTER_ADDRESS: Final = "PET_MASTER_ADDR"
"""Host name of the pod of node 0."""

ENV_MASTER_PORT: Final = "PET_MASTER_PORT"
"""Where that pod's training process waits for the others."""

MASTER_PORT: Final = 29500
"""torchrun's own default."""

TRACKING_KEYS: Final = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Keys of the Secret in `tracking.mlflow.secretName`, each one an environment variable of the pod."""

TERMINATION_LOG: Final = "/dev/termination-log"
"""File whose text becomes the container's termination message: the RunReport."""

WORK_PATH: Final = "/work"
"""emptyDir for model, data and results."""

CACHE_PATH: Final = "/cache"
"""emptyDir for the caches of the libraries; the root file system is read-only."""

USER_ID: Final = 1000
"""User, group and fsGroup of the pods: what the trainer image is built for."""

ENV_WRITER: Final = "TUNEWRIGHT_WRITER"
"""The pod's UID: keeps the files of two pods apart."""

ENV_TERMINATION_LOG: Final = "TUNEWRIGHT_TERMINATION_LOG"
"""Where the trainer writes its report."""

ENV_HUB_TOKEN: Final = "HF_TOKEN"  # noqa: S105  a name
"""The Hub token, as the hub client reads it; the trainer keeps it from the training process."""

HUB_TOKEN_KEY: Final = "token"  # noqa: S105  a name
"""Key of the token in the Secret that `hub.secretName` names."""

ENV_WORK: Final = "TUNEWRIGHT_WORK"
"""Where the trainer keeps model, data and results."""
