"""``FusedLoRAExperts``: a mixture's experts, whose weights are 3-D Parameters, with adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..functional import ops
from ..functional.experts import expert_linear
from ..functional.segmented import segmented_lora
from ..spec.segments import SegmentTable
from .foreign import expert_matrices, is_dispatched
from .fused import check_lora_arguments, default_scaling
from .merging import is_offloaded, write_obstacle
from .replacing import is_forward_of_class


class Factors(NamedTuple):
    """One adapter as :func:`expert_linear` takes it: A [E, r, in], B [E, out, r], the scale."""

    a: Tensor
    b: Tensor
    scale: float | Tensor


class SlotFactors(NamedTuple):
    """The adapters of many slots: A [S*E, r_max, in] and B [S*E, out, r_max], the experts of a slot
    one after the other, or one of each for every slice of the output; ``table`` has the slot of
    each row of hidden_states."""

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    table: SegmentTable

    def routed(self, expert: Tensor, token: Tensor, experts: int) -> SegmentTable:
        """The table of rows that were dealt out: of which expert, and of which row before that.
        Nothing waits for the device."""
        if torch.compiler.is_dynamo_compiling():
            # A table is made by the host, and no graph has one.
            return torch.compiler.disable(SlotFactors._routed)(self, expert, token, experts)
        return self._routed(expert, token, experts)

    def _routed(self, expert: Tensor, token: Tensor, experts: int) -> SegmentTable:
        seg = self.table
        slot = seg.slot_of_row[token]
        own = torch.where((slot >= 0) & (expert < experts), slot * experts + expert, -1)
        slots = len(seg.rank_of_slot) * experts
        ranks, scales = (
            t.repeat_interleave(experts, output_size=slots)
            for t in (seg.rank_of_slot, seg.scale_of_slot)
        )
        return SegmentTable.from_token_mapping(
            own, slots, seg.max_rank, rank_of_slot=ranks, scale_of_slot=scales
        )

    def onto(self, y: Tensor, rows: Tensor, table: SegmentTable) -> Tensor:
        """y and what the adapters make of ``rows``; in y's place where no gradient is wanted."""
        rows = rows.to(y.dtype)
        if ops.records_gradients():
            return y + segmented_lora(rows, self.a, self.b, table)
        return segmented_lora(rows, self.a, self.b, table, out=y)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted as experts, or None if it can."""
    names = expert_matrices(module)
    if not names:
        return "is no experts module that transformers' use_experts_implementation made"
    if not is_forward_of_class(module):
        return "computes in its own way: forward was set on the module object"
    for name in names:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3:
            return f"its {name} is no 3-D Parameter (parametrised or sharded)"
        if type(weight) not in ops.PLAIN or not weight.is_floating_point() or weight.itemsize < 2:
            return f"its {name} is a {type(weight).__name__} of {weight.dtype}"
    if is_offloaded(module):
        return "its weights are offloaded by accelerate"
    return None


def sizes(module: Any, name: str) -> tuple[int, int, int]:
    """E, in and out features of the Parameter ``name`` of experts."""
    shape = getattr(module, name).shape
    return shape if module.is_transposed else (shape[0], shape[2], shape[1])


def stored_factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views A [E, r, in] and B [E, out, r] of PEFT's lora_A [r*E, in], where an expert's rows are
    neighbours, and lora_B [out, r*E], where the experts of a column of B are."""
    r = lora_a.shape[0] // experts
    b = lora_b.reshape(lora_b.shape[0], r, experts).permute(2, 0, 1)
    return lora_a.reshape(experts, r, lora_a.shape[1]), b


def experts_forward(
    experts: Any,
    adapters: Mapping[str, Factors | SlotFactors],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What transformers' experts compute (``ExpertsInterface``), with ``adapters`` on the
    Parameters of these names: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H].

    Rows are sorted by expert once. Activations and routing weights are the module's own and the
    sum over k is that of transformers' ``grouped_mm``. An index from E on (another device's expert)
    adds nothing.
    """
    k = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    every = torch.arange(experts.num_experts, device=expert.device)
    offs = torch.searchsorted(expert, every, right=True).int()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    # Of a batch's tables; usually both Parameters have the same.
    tables: dict[int, SegmentTable] = {}

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        if not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(weight.dtype)
        own, kn = adapters.get(name), experts.is_transposed
        if isinstance(own, Factors):
            a, b, scale = own
            return expert_linear(rows, weight, a, b, offs, scale, bias, fan_in_fan_out=kn)
        y = expert_linear(rows, weight, None, None, offs, bias=bias, fan_in_fan_out=kn)
        if own is None:
            return y
        if id(own.table) not in tables:
            tables[id(own.table)] = own.routed(expert, order // k, len(every))
        return own.onto(y, rows, tables[id(own.table)])

    rows: Tensor = _Sorted.apply(hidden_states, order, place, k)
    if experts.has_gate:
        rows = experts._apply_gate(product(rows, "gate_up_proj"))
    else:
        rows = experts.act_fn(product(rows, "up_proj"))
    rows = product(rows, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = _Unsorted.apply(rows, order, place).view(*top_k_index.shape, -1)
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def warmup_inputs(experts: Any, rows: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """For :func:`lora_kernels.warmup`: hidden_states of zeros, and a router that deals them out to
    as many experts a row as the model's does, in turns."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    weight, (count, in_features, _) = getattr(experts, first), sizes(experts, first)
    x = weight.new_zeros(rows, in_features, dtype=dtype)
    k = getattr(getattr(experts, "config", None), "num_experts_per_tok", None) or 1
    index = torch.arange(rows * k, device=x.device).view(rows, k) % count
    return x, index, x.new_ones(rows, k)


