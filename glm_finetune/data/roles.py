"""Names of who speaks in a conversation -> roles, those of --roles before those that everybody uses.

role_of("Human", {})                                    # "user"
role_of("Client", parse_roles("client=user"))           # "user"
"""

from glm_finetune.errors import UserError, did_you_mean

TARGETS = ("system", "user", "assistant", "observation", "function_call", "tool")
ROLES = {"human": "user", "gpt": "assistant", **{name: name for name in TARGETS}}


def role_of(name, roles, field="role"):
    """The role of a name in any case. roles: `parse_roles`. Raises UserError naming `field` for an unknown one."""
    lower = name.lower() if isinstance(name, str) else None
    role = roles.get(lower) or ROLES.get(lower)
    if role is None:
        hint = " Another name is read with --roles NAME=ROLE." if lower else ""
        raise UserError(f"{field} {name!r:.40}: must be one of {', '.join({**ROLES, **roles})}.{hint}")
    return role


def parse_roles(text):
    """ "client=user,counselor=assistant" -> {"client": "user", "counselor": "assistant"}, names in lower case.

    Raises UserError for another form, a name that is given twice, and a role that there is none of.
    """
    roles = {}
    for part in filter(None, text.split(",")):
        name, equals, role = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise UserError(f"--roles {text}: {part!r} must be NAME=ROLE, the name in the file first.")
        if role not in TARGETS:
            near = did_you_mean(role.lower(), TARGETS)
            raise UserError(f"--roles {text}: {role!r} must be one of {', '.join(TARGETS)}.{near}")
        if name.lower() in roles:
            raise UserError(f"--roles {text}: {name!r} is given twice. Leave one of them out.")
        roles[name.lower()] = role
    return roles
