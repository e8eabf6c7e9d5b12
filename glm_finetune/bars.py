"""Signs of life of what takes long: a bar with its total and the time left, drawn again while a step of it lasts.

    for name, tensor in counted(tensors, "read ChatGLM3-6B", num_bytes, size_of_pair): ...

On rank 0 only; nothing is seen of what takes less than a second.
"""

import threading
import time
from contextlib import suppress

from tqdm import tqdm

from glm_finetune import dist

BEAT_SECS = 2


def bar(title, total=None, **options):
    """A tqdm bar of rank 0 that counts bytes, and leaves nothing behind; without a total the time that passes."""
    form = None if total else "{desc} [{elapsed}]"
    given = dict(unit="B", unit_scale=True, delay=1, leave=False, disable=not dist.is_main(), dynamic_ncols=True)
    return tqdm(desc=title, total=total, bar_format=form, **given | options)


def counted(items, title, total, size=lambda item: item[-1].nbytes):
    """The items, with a bar of the bytes in them. size: of an item; default: of its last part, a tensor."""
    with bar(title, total) as shown:
        for item in items:
            yield item
            shown.update(size(item))


def keep_alive():
    """Draw every bar of this process again and again, as long as it lives."""
    threading.Thread(target=_beat, daemon=True).start()


def _beat():
    while True:
        time.sleep(BEAT_SECS)
        with suppress(RuntimeError, AttributeError):  # of the list of bars, when one comes or goes, or is half made
            for shown in list(getattr(tqdm, "_instances", ())):
                if not shown.disable and time.time() >= shown.start_t + shown.delay:
                    shown.refresh()
