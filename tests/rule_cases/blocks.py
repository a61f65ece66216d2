"""Rules of model, data, output, training arguments, evaluation, names and pod."""

from __future__ import annotations

from tests.rule_cases.case import PREFIX, TRAIN, Case, dataset, hub, selecting

REVISION = "model.revision is only for hf:// models"
WEIGHTS = "model names its weights by exactly one of uri and fromMerge"
SOURCE_REVISION = "revision of a data source is only for hf://datasets/..."
SPLIT = "split of a data source is only for a data set as a whole"
HUB_NAME = "hub.repository may not have"
HUB_BRANCH = "hub.revision is a branch"
VALIDATION = "dataset.validation and dataset.validationFraction exclude each other"
EPOCHS = "hyperparameters.epochs and hyperparameters.maxSteps exclude each other"
EVAL_STEPS = "evaluation.steps belongs to strategy Steps"
EVAL_ROWS = "evaluation needs rows to evaluate on"
NAME_LENGTH = "metadata.name may have at most 45 characters"
NAME_FORM = "metadata.name may have only lower-case letters"
POD_LABELS = "pod.labels may not start with tunewright.dev/"
POD_KEYS = "keys in pod.labels, pod.annotations and pod.nodeSelector are names"
POD_ANNOTATIONS = "pod.annotations may not start with tunewright.dev/"
SELECTION = "evaluation.loadBest and evaluation.earlyStopping need evaluations while training"
METRIC = "evaluation.metric is what loadBest and earlyStopping go by"
METRIC_OBJECTIVE = "evaluation.metric Accuracy is only for"
NEFTUNE = "hyperparameters.neftuneNoiseAlpha is only for objective SFT"

BLOCK_RULES = (
    Case("hub model with revision", True, {"model": {"uri": "hf://a/b", "revision": "main"}}, REVISION),
    Case("bucket model with revision", False, {"model": {"uri": "s3://bucket/b", "revision": "main"}}, REVISION),
    Case("merged model with revision", False, {"model": {"fromMerge": "other", "revision": "main"}}, REVISION),
    Case("model of a merge", True, {"model": {"fromMerge": "other"}}, WEIGHTS),
    Case("model of a merge and by address", False, {"model": {"uri": "hf://a/b", "fromMerge": "other"}}, WEIGHTS),
    Case("model of nothing", False, {"model": {"dtype": "Auto"}}, WEIGHTS),
    Case(
        "hub rows with revision",
        True,
        {"dataset": {"train": [{"uri": "hf://datasets/a/b/train.jsonl", "revision": "v1"}]}},
        SOURCE_REVISION,
    ),
    Case(
        "bucket rows with revision",
        False,
        {"dataset": {"train": [{"uri": "s3://bucket/train.jsonl", "revision": "v1"}]}},
        SOURCE_REVISION,
    ),
    *(
        Case(f"split of {uri}", uri.endswith("name"), {"dataset": {"train": [{"uri": uri, "split": "test.v1"}]}}, SPLIT)
        for uri in ("hf://datasets/org/name", "hf://datasets/org/name/train.jsonl", "s3://bucket/name.csv")
    ),
    Case("hub repository", True, hub(repository="my-org/Name-1.0_x"), HUB_NAME),
    *(
        Case(f"hub repository {name}", False, hub(repository=name), HUB_NAME)
        for name in ("org/a--b", "org/a..b", "org-/name", "org/name.", "org/name.git")
    ),
    Case("hub branch", True, hub(revision="release/v1.2", private=False, commitMessage="Third try"), HUB_BRANCH),
    Case("hub commit", False, hub(revision="0123456789" * 4), HUB_BRANCH),
    Case("validation files", True, dataset(validation=TRAIN), VALIDATION),
    Case("validation fraction", True, dataset(validationFraction=0.1), VALIDATION),
    Case("both validations", False, dataset(validation=TRAIN, validationFraction=0.1), VALIDATION),
    *(
        Case(f"{name} alone", True, dataset(**{name: "{prompt} A:"}), "dataset.promptTemplate and")
        for name in ("promptTemplate", "responseTemplate")
    ),
    Case(
        "both templates",
        False,
        dataset(promptTemplate="{prompt}", responseTemplate="A:"),
        "dataset.promptTemplate and",
    ),
    *(
        Case(f"{name} for {data_format}", good, dataset(**{name: "{x}"}, format=data_format), f"dataset.{name} is only")
        for name, data_format, good in (
            ("promptTemplate", "Alpaca", True),
            ("promptTemplate", "Messages", False),
            ("responseTemplate", "Text", True),
            ("responseTemplate", "Alpaca", False),
        )
    ),
    *(
        Case(
            f"weight {weight} with validationFraction",
            weight <= 1,
            {"dataset": {"train": [{**TRAIN[0], "weight": weight}], "validationFraction": 0.1}},
            "dataset.validationFraction does not go with weights above 1",
        )
        for weight in (0.5, 2.0)
    ),
    Case("epochs", True, {"hyperparameters": {"epochs": 2.5}}, EPOCHS),
    Case("steps", True, {"hyperparameters": {"maxSteps": 10}}, EPOCHS),
    Case("epochs and steps", False, {"hyperparameters": {"epochs": 1.0, "maxSteps": 10}}, EPOCHS),
)

