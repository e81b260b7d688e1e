"""``FusedLoRALinear``: the parameters, the state and the merge of one adapted linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .functional import lora_linear
from .packed import PackedLinear
from .replacing import carry, share_linear, unsupported_reason


class FusedLoRALinear(PackedLinear):
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
    - ``deepcopy`` and ``pickle`` keep the state, the pristine weight included;
    - ``train()`` unmerges, since a merged layer would train nothing; ``eval()`` changes nothing.

    After ``merge(keep_base=False)`` the layer is a plain frozen linear for good: ``lora_A`` and
    ``lora_B`` are None and ``state_dict`` is that of the plain layer.

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
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    _scale: Tensor

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
        autocast_adapter_dtype: bool = True,
        pack_weight: str = "eval",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_lora_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.fan_in_fan_out = False
        self._add_lora(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, autocast_adapter_dtype
        )
        self.pack_weight = pack_weight

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        pack_weight: str = "eval",
    ) -> FusedLoRALinear:
        """Wrap an ``nn.Linear`` or transformers' ``Conv1D``: the new layer holds the same Parameter
        objects, frozen.

        Hooks, ``training`` and the device come along; nothing is copied and no forward of
        ``module`` changes.

        Raises:
            TypeError: ``module`` is something else, computes in its own way (a subclass's forward,
                one that was set on the object), holds more than weight and bias (parametrised,
                pruned), or its weight is no plain Parameter (quantised); the message says which.
            ValueError: as for the constructor.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"FusedLoRALinear.from_linear: the module {reason}")
        check_lora_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        share_linear(self, module)
        self._add_lora(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, autocast_adapter_dtype
        )
        self.pack_weight = pack_weight
        carry(module, self)
        return self.train(module.training)

    def _add_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        autocast_adapter_dtype: bool,
    ) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.merged = False
        # The pristine weight while merged, in a tuple so that nn.Module does not register it.
        self._base: tuple[nn.Parameter, ...] = ()
        self._init_packing()
        device, dtype = self.weight.device, self.weight.dtype
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self._scaling = default_scaling(lora_alpha, r, use_rslora)
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
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def set_lora(
        self, lora_a: Tensor, lora_b: Tensor, *, lora_alpha: float, use_rslora: bool = False
    ) -> None:
        """Copy another adapter of the same rank into this layer, ``scaling`` included; a merged
        layer merges it.

        Raises:
            ValueError: ``lora_a`` is not [r, in_features] or ``lora_b`` not [out_features, r].
        """
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        if lora_a.shape != self.lora_A.shape or lora_b.shape != self.lora_B.shape:
            raise ValueError(
                f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit this "
                f"layer's {list(self.lora_A.shape)} and {list(self.lora_B.shape)}"
            )
        self._with_pristine_weight(lambda: self._set_lora(lora_a, lora_b, lora_alpha, use_rslora))

    @torch.no_grad()
    def _set_lora(
        self, lora_a: Tensor, lora_b: Tensor, lora_alpha: float, use_rslora: bool
    ) -> None:
        assert self.lora_A is not None and self.lora_B is not None
        self.lora_A.copy_(lora_a)
        self.lora_B.copy_(lora_b)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self._set_scaling(default_scaling(lora_alpha, self.r, use_rslora))

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
        if self.merged:
            return self._base_forward(input)
        assert self.lora_A is not None and self.lora_B is not None
        return lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            self._scale,
            self.bias,
            dropout_p=self.lora_dropout,
            training=self.training,
            fan_in_fan_out=self.fan_in_fan_out,
            packed=self._packed_copies(input),
        )

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`."""
        return self.weight.new_zeros(rows, self.in_features, dtype=dtype), self.forward

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling * B A`` in the weight's own orientation, in float32 (float64 for a float64
        weight)."""
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        device_type = self.weight.device.type
        # Merging under autocast must not round the factors.
        with torch.autocast(device_type, enabled=False):
            delta = (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).mul_(self._scaling)
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Fold the adapter into a new weight Parameter; merging a merged layer changes nothing.

        The pristine weight is never written, so tied and shared weights stay as they are, and
        :meth:`unmerge` puts the same object back. With ``keep_base=False`` neither it nor the
        adapter is kept, for a final export.
        """
        if not self.merged:
            delta = self.delta_weight()
            base = cast(nn.Parameter, self.weight)
            self.weight = nn.Parameter(
                (base.to(delta.dtype) + delta).to(base.dtype), requires_grad=False
            )
            self._base = (base,)
            self.merged = True
            self.drop_packed()
        if not keep_base and self._base:
            self._base = ()
            self.lora_A = self.lora_B = None

    def unmerge(self) -> None:
        """Put the pristine weight back; on a layer that is not merged nothing changes.

        Raises:
            RuntimeError: the layer was merged with ``keep_base=False``.
        """
        if not self.merged:
            return
        if not self._base:
            raise RuntimeError(
                "this layer was merged with keep_base=False: its pristine weight is gone"
            )
        (self.weight,) = self._base
        self._base = ()
        self.merged = False
        self.drop_packed()

    def _with_pristine_weight(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on the unmerged layer and merge again if it was merged."""
        if not self._base:
            return action()
        self.unmerge()
        try:
            return action()
        finally:
            self.merge()

    def train(self, mode: bool = True) -> FusedLoRALinear:
        """As ``nn.Module.train``; entering training mode unmerges (a layer exported by
        ``keep_base=False`` stays)."""
        if mode and self._base:
            self.unmerge()
        if mode and self._pack_weight == "eval":
            self.drop_packed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRALinear:
        self._with_pristine_weight(lambda: self._apply_to_pristine(fn, recurse))
        return self

    def _apply_to_pristine(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        scale = self._scale
        self.drop_packed()
        super()._apply(fn, recurse)
        # .half() must not round the scale, to_empty() must not lose it.
        self._keep_scale(scale)

    def _keep_scale(self, scale: Tensor) -> None:
        """``scale`` where it fits the weight, which keeps its address; else a new one."""
        expected = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if scale.device == self.weight.device and scale.dtype == expected:
            self._scale = scale
        else:
            self._scale = self._new_scale()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base:
            (base,) = self._base
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        self._with_pristine_weight(lambda: self._load_pristine(*args, **kwargs))

    def _load_pristine(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # With assign=True the weight may have come off the meta device, and the scale is in no
        # state_dict.
        self._keep_scale(self._scale)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        text += f", scaling={self.scaling:g}"
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
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str
) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"the rank r must be an integer >= 1, not {r!r}")
    if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if not isinstance(lora_dropout, (int, float)) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), not {lora_dropout!r}")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian', not {init_lora_weights!r}"
        )
