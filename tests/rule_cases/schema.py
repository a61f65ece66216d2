"""Addresses, bounds, types and misspelt fields."""

from __future__ import annotations

from typing import Any

from tests.rule_cases.case import TRAIN, Case, continued, dataset, grpo, hub, ppo, selecting


def _uris(what: str, path: str, wrap: Any, good: tuple[str, ...], bad: tuple[str, ...]) -> tuple[Case, ...]:
    accepted = tuple(Case(f"{what} {uri}", True, wrap(uri)) for uri in good)
    return accepted + tuple(Case(f"{what} {uri}", False, wrap(uri), path) for uri in bad)


URIS = (
    *_uris(
        "model",
        "model.uri",
        lambda uri: {"model": {"uri": uri}},
        ("hf://org/Name-1.0_x", "s3://bucket", "s3://bucket/prefix/", "s3://my.bucket-1/a/b=c", "pvc://claim/a/b"),
        ("org/name", "hf://org", "https://bucket/x", "s3://B/x", "s3://bucket/../x", "pvc://claim", "/local/path", ""),
    ),
    *_uris(
        "data",
        "dataset.train[0].uri",
        lambda uri: {"dataset": {"train": [{"uri": uri}]}},
        (
            "s3://bucket/train.jsonl",
            "pvc://claim/data/train.parquet",
            "hf://datasets/org/name-1.0/data/train.csv",
            "hf://datasets/org/name-1.0",
        ),
        (
            "hf://datasets/org",
            "hf://datasets/org/name/",
            "hf://org/name/train.jsonl",
            "hf://datasets/org/name@v1/train.jsonl",
            "hf://org/name",
            "s3://bucket",
            "s3://bucket/a/",
            "s3://bucket//a",
            "pvc://claim/.hidden",
            "file:///x",
        ),
    ),
    *_uris(
        "output",
        "output.uri",
        lambda uri: {"output": {"uri": uri}},
        ("s3://bucket/prefix", "s3://bucket/prefix/", "pvc://claim/path"),
        ("s3://bucket", "hf://org/name", "s3://bucket/a b", "pvc://claim", "relative/path"),
    ),
    *_uris(
        "result",
        "model.continueFrom.uri",
        lambda uri: continued(uri=uri),
        ("s3://bucket/out", "s3://bucket/out/0123456789abcdef/manifest.json", "pvc://claim/out/0123456789abcdef/"),
        ("s3://bucket", "hf://org/name", "s3://bucket/../x", "pvc://claim", "other-job", "/local/path"),
    ),
    *(
        Case(f"model of merge {name}", False, {"model": {"fromMerge": name}}, "model.fromMerge")
        for name in ("A", "team-b/a", "a.b", "n" * 46, "")
    ),
    *(
        Case(f"reference to {name}", False, continued(fineTuneJob=name), "model.continueFrom.fineTuneJob")
        for name in ("A", "team-b/a", "a.b", "n" * 46, "-a")
    ),
)
"""Addresses, by the patterns of `tunewright_api.base`."""

FUNCTION = "objective.ppo.rewards[0].function.module"