EVALUATION_RULES = (
    Case(
        "evaluation by steps",
        True,
        {**dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps", "steps": 5}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by steps without number",
        False,
        {**dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps"}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by epoch with number",
        False,
        {**dataset(validationFraction=0.1), "evaluation": {"strategy": "Epoch", "steps": 5}},
        EVAL_STEPS,
    ),
    Case("evaluation with rows", True, {**dataset(validation=TRAIN), "evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("no evaluation", True, {"evaluation": {"strategy": "None"}}, EVAL_ROWS),
    Case("evaluation without rows", False, {"evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("best model with rows", True, selecting(loadBest=True, earlyStopping={}), EVAL_ROWS),
    Case("best model without rows", False, {"evaluation": {"loadBest": True}}, EVAL_ROWS),
    Case("early stopping without rows", False, {"evaluation": {"earlyStopping": {"patience": 2}}}, EVAL_ROWS),
    Case("best model by epoch", True, selecting(strategy="Epoch", loadBest=True), SELECTION),
    Case("last model without evaluation", True, selecting(strategy="None", loadBest=False), SELECTION),
    Case("best model without evaluation", False, selecting(strategy="None", loadBest=True), SELECTION),
    Case("early stopping without evaluation", False, selecting(strategy="None", earlyStopping={}), SELECTION),
    Case("metric of the best model", True, selecting(metric="Loss", loadBest=True), METRIC),
    Case("metric of early stopping", True, selecting(metric="Loss", earlyStopping={}), METRIC),
    Case("metric of nothing", False, selecting(metric="Loss"), METRIC),
    Case("F1 of a classifier", True, selecting("Classification", metric="F1", loadBest=True), METRIC_OBJECTIVE),
    Case("accuracy of a reward model", True, selecting("Reward", metric="Accuracy", loadBest=True), METRIC_OBJECTIVE),
    Case("F1 of a reward model", False, selecting("Reward", metric="F1", loadBest=True), METRIC_OBJECTIVE),
    Case("accuracy of a chat model", False, selecting(metric="Accuracy", loadBest=True), METRIC_OBJECTIVE),
    Case("noise for SFT", True, {"hyperparameters": {"neftuneNoiseAlpha": 5}}, NEFTUNE),
    Case(
        "noise for DPO", False, {"hyperparameters": {"neftuneNoiseAlpha": 5.5}, "objective": {"type": "DPO"}}, NEFTUNE
    ),
)

POD_RULES = (
    Case("name of 45 characters", True, part=NAME_LENGTH, job_name="n" * 45),
    Case("name of 46 characters", False, part=NAME_LENGTH, job_name="n" * 46),
    Case("name with hyphen", True, part=NAME_FORM, job_name="a-1"),
    Case("name with dot", False, part=NAME_FORM, job_name="a.b"),
    Case("pod label", True, {"pod": {"labels": {"team": "a", "example.org/x": "b"}}}, POD_LABELS),
    Case("reserved pod label", False, {"pod": {"labels": {f"{PREFIX}attempt": "9"}}}, POD_LABELS),
    Case("pod annotation", True, {"pod": {"annotations": {"note": "free text, even long"}}}, POD_ANNOTATIONS),
    Case("reserved pod annotation", False, {"pod": {"annotations": {f"{PREFIX}x": "9"}}}, POD_ANNOTATIONS),
    Case(
        "keys with and without a domain",
        True,
        {"pod": {"labels": {"team": "a"}, "annotations": {"example.com/x": "1"}, "nodeSelector": {"a.b/c-d_e": "x"}}},
        POD_KEYS,
    ),
    *(
        Case(f"bad key in {name}", False, {"pod": {name: {key: "x"}}}, POD_KEYS)
        for name, key in (("labels", "a b"), ("annotations", "/x"), ("nodeSelector", "a/b/c"))
    ),
)