class _Sorted(torch.autograd.Function):
    """Row ``order[i] // k`` of x for every i; the gradient is a sum over k instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        rows = grad.index_select(0, place).view(-1, ctx.k, grad.shape[1])
        return rows.sum(1), None, None, None


class _Unsorted(torch.autograd.Function):
    """The rows in the order that they had."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


class ExpertAdapter(nn.Module):
    """A and B of one 3-D Parameter, as PEFT stores them: ``lora_A`` [r*E, in], ``lora_B``
    [out, r*E]; ``scaling`` is the factor of their product."""

    def __init__(
        self,
        weight: Tensor,
        shape: tuple[int, int, int],
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        check_lora_arguments(r, lora_alpha, 0.0, init_lora_weights)
        super().__init__()
        self.experts, self.in_features, self.out_features = shape
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.init_lora_weights = init_lora_weights
        self.scaling = default_scaling(lora_alpha, r, use_rslora)
        dtype = weight.dtype
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        columns = r * self.experts
        a, b = (columns, self.in_features), (self.out_features, columns)
        self.lora_A = nn.Parameter(torch.empty(a, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(b, device=weight.device, dtype=dtype))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A and B anew, as ``init_lora_weights`` says."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def factors(self) -> Factors:
        return Factors(*stored_factors(self.lora_A, self.lora_B, self.experts), self.scaling)

    @torch.no_grad()
    def added_to(self, weight: Tensor, is_transposed: bool) -> Tensor:
        """``weight + scaling * B_e A_e``, one expert after the other, in float32 or wider and
        rounded once."""
        a, b, _ = self.factors()
        merged = torch.empty_like(weight)
        acc = torch.promote_types(weight.dtype, torch.float32)
        for e in range(self.experts):
            delta = (b[e].to(acc) @ a[e].to(acc)).mul_(self.scaling)
            merged[e] = weight[e].to(acc) + (delta.t() if is_transposed else delta)
        return merged

    def extra_repr(self) -> str:
        shape = f"experts={self.experts}, in={self.in_features}, out={self.out_features}"
        return f"{shape}, r={self.r}, scaling={self.scaling:g}"


class FusedLoRAExperts(nn.Module):
    """Experts of transformers with adapters on their 3-D Parameters, computed in one grouped
    operator a Parameter; the delta of a weight never exists.

    Made in place by :meth:`adapt`: the module keeps its Parameters, attributes and hooks and gets a
    subclass of its own class, with ``lora`` [name of the Parameter] beside the weights. While
    merged, the Parameters are new ones; the pristine ones are kept aside and come back, the same
    objects, on :meth:`unmerge`. What ``state_dict``, ``load_state_dict``, ``.to`` and ``train()``
    do while merged is as for :class:`FusedLoRALinear`. Disabled or merged, the model's own code
    computes.
    """

    _kind: type[nn.Module]
    lora: nn.ModuleDict
    merged: bool
    _base: dict[str, tuple[nn.Parameter, nn.Parameter]]
    # By lora_kernels.disable_adapter.
    _disabled = False
    _was_merged = False

    @staticmethod
    def adapt(module: nn.Module, arguments: Mapping[str, Mapping[str, Any]]) -> FusedLoRAExperts:
        """Give ``module`` an adapter on each Parameter of ``arguments``, which has those of
        :class:`ExpertAdapter`; its own Parameters are frozen.

        Raises:
            TypeError: ``module`` is not what this serves; the message says why.
            ValueError: a wrong rank or alpha.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"the module {reason}")
        held = module._parameters
        lora = nn.ModuleDict(
            {
                name: ExpertAdapter(cast(Tensor, held[name]), sizes(module, name), **own)
                for name, own in arguments.items()
            }
        )
        module.requires_grad_(False)
        become(module, FusedLoRAExperts)
        self = cast(FusedLoRAExperts, module)
        self.merged, self._base = False, {}
        self.lora = lora.train(module.training)
        self.register_load_state_dict_post_hook(_merge_again)
        return self

    def restore(self) -> nn.Module:
        """Give the module the class back that it had, with the Parameters that it has now."""
        for name in ("merged", "_base", "_disabled", "_was_merged"):
            self.__dict__.pop(name, None)
        for handle, hook in list(self._load_state_dict_post_hooks.items()):
            if hook is _merge_again:
                del self._load_state_dict_post_hooks[handle]
        self._modules.pop("lora", None)
        return put_back(self)

    @property
    def is_exported(self) -> bool:
        """Whether ``merge(keep_base=False)`` removed the adapters."""
        return self.merged and not self._base

    def adapters(self) -> dict[str, ExpertAdapter]:
        return {name: cast(ExpertAdapter, adapter) for name, adapter in self.lora.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the class's own: hidden_states [T, H], top_k_index and top_k_weights [T, k]."""
        plain: Callable[..., Tensor] = super().forward
        if self._disabled or self.merged:
            with self._with_pristine() if self._disabled else _nothing():
                return plain(*args, **kwargs)
        factors = {name: adapter.factors() for name, adapter in self.adapters().items()}
        return experts_forward(self, factors, *args, **kwargs)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`; merged or disabled they have nothing to compile."""
        x, *routing = warmup_inputs(self, rows, dtype)
        if self.merged or self._disabled:
            return x, Tensor.detach
        factors = {name: adapter.factors() for name, adapter in self.adapters().items()}
        return x, lambda x: experts_forward(self, factors, x, *routing)

    @contextmanager
    def _with_pristine(self) -> Iterator[None]:
        """The pristine Parameters in place of the merged ones."""
        for name, (base, _) in self._base.items():
            self._parameters[name] = base
        try:
            yield
        finally:
            for name, (_, merged) in self._base.items():
                self._parameters[name] = merged

    def set_lora(
        self, name: str, lora_a: Tensor, lora_b: Tensor, *, lora_alpha: float, use_rslora: bool
    ) -> None:
        """Copy another adapter of the same rank onto the Parameter ``name``, ``scaling`` included;
        merged experts merge it. ValueError for other shapes."""
        own = self.adapters()[name]
        if lora_a.shape != own.lora_A.shape or lora_b.shape != own.lora_B.shape:
            raise ValueError(
                f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit "
                f"{list(own.lora_A.shape)} and {list(own.lora_B.shape)} of {name}"
            )
        with self._unmerged(), torch.no_grad():
            own.lora_A.copy_(lora_a)
            own.lora_B.copy_(lora_b)
            own.lora_alpha, own.use_rslora = lora_alpha, use_rslora
            own.scaling = default_scaling(lora_alpha, own.r, use_rslora)

    def merge_obstacle(self) -> str | None:
        """As :meth:`FusedLoRALinear.merge_obstacle`."""
        return write_obstacle(self, self.lora) or next(
            (o for a in self.lora.values() if (o := write_obstacle(a, ("lora_A", "lora_B")))), None
        )

    def merge(self, keep_base: bool = True) -> None:
        """As :meth:`FusedLoRALinear.merge`, for every adapted Parameter."""
        if not self.merged:
            obstacle = self.merge_obstacle()
            if obstacle is not None:
                raise RuntimeError(f"cannot merge the adapters of these experts: {obstacle}")
            for name, adapter in self.adapters().items():
                base = cast(nn.Parameter, self._parameters[name])
                values = adapter.added_to(base, cast(bool, self.is_transposed))
                self._base[name] = base, nn.Parameter(values, requires_grad=False)
                self._parameters[name] = self._base[name][1]
            self.merged = True
        if not keep_base:
            self._base = {}
            self.lora = nn.ModuleDict()

    def unmerge(self) -> None:
        """As :meth:`FusedLoRALinear.unmerge`."""
        if not self.merged:
            return
        if not self._base:
            raise RuntimeError(
                "these experts were merged with keep_base=False: their pristine weights are gone"
            )
        for name, (base, _) in self._base.items():
            self._parameters[name] = base
        self.merged, self._base = False, {}

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Unmerged inside, merged again behind it if they were."""
        merged = bool(self._base)
        if merged:
            self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    def train(self, mode: bool = True) -> FusedLoRAExperts:
        if mode and self._base:
            self.unmerge()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAExperts:
        with self._unmerged():
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Merged again by the hook, when A and B of the children are loaded too.
        if self._base:
            self.unmerge()
            self._was_merged = True
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._with_pristine():
            super()._save_to_state_dict(*args, **kwargs)


def _merge_again(module: FusedLoRAExperts, _: Any) -> None:
    if module._was_merged:
        module._was_merged = False
        module.merge()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


_classes: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def become(module: nn.Module, family: type[nn.Module]) -> None:
    """Give ``module`` the subclass of ``family`` and its own class, whose ``_kind`` that is."""
    _set_class(module, _class_of(family, type(module)))


def put_back(module: Any) -> nn.Module:
    """Give the module the class back that it had before :func:`become`."""
    _set_class(module, module._kind)
    return cast(nn.Module, module)


def _class_of(family: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    if (family, kind) not in _classes:
        name = family.__name__.removesuffix("Experts") + kind.__name__
        own = {"_kind": kind, "__reduce__": lambda self: (_blank, (family, kind), self.__dict__)}
        _classes[family, kind] = type(name, (family, kind), own)
    return _classes[family, kind]


def _blank(family: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    made = _class_of(family, kind)
    return made.__new__(made)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    dispatched = is_dispatched(module)
    module.__class__ = kind
    if dispatched:
        # accelerate's hook calls the forward that it found.
        vars(module)["_old_forward"] = kind.forward.__get__(module)
