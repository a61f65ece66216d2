"""What merged models are tried with: short texts of several kinds, because an adapter may act on one kind only."""

from __future__ import annotations

PLAIN_PROMPTS = (
    "The three laws of thermodynamics say that energy is conserved, that entropy never decreases, and that absolute "
    "zero cannot be reached in a finite number of steps.",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "昔々、あるところにおじいさんとおばあさんがいました。おじいさんは山へ柴刈りに、おばあさんは川へ洗濯に行きました。",
    "В начале было слово. Die Würde des Menschen ist unantastbar. Liberté, égalité, fraternité. العلم نور والجهل ظلام.",
)
"""Given to the tokenizer as they are."""
CHAT_PROMPTS = (
    "How do I reset my password?",
    'Answer in JSON with the keys "city" and "population": what is the largest city of Brazil? 17 * 23 = ?',
)
"""Asked as the user's turn of a conversation where the tokenizer has a chat template; else given as they are."""
