"""update through csrc/{cpu/update.cpp, cuda/update.cu}."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import SLOTS

# The operands that cross as an address alone.
ADDRESSES = (
    "x", "x_out", "table", "anchor", "anchor_out", "noise", "gain", "clip", "gradient", "mask", "known", "known_noise",
    "x0_out", "nonfinite", "deviance",
)  # fmt: skip


class Update:
    """An update whose tensors were checked once: call it with a row (an int, or an int64 tensor [1] on the device)."""

    def __init__(self, operands: Operands) -> None:
        module = native.extension()
        assert not isinstance(module, str)
        o, p = operands, module.UpdateParams()
        self.module, self.params, self.device = module, p, o.x.device
        self.on_cpu = self.device.type == "cpu"
        self.operands = o  # keeps the tensors alive
        elements, batch = o.x.numel(), o.x.shape[0]
        self.empty = elements == 0
        p.batch, p.n = batch, elements // (batch or 1)
        p.key = native.key(module, o.key)
        for name in ADDRESSES:
            tensor = getattr(o, name)
            if tensor is not None:
                setattr(p, name, tensor.data_ptr())
        for slot in range(SLOTS):
            read, written = o.slots[slot], o.slots_out[slot]
            if read is not None:
                p.set_slot(slot, read.data_ptr())
            if written is not None:
                p.set_slot_out(slot, written.data_ptr())
        if o.model_input is not None:
            p.model_input = native.view(module, o.model_input)
        self.named: list[Any] = []  # where the outputs lie that the parameters name, the variance last
        self.has_variance = False
        self.set_outputs(o.outputs, o.variance)

    def set_state(self, x: Tensor, x_out: Tensor) -> None:
        """Name the state to read and the one to write, for a caller whose state moves between rows."""
        self.operands.x, self.operands.x_out = x, x_out
        self.params.x, self.params.x_out = x.data_ptr(), x_out.data_ptr()

    def set_outputs(self, outputs: tuple[Tensor, ...], variance: Tensor | None = None) -> None:
        """Name the network's outputs, where they are not at the addresses of the last call."""
        self.operands.outputs, self.operands.variance = outputs, variance
        if variance is None and len(outputs) == 1 and not self.has_variance and outputs[0].is_contiguous():
            self.named = []
            self.params.set_dense_output(outputs[0].data_ptr(), native.DTYPES[outputs[0].dtype])
            return
        tensors = outputs if variance is None else (*outputs, variance)
        places = [(t.data_ptr(), t.dtype, t.stride()) for t in tensors]
        if places == self.named:
            return
        self.named = places
        self.params.n_outputs = len(outputs)
        for i, output in enumerate(outputs):
            self.params.set_output(i, native.view(self.module, output))
        if variance is not None:
            self.params.variance = native.view(self.module, variance)
        elif self.has_variance:  # a row without a network call reads none
            self.params.variance = self.module.View(0, 0, 0, 1, 0, 1)
        self.has_variance = variance is not None

    def set_noise(self, noise: Tensor | None, known_noise: Tensor | None = None) -> None:
        """Name the noise to use in place of the stream's."""
        self.operands.noise, self.operands.known_noise = noise, known_noise
        self.params.noise, self.params.known_noise = native.address(noise), native.address(known_noise)

    def set_results(self, x0_out: Tensor | None, anchor_out: Tensor | None) -> None:
        """Name where x̂_0 and anchor' go, for a caller who wants new tensors of them."""
        self.operands.x0_out, self.operands.anchor_out = x0_out, anchor_out
        self.params.x0_out, self.params.anchor_out = native.address(x0_out), native.address(anchor_out)

    def __call__(self, row: int | Tensor) -> None:
        if self.empty:
            return
        if isinstance(row, Tensor):
            self.params.step = row.data_ptr()
        else:
            self.params.step, self.params.row = 0, row
        if self.on_cpu:
            self.module.update_cpu(self.params, torch.get_num_threads())
        else:
            native.launch(self.module, "update", self.params, self.device)
