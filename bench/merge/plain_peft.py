"""The usual script: `python -m bench.merge.plain_peft BASE ADAPTER TARGET` merges by peft's merge_and_unload."""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.machine import peak_bytes


def main() -> None:
    """Merge, and print the peak of resident memory."""
    base, adapter, target = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    print(json.dumps({"peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
