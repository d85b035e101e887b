"""update through csrc/{cpu/update.cpp, cuda/update.cu}."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.update.operands import Operands


class Update:
    """An update whose tensors were checked once: call it with a row (an int, or an int64 tensor [1] on the device)."""

    def __init__(self, operands: Operands) -> None:
        module = native.extension()
        assert not isinstance(module, str)
        o, p = operands, module.UpdateParams()
        self.module, self.params, self.device = module, p, o.x.device
        self.empty = o.x.numel() == 0
        self.operands = o  # keeps the tensors alive
        p.batch, p.n = len(o.x), o.x[0].numel() if len(o.x) else 0
        p.table, p.key = o.table.data_ptr(), native.key(module, o.key)
        for name in ("x", "x_out", "anchor", "anchor_out", "noise", "gain", "clip", "gradient", "mask", "known"):
            setattr(p, name, native.address(getattr(o, name)))
        p.known_noise, p.x0_out = native.address(o.known_noise), native.address(o.x0_out)
        p.nonfinite = native.address(o.nonfinite)
        for slot in range(len(o.slots)):
            p.set_slot(slot, native.address(o.slots[slot]))
            p.set_slot_out(slot, native.address(o.slots_out[slot]))
        p.model_input = native.view(module, o.model_input)
        self.set_outputs(o.outputs, o.variance)

    def set_outputs(self, outputs: tuple[Tensor, ...], variance: Tensor | None = None) -> None:
        """Name the network's outputs, where they are not at the addresses of the last call."""
        self.operands.outputs, self.operands.variance = outputs, variance
        self.params.n_outputs = len(outputs)
        for i, output in enumerate(outputs):
            self.params.set_output(i, native.view(self.module, output))
        self.params.variance = native.view(self.module, variance)

    def set_noise(self, noise: Tensor | None, known_noise: Tensor | None = None) -> None:
        """Name the noise to use in place of the stream's."""
        self.operands.noise, self.operands.known_noise = noise, known_noise
        self.params.noise, self.params.known_noise = native.address(noise), native.address(known_noise)

    def __call__(self, row: int | Tensor) -> None:
        if self.empty:
            return
        if isinstance(row, Tensor):
            self.params.step = row.data_ptr()
        else:
            self.params.step, self.params.row = 0, row
        native.launch(self.module, "update", self.params, self.device)
