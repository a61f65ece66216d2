"""Axolotl's keys one by one: the field each becomes, and the error where none would be true."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cli.axolotl_kit import (
    ALPACA,
    BASE,
    BEST,
    CHAT,
    CYCLES,
    DPO,
    EVALUATED,
    GRPO,
    MLFLOW,
    PER_EPOCH,
    REWARD,
    TRL,
    converted,
    errors,
    said,
)
from tunewright_cli.axolotl.convert import convert
from tunewright_cli.axolotl.draft import Kind


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"learning_rate": "2e-4"}, "hyperparameters.learningRate", 2e-4),
        ({"learning_rate": 0.00002}, "hyperparameters.learningRate", 2e-5),
        ({"num_epochs": "3"}, "hyperparameters.epochs", 3),
        ({"max_steps": 10, "num_epochs": 3}, "hyperparameters.maxSteps", 10),
        ({"max_steps": 10, "num_epochs": 3}, "hyperparameters.epochs", None),
        ({"max_steps": -1, "num_epochs": 3}, "hyperparameters.epochs", 3),
        ({"warmup_ratio": 0.1}, "hyperparameters.warmupRatio", 0.1),
        ({"warmup_steps": 7, "max_steps": 100}, "hyperparameters.warmupRatio", 0.069999),
        ({"warmup_steps": 0}, "hyperparameters.warmupRatio", 0),
        ({"warmup_steps": 100}, "hyperparameters.warmupRatio", None),
        ({"lr_scheduler": "constant", "warmup_steps": 5}, "hyperparameters.warmupRatio", None),
        ({"batch_size": 32, "micro_batch_size": 4}, "hyperparameters.gradientAccumulationSteps", 8),
        ({"batch_size": 32, "gradient_accumulation_steps": 4}, "hyperparameters.batchSize", 8),
        ({"optimizer": "adamw_torch"}, "hyperparameters.optimizer", "AdamW"),
        ({"gradient_checkpointing": "offload"}, "hyperparameters.gradientCheckpointing", True),
        ({"gradient_checkpointing": False}, "hyperparameters.gradientCheckpointing", False),
        ({"bf16": "auto"}, "model.dtype", None),
        ({"bf16": True}, "model.dtype", "BFloat16"),
        ({"bf16": "full"}, "model.dtype", "BFloat16"),
        ({"bf16": "auto", "fp16": True}, "model.dtype", "Float16"),
        ({"bf16": False}, "model.dtype", "Float32"),
        ({"fp16": True, "load_in_8bit": True}, "model.dtype", None),
        ({"float16": True}, "model.dtype", "Float16"),
        ({"eager_attention": True}, "model.attention", "Eager"),
        ({"attn_implementation": "sdpa"}, "model.attention", "SDPA"),
        ({"attn_implementation": "flash_attention_2"}, "model.attention", None),
        ({"base_model": "./models/tiny"}, "model.uri", "s3://replace-me/models/tiny"),
        ({"base_model": "../../../etc"}, "model.uri", "s3://replace-me/etc"),
        ({"adapter": None}, "method.type", "Full"),
        ({"adapter": ""}, "method.lora", None),
        ({"load_in_4bit": True}, "method.type", "QLoRA"),
        ({"adapter": "qlora", "load_in_4bit": True}, "method.quantization", {"bits": 4}),
        ({"load_in_8bit": True}, "method.quantization", {"bits": 8}),
        ({"lora_target_linear": False, "lora_target_modules": "q_proj"}, "method.lora.targetModules", ["q_proj"]),
        ({"lora_target_modules": ["q_proj"]}, "method.lora.targets", "AllLinear"),
        ({"lora_target_linear": None}, "method.lora.targets", None),
        ({"lora_alpha": 64}, "method.lora.alpha", 64),
        ({"peft_use_dora": True}, "method.lora.useDora", True),
        ({"train_on_inputs": True}, "objective", {"type": "SFT", "sft": {"loss": "AllTokens"}}),
        ({"train_on_inputs": False}, "objective", None),
        ({"val_set_size": 0}, "dataset.validationFraction", None),
        ({"val_set_size": "0.1"}, "dataset.validationFraction", 0.1),
        ({"val_set_size": 0.1, "eval_strategy": False}, "evaluation.strategy", "None"),
        ({"val_set_size": 0.1, "eval_steps": 50}, "evaluation", {"strategy": "Steps", "steps": 50}),
        ({"val_set_size": 0.1, "eval_steps": 0.1}, "evaluation", None),
        ({"val_set_size": 0.1, "evals_per_epoch": 1}, "evaluation", None),
        ({**EVALUATED, "load_best_model_at_end": True}, "evaluation.loadBest", True),
        ({**EVALUATED, "save_steps": 20}, "evaluation.loadBest", True),
        ({**EVALUATED, "save_steps": 15}, "evaluation.loadBest", None),
        ({**EVALUATED, "save_steps": 20, "load_best_model_at_end": False}, "evaluation.loadBest", None),
        (PER_EPOCH, "evaluation.loadBest", True),
        ({**PER_EPOCH, "evals_per_epoch": 3, "saves_per_epoch": 2}, "evaluation", None),
        ({**EVALUATED, "early_stopping_patience": 3}, "evaluation.earlyStopping", {"patience": 3}),
        ({**EVALUATED, "early_stopping_patience": 3}, "evaluation.loadBest", True),
        ({**BEST, "metric_for_best_model": "eval_loss", "greater_is_better": False}, "evaluation.metric", None),
        ({**BEST, **REWARD, "metric_for_best_model": "accuracy"}, "evaluation.metric", "Accuracy"),
        ({**BEST, **REWARD, "metric_for_best_model": "eval_loss"}, "evaluation.metric", None),
        ({"early_stopping_patience": 3}, "evaluation", None),
        ({"neftune_noise_alpha": "5"}, "hyperparameters.neftuneNoiseAlpha", 5),
        ({"noisy_embedding_alpha": 10}, "hyperparameters.neftuneNoiseAlpha", 10),
        ({"neftune_noise_alpha": 0}, "hyperparameters.neftuneNoiseAlpha", None),
        ({"lr_scheduler": "polynomial"}, "hyperparameters.scheduler", "Polynomial"),
        ({"lr_scheduler": "inverse_sqrt"}, "hyperparameters.scheduler", "InverseSqrt"),
        ({"lr_scheduler": "cosine_with_restarts"}, "hyperparameters.scheduler", "Cosine"),
        ({"lr_scheduler": "cosine_with_restarts", **CYCLES}, "hyperparameters.scheduler", "CosineWithRestarts"),
        (CYCLES, "hyperparameters.extra", {"lr_scheduler_kwargs": '{"num_cycles": 3}'}),
        ({"optimizer": "sgd"}, "hyperparameters.optimizer", "SGD"),
        ({"optimizer": "lion_32bit"}, "hyperparameters.optimizer", "Lion"),
        (
            {"adam_beta1": "0.8", "adam_epsilon": 1e-6},
            "hyperparameters.extra",
            {"adam_beta1": 0.8, "adam_epsilon": 1e-6},
        ),
        ({"optim_args": {"a": 1, "b": "x"}}, "hyperparameters.extra", {"optim_args": "a=1,b=x"}),
        ({"optim_args": "a=1"}, "hyperparameters.extra", {"optim_args": "a=1"}),
        ({"group_by_length": True}, "hyperparameters.extra", {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": True, "sample_packing": True}, "hyperparameters.extra", None),
        (
            {"hub_model_id": "org/name", "hub_revision": "v1"},
            "output.hub",
            {"repository": "org/name", "revision": "v1"},
        ),
        ({"use_tensorboard": True}, "tracking", {"tensorboard": True}),
        (MLFLOW, "tracking.mlflow", {"uri": "https://mlflow.example.com", "experiment": "a"}),
        ({**MLFLOW, "use_mlflow": False}, "tracking", None),
        ({**MLFLOW, "mlflow_tracking_uri": "databricks"}, "tracking", None),
        ({"wandb_project": "bot", "wandb_entity": "team"}, "tracking.wandb", {"project": "bot", "entity": "team"}),
        ({"wandb_project": "bot", "wandb_mode": "disabled"}, "tracking", None),
        ({**DPO, "dpo_loss_type": ["apo_zero"]}, "objective.dpo.loss", "APOZero"),
        ({**DPO, "dpo_loss_type": "hinge", "rl": "ipo"}, "objective.dpo.loss", "IPO"),
        ({"chat_template": "chatml"}, "model.chatTemplate", None),
    ],
)
def test_a_key_becomes_a_field(changes: dict[str, Any], field: str, value: Any) -> None:
    """None where the field stays with its default."""
    found: Any = converted(**changes)
    for part in field.split("."):
        found = found.get(part, {})
    assert (found or None) == (value or None)


@pytest.mark.parametrize(
    ("trl", "field", "value"),
    [
        ({"num_generations": 4}, "generations", 4),
        ({"max_completion_length": 128, "temperature": 0.7}, "maxCompletionLength", 128),
        ({"temperature": 0.7, "top_p": 0.9}, "topP", 0.9),
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"epsilon": 0.1, "use_vllm": True}, "epsilon", 0.1),
        ({"beta": 0.01}, "beta", 0.01),
        ({"loss_type": "bnpo", "num_iterations": 1}, "loss", "BNPO"),
        ({"loss_type": "dr_grpo", "scale_rewards": False}, "loss", "DrGRPO"),
        ({"scale_rewards": True}, "loss", None),
    ],
)
def test_a_key_of_trl_becomes_a_field_of_grpo(trl: dict[str, Any], field: str, value: Any) -> None:
    """None where the field stays with its default."""
    spec = converted(**GRPO, trl={**TRL, **trl})
    assert spec["objective"]["grpo"].get(field) == value
    assert spec["dataset"]["format"] == "Prompts"


def test_every_reward_function_gets_a_place_of_its_own() -> None:
    """With its weight; what is written there is the user's to say."""
    trl = {"reward_funcs": ["rewards.right", "org/model"], "reward_weights": [2, -0.5], "num_generations": 2}
    conversion = convert({**BASE, **GRPO, "trl": trl}, "name")
    assert conversion.document is not None
    assert conversion.document["spec"]["objective"]["grpo"]["rewards"] == [
        {"type": "Model", "weight": 2, "model": {"uri": "s3://replace-me/rewards/rewards.right"}},
        {"type": "Model", "weight": -0.5, "model": {"uri": "s3://replace-me/rewards/org/model"}},
    ]
    to_do = [note.text for note in conversion.notes if note.path == "trl.reward_funcs"]
    assert [text.split(" is ")[0] for text in to_do] == ["rewards.right", "org/model"]


