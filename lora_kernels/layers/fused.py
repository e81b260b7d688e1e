"""``FusedLoRALinear``: the parameters, the state and the merge of one adapted linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check, scale_tensor
from ..functional.dora import dora_norm
from ..functional.linear import Operands, checked_lora_linear, lora_linear
from ..functional.ops import PLAIN, without_autocast
from ..spec.four_bit import quant_state_of
from .foreign import carry_dispatch_hook
from .merging import MergeableLinear, Plain
from .norms import DoRANorms
from .packed import check_pack_weight
from .replacing import holds_four_bits, share_hooks, share_linear, unsupported_reason
from .shared_input import shared_result


class FusedLoRALinear(MergeableLinear):
    """A linear layer with a LoRA adapter, computed in one operator; a drop-in for ``nn.Linear``.

    ``y = x W^T + scaling * (dropout(x) A^T) B^T + bias`` with ``weight`` W [out, in] and ``bias``
    [out] frozen, and ``lora_A`` A [r, in], ``lora_B`` B [out, r] trainable Parameters. ``scaling``
    is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski,
    arXiv:2312.03732). Weights taken from transformers' Conv1D stay stored as [in, out]
    (``fan_in_fan_out`` is then True); so do ``state_dict`` and ``delta_weight``.

    While merged, the layer computes ``x (W + delta)^T + bias`` with a new weight Parameter; the
    pristine one is kept aside and comes back, the same object, on :meth:`unmerge`. The merged
    weight is derived state, so:

    - ``state_dict()`` holds the pristine weight and the adapter, merged or not;
    - ``load_state_dict``, ``.to``, ``.half`` and their like, and setting ``scaling``, act on the
      pristine weight and the adapter, and merge again;
    - a Parameter that is assigned to ``weight`` (as ``tie_weights()`` does) is the new pristine
      weight, and is merged; one that is not the former pristine weight is warned of;
    - ``deepcopy`` and ``pickle`` keep the state, the pristine weight included;
    - ``train()`` unmerges, since a merged layer would train nothing; ``eval()`` changes nothing.

    After ``merge(keep_base=False)`` the layer is a plain frozen linear for good: ``lora_A`` and
    ``lora_B`` are None and ``state_dict`` is that of the plain layer; :meth:`to_linear` gives a
    layer of the plain class.

    A layer that is materialised from the meta device draws its adapter anew, by ``to_empty`` as by
    a ``load_state_dict(assign=True)`` that has none: on the meta device it had no values.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        r: the rank, >= 1.
        lora_alpha: the numerator of ``scaling``.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input in
            training.
        use_rslora: see above.
        init_lora_weights: True: A Kaiming-uniform and B zero, so that the layer starts as its base;
            "gaussian": A normal with deviation 1/r and B zero; False: both Kaiming-uniform, for
            tests.
        use_dora: DoRA (Liu et al., arXiv:2402.09353): ``lora_magnitude_vector`` [out] trains the
            lengths of the rows of ``W + scaling * B A``, see
            :func:`lora_kernels.functional.dora.dora_linear`.
        autocast_adapter_dtype: keep the adapter in float32 on a half-precision base (PEFT's
            default). The compute dtype is x's in any case, see :func:`lora_kernels.lora_linear`.
        pack_weight: when a frozen float32 or bfloat16 ``weight`` on a CPU is kept a second time, in
            the order in which the native kernels read it: "eval": in evaluation mode, made by the
            first call and dropped by ``train()`` (one copy of the weight); "always": in training
            too, for the forward and for dX (two copies); "never". Copies are dropped when the
            weight changes, and are no part of any state. A weight that FSDP shards is never packed:
            it is there for one call at a time.

    Raises:
        ValueError: r < 1, lora_dropout outside [0, 1), an unknown init_lora_weights or pack_weight.

    >>> import torch
    >>> layer = FusedLoRALinear(8, 4, r=2, lora_alpha=4)
    >>> layer.scaling, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
    (2.0, (2, 8), (4, 2))
    >>> x = torch.ones(3, 8)
    >>> torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    True
    """

    fan_in_fan_out: bool
    use_dora = False
    lora_magnitude_vector: nn.Parameter
    _scale: Tensor
    _least_rank = 1
    # Whether share_inputs has found siblings.
    _shares_input = False
    # What stood here before.
    _plain = Plain(nn.Linear, {})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        pack_weight: str = "eval",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_lora_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        check_pack_weight(pack_weight)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.fan_in_fan_out = False
        self._add_lora(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            autocast_adapter_dtype=autocast_adapter_dtype,
            pack_weight=pack_weight,
        )

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        **options: Any,
    ) -> FusedLoRALinear:
        """Wrap an ``nn.Linear`` or transformers' ``Conv1D``: the new layer holds the same Parameter
        objects, frozen. The arguments are the class's.

        A four-bit layer (bitsandbytes' ``Linear4bit``, :class:`lora_kernels.QuantizedLinear`) stays
        four-bit, in its ``compute_dtype``: merging attaches a weight in that dtype. Hooks,
        ``training`` and the device come along; nothing is copied and no forward of ``module``
        changes.

        Raises:
            TypeError: ``module`` is something else, computes in its own way (a subclass's forward,
                one that was set on the object), holds more than weight and bias (parametrised,
                pruned), or its weight is no plain Parameter (quantised otherwise); the message
                says which.
            ValueError: as for the constructor; DoRA on a four-bit weight.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"FusedLoRALinear.from_linear: the module {reason}")
        if options.get("use_dora") and holds_four_bits(module):
            raise ValueError("use_dora is not computed on a four-bit weight")
        check_lora_arguments(r, lora_alpha, lora_dropout, init_lora_weights, cls._least_rank)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        share_linear(self, module)
        self._plain = Plain.of(module)
        self._add_lora(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, **options)
        carry_dispatch_hook(module, self)
        self.train(module.training)
        return self

    def _add_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        pack_weight: str = "eval",
    ) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.init_lora_weights, self.use_dora = init_lora_weights, use_dora
        self.merged = False
        self._base = ()
        self._init_packing()
        self.pack_weight = pack_weight
        device, dtype = self.weight.device, self.weight_dtype()
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        for name, shape in self._adapter_shapes().items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if use_dora:
            self._norms = DoRANorms()
        self._scaling = self._default_scaling()
        # A tensor, so that changing it recompiles nothing and reaches captured graphs; not part of
        # any state_dict.
        self.register_buffer("_scale", self._new_scale(), persistent=False)
        self.reset_lora_parameters()

    def _new_scale(self) -> Tensor:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return torch.full((), self._scaling, dtype=dtype, device=self.weight.device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.drop_packed()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A and B anew, as ``init_lora_weights`` says; ``weight`` and ``bias`` stay as they
        are."""
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        self._check_writable("draw an adapter", "lora_A", "lora_B")
        if self.lora_A.is_meta and not self.weight.is_meta:
            for name in self._adapter_names():
                held = self._parameters[name]
                assert held is not None
                values = torch.empty_like(held, device=self.weight.device)
                setattr(self, name, nn.Parameter(values, held.requires_grad))
            self._keep_scale(self._scale)
        self._draw_adapter()
        if self.use_dora and not self.weight.is_meta:
            # So that the layer starts as W + s B A.
            norm = dora_norm(
                self._pristine(), self.lora_A, self.lora_B, self._scale, self.fan_in_fan_out
            )
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(norm)

    def _draw_adapter(self) -> None:
        a: Any = self.lora_A
        b: Any = self.lora_B
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def _adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (self.r, self.in_features),
            "lora_B": (self.out_features, self.r),
        }
        return shapes | {"lora_magnitude_vector": (self.out_features,)} if self.use_dora else shapes

    def _adapter_names(self) -> list[str]:
        return list(self._adapter_shapes())

    def _default_scaling(self) -> float:
        return default_scaling(self.lora_alpha, self.r, self.use_rslora)

    def _pristine(self) -> Tensor:
        """The weight without the adapter."""
        return self._base[0] if self._base else self.weight

    def set_lora(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None = None,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
    ) -> None:
        """Copy another adapter of the same rank into this layer, ``scaling`` included; a merged
        layer merges it.

        Raises:
            ValueError: ``lora_a`` is not [r, in_features] or ``lora_b`` not [out_features, r]; or
                ``magnitude`` is missing with ``use_dora``, or not [out_features].
        """
        others = [] if magnitude is None else [magnitude]
        self._set_adapter([lora_a, lora_b, *others], lora_alpha, use_rslora)

    def _set_adapter(self, tensors: list[Tensor], lora_alpha: float, use_rslora: bool) -> None:
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        shapes = self._adapter_shapes()
        if [tuple(t.shape) for t in tensors] != list(shapes.values()):
            names = [*map(str.lower, shapes), "a magnitude"]
            given = [f"{n} {list(t.shape)}" for n, t in zip(names, tensors, strict=False)]
            raise ValueError(
                f"{', '.join(given)} do not fit this layer's "
                + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            )
        self._check_writable("set an adapter", *shapes)
        self._with_pristine_weight(lambda: self._set_lora(tensors, lora_alpha, use_rslora))

    @torch.no_grad()
    def _set_lora(self, tensors: list[Any], lora_alpha: float, use_rslora: bool) -> None:
        for name, tensor in zip(self._adapter_names(), tensors, strict=True):
            getattr(self, name).copy_(tensor)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self._set_scaling(self._default_scaling())

    @property
    def scaling(self) -> float:
        """The factor of the adapter's product; setting it keeps compiled code and captured graphs
        valid."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._with_pristine_weight(lambda: self._set_scaling(float(value)))

    def _set_scaling(self, value: float) -> None:
        self._scaling = value
        with torch.no_grad():
            self._scale.fill_(value)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], see :func:`lora_kernels.lora_linear`."""
        if self.compute_dtype is not None and self._casts(input):
            return self.forward(input.to(self.compute_dtype)).to(input.dtype)
        if self.merged:
            if self._base and (
                self._disabled or self._parameters.get("weight") is not self._base[1]
            ):
                return self._forward_beside_merged(input)
            return self._base_forward(input)
        if self._disabled:
            return self._base_forward(input)
        return self._adapted_forward(input)

    def _adapted_forward(self, input: Tensor) -> Tensor:
        if self._shares_input and not torch.compiler.is_compiling():
            y = shared_result(self, input)
            if y is not None:
                return y
        (weight, bias, a, b), kn = self._tensors(), self.fan_in_fan_out
        scale: Any = self._buffers["_scale"]
        p = self.lora_dropout if self.training else 0.0
        if self.use_dora:
            dtype = check(input, weight, a, b, bias, p, kn)
            packed = self._packed_copies(weight, kn, dtype)
            operands = input, weight, a, b, self.lora_magnitude_vector, scale, bias
            return self._norms.linear(*operands, kn, p, packed, training=self.training)
        if type(input) not in PLAIN or type(weight) not in PLAIN:
            options: Any = {"training": self.training, "fan_in_fan_out": kn}
            return lora_linear(input, weight, a, b, scale, bias, dropout_p=p, **options)
        dtype = check(input, weight, a, b, bias, p, kn)
        if dtype == torch.float64 or scale.device != input.device:
            scale = scale_tensor(scale, input.device, dtype)
        packed = self._packed_copies(weight, kn, dtype)
        return checked_lora_linear(
            Operands(input, weight, a, b, scale, bias, None, p, kn, dtype, *packed)
        )

    def operands_to_share(self, x: Tensor) -> Operands | None:
        """For :mod:`lora_kernels.layers.shared_input`."""
        (weight, bias, a, b), kn = self._tensors(), self.fan_in_fan_out
        if (
            type(self) is not FusedLoRALinear
            or self.use_dora
            or self.merged
            or self._disabled
            or not (type(x) in PLAIN and type(weight) in PLAIN)
        ):
            return None
        p = self.lora_dropout if self.training else 0.0
        dtype = check(x, weight, a, b, bias, p, kn)
        packed = self._packed_copies(weight, kn, dtype)
        scale: Any = self._buffers["_scale"]
        return Operands(x, weight, a, b, scale, bias, None, p, kn, dtype, *packed)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`."""
        dtype = dtype or self.weight_dtype()
        return self.weight.new_zeros(rows, self.in_features, dtype=dtype), self.forward

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging adds to the weight: ``scaling * B A`` in the weight's own orientation, in
        float32 (float64 for a float64 weight); with ``use_dora`` what ``W + scaling * B A`` with
        rows of the trained lengths differs by from W."""
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        # Merging under autocast must not round the factors.
        with without_autocast(self.weight.device.type):
            _, _, a, b = self._tensors()
            delta = (b.to(dtype) @ a.to(dtype)).mul_(self._scaling)
            if self.use_dora:
                w, kn = self._pristine(), self.fan_in_fan_out
                norm = dora_norm(w, self.lora_A, self.lora_B, self._scale, kn)
                base = (w.t() if kn else w).to(dtype)
                ratio = self.lora_magnitude_vector.to(dtype) / norm.to(dtype)
                delta = delta.add_(base).mul_(ratio[:, None]).sub_(base)
        return delta.t() if self.fan_in_fan_out else delta

    def to_linear(self) -> nn.Module:
        """A layer of the class that stood here before the adapter (``nn.Linear``, ``Conv1D``), with
        this one's ``weight`` as it is, merged or not, its ``bias``, hooks and mode.

        Raises:
            RuntimeError: as for :meth:`merge`.
        """
        names = ["weight"] + self._adapter_names() * (self.lora_A is not None)
        self._check_writable("make a plain linear", *names)
        kind, attributes = self._plain
        weight = self._own_weight()
        if "compute_dtype" in attributes and quant_state_of(weight) is None:
            # Merged into what was four-bit: no such layer could hold it.
            kind, attributes = nn.Linear, {}
            if self.fan_in_fan_out:
                weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        plain = kind.__new__(kind)
        nn.Module.__init__(plain)
        vars(plain).update(attributes)
        if isinstance(plain, nn.Linear):
            plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight, plain.bias = weight, self.bias
        share_hooks(plain, self)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRALinear:
        self._with_pristine_weight(lambda: self._apply_to_pristine(fn, recurse))
        return self

    def _apply_to_pristine(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        scale = self._scale
        was_meta = self.lora_A is not None and self.lora_A.is_meta
        super()._apply(fn, recurse)
        # .half() must not round the scale, to_empty() must not lose it.
        self._keep_scale(scale)
        if was_meta and self.lora_A is not None and not self.lora_A.is_meta:
            self.reset_lora_parameters()

    def _keep_scale(self, scale: Tensor) -> None:
        """``scale`` where it fits the weight, which keeps its address; else a new one."""
        expected = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if scale.device == self.weight.device and scale.dtype == expected:
            self._scale = scale
        else:
            self._scale = self._new_scale()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._with_pristine_weight(lambda: self._load_pristine(*args, **kwargs))

    def _load_pristine(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # With assign=True the weight may have come off the meta device, and the scale is in no
        # state_dict.
        self._keep_scale(self._scale)
        if self.lora_A is not None and self.lora_A.is_meta and not self.weight.is_meta:
            self.reset_lora_parameters()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        text += f", scaling={self.scaling:g}"
        if self.use_dora:
            text += ", use_dora=True"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout}"
        if self.fan_in_fan_out:
            text += ", fan_in_fan_out=True"
        if self.merged:
            text += ", merged=True"
        return text


def default_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_lora_arguments(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    init_lora_weights: bool | str,
    least: int = 1,
) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < least:
        raise ValueError(f"the rank r must be an integer >= {least}, not {r!r}")
    if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if not isinstance(lora_dropout, (int, float)) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), not {lora_dropout!r}")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian', not {init_lora_weights!r}"
        )
