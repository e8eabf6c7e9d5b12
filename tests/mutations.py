"""Do the tests notice? Breaks one thing after the other in a copy of the tree and runs the tests that should fail.

    python tests/mutations.py                # about six minutes; exit code 0 if every mutation is killed
    python tests/mutations.py decay betas    # those whose names hold one of these

The tests must pass in the copy as it is, or that they fail would mean nothing. A mutation finds its place by the text
that it replaces, which must stand once in the code, in whatever file: where the code was changed, so must the mutation.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAIN = "tests/test_reference.py::test_training_is_that_of_plain_torch"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new`; `tests`: arguments of pytest that should fail then."""

    name: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # These eight passed 827 tests, all at once.
    Mutation(
        "evaluation with dropout",
        "    run.engine.eval()\n",
        "",
        "tests/test_reference.py::test_evaluation_drops_nothing",
    ),
    Mutation(
        "the same dropout on all ranks",
        "dist.seed_all(config.seed + dist.rank())",
        "dist.seed_all(config.seed)",
        "tests/test_reference.py::test_ranks_drop_different_things_as_many_as_they_are_told",
    ),
    Mutation(
        "--max_grad_norm unheard",
        '"gradient_clipping": config.max_grad_norm,',
        '"gradient_clipping": 1.0,',
        f"{PLAIN}[lora, clipped]",
    ),
    Mutation("another second beta", '"betas": [0.9, 0.95],', '"betas": [0.9, 0.999],', f"{PLAIN}[lora, not clipped]"),
    Mutation(
        "norms and biases decay",
        "decay = weight_decay if len(full_shape(parameter)) > 1 else 0.0",
        "decay = weight_decay",
        "tests/test_reference.py::test_matrices_decay_norms_and_biases_do_not[glm3]",
    ),
    Mutation(
        "--lora_dropout unheard",
        "name: Dropout(dropout) for name",
        "name: Dropout(0.0) for name",
        "tests/test_reference.py::test_ranks_drop_different_things_as_many_as_they_are_told",
    ),
    Mutation("--lora_alpha unheard", '"lora_alpha": alpha,', '"lora_alpha": 8,', f"{PLAIN}[lora, not clipped]"),
    Mutation(
        "an answer behind no question",
        "kept = messages[:first] + messages[start:]",
        "kept = messages[:first] + messages[start + 1 :]",
        "tests/test_own_questions.py",
    ),
    Mutation(
        "answers without the blanks around them",
        "for token_id in ids:\n        reply.push(token_id)\n    reply.finish()\n    return reply.text",
        "for token_id in ids:\n        reply.push(token_id)\n    reply.finish()\n    return reply.text.strip()",
        "tests/test_asked_as_trained.py",
    ),
    Mutation(
        "a merged folder forgets its template",
        '**read_record(adapter), "mode": mode.name, **dataclasses.asdict(prompt)}',
        '"mode": mode.name}',
        "tests/test_reference.py::test_a_merged_folder_is_asked_with_the_template_of_its_training[train]",
    ),
    # These were killed before.
    Mutation(
        "loss not multiplied by the ranks",
        "len(batches) * dist.get_world_size()",
        "len(batches)",
        "tests/test_training.py::test_loss_and_weights_do_not_depend_on_how_a_step_is_split[glm3-lora]",
    ),
    Mutation(
        "second moments not restored",
        "in zip(MOMENTS, moments):",
        "in zip(MOMENTS[:1], moments[:1]):",
        "tests/test_old_checkpoint.py::test_a_checkpoint_of_the_old_code_goes_on_as_it_did_there[all]",
    ),
    Mutation(
        "random numbers not restored",
        'torch.set_rng_state(states[f"cpu.{dist.rank()}"])',
        "pass",
        "tests/test_old_checkpoint.py::test_a_checkpoint_of_the_old_code_goes_on_as_it_did_there[lora]",
    ),
    Mutation(
        "what is not finite is accepted",
        "if math.isfinite(loss) and applied:",
        "if True:",
        "tests/test_guard.py::test_what_is_not_finite_stops_all_ranks_before_a_weight_changes"
        "[loss-the loss is nan-zero2]",
    ),
    Mutation(
        "kv heads in turn, not side by side",
        "again(torch.repeat_interleave, x, num_groups, 1)",
        "x.repeat(1, num_groups, 1, 1)",
        "tests/test_oracle.py::test_logits_and_loss",
    ),
    Mutation(
        "the first token of a packed sample is a target",
        '[[IGNORE, *row["labels"][1:]] for row in rows]',
        '[row["labels"] for row in rows]',
        "tests/test_packing.py::test_the_last_token_of_a_sample_never_predicts_the_first_of_the_next",
    ),
    Mutation(
        "special tokens out of text",
        "if self.special_ids.isdisjoint(ids):",
        "if True:",
        "tests/test_tokenizer.py::test_a_vocabulary_that_would_match_a_special_piece_in_text_is_overruled",
    ),
    Mutation(
        "the schedule a step late",
        "lr_at(progress.step + 1,",
        "lr_at(progress.step,",
        f"{PLAIN}[lora, not clipped]",
    ),
    Mutation(
        "--loraplus_ratio unheard",
        'group["lr"] = lr * group["lr_ratio"]',
        'group["lr"] = lr',
        "tests/test_train_types.py::test_loraplus_reaches_the_optimizer",
    ),
    Mutation(
        "--seed does not shuffle",
        "shuffled(self.num_rows, self.seed, epoch)",
        "shuffled(self.num_rows, epoch)",
        "tests/test_distribution.py::test_the_order_follows_from_seed_and_epoch_alone",
    ),
)


