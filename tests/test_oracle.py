"""The recorded numbers of the original implementation (tests/fixtures/oracle: fp32, CPU, tiny random checkpoints).

A part of the golden data that the project was built against; what each file holds is said in the README under "Proof".
The hooks are those of tests/oracle_impl.py, so that this and the complete check run the same code.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_finetune.models.glm2 import ChatGLM2ForConditionalGeneration
from tests import oracle_impl as impl

ROOT = Path(__file__).parent / "fixtures/oracle"
CASES = json.loads((ROOT / "manifest.json").read_text(encoding="utf-8"))["cases"]


def cases(*types):
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in CASES if c["type"] in types])


def recorded(case):
    path = ROOT / case["file"]
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))


def model_of(case):
    folder = ROOT / case["checkpoint"]
    if "adapter" in case:
        return impl.load_lora_model(folder, ROOT / case["adapter"], case["mode"])
    return impl.load_model(folder, case["mode"])


def tokenizer_of(case):
    return impl.load_tokenizer(ROOT / case["checkpoint"], case["mode"])


@cases("forward", "lora")
def test_logits_and_loss(case):
    data = recorded(case)
    inputs = {name[3:]: value for name, value in data.items() if name.startswith("in.")}
    with torch.no_grad():
        output = impl.forward(model_of(case), case["mode"], inputs)
    logits, compared = output.logits[:, data["positions"]], data["compare"]
    difference = (logits[..., data["vocab_columns"]] - data["out.logits"])[compared].abs().max()
    assert difference <= case["atol_logits"]
    assert (logits.logsumexp(-1) - data["out.logsumexp"])[compared].abs().max() <= case["atol_logits"]
    if "out.loss" in data:
        assert abs(output.loss - data["out.loss"]) <= case["atol_loss"]


@cases("grad")
def test_gradients(case):
    data, model = recorded(case), model_of(case)
    model(input_ids=data["in.input_ids"], labels=data["in.labels"], use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == case["norms"].keys()
    for name, norm in case["norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=case["rtol_norm"], abs=1e-9), name
    for name, gradient in data.items():
        if name.startswith("grad."):
            assert (gradients[name[5:]] - gradient).norm() <= case["rtol_full"] * gradient.norm(), name


@cases("generate")
def test_greedy_generation(case):
    data, dtypes = recorded(case), {"attention_mask": torch.bool if case["mode"] == "glm" else torch.long}
    inputs = {name: torch.tensor(value, dtype=dtypes.get(name, torch.long)) for name, value in data["inputs"].items()}
    output = impl.generate(model_of(case), case["mode"], inputs, data["max_new_tokens"], data["eos_token_id"])
    for new_ids, expected in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), data["new_ids"], strict=True):
        assert new_ids[: len(expected)] == expected


@cases("tokenize")
def test_token_ids_and_decoded_text(case):
    tokenizer = tokenizer_of(case)
    for entry in recorded(case):
        text, ids = entry["text"], entry["ids"]
        assert tokenizer.tokenize(text) == entry["tokens"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == entry["ids_special"]
        assert tokenizer.decode(ids) == entry["decode"]
        assert tokenizer.decode(entry["ids_special"], skip_special_tokens=True) == entry["decode_skip_special"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == entry["decode_no_cleanup"]


@cases("dataset")
def test_training_rows(case):
    tokenizer, whole = tokenizer_of(case), None
    for entry in recorded(case):
        settings = [entry[name] for name in ("max_len", "max_src_len", "is_skip")]
        rows = list(impl.build_dataset(ROOT / case["samples"], tokenizer, case["mode"], *settings))
        if not entry["is_skip"]:
            whole = [
                {"input_ids": ids, "labels": [-100] * n + ids[n:]}
                for ids, n in zip(entry["input_ids"], entry["n_ignored"])
            ]
        expected = whole if not entry["is_skip"] else [whole[i] for i in entry["kept_rows"]]
        assert [{name: row[name] for name in ("input_ids", "labels")} for row in rows] == expected


@cases("chat")
def test_chat_turns(case):
    model, tokenizer = model_of(case), tokenizer_of(case)
    for entry in recorded(case):
        response, history = impl.chat(
            model, tokenizer, case["mode"], entry["query"], entry["history"], entry["max_length"]
        )
        assert response == entry["response"]
        assert json.loads(json.dumps(history)) == entry["new_history"]


@cases("process_response")
def test_responses_are_cleaned_as_by_the_original(case):
    for entry in recorded(case):
        result = impl.process_response(None, case["mode"], entry["text"], entry.get("history"))
        assert result == ((entry["out"], entry["new_history"]) if case["mode"] == "glm3" else entry["out"])


@pytest.mark.parametrize("name", ["glm", "glm2", "glm3", "codegeex2"])
def test_every_parameter_of_the_released_6b_checkpoints_is_accounted_for(name):
    contract = json.loads((ROOT.parent / f"contracts/{name}.json").read_text())
    mode = impl.MODE[contract["mode"]]
    config = mode.config(**contract["config"])
    with torch.device("meta"):
        model = mode.model(config)
    ours = {n: list(p.shape) for n, p in model.named_parameters()}
    ours |= {alias: ours[parameter] for alias, parameter in model.tied_names().items()}
    ours |= {n: list(buffer.shape) for n, buffer in model.stored_buffers().items()}
    theirs = {
        n.replace("{i}", str(i)): shape
        for n, shape in contract["parameter_shapes"].items()
        for i in range(config.num_layers if "{i}" in n else 1)
    }
    assert ours == theirs and len(theirs) == contract["num_names"]
    assert issubclass(mode.model, ChatGLM2ForConditionalGeneration) == (contract["mode"] != "glm")


def test_exceptions_name_a_case_and_a_reason():
    exceptions = json.loads((Path(__file__).parent / "oracle_exceptions.json").read_text(encoding="utf-8"))
    assert all(isinstance(reason, str) and len(reason) > 20 for reason in exceptions.values())
    forbidden = ("forward", "grad", "generate", "lora", "train")
    assert not [case for case in exceptions if case.split("/")[1] in forbidden]