@pytest.mark.parametrize(
    ("changes", "kind", "path"),
    [
        ({**EVALUATED, "save_steps": 20}, Kind.DIFFERS, "save_steps"),
        ({**EVALUATED, "save_steps": 20}, Kind.NOT_CONVERTED, "save_steps"),
        ({**DPO, **EVALUATED, "early_stopping_patience": 3}, Kind.NOT_NEEDED, "early_stopping_patience"),
        ({"early_stopping_patience": 3}, Kind.NOT_NEEDED, "early_stopping_patience"),
        ({**EVALUATED, "metric_for_best_model": "f1"}, Kind.NOT_NEEDED, "metric_for_best_model"),
        ({**EVALUATED, "load_best_model_at_end": False}, Kind.NOT_NEEDED, "load_best_model_at_end"),
        ({**DPO, "neftune_noise_alpha": 5}, Kind.NOT_NEEDED, "neftune_noise_alpha"),
        ({"group_by_length": True, "sample_packing": True}, Kind.NOT_CONVERTED, "group_by_length"),
        ({"hub_model_id": "org/name"}, Kind.TO_DO, "hub_model_id"),
        ({"hub_model_id": "org/name", "hub_strategy": "every_save"}, Kind.NOT_CONVERTED, "hub_strategy"),
        ({"hub_strategy": "end"}, Kind.NOT_NEEDED, "hub_strategy"),
        ({"use_mlflow": True}, Kind.NOT_CONVERTED, "use_mlflow"),
        ({**MLFLOW, "mlflow_tracking_uri": "./runs"}, Kind.NOT_CONVERTED, "mlflow_tracking_uri"),
        ({**MLFLOW, "use_mlflow": False}, Kind.NOT_NEEDED, "mlflow_tracking_uri"),
        ({**MLFLOW, "mlflow_run_name": "a"}, Kind.NOT_CONVERTED, "mlflow_run_name"),
        ({"wandb_project": "bot"}, Kind.DIFFERS, "wandb_project"),
        ({"wandb_project": "bot", "use_wandb": False}, Kind.NOT_NEEDED, "wandb_project"),
        ({"wandb_entity": "team"}, Kind.NOT_CONVERTED, "wandb_entity"),
        ({"wandb_project": "bot", "wandb_log_model": "end"}, Kind.NOT_CONVERTED, "wandb_log_model"),
        ({**GRPO, "trl": {**TRL, "loss_type": "dr_grpo"}}, Kind.DIFFERS, "trl.scale_rewards"),
        ({**GRPO, "trl": {**TRL, "top_k": 0}}, Kind.NOT_NEEDED, "trl.top_k"),
        ({**GRPO, "trl": TRL}, Kind.DIFFERS, "trl.max_completion_length"),
        ({**GRPO, "trl": {**TRL, "misspelt": 0}}, Kind.NOT_CONVERTED, "trl.misspelt"),
        ({**GRPO, "trl": TRL}, Kind.TO_DO, "datasets[0].type"),
    ],
)
def test_what_is_not_converted_as_it_stands_is_named(changes: dict[str, Any], kind: Kind, path: str) -> None:
    """With the kind of its line."""
    conversion = convert({**BASE, **changes}, "name")
    assert conversion.document is not None
    assert path in said(conversion, kind)


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"adapter": "llama-adapter"}, "adapter", "'llama-adapter' cannot be converted: lora and qlora can"),
        ({"adapter": "qlora"}, "adapter", "qlora needs load_in_4bit: true"),
        ({"adapter": None, "load_in_8bit": True}, "load_in_8bit", "remove the key, or set adapter: lora"),
        ({"rl": "orpo"}, "rl", "'orpo' cannot be converted: dpo, ipo, kto, grpo and reward_model can"),
        (GRPO, "trl.reward_funcs", "missing: name what answers are rewarded for"),
        ({**GRPO, "trl": {**TRL, "reward_weights": [1, 2]}}, "trl.reward_weights", "a list of 1 numbers"),
        ({**GRPO, "trl": {**TRL, "reward_weights": [0]}}, "trl.reward_funcs", "weight may not be 0"),
        ({**GRPO, "trl": {**TRL, "loss_type": "cispo"}}, "trl.loss_type", "use one of grpo, dapo, dr_grpo, bnpo"),
        ({**GRPO, "trl": {**TRL, "scale_rewards": False}}, "trl.scale_rewards", "except with loss_type: dr_grpo"),
        ({**GRPO, "trl": {**TRL, "scale_rewards": "batch"}}, "trl.scale_rewards", "not by that of 'batch'"),
        ({**GRPO, "trl": {**TRL, "num_iterations": 2}}, "trl.num_iterations", "answers are learned from once"),
        ({**GRPO, "trl": {**TRL, "sync_ref_model": True}}, "trl.sync_ref_model", "the reference is the model at the"),
        (
            {**DPO, "dpo_loss_type": ["sigmoid", "sft"]},
            "dpo_loss_type",
            "one loss is learned, not the sum of sigmoid, sft",
        ),
        ({**DPO, "dpo_loss_type": "sft"}, "dpo_loss_type", "'sft' is not known here: use one of sigmoid"),
        ({**BEST, "metric_for_best_model": "accuracy"}, "metric_for_best_model", "not 'accuracy'"),
        ({**BEST, "metric_for_best_model": "rouge"}, "metric_for_best_model", "not 'rouge'"),
        ({**BEST, "greater_is_better": True}, "greater_is_better", "the one with the lowest loss"),
        ({**BEST, "eval_strategy": "no"}, "", "need evaluations while training"),
        ({"hub_model_id": "name"}, "hub_model_id", "'name' is not a repository: use organisation/name"),
        ({"optim_args": 1}, "optim_args", "must be text or a mapping"),
        ({"num_labels": 3}, "num_labels", "3 outputs are those of a classifier"),
        ({"base_model": "gpt2"}, "base_model", "openai-community/gpt2"),
        ({"base_model": None}, "base_model", "missing"),
        ({"base_model_config": "org/other"}, "base_model_config", "give that as base_model, and remove the key"),
        ({"tokenizer_config": "org/other"}, "tokenizer_config", "give that as base_model, and remove the key"),
        ({"datasets": None}, "datasets", "missing"),
        ({"datasets": []}, "datasets", "missing"),
        ({"datasets": "org/name"}, "datasets", "must be a list of data sets"),
        ({"datasets": [{"path": "a.jsonl"}]}, "datasets[0].type", "tokenised already"),
        ({"datasets": [{"type": "alpaca"}]}, "datasets[0].path", "missing"),
        ({"datasets": [{**ALPACA, "type": "oasst"}]}, "datasets[0].type", "'oasst' are not read with objective SFT"),
        ({"datasets": [{**ALPACA, "shards": 4}]}, "datasets[0].shards", "write the part into a file"),
        ({"datasets": [{**CHAT, "roles_to_train": ["user"]}]}, "datasets[0].roles_to_train", "all answers"),
        ({"datasets": [{**CHAT, "roles_to_train": []}]}, "datasets[0].roles_to_train", "all answers"),
        ({"datasets": [{**CHAT, "train_on_eos": "all"}]}, "datasets[0].train_on_eos", "not 'all'"),
        ({"datasets": [{**CHAT, "message_field_role": "who"}]}, "datasets[0].message_property_mappings", "rename them"),
        ({"datasets": [{**CHAT, "roles": {"assistant": ["user"]}}]}, "datasets[0].roles", "not as 'assistant'"),
        ({"datasets": [{**ALPACA, "type": {"format": "Q: {instruction}"}}]}, "datasets[0].type", "put together"),
        ({"datasets": [ALPACA, CHAT]}, "datasets", "these are Alpaca and Messages: make them alike"),
        ({"rl": "dpo"}, "datasets[0].type", "'alpaca' are not read with objective DPO: write them as two chats"),
        ({"rl": "kto"}, "datasets[0].type", "(type: chatml.prompt_pairs)"),
        ({"reward_model": True}, "datasets[0].type", "(type: bradley_terry.chat_template)"),
        ({"learning_rate": "fast"}, "learning_rate", "must be a number, is 'fast'"),
        ({"lora_r": 8.5}, "lora_r", "must be a whole number"),
        ({"lora_r": 1024}, "lora_r", "becomes spec.method.lora.rank: Input should be less than or equal to 512"),
        ({"sample_packing": "yes"}, "sample_packing", "must be true or false"),
        ({"lora_target_linear": None, "lora_target_modules": ".*_proj"}, "lora_target_modules", "list their names"),
        ({"lora_target_modules": ["lm_head"]}, "lora_target_modules", "name them in lora_modules_to_save"),
        ({"lora_model_dir": "./out"}, "lora_model_dir", "merge the adapter into the model"),
        ({"optimizer": "lion_8bit"}, "optimizer", "use one of adamw_torch"),
        ({"adam_beta3": 0.9}, "adam_beta3", "usual constants"),
        ({"lr_scheduler": "rex"}, "lr_scheduler", "use one of cosine"),
        ({"max_grad_norm": 0}, "max_grad_norm", "set it to a large number"),
        ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio", "one learning rate"),
        ({"tokens": ["<|im_start|>"]}, "tokens", "copy of the model"),
        ({"plugins": ["my.Plugin"]}, "plugins", "my.Plugin: plugins are not run"),
        ({"bnb_config_kwargs": {"llm_int8_threshold": 4.0}}, "bnb_config_kwargs.llm_int8_threshold", "cannot be set"),
        ({"datasets": [CHAT], "chat_template_jinja": "chat.jinja"}, "chat_template_jinja", "write the template itself"),
        ({"rl": "dpo", "datasets": [{**CHAT, "type": "chatml.ultra"}], "sample_packing": True}, "", "packing is only"),
    ],
)
def test_what_would_change_the_result_is_an_error(changes: dict[str, Any], path: str, message: str) -> None:
    """With the key and what to do."""
    assert message in errors(**changes)[path]