def place_of(mutation, root):
    """The file in which the text of a mutation stands. Raises ValueError unless it stands once in all of them."""
    paths = [*root.glob("*.py"), *root.glob("glm_finetune/**/*.py")]
    found = [path for path in paths for _ in range(path.read_text(encoding="utf-8").count(mutation.old))]
    if len(found) != 1:
        names = [str(path.relative_to(root)) for path in found]
        raise ValueError(
            f"mutation {mutation.name!r}: {mutation.old!r} stands {len(found)} times in the code {names}, not once. "
            "The code was changed: update the mutation in tests/mutations.py."
        )
    return found[0]


def failures(tests, root):
    """Names of the tests that fail in a copy of the tree, up to the first; [] if all pass.

    Raises RuntimeError if they could not be run, or ran out of time: that says nothing.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # restored files are as old and long as mutated ones
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    out_of_time = re.search(r"queue\.Empty|it hangs", done.stdout)
    if done.returncode not in (0, 1) or bool(failed) != bool(done.returncode) or out_of_time:
        raise RuntimeError(f"{' '.join(tests)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return failed


def is_killed(mutation, root):
    """Make one mutation in a copy of the tree, run its tests, print a row of the table, take it back."""
    path, started = place_of(mutation, root), time.monotonic()
    text = path.read_text(encoding="utf-8")
    mutated = text.replace(mutation.old, mutation.new)
    compile(mutated, path, "exec")
    path.write_text(mutated, encoding="utf-8")
    try:
        failed = failures([mutation.tests], root)
    finally:
        path.write_text(text, encoding="utf-8")
    where = path.relative_to(root)
    killer = f"`{failed[0]}`" if failed else "SURVIVES"
    print(f"| {mutation.name} | {where} | {killer} | {time.monotonic() - started:.0f} |", flush=True)
    return bool(failed)


def copy_tree(folder):
    """Copy the files that git knows, as they are now; the working tree is never changed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def main(wanted):
    chosen = [mutation for mutation in MUTATIONS if not wanted or any(part in mutation.name for part in wanted)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        root = Path(name).resolve()
        copy_tree(root)
        for mutation in chosen:
            place_of(mutation, root)
        failed = failures(sorted({mutation.tests for mutation in chosen}), root)
        if failed:
            raise RuntimeError(f"{failed[0]} fails without a mutation.")
        print("| mutation | in | killed by | seconds |\n|---|---|---|---|", flush=True)
        killed = [is_killed(mutation, root) for mutation in chosen]
    print(f"{sum(killed)} of {len(chosen)} mutations are killed.")
    return 0 if chosen and all(killed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
