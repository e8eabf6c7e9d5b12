"""The files of an original checkpoint and the models: a config that keeps config.json as it was read, strict loading,
saving in the original layout.

transformers warns about names that do not fit, here they are an error, and every weight is read once, straight into
the dtype asked for. Not here: what is computed, see `network`.
"""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from glm_finetune import weights
from glm_finetune.errors import UserError
from glm_finetune.models.rope import choose_rule
from glm_finetune.weights import DTYPE_NAMES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OriginalConfig(PreTrainedConfig):
    """A config.json of the original project. `source` keeps it as it was read, so that it can be written back.

    A subclass lists the fields with their defaults (transformers makes the constructor), and has head_size,
    num_kv_heads, and max_positions: the longest text the model was made for, in tokens.
    """

    model_type = "chatglm"
    prompt_len = None  # embeddings of a P-Tuning v1 prompt; a field of this project's own
    prefix_embedding_size = None  # of a P-Tuning v2 encoder; None: that of the keys and values
    required_fields = ()  # fields that a config.json of this architecture has and the other's lacks
    attribute_map = {"num_hidden_layers": "num_layers"}  # another name of a field
    rope_ratio, rope_rule = 1.0, None  # fields where an architecture has long-context variants

    @classmethod
    def from_pretrained(cls, folder):
        """Read `folder`/config.json. Raises UserError if it is missing, not JSON, or a field has a wrong type."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder. Give the folder of a checkpoint on this machine.")
        fields = weights.read_json(path)
        cls._check_types(fields, path)
        config = cls(**fields)
        config.source = fields
        return config

    def stretch(self, folder, rope_rule=None, default=None):
        """Know what a rope_ratio other than 1 means in the checkpoint `folder`, see `rope.choose_rule`."""
        self.rope_rule = None
        if self.rope_ratio != 1:
            self.rope_rule = self.source["rope_rule"] = choose_rule(Path(folder), self.source, rope_rule, default)
        return self

    @classmethod
    def _check_types(cls, fields, path):
        """Raise UserError for a field whose type is not that of its default, a negative number, an unknown dtype."""
        for name in filter(cls.__annotations__.__contains__, fields):
            value, default = fields[name], getattr(cls, name)
            kinds = {bool: bool, int: int, float: (int, float)}.get(type(default), object)
            if not isinstance(value, kinds) or (kinds not in (bool, object) and value < 0):
                raise UserError(f"{path}: {name} is {value!r}, expected something like {default!r}.")
        known = DTYPE_NAMES.values()
        if (dtype := fields.get("torch_dtype", "float32")) not in known:
            raise UserError(f"{path}: torch_dtype is {dtype!r}, expected one of {', '.join(known)}.")

    def to_original(self, **changes):
        """The fields of config.json, as read, with `changes` (None removes a field)."""
        fields = {**self.source, **changes}
        return {name: value for name, value in fields.items() if value is not None}


class OriginalModel(PreTrainedModel):
    """A model that reads and writes original checkpoints. Subclasses: `network.Network`."""

    base_model_prefix = "transformer"
    ignored_in_file = (r"\.inv_freq$",)  # rotary frequencies: the original stores and never reads them

    @classmethod
    def from_pretrained(cls, folder, dtype=None, place=None, rope_rule=None):
        """Load an original checkpoint folder, or one saved by this project.

        dtype: of every weight; default: `torch_dtype` of config.json. place: where the weights go (`weights.OnDevice`),
        instead of whole onto the CPU as `dtype`. rope_rule: of a long-context variant, see `rope.choose_rule`. Peak
        memory is the model plus one tensor. Returns the model in eval mode. Raises UserError for a folder, file, name
        or shape that does not fit, and for weights that take more memory than is free.
        """
        config = cls.config_class.from_pretrained(folder).stretch(folder, rope_rule)
        dtype = dtype or getattr(torch, config.source.get("torch_dtype", "float32"))
        place = place or weights.Mapped(dtype, torch.device("cpu"))
        if weights.weight_bytes(folder) > weights.LARGE_BYTES:
            weights.check_host(lambda: cls(config), folder, place)
        model = place.construct(lambda: cls(config))
        weights.fill(model, folder, place, cls.ignored_in_file, model.tied_names())
        model.tie_weights()
        return model.eval()

    def tied_names(self):
        """{alias in the file: parameter}; empty when the head has its own weight."""
        return {}

    def get_input_embeddings(self):
        return self.get_submodule(self.input_embeddings_name)

    def get_output_embeddings(self):
        return self.get_submodule(self.output_embeddings_name)

    def stored_buffers(self):
        """{name: tensor} that the original's files contain besides parameters (inverse rotary frequencies)."""
        raise NotImplementedError

    def save_weights(self, folder, tensors=None, dtype=None, dtypes=None):
        """Write config.json and weights in the original's layout, so that the original loads them too.

        tensors: iterable of (name, tensor); default: the model's own parameters. dtype: of the files, default the
        model's; dtypes: {name: dtype} where single tensors differ (ChatGLM-6B's fp32 norms in an fp16 file).
        """
        dtype = dtype or self.get_input_embeddings().weight.dtype
        tensors = self.named_parameters() if tensors is None else tensors
        aliases = {parameter: alias for alias, parameter in self.tied_names().items()}

        def entries():
            for name, tensor in tensors:
                tensor = tensor.detach().to("cpu", (dtypes or {}).get(name, dtype))
                yield name, tensor
                if name in aliases:
                    yield aliases[name], tensor.clone()
            yield from self.stored_buffers().items()

        weights.write_sharded(entries(), folder)
        weights.write_json(self.config.to_original(torch_dtype=DTYPE_NAMES[dtype]), Path(folder) / "config.json")