def test_a_bfloat16_adapter_of_a_quantized_model_says_what_differs() -> None:
    """Float16 is not what QLoRA trains in here."""
    assert "fp16" in said(convert({**BASE, "load_in_4bit": True, "fp16": True}, "name"), Kind.DIFFERS)


def test_keys_that_are_off_need_nothing_and_unknown_ones_get_the_nearest_name() -> None:
    """`false` is not an error, a misspelt key is not lost."""
    changes = {"relora": False, "micro_batchsize": 2, "tokenizer_config": BASE["base_model"]}
    conversion = convert({**BASE, **changes}, "name")
    assert said(conversion, Kind.NOT_NEEDED)["relora"] == "off, as here"
    assert said(conversion, Kind.NOT_NEEDED)["tokenizer_config"] == "the same as base_model"
    assert "'micro_batch_size'" in said(conversion, Kind.NOT_CONVERTED)["micro_batchsize"]


def test_axolotl_s_defaults_are_written_where_ours_are_others() -> None:
    """The same run, not the same YAML."""
    spec = converted(load_in_4bit=True)
    assert spec["method"]["lora"]["dropout"] == 0
    assert spec["hyperparameters"] == {
        "warmupRatio": 0.03,
        "batchSize": 1,
        "gradientAccumulationSteps": 1,
        "maxSequenceLength": 512,
        "optimizer": "AdamW",
        "maxGradNorm": 1,
    }


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_warm_up_steps_become_a_share_that_gives_them_back(part: int, rest: int) -> None:
    """transformers rounds the share of the steps up."""
    steps = part + rest
    ratio = converted(max_steps=steps, warmup_steps=part)["hyperparameters"]["warmupRatio"]
    assert math.ceil(steps * ratio) == part