SCHEMA = (
    *(
        Case(f"function {name}", True, grpo({"type": "Function", "function": {"module": name}}))
        for name in ("rewards:score", "_a.b2.C:__call", "a" * 127 + ":" + "b" * 128)
    ),
    *(
        Case(f"function {name}", False, ppo(rewards=[{"type": "Function", "function": {"module": name}}]), FUNCTION)
        for name in (
            "rewards.score",
            ":f",
            "a:",
            "a..b:f",
            "a:f.g",
            "a-b:f",
            "1a:f",
            "os;x:f",
            "a" * 128 + ":" + "b" * 128,
        )
    ),
    Case(
        "function without time",
        False,
        ppo(rewards=[{"type": "Function", "function": {"module": "a:f", "timeoutSeconds": 0}}]),
        "objective.ppo.rewards[0].function.timeoutSeconds",
    ),
    Case("PPO lambda above 1", False, ppo(**{"lambda": 1.1}), "objective.ppo.lambda"),
    Case("no rewards", False, {"objective": {"type": "GRPO", "grpo": {"rewards": []}}}, "objective.grpo.rewards"),
    Case("nine rewards", False, grpo(*[{"type": "JSON"}] * 9), "objective.grpo.rewards"),
    Case(
        "long pattern",
        False,
        grpo({"type": "Regex", "regex": {"pattern": "a" * 513}}),
        "objective.grpo.rewards[0].regex.pattern",
    ),
    Case(
        "hub reward model",
        False,
        grpo({"type": "Model", "model": {"uri": "hf://org/name"}}),
        "objective.grpo.rewards[0].model.uri",
    ),
    Case("smallest", True),
    Case("no model", False, {"model": None}, "model"),
    Case("no data", False, {"dataset": {"train": []}}, "dataset.train"),
    Case("too many files", False, {"dataset": {"train": TRAIN * 33}}, "dataset.train"),
    Case(
        "part of a split",
        False,
        {"dataset": {"train": [{"uri": "hf://datasets/org/name", "split": "train[:10]"}]}},
        "dataset.train[0].split",
    ),
    Case("unknown method", False, {"method": {"type": "Magic"}}, "method.type"),
    Case("number in quotes", False, {"hyperparameters": {"learningRate": "2e-4"}}, "hyperparameters.learningRate"),
    Case("learning rate of zero", False, {"hyperparameters": {"learningRate": 0}}, "hyperparameters.learningRate"),
    Case("whole number for a rate", True, {"hyperparameters": {"learningRate": 1}}),
    Case("patience of zero", False, selecting(earlyStopping={"patience": 0}), "evaluation.earlyStopping.patience"),
    Case("further arguments", True, {"hyperparameters": {"extra": {"adam_beta2": 0.95, "torch_compile": False}}}),
    Case(
        "too many further arguments",
        False,
        {"hyperparameters": {"extra": {f"a{n}": n for n in range(33)}}},
        "hyperparameters.extra",
    ),
    Case(
        "tracking",
        True,
        {"tracking": {"tensorboard": True, "mlflow": {"uri": "http://mlflow.ml:5000/a", "experiment": "Team A"}}},
    ),
    Case("offline run of W&B", True, {"tracking": {"wandb": {"project": "support bot", "entity": "team-a"}}}),
    Case("W&B project by path", False, {"tracking": {"wandb": {"project": "team/bot"}}}, "tracking.wandb.project"),
    Case("tracking by file", False, {"tracking": {"mlflow": {"uri": "file:///tmp/x"}}}, "tracking.mlflow.uri"),
    Case("password in a URL", False, {"tracking": {"mlflow": {"uri": "http://a:b@host"}}}, "tracking.mlflow.uri"),
    Case("fraction of one", False, dataset(validationFraction=1.0), "dataset.validationFraction"),
    Case("16 GPUs on 64 nodes", True, {"resources": {"gpus": 16, "nodes": 64}}),
    Case("17 GPUs", False, {"resources": {"gpus": 17}}, "resources.gpus"),
    Case("65 nodes", False, {"resources": {"nodes": 65}}, "resources.nodes"),
    Case("no node", False, {"resources": {"nodes": 0}}, "resources.nodes"),
    Case("cpu as number", True, {"resources": {"cpu": 4, "memory": "16Gi", "ephemeralStorage": "1.5Ti"}}),
    Case("bad quantity", False, {"resources": {"memory": "16 GB"}}, "resources.memory"),
    Case("timeouts", True, {"retry": {"maxRestarts": 0, "timeouts": {"queue": "90s", "run": "12h", "stall": "5m"}}}),
    Case("bad duration", False, {"retry": {"timeouts": {"run": "1.5h"}}}, "retry.timeouts.run"),
    Case("duration of zero", False, {"ttlAfterFinished": "0s"}, "ttlAfterFinished"),
    Case("endpoint", True, {"storage": {"endpoint": "http://10.0.0.1:9000", "secretName": "s3"}}),
    Case("endpoint without scheme", False, {"storage": {"endpoint": "minio:9000"}}, "storage.endpoint"),
    Case("hub", True, {"hub": {"secretName": "hf-token", "endpoint": "https://hub.example.com"}}),
    Case("hub endpoint with a path", False, {"hub": {"endpoint": "https://hub.example.com/x"}}, "hub.endpoint"),
    Case("hub output without a namespace", False, hub(repository="name"), "output.hub.repository"),
    Case("hub branch out of bounds", False, hub(revision="a/../b"), "output.hub.revision"),
    Case("empty commit message", False, hub(commitMessage=""), "output.hub.commitMessage"),
    Case(
        "whole pod",
        True,
        {
            "pod": {
                "image": "registry:5000/trainer:1",
                "imagePullSecrets": [{"name": "registry"}],
                "serviceAccountName": "trainer",
                "nodeSelector": {"gpu": "a100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "priorityClassName": "high",
                "runtimeClassName": "nvidia",
            }
        },
    ),
)
"""Bounds and types of the schema."""

FINETUNEJOB_UNKNOWN_FIELDS = (
    ({"hyperparameters": {"learningrate": 1e-4}}, "learningrate", "learningRate"),
    ({"outptu": {"uri": "s3://b/x"}}, "outptu", "output"),
    ({"pod": {"securityContext": {"privileged": True}}}, "securityContext", None),
    ({"pod": {"hostNetwork": True}}, "hostNetwork", None),
    (continued(finetuneJob="other"), "finetuneJob", "fineTuneJob"),
)
"""Misspelt or forbidden fields: changes, the field, and the name that is meant."""
