"""What must not go on in silence: loss or gradient inf or nan, a step without targets, a loss that stands still.

DeepSpeed discards a step on every rank, before it touches a weight, when the norm of the gradient is not finite; here
the run then stops, or counts and goes on (--on_nonfinite skip), and says what it can see of the cause.

    counts = guard.accepts(step, loss, losses, slots)     # after each step; all ranks must call
"""

import math

from glm_finetune import dist
from glm_finetune.errors import NotFinite, StandsStill
from glm_finetune.weights import is_finite

MAX_STILL = 20  # steps with the same loss, or with a loss of 0
TOO_HIGH = 10  # times the learning rate of the recipe
SHOWN = 8  # samples of a micro-batch that are named
STILL = (
    "Nothing is learnt: the samples are all the same, the answers are a single token, --learning_rate is too small for "
    "this precision, or the model knows the data by heart."
)


def loss_scales(engine):
    """By what fp16 training multiplies the loss, and the least that it may come down to; 1 in other precisions."""
    if not engine.fp16_enabled():
        return 1.0, 1.0
    scaler = engine.optimizer.loss_scaler
    return scaler.cur_scale, scaler.min_scale if scaler.dynamic else scaler.cur_scale


class Guard:
    """skipped: fp16 steps that the loss scaler discarded. nonfinite: steps that were skipped for another reason."""

    def __init__(self, engine, config, train_type, where):
        """where(row) -> "file, line N" of a row of the training data."""
        self.engine, self.config, self.train_type, self.where = engine, config, train_type, where
        self.skipped = self.nonfinite = self.still = 0
        self.last_loss, (self.scale, self.smallest_scale) = None, loss_scales(engine)

    def check_targets(self, step, num_targets, slots):
        """Raise NotFinite if no sample of a step has a target. slots: this rank's micro-batches of rows."""
        if not num_targets:
            self._refuse_step(step, slots)

    def _refuse_step(self, step, slots):
        gathered = dist.gather_objects([self._places(slot) for slot in slots])
        places = "; ".join(place for part in gathered for place in part if place)
        remedy = "their answers are empty or do not fit. Remove them, or raise --max_len."
        raise NotFinite(f"step {step}: no sample of this step has a target to learn from ({places}): {remedy}")

    def accepts(self, step, loss, losses, slots):
        """Whether the loss of a step counts; it does not when the step was discarded for a loss that is not finite.

        loss: mean of a target token over all ranks. losses: this rank's share of each micro-batch; slots: their rows.
        Raises NotFinite with the causes that can be seen. All ranks must call.
        """
        applied, could_scale_down = self.engine.was_step_applied(), self.scale > self.smallest_scale
        self.scale, _ = loss_scales(self.engine)
        if math.isfinite(loss) and applied:
            self.still = self.still + 1 if loss in (0.0, self.last_loss) else 0
            self.last_loss = loss
            if self.still >= MAX_STILL:
                self._tell_still(step, loss)
        elif math.isfinite(loss) and could_scale_down:  # fp16's loss scaler is looking for the scale that fits
            self.skipped += 1
        else:
            self._discarded(self._explain(step, loss, losses, slots, applied))
            return False
        return True

    def _discarded(self, text):
        self.nonfinite += 1
        if self.config.on_nonfinite == "stop" or self.nonfinite > self.config.max_nonfinite:
            raise NotFinite(text)
        dist.print_main(f"skipped, {self.nonfinite} of at most {self.config.max_nonfinite}: {text}")

    def _tell_still(self, step, loss):
        text = f"step {step}: the loss has been {loss} for {MAX_STILL} steps. {STILL}"
        if self.config.on_nonfinite == "stop":
            raise StandsStill(text)
        dist.print_main(text)
        self.still = 0

    def _explain(self, step, loss, losses, slots, applied):
        bad = [
            f"rank {dist.rank()}, micro-batch {i}: loss {float(value)} ({self._places(slot) or 'no samples'})"
            for i, (value, slot) in enumerate(zip(losses, slots), 1)
            if not math.isfinite(value)
        ]
        bad = [line for part in dist.gather_objects(bad) for line in part]
        what = f"the loss is {loss}" if bad else f"the gradient is not finite (the loss is, {loss:.5f})"
        state = "The step was taken already." if applied else "The step was discarded, no weight was changed by it."
        causes = "".join(f"\n  cause: {cause}" for cause in self._causes(bool(bad)))
        return f"step {step}: {what}. {state}" + "".join(f"\n  {line}" for line in bad) + causes

    def _places(self, slot):
        more = f"; and {len(slot) - SHOWN} more" if len(slot) > SHOWN else ""
        return "; ".join(self.where(row) for row in slot[:SHOWN]) + more

    def _causes(self, in_loss):
        """What may be behind it, the surest first. All ranks must call."""
        parts = ((name, getattr(p, "ds_tensor", p)) for name, p in self.engine.module.named_parameters())
        own = [name for name, p in parts if p.is_floating_point() and p.numel() and not is_finite(p.detach())]
        broken = sorted({name for names in dist.gather_objects(own) for name in names})
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            yield f"weights hold inf or nan since an earlier step: {broken[0]}{more}. Go back to an earlier checkpoint."
        rate, recipe = self.config.learning_rate, self.train_type.learning_rate(self.config)
        if rate > TOO_HIGH * recipe:
            yield f"--learning_rate {rate} is too high for {self.train_type.name}: its recipe has {recipe}."
        if self.engine.fp16_enabled():
            limit = "ends at 65504, which activations of these models pass"
            what = limit if in_loss else "overflowed with the smallest loss scale as well"
            yield f"fp16 {what}: use --precision bf16 or fp32."
        if not broken and rate <= TOO_HIGH * recipe:
            yield f"try a --learning_rate below {rate}, and look at the samples named here."
