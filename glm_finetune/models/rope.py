"""Stretched positions of the long-context variants: which of two rules a checkpoint's rope_ratio means.

"base" multiplies the rotary base: theta_i = (10000 * rope_ratio) ** (-2i / n) (ChatGLM3-6B-32k and -128k, GLM-4; in
rtp-llm chat_glm_v3.py, lmdeploy). "position" divides the positions by it (ChatGLM2-6B-32k; in rtp-llm chat_glm_v2.py,
fastllm chatglm.cpp). config.json does not say; the code published beside the weights does, and is read as text.
"""

import re

from glm_finetune.errors import UserError

RULES = ("base", "position")
CODE = "modeling_chatglm.py"
IN_CODE = {  # rope_ratio as it is used there
    "base": r"\*\s*(self\.|config\.)?rope_ratio|rope_ratio\s*\*",
    "position": r"/\s*(self\.|config\.)?rope_ratio",
}


def choose_rule(folder, fields, asked=None, default=None):
    """One of RULES for the config.json `fields` of a folder, a Path. asked: by a flag, or recorded in training.

    default: where nothing says which. Raises UserError if the ratio is 0, nothing says which, or two say otherwise.
    """
    path, recorded = folder / "config.json", fields.get("rope_rule")
    if fields["rope_ratio"] == 0:
        raise UserError(f"{path}: rope_ratio is 0, expected something like 1.0 or 50.")
    if recorded not in (None, *RULES):
        raise UserError(f"{path}: rope_rule is {recorded!r}, expected {' or '.join(RULES)}.")
    known = {recorded: path} if recorded else rules_in(folder / CODE)
    if len(known) == 1:
        ((rule, where),) = known.items()
        if asked not in (None, rule):
            said = f"{where} says {rule}, where {asked} was asked for, or trained with"
            raise UserError(f"rope_ratio, --rope_rule: {said}. Leave the flag out, or give the base of the training.")
        return rule
    if not (asked or default):
        raise UserError(
            f"{folder}: rope_ratio is {fields['rope_ratio']} and nothing says by which rule. Put the {CODE} that was "
            "published with the weights beside them, or give --rope_rule position (it divides positions, as the 16 of "
            "ChatGLM2-6B-32k) or --rope_rule base (it multiplies the rotary base, as the 50 of ChatGLM3-6B-32k and the "
            "500 of ChatGLM3-6B-128k)."
        )
    return asked or default


def rules_in(path):
    """{rule: the file} of the rules by which a file of code uses rope_ratio; empty if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {rule: path for rule, pattern in IN_CODE.items() if re.search(pattern, text)}
