"""Axolotl's keys that become no field of a FineTuneJob, each with the reason. A name that ends with * is a family."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunewright_cli.axolotl.draft import Keys, Kind


@dataclass(frozen=True)
class Unmapped:
    """What is said about the keys of one level of the file that no field is made of.

    Attributes:
        not_needed: Keys without effect on the result: the run does without, or does it anyway.
        not_converted: Keys that do something which a FineTuneJob cannot say; the run goes without.
        refused: Keys without which the result would be another one, with what to do instead.
    """

    not_needed: Mapping[str, str]
    not_converted: Mapping[str, str]
    refused: Mapping[str, str]


_SPEED = "kernels change the speed, not the result; the fastest that is installed is taken"
_MEMORY = "memory is managed by the trainer"
_PREPARATION = "every run prepares its rows itself"
_EVERY_STEP = "every step is reported"
_HARDWARE = "set by the platform"
_TRACKING = "numbers go to TensorBoard files, MLflow or W&B: see tracking"
_RUN_NAME = "runs are named after the FineTuneJob"
_NO_PREDICTIONS = "no predictions are written"
_PARALLEL = (
    "set resources.gpus (of each pod), resources.nodes (pods), and resources.parallelism FSDP for a model that does "
    "not fit one GPU; the global batch counts processes as in Axolotl"
)
_CHECKPOINTS = "only the final result is published"
_RATES = "all weights have one learning rate"
_WITHOUT = "remove the key to convert without it"
_TOKENS = "give a copy of the model, with the tokens in its tokenizer and embeddings, as base_model, and remove the key"
_FROM = "merge the adapter into the model and give that as base_model, then remove the key"

CONFIG = Unmapped(
    not_needed={
        "model_type": "the model's own config says it",
        "tokenizer_type": "the model's own tokenizer config says it",
        "tokenizer_use_fast": "fast tokenizers are always used",
        "processor_type": "text models have no processor",
        "is_*_derived_model": "the model's own config says it",
        "resize_token_embeddings_to_32x": _SPEED,
        "embeddings_skip_upcast": _MEMORY,
        "low_cpu_mem_usage": _MEMORY,
        "lora_on_cpu": _MEMORY,
        "gpu_memory_limit": _MEMORY,
        "max_memory": _MEMORY,
        "device_map": _MEMORY,
        "device": _HARDWARE,
        "activation_offloading": _MEMORY,
        "gradient_checkpointing_kwargs": _MEMORY,
        "gc_steps": _MEMORY,
        "lora_fan_in_fan_out": "seen in the layers themselves",
        "lora_*_kernel": _SPEED,
        "flash_attention": _SPEED,
        "xformers_attention": _SPEED,
        "flex_attention": _SPEED,
        "flex_attn_compile_kwargs": _SPEED,
        "flash_attn_*": _SPEED,
        "flash_optimum": _SPEED,
        "unsloth_*": _SPEED,
        "liger_*": _SPEED,
        "cut_cross_entropy": _SPEED,
        "use_kernels": _SPEED,
        "torch_compile*": _SPEED,
        "tf32": _SPEED,
        "batch_flattening": _SPEED,
        "pad_to_sequence_len": "padding is not learned",
        "eval_sample_packing": "validation rows are not packed",
        "sample_packing_*": "how rows are packed is chosen by the trainer",
        "total_num_tokens": "counted by the trainer",
        "total_supervised_tokens": "counted by the trainer",
        "eval_batch_size": "the batch of training is used; the loss is the same",
        "remove_unused_columns": "columns that the format does not have are not read",
        "dataset_prepared_path": _PREPARATION,
        "dataset_processes": _PREPARATION,
        "dataset_num_proc": _PREPARATION,
        "dataset_keep_in_memory": _PREPARATION,
        "skip_prepare_dataset": _PREPARATION,
        "push_dataset_to_hub": _PREPARATION,
        "dataloader_*": _PREPARATION,
        "precompute_ref_log_probs": _PREPARATION,
        "dpo_padding_free": _MEMORY,
        "dpo_use_logits_to_keep": _MEMORY,
        "rl_adapter_ref_model": "the reference is the model without its adapter, which is the same",
        "eot_tokens": "the end of every answer is learned, whatever the chat template writes there",
        "hf_use_auth_token": "access is a matter of the platform's Secrets",
        "output_dir": "results go to output.uri",
        "save_safetensors": "results are always safetensors",
        "save_only_model": _CHECKPOINTS,
        "logging_steps": _EVERY_STEP,
        "include_tokens_per_second": _EVERY_STEP,
        "include_tkps": _EVERY_STEP,
        "profiler_*": "no influence on the result",
        "strict": "unknown keys are always reported",
        "debug": "no influence on the result",
        "axolotl_config_path": "set by Axolotl itself",
        "local_rank": _HARDWARE,
        "world_size": _HARDWARE,
        "ddp*": _HARDWARE,
        "ray_*": _HARDWARE,
        "use_ray": _HARDWARE,
        "resources_per_worker": _HARDWARE,
        "accelerator_config": _HARDWARE,
        "gradio_*": "no influence on training",
        "merge_lora": "no influence on training",
        "merge_method": "no influence on training",
    },
    not_converted={
        "wandb_name": _RUN_NAME,
        "wandb_run_id": _RUN_NAME,
        "wandb_*": "numbers are tracked, nothing else: see tracking.wandb",
        "mlflow_run_name": _RUN_NAME,
        "hf_mlflow_log_artifacts": "results go to output.uri",
        "comet_*": _TRACKING,
        "use_comet": _TRACKING,
        "save_steps": _CHECKPOINTS,
        "saves_per_epoch": _CHECKPOINTS,
        "save_strategy": _CHECKPOINTS,
        "save_total_limit": _CHECKPOINTS,
        "save_first_step": _CHECKPOINTS,
        "resume_from_checkpoint": "a run starts from the model",
        "auto_resume_from_checkpoints": "a run starts from the model",
        "loss_watchdog_*": "a run whose loss grows goes on to its last step",
        "deepspeed": _PARALLEL,
        "fsdp*": _PARALLEL,
        "qlora_sharded_model_loading": _PARALLEL,
        "tensor_parallel_size": _PARALLEL,
        "context_parallel_size": _PARALLEL,
        "dp_shard_size": _PARALLEL,
        "dp_replicate_size": _PARALLEL,
        "sequence_parallel_degree": _PARALLEL,
        "heads_k_stride": _PARALLEL,
        "ring_attn_func": _PARALLEL,
        "auto_find_batch_size": "a run has the batch size that hyperparameters.batchSize says",
        "trust_remote_code": "code of a model's repository is not run; models that transformers knows need none",
        "tokenizer_legacy": "the model's own tokenizer config says it",
        "shuffle_merged_datasets": "rows are drawn in random order",
        "eval_table_size": _NO_PREDICTIONS,
        "eval_max_new_tokens": _NO_PREDICTIONS,
        "eval_table_max_new_tokens": _NO_PREDICTIONS,
        "dpo_generate_during_eval": _NO_PREDICTIONS,
        "do_causal_lm_eval": "the validation loss is measured, nothing else",
        "eval_causal_lm_metrics": "the validation loss is measured, nothing else",
        "do_bench_eval": "the validation loss is measured, nothing else",
        "bench_*": "the validation loss is measured, nothing else",
    },
    refused={
        "lora_model_dir": f"a run goes on from results of tunewright alone (model.continueFrom); {_FROM}",
        "pretraining_dataset": "pre-training is not fine-tuning; give the texts under datasets with type: completion",
        "process_reward_model": f"there is no process reward model; {_WITHOUT}",
        "base_model_config": "the model's own config is used; put the other one into a copy of the model, give that as "
        "base_model, and remove the key",
        "tokenizer_config": "the model's own tokenizer is used; put the other tokenizer's files into a copy of the "
        "model, give that as base_model, and remove the key",
        "tokens": f"tokens cannot be added; {_TOKENS}",
        "added_tokens_overrides": f"tokens cannot be replaced; {_TOKENS}",
        "default_system_message": f"it changes the chat template; write it as chat_template_jinja, or {_WITHOUT}",
        "overrides_of_model_config": "the model's config is taken as it is; change it in a copy of the model, give "
        "that as base_model, and remove the key",
        "overrides_of_model_kwargs": f"the model is loaded as it is; {_WITHOUT}",
        "model_config": f"the model's config is taken as it is; {_WITHOUT}",
        "model_kwargs": f"the model is loaded as it is; {_WITHOUT}",
        "model_quantization_config*": f"the model is loaded as it is; {_WITHOUT}",
        "rope_scaling": f"the model's config is taken as it is; {_WITHOUT}",
        "reinit_weights": f"training from random weights is not fine-tuning; {_WITHOUT}",
        "random_init_weights": f"training from random weights is not fine-tuning; {_WITHOUT}",
        "gptq": "GPTQ models are not trained; give the original model as base_model with load_in_4bit: true",
        "qat": f"there is no quantization-aware training; {_WITHOUT}",
        "quantization": f"results are not quantized; {_WITHOUT}",
        "fp8": f"there is no training in fp8; {_WITHOUT}",
        "unfrozen_parameters": f"weights cannot be frozen one by one; use adapter: lora, or {_WITHOUT}",
        "lora_target_parameters": f"layers are adapted, not single parameters; {_WITHOUT}",
        "lora_exclude_modules": "layers cannot be excluded; list the others in lora_target_modules",
        "lora_rank_pattern": f"all layers have one rank; {_WITHOUT}",
        "lora_alpha_pattern": f"all layers have one alpha; {_WITHOUT}",
        "peft": f"not known here; use load_in_4bit or load_in_8bit, or {_WITHOUT}",
        "peft_init_lora_weights": f"adapters start as in the original LoRA; {_WITHOUT}",
        "peft_layers_to_transform": f"all layers of a name are adapted; {_WITHOUT}",
        "peft_layers_pattern": f"all layers of a name are adapted; {_WITHOUT}",
        "peft_layer_replication": f"layers cannot be repeated; {_WITHOUT}",
        "peft_trainable_token_indices": f"tokens cannot be trained one by one; {_WITHOUT}",
        "loraplus_*": f"{_RATES}; {_WITHOUT}",
        "embedding_lr*": f"{_RATES}; {_WITHOUT}",
        "lr_groups": f"{_RATES}; {_WITHOUT}",
        "relora*": f"there is no ReLoRA; {_WITHOUT}",
        "jagged_restart*": f"there is no ReLoRA; {_WITHOUT}",
        "lisa_*": f"there is no LISA; {_WITHOUT}",
        "s2_attention": f"there is no shifted sparse attention; {_WITHOUT}",
        "pose_*": f"there is no PoSE; {_WITHOUT}",
        "cosine_min_lr_ratio": f"the cosine ends at zero; {_WITHOUT}",
        "cosine_constant_lr_ratio": f"the cosine ends at zero; {_WITHOUT}",
        "lr_quadratic_warmup": f"warm-up is linear; {_WITHOUT}",
        "lr_div_factor": f"schedules have no arguments of their own; {_WITHOUT}",
        "adam_*": f"the optimizer has its usual constants; {_WITHOUT}",
        "optim_target_modules": f"the optimizer takes all trained weights; {_WITHOUT}",
        "curriculum_sampling": f"rows are drawn in random order; {_WITHOUT}",
        "dataset_exact_deduplication": f"rows are taken as they are; remove double rows from the files, and {_WITHOUT}",
        "dataset_shard_num": "files are read whole; write the part into a file, and remove the key",
        "dataset_shard_idx": "files are read whole; write the part into a file, and remove the key",
        "min_sample_len": "short rows are not dropped; remove them from the files, and remove the key",
        "fix_untrained_tokens": f"embeddings are taken as they are; {_TOKENS}",
        "shrink_embeddings": f"embeddings are taken as they are; {_WITHOUT}",
        "dpo_use_weighting": f"pairs are not weighted; {_WITHOUT}",
        "dpo_norm_loss": f"the loss is not normalised; {_WITHOUT}",
        "dpo_loss_weights": f"one loss is learned, not a sum of several; {_WITHOUT}",
        "rpo_alpha": f"there is no additional likelihood term; {_WITHOUT}",
        "orpo_alpha": f"there is no ORPO; {_WITHOUT}",
        "simpo_gamma": f"there is no SimPO; {_WITHOUT}",
        "cpo_alpha": f"there is no CPO; {_WITHOUT}",
        "image_*": f"models read text only; {_WITHOUT}",
        "trainer_cls": f"trainers are fixed; {_WITHOUT}",
    },
)

SOURCE = Unmapped(
    not_needed={
        "ds_type": "seen in the file's name",
        "preprocess_shards": _PREPARATION,
        "trust_remote_code": "data sets are files, without code",
    },
    not_converted={},
    refused={
        "shards": "files are read whole; write the part into a file, and remove the key",
        "shards_idx": "files are read whole; write the part into a file, and remove the key",
        "input_transform": f"rows are taken as they are; {_WITHOUT}",
        "input_format": f"rows are taken as they are; {_WITHOUT}",
        "drop_system_message": "system turns are kept; remove them from the rows, and remove the key",
        "field_system": "no system column is read; write it into the rows as a system turn, and remove the key",
        "field_tools": f"tool schemas are not read; {_WITHOUT}",
        "field_thinking": f"thinking is read as part of the content only; {_WITHOUT}",
        "template_thinking_key": f"thinking is read as part of the content only; {_WITHOUT}",
        "split_thinking": f"thinking is read as part of the content only; {_WITHOUT}",
        "message_field_training": "every answer is learned; keep the rows that are to be learned, and remove the key",
        "message_field_training_detail": "every answer is learned whole; remove the key to convert without it",
        "train_on_eot": f"the end of every answer is learned, no other; {_WITHOUT}",
        "field_human": f"rows of this kind are not read; {_WITHOUT}",
        "field_model": f"rows of this kind are not read; {_WITHOUT}",
    },
)


def report_left(keys: Keys, unmapped: Unmapped, mapped: frozenset[str]) -> None:
    """Say about every key that is left why no field was made of it.

    Args:
        keys: Keys of one level of the file.
        unmapped: Reasons of that level.
        mapped: Names of the keys that are converted there, for the nearest name of an unknown one.
    """
    for key, value in keys.left().items():
        known = find(key, unmapped.not_needed)
        if known is not None:
            keys.note(Kind.NOT_NEEDED, key, known)
        elif value in (False, []) and find(key, {**unmapped.not_converted, **unmapped.refused}) is not None:
            keys.note(Kind.NOT_NEEDED, key, "off, as here")
        elif (reason := find(key, unmapped.not_converted)) is not None:
            keys.note(Kind.NOT_CONVERTED, key, reason)
        elif (reason := find(key, unmapped.refused)) is not None:
            keys.note(Kind.ERROR, key, reason)
        else:
            keys.note(Kind.NOT_CONVERTED, key, _unknown(key, unmapped, mapped))


def find(key: str, table: Mapping[str, Any]) -> Any:
    """Return what a table has for a key, None where it has nothing. An entry with a * stands for a family."""
    if key in table:
        return table[key]
    for name, value in table.items():
        start, star, end = name.partition("*")
        if star and key.startswith(start) and key.endswith(end):
            return value
    return None


def _unknown(key: str, unmapped: Unmapped, mapped: frozenset[str]) -> str:
    names = [*mapped, *unmapped.not_needed, *unmapped.not_converted, *unmapped.refused]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    return f"not a key known here: did you mean {nearest[0]!r}?" if nearest else "not a key known here"
