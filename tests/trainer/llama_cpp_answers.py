"""What GGUF files say in llama.cpp, through llama-cpp-python: `python llama_cpp_answers.py FILE...`, answers as JSON.

A process of its own: the binding is on PYTHONPATH only here, and llama.cpp ends its process when it goes wrong.
"""

from __future__ import annotations

import json
import sys

import llama_cpp


def answers(path: str) -> dict[str, str]:
    """Continue a text, and answer a question with the file's own chat template; always the most likely token."""
    model = llama_cpp.Llama(path, n_ctx=256, n_threads=1, verbose=False)
    text = model.create_completion("The capital of France is", max_tokens=4, temperature=0)
    question = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
    chat = model.create_chat_completion(question, max_tokens=12, temperature=0)
    model.close()
    return {"text": text["choices"][0]["text"], "chat": chat["choices"][0]["message"]["content"]}


if __name__ == "__main__":
    print(json.dumps({path: answers(path) for path in sys.argv[1:]}))
