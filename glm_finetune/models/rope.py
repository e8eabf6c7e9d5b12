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


def choose_rule(folder, fields, asked):
    """ "base" or "position" for the config.json `fields` of a folder, a Path. asked: the rule where nothing says it.

    asked may end in "?": taken only then. Raises UserError if the ratio is 0, nothing says which, or two say otherwise.
    """
    if fields["rope_ratio"] == 0:
        raise UserError(f"{folder / 'config.json'}: rope_ratio is 0, expected something like 1.0 or 50.")
    if fields.get("rope_rule") not in (None, *RULES):
        names = " or ".join(RULES)
        raise UserError(f"{folder / 'config.json'}: rope_rule is {fields['rope_rule']!r}, expected {names}.")
    wanted, is_default = (asked or "").rstrip("?"), (asked or "?").endswith("?")
    known = {fields["rope_rule"]: "config.json"} if fields.get("rope_rule") else rules_in(folder / CODE)
    if len(known) == 1:
        (rule, where), *_ = known.items()
        if not is_default and wanted != rule:
            said = f"{folder / where} says {rule}, where {wanted} was asked for, or trained with"
            raise UserError(f"rope_ratio, --rope_rule: {said}. Leave the flag out, or give the base of the training.")
        return rule
    if not wanted:
        raise UserError(
            f"{folder}: rope_ratio is {fields['rope_ratio']} and nothing says by which rule. Put the {CODE} that was "
            "published with the weights beside them, or give --rope_rule position (it divides positions, as in "
            "ChatGLM2-6B-32k) or --rope_rule base (it multiplies the rotary base, as in ChatGLM3-6B-32k)."
        )
    return wanted


def rules_in(path):
    """{rule: name of the file} of the rules by which a file of code uses rope_ratio; empty if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {rule: path.name for rule, pattern in IN_CODE.items() if re.search(pattern, text)}
