"""The data set as ChatGLM-Finetuning makes it."""

from glm_finetune import MODE
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.samples import Settings, check_limits
from glm_finetune.modes.spec import Limits


def original_dataset(mode, path, tokenizer, max_len=1024, max_src_len=256, is_skip=False):
    """An end token after cut answers included, and no token kept free for an answer. mode: its name.

    max_len, max_src_len: tokens of a sample, of its question. is_skip: leave out rows that do not fit instead of
    cutting them. Raises UserError for limits that leave no room, and as InstructionDataset.
    """
    form = MODE[mode].template
    check_limits(max_len, max_src_len, form)
    settings = Settings(form, tokenizer, Limits(max_len, max_src_len), too_long="drop" if is_skip else "cut")
    return InstructionDataset(path, settings)
