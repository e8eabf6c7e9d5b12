"""What both model files build on: a config that keeps the original file, and a strict `from_pretrained`.

transformers gives `generate()`, gradient checkpointing and what peft needs. Loading is ours: transformers warns about
names that do not fit, here they are an error, and every weight is read once, straight into the dtype asked for.
"""

import inspect
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from glm_finetune import weights
from glm_finetune.errors import UserError
from glm_finetune.models.layers import PromptEncoder, Segments, head_loss, with_prefix_columns
from glm_finetune.weights import DTYPE_NAMES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OriginalConfig(PreTrainedConfig):
    """A config.json of the original project. `source` keeps it as it was read, so that it can be written back."""

    model_type = "chatglm"
    prompt_len = None  # embeddings of a P-Tuning v1 prompt; a field of this project's own
    keys_to_ignore_at_inference = ["past_key_values"]
    required_fields = ()  # fields that a config.json of this architecture has and the other's lacks

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

    @classmethod
    def _check_types(cls, fields, path):
        """Raise UserError for a field whose type is not that of its default, a negative number, an unknown dtype."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
        for name, value in fields.items():
            kinds = {bool: bool, int: int, float: (int, float)}.get(type(defaults.get(name)), object)
            if not isinstance(value, kinds) or (kinds not in (bool, object) and value < 0):
                raise UserError(f"{path}: {name} is {value!r}, expected something like {defaults[name]!r}.")
        if fields.get("torch_dtype", "float32") not in DTYPE_NAMES.values():
            raise UserError(
                f"{path}: torch_dtype is {fields['torch_dtype']!r}, expected one of {', '.join(DTYPE_NAMES.values())}."
            )

    def to_original(self, **changes):
        """The fields of config.json, as read, with `changes` (None removes a field)."""
        fields = {**self.source, **changes}
        return {name: value for name, value in fields.items() if value is not None}


class OriginalModel(PreTrainedModel, GenerationMixin):
    """Base of the two language models. Subclasses name `config_class`, `prefix_embedding_size` and their tied names."""

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    ignored_in_file = (r"\.inv_freq$",)  # rotary frequencies: the original stores and never reads them

    @classmethod
    def from_pretrained(cls, folder, dtype=None, config=None, device="cpu", may_miss=(), place=None):
        """Load an original checkpoint folder, or one saved by this project.

        dtype: torch.float32, bfloat16 or float16 for every weight; default: `torch_dtype` of config.json.
        config: replaces the folder's own (to set `pre_seq_len`); may_miss: see `weights.fill`.
        place: where the weights go, instead of whole onto `device` as `dtype`; see `weights.OnDevice`.
        Peak memory is the model plus one tensor. Returns the model in eval mode.
        Raises UserError for a folder, file, name or shape that does not fit.
        """
        config = cls.config_class.from_pretrained(folder) if config is None else config
        dtype = dtype or getattr(torch, config.source.get("torch_dtype", "float32"))
        place = place or weights.OnDevice(dtype, device)
        model = place.construct(lambda: cls(config))
        new = weights.fill(model, folder, place, cls.ignored_in_file, may_miss, model.tied_names())
        model._initialise_new(new, device)
        model.tie_weights()
        return model.eval()

    def _initialise_new(self, names, device):
        """Give parameters that no file had torch's default values in fp32 (a new prefix encoder, as in the
        original).
        """
        for owner in sorted({name.rpartition(".")[0] for name in names}):
            module = self.get_submodule(owner).to_empty(device=device)
            module.float().reset_parameters()

    def add_prefix(self, pre_seq_len, projection, dropout=0.0):
        """Add a new P-Tuning v2 prefix of `pre_seq_len` tokens in fp32 to a model without one.

        The original's config.json fields say so, also in what is saved.
        """
        self._set_config(pre_seq_len=pre_seq_len, prefix_projection=projection)
        self.transformer.new_prefix_encoder()
        self.transformer.prefix_encoder.to(self.device, torch.float32)
        self.transformer.dropout.p = dropout

    def add_prompt(self, prompt_len, projection, dropout=0.0):
        """Add a new P-Tuning v1 prompt of `prompt_len` embeddings in fp32 to a model without one."""
        self._set_config(prompt_len=prompt_len)
        size = self.get_input_embeddings().embedding_dim
        self.transformer.prompt_encoder = PromptEncoder(prompt_len, size, projection, dropout).to(self.device)

    def _set_config(self, **fields):
        """Set fields of the configuration, also in what is saved."""
        for name, value in fields.items():
            setattr(self.config, name, value)
        self.config.source = {**self.config.source, **fields}

    def with_prompt(self, embedded, position_ids, mask, num_past):
        """Put the prompt of P-Tuning v1, if there is one, in front of the text, whose positions move up.

        embedded: (B, T, D), position_ids: (B or 1, [2,] T), mask: (B, 1, T, S), Segments or None; num_past: text tokens
        in the cache, behind the prompt when there are any. The prompt is causal in itself and does not see the text, so
        that it is the same for every sample, also for those that share a row and so share its prompt. Returns the three
        for P + T tokens.
        """
        num_prompt = self.config.prompt_len or 0
        if not num_prompt:
            return embedded, position_ids, mask
        if isinstance(mask, Segments):  # each of them would need a prompt in front of it, not the row one
            mask = mask.as_mask(embedded.shape[0])
        mask = with_prefix_columns(mask, num_prompt)
        place = torch.arange(num_prompt, device=embedded.device)
        if position_ids.dim() == 3:  # ChatGLM-6B's second position counts from <sop>
            place = torch.stack((place, torch.zeros_like(place)))  # (2, P)
            position_ids = position_ids + position_ids.new_tensor([num_prompt, 0])[:, None]
        else:
            position_ids = position_ids + num_prompt
        if num_past:
            return embedded, position_ids, mask
        prompt = self.transformer.prompt_encoder().to(embedded.dtype)  # (P, D)
        embedded = torch.cat((prompt.expand(embedded.shape[0], -1, -1), embedded), 1)
        position_ids = torch.cat((place.expand(*position_ids.shape[:-1], -1), position_ids), -1)
        if mask is not None:
            rows = torch.ones(num_prompt, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
            mask = torch.cat((rows.expand(mask.shape[0], 1, -1, -1), mask), 2)  # (B, 1, P + T, P + S)
        return embedded, position_ids, mask

    def tied_names(self):
        """{alias in the file: parameter}; empty when the head has its own weight."""
        return {}

    def get_input_embeddings(self):
        return self.get_submodule(self.input_embeddings_name)

    def set_input_embeddings(self, module):
        owner, _, attribute = self.input_embeddings_name.rpartition(".")
        setattr(self.get_submodule(owner), attribute, module)

    def get_output_embeddings(self):
        return self.get_submodule(self.output_embeddings_name)

    def set_output_embeddings(self, module):
        owner, _, attribute = self.output_embeddings_name.rpartition(".")
        setattr(self.get_submodule(owner) if owner else self, attribute, module)

    def stored_buffers(self):
        """{name: tensor} that the original's files contain besides parameters (inverse rotary frequencies)."""
        raise NotImplementedError

    def refuse(self, output_attentions, output_hidden_states, return_dict):
        """Arguments that peft and transformers may pass and this model cannot honour. Raises ValueError."""
        if output_attentions or output_hidden_states or return_dict is False:
            raise ValueError("output_attentions, output_hidden_states and return_dict=False are not supported.")

    def cache_and_length(self, cache, use_cache):
        """The key/value cache to use (None: none) and how many tokens of text it holds."""
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None:
            return (DynamicCache(config=self.config), 0) if use_cache else (None, 0)
        return cache, max(0, cache.get_seq_length() - (self.config.prompt_len or 0))

    def output(self, hidden, labels, target_index, num_targets, logits_to_keep, return_logits, cache):
        """hidden: (B, T, D) -> loss at the targets, logits where they are asked for."""
        head = self.get_output_embeddings()
        loss = None if labels is None else head_loss(hidden, head, labels, target_index, num_targets)
        logits = None
        if return_logits or (return_logits is None and labels is None):
            logits = head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

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


def new_dropout(probability):
    """Dropout, or nothing at all when the probability is 0."""
    return nn.Dropout(probability) if probability else nn.Identity()
